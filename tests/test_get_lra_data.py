"""get_lra_data.sh with a local server that refuses requests and corrupts files."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT, wait_for

from data.layout import LAYOUTS, describe

SCRIPT = ROOT / "get_lra_data.sh"
LAYOUT = ROOT / "data" / "layout.py"
COMMANDS = "bash cat curl dirname gzip mkdir mktemp mv rm rmdir tar".split()
NAMES = [
    "cifar10", "imdb", "listops", "pathfinder32", "pathfinder32-intermediate",
    "pathfinder32-baseline", "aan",
]
# Examples of each part in the official layouts in miniature.
SIZES = {
    "cifar10": (5, 1), "imdb": (6, 6), "listops": (4, 2, 2), "pathfinder32": (4,), "aan": (3, 2, 2),
}
HARD = "lra_release/lra_release/pathfinder32/curv_contour_length_14"

pytestmark = pytest.mark.skipif(
    not (shutil.which("bash") and shutil.which("curl")), reason="needs bash and curl"
)


def cifar10_files() -> dict[str, bytes]:
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {f"cifar-10-batches-py/{name}": bytes(3074) for name in names}


def imdb_files() -> dict[str, bytes]:
    return {
        f"aclImdb/{split}/{label}/{i}_7.txt": b"A film.<br />Seen twice."
        for split in ("train", "test") for label in ("pos", "neg") for i in range(3)
    }


def lra_files() -> dict[str, bytes]:
    files = {}
    for split, rows in (("train", 4), ("val", 2), ("test", 2)):
        files[f"listops-1000/basic_{split}.tsv"] = b"Source\tTarget\n" + b"( 1 )\t1\n" * rows
    hard = "pathfinder32/curv_contour_length_14"
    for batch in range(2):
        rows = [f"imgs/{batch} sample_{i}.png {i} 1 2 3" for i in range(2)]
        files[f"{hard}/metadata/{batch}.npy"] = "\n".join(rows).encode()  # no newline at the end
        files[f"{hard}/imgs/{batch}/sample_0.png"] = b"\x89PNG\r\n\x1a\n"
        files[f"{hard}/imgs/{batch}/sample_1.png"] = b""  # the release has such files
    for split, rows in (("train", 3), ("eval", 2), ("test", 2)):
        row = b'1.0\tP1\tP2\tA "text\tanother'
        files[f"tsv_data/new_aan_pairs.{split}.tsv"] = b"\n".join([row] * rows)
    return {f"lra_release/lra_release/{name}": content for name, content in files.items()}


def tar_gz(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read_files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*") if path.is_file()
    }


CIFAR10, IMDB = tar_gz(cifar10_files()), tar_gz(imdb_files())


@dataclass
class Server:
    """Serves the archives; `refused` names those that it answers with status 403."""

    address: str = ""
    archives: dict[str, bytes] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server(archives={"/cifar10": CIFAR10, "/imdb": IMDB})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            if self.path in state.refused:
                self.send_error(403)
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(state.archives[self.path])

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        state.address = f"http://127.0.0.1:{listener.server_port}"
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        yield state
        listener.shutdown()
        thread.join()


@dataclass
class Shell:
    """Runs the script in a folder of its own, with nothing on PATH but the commands it needs."""

    home: Path
    environment: dict[str, str]

    @property
    def data(self) -> Path:
        return self.home / "datasets"

    def stub(self, name: str, script: str) -> None:
        """Put a program called `name` on PATH instead of the real one."""
        path = self.home / "bin" / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [str(SCRIPT), *arguments], cwd=self.home, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)


@pytest.fixture
def shell(tmp_path: Path, server: Server) -> Shell:
    """Return the script with small published sizes, and a generator that records its arguments."""
    (tmp_path / "bin").mkdir()
    shell = Shell(tmp_path, {
        "PATH": str(tmp_path / "bin"), "HOME": str(tmp_path),
        "CIFAR10_URL": f"{server.address}/cifar10", "CIFAR10_MD5": hashlib.md5(CIFAR10).hexdigest(),
        "IMDB_URL": f"{server.address}/imdb", "IMDB_MD5": hashlib.md5(IMDB).hexdigest(),
    })
    for name in COMMANDS:
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    (tmp_path / "layout.py").write_text(
        f"import sys\nsys.path.insert(0, {str(LAYOUT.parent)!r})\nimport layout\n"
        f"for name, sizes in {SIZES}.items():\n"
        "    layout.LAYOUTS[name] = layout.LAYOUTS[name]._replace(expected=sizes)\n"
        "sys.exit(not layout.print_table(*sys.argv[1:]))\n"
    )
    shell.stub("python", f"""
        case $1 in
            *generate_lra.py) echo "$@" >> "$HOME/generated" ;;
            *layout.py) shift; exec {sys.executable} -S "$HOME/layout.py" "$@" ;;
            *) exec {sys.executable} "$@" ;;
        esac""")
    return shell


def row(output: str, name: str) -> list[str]:
    """Return the state and the source of a data set in the printed table."""
    return next(line.split()[1:3] for line in output.splitlines() if line.startswith(name + " "))


def test_a_download_is_unpacked_and_a_second_run_makes_no_request(shell, server):
    for said in ("unpacking to elsewhere", "left alone"):
        result = shell("cifar10", "imdb", "--dir", "elsewhere")
        assert (result.returncode, result.stderr) == (0, "")
        assert said in result.stdout
        assert row(result.stdout, "cifar10") == ["complete", "downloaded"]
        assert read_files(shell.home / "elsewhere") == cifar10_files() | imdb_files()
    assert server.asked == ["/cifar10", "/imdb"]


def test_an_archive_of_the_user_is_checked_used_and_kept(shell, server):
    write_files(shell.data, {"cifar-10-python.tar.gz": CIFAR10[:-1]})
    damaged = shell("cifar10")
    assert damaged.returncode == 1 and "is damaged" in damaged.stderr
    write_files(shell.data, {"cifar-10-python.tar.gz": CIFAR10})
    assert shell("cifar10").returncode == 0 and server.asked == []
    assert read_files(shell.data) == cifar10_files() | {"cifar-10-python.tar.gz": CIFAR10}


def test_an_incomplete_folder_of_the_user_is_kept(shell):
    files = dict(list(imdb_files().items())[:5])
    write_files(shell.data, files)
    result = shell("imdb")
    assert result.returncode == 1 and "move it away and run again" in result.stderr
    assert read_files(shell.data) == files


def test_a_damaged_or_refused_download_says_what_to_do_and_leaves_nothing(shell, server):
    server.archives["/cifar10"] = CIFAR10[:-20] + bytes(20)
    server.refused.add("/imdb")
    result = shell("cifar10", "imdb")
    assert result.returncode == 1
    assert f"{server.address}/cifar10 is damaged" in result.stderr
    assert f"no file from {server.address}/imdb; put it at datasets/aclImdb" in result.stderr
    assert list(shell.data.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_unpacking_leaves_nothing_and_is_repeated(number, shell):
    shell.stub("tar", f'{shutil.which("tar")} "$@"; echo > "$HOME/unpacked"; exec sleep 60')
    process = shell.start("cifar10")
    wait_for(process, (shell.home / "unpacked").exists)
    os.killpg(process.pid, number)
    process.communicate(timeout=10)  # well before the 60 s of tar
    assert process.returncode != 0 and list(shell.data.iterdir()) == []
    shell.stub("tar", f'exec {shutil.which("tar")} "$@"')
    assert shell("cifar10").returncode == 0


@pytest.mark.parametrize("missing", ["python", "curl"])
def test_a_missing_program_is_named(missing, shell):
    (shell.home / "bin" / missing).unlink()
    result = shell("imdb")
    assert result.returncode == 1
    assert result.stderr.startswith(f"get_lra_data.sh: needs {missing}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [("cifar",), ("--nonsense",), ("imdb", "--dir"), ("--dir", "--check")]
)
def test_wrong_usage(arguments, shell):
    result = shell(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert not shell.data.exists()


def test_without_arguments_it_fetches_generates_and_explains(shell, server):
    server.refused.add("/cifar10")  # the others are fetched after one failure
    result = shell()
    assert server.asked == ["/cifar10", "/imdb"]
    assert read_files(shell.data) == imdb_files()
    assert (shell.home / "generated").read_text().splitlines() == [
        f"{SCRIPT.parent}/generate_lra.py {task} --out datasets --seed 0"
        for task in ("listops", "pathfinder32")
    ]
    assert "may not be redistributed" in result.stderr
    assert "datasets/lra_release/tsv_data/new_aan_pairs.{train,eval,test}.tsv" in result.stderr
    assert result.returncode == 1  # the stub generates nothing
    assert row(result.stdout, "imdb") == ["complete", "downloaded"]
    assert [line.split()[0] for line in result.stdout.splitlines()[-7:]] == NAMES


def test_check_finds_official_and_generated_files(shell, server):
    empty = shell("--check")
    assert empty.returncode == 1 and not shell.data.exists()
    assert [row(empty.stdout, name) for name in NAMES] == [["absent", "-"]] * 7

    write_files(shell.data, cifar10_files() | imdb_files() | lra_files())
    folder = "lra_release/pathfinder32/curv_contour_length_9"
    shutil.copytree(shell.data / HARD, shell.data / folder)
    record = b'{"split": "intermediate", "counts": {"images": 4}}'
    write_files(shell.data, {f"{folder}/GENERATED.json": record})
    result = shell("--check")
    assert result.returncode == 0, result.stdout
    complete = [name for name in NAMES if row(result.stdout, name)[0] == "complete"]
    assert complete == [name for name in NAMES if name != "pathfinder32-baseline"]
    assert row(result.stdout, "pathfinder32-intermediate") == ["complete", "generated"]
    assert "4 images of the intermediate split" in result.stdout
    assert server.asked == []


@pytest.mark.parametrize(("name", "damage"), [
    ("cifar10", {"cifar-10-batches-py/test_batch": b"\x80"}),
    ("imdb", {"aclImdb/test/neg/0_7.txt": None}),
    ("listops", {"lra_release/lra_release/listops-1000/basic_val.tsv": b"Source\tTarget\n"}),
    ("listops", {"lra_release/lra_release/listops-1000/basic_val.tsv": None}),
    ("pathfinder32", {f"{HARD}/imgs/0/sample_0.png": None}),
    ("pathfinder32", {f"{HARD}/metadata/1.npy": None}),
    ("aan", {"lra_release/lra_release/tsv_data/new_aan_pairs.eval.tsv": b""}),
])
def test_a_damaged_data_set_is_incomplete(name, damage, tmp_path, monkeypatch):
    monkeypatch.setitem(LAYOUTS, name, LAYOUTS[name]._replace(expected=SIZES[name]))
    files = cifar10_files() | imdb_files() | lra_files()
    write_files(tmp_path, files)
    assert describe(str(tmp_path), name)[0] == "complete"
    for path, content in damage.items():
        (tmp_path / path).unlink()
        if content is not None:
            (tmp_path / path).write_bytes(content)
    assert describe(str(tmp_path), name)[0] == "incomplete"
