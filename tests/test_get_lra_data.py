"""get_lra_data.sh against a server on this machine that cuts, refuses and corrupts."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "get_lra_data.sh"
# What the script calls; on another system some of them go by another name.
COMMANDS = (
    "bash cat dirname env gzip kill mkdir mv rm rmdir sleep tar".split()
)

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
PNG = b"\x89PNG\r\n\x1a\n"
# The official layouts in miniature.
SIZES = {
    "EXPECTED_CIFAR10": "5 1", "EXPECTED_IMDB": "6 6", "EXPECTED_LISTOPS": "4 2 2",
    "EXPECTED_PATHFINDER32": "4", "EXPECTED_AAN": "3 2 2",
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
both_tools = pytest.mark.parametrize(
    "tool",
    [
        pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"no {name}"))
        for name in ("curl", "wget")
    ],
)


def cifar10_files() -> dict[str, bytes]:
    # Random bytes, so that the archive is as long as its files and a cut lands inside it.
    noise = random.Random(0)
    return {f"cifar-10-batches-py/{name}": b"\x80\x02" + noise.randbytes(3072) for name in BATCHES}


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
        files[f"{hard}/imgs/{batch}/sample_0.png"] = PNG
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


CIFAR10, IMDB, LRA = tar_gz(cifar10_files()), tar_gz(imdb_files()), tar_gz(lra_files())


@dataclass
class Server:
    """Serves `archives`; each request meets the next of `faults`, then none."""

    address: str = ""
    archives: dict[str, bytes] = field(default_factory=dict)
    faults: list[tuple] = field(default_factory=list)  # (cut, bytes) (status, code) (corrupt,)
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # (path, Range header)

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append((request.path, wanted))
        fault, *details = self.faults.pop(0) if self.faults else ("none",)
        if fault == "status":
            request.send_error(details[0])
            return
        body = self.archives[request.path]
        if fault == "corrupt":
            body = body[:-20] + bytes(20)
        start = 0
        if wanted:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                request.send_error(416)
                return
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            request.send_response(200)
        request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        end = start + details[0] if fault == "cut" else None
        request.wfile.write(body[start:end])


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server(archives={"/cifar10": CIFAR10, "/imdb": IMDB, "/lra": LRA})

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

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
    """Runs the script in a folder of its own, with nothing on PATH but what it may use."""

    home: Path
    environment: dict[str, str]

    @property
    def data(self) -> Path:
        return self.home / "datasets"

    def offer(self, *names: str) -> None:
        for name in names:
            if found := shutil.which(name):
                (self.home / "bin" / name).symlink_to(found)

    def stub(self, name: str, script: str) -> Path:
        """Put an own program called `name` on PATH instead of the real one."""
        path = self.home / "bin" / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def stub_generator(self, script: str) -> None:
        """Put `script` instead of generate_lra.py; data/layout.py stays."""
        self.stub("python", f"""
            case $1 in *generate_lra.py) {script} ;; *) exec {sys.executable} "$@" ;; esac""")

    def start(self, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [str(SCRIPT), *arguments], cwd=self.home, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, output, errors)

    def leftovers(self) -> list[str]:
        """What lies in the data folder beside the data sets themselves."""
        names = {path.name for path in self.data.iterdir()}
        return sorted(names - {"cifar-10-batches-py", "aclImdb", "lra_release"})


@pytest.fixture
def shell(tmp_path: Path, server: Server) -> Shell:
    (tmp_path / "bin").mkdir()
    shell = Shell(tmp_path, {
        "PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), "GET_PAUSE": "0", "GET_TRIES": "3",
        "CIFAR10_URL": f"{server.address}/cifar10",
        "CIFAR10_CHECKSUM": hashlib.md5(CIFAR10).hexdigest(),
        "IMDB_URL": f"{server.address}/imdb",
        "IMDB_CHECKSUM": hashlib.sha256(IMDB).hexdigest(),
        "LRA_URL": f"{server.address}/lra",
        **SIZES,
    })
    shell.offer(*COMMANDS)
    # As many arguments as the contract of generate_lra.py has: SCRIPT TASK --out DIR --seed SEED.
    shell.stub_generator('echo "$@" >> "$HOME/generated"')
    return shell


def row(output: str, name: str) -> list[str]:
    """The state and the source of a data set in the table."""
    return next(line.split()[1:3] for line in output.splitlines() if line.startswith(name + " "))


def assert_downloaded(shell: Shell, result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stderr
    assert row(result.stdout, "cifar10") == ["complete", "downloaded"]
    assert read_files(shell.data) == cifar10_files()  # and so no temporary is left


@both_tools
def test_fresh_download(tool: str, shell: Shell, server: Server) -> None:
    shell.offer(tool)
    result = shell("cifar10", "imdb", "--dir", "elsewhere")
    assert result.returncode == 0, result.stderr
    assert read_files(shell.home / "elsewhere") == cifar10_files() | imdb_files()
    assert result.stderr == ""


@both_tools
def test_second_run_makes_no_request(tool: str, shell: Shell, server: Server) -> None:
    shell.offer(tool)
    shell("cifar10")
    server.asked.clear()
    result = shell("cifar10")
    assert_downloaded(shell, result)
    assert "left alone" in result.stdout and server.asked == []


@both_tools
def test_cut_download_is_resumed(tool: str, shell: Shell, server: Server) -> None:
    shell.offer(tool)
    server.faults = [("cut", 5000), ("status", 500), ("cut", 2000)]
    result = shell("cifar10")
    assert result.returncode == 1 and "run again to resume" in result.stderr
    assert os.listdir(shell.data) == ["cifar-10-python.tar.gz.part"]
    assert_downloaded(shell, shell("cifar10"))
    assert [wanted for _, wanted in server.asked] == [
        None, "bytes=5000-", "bytes=5000-", "bytes=7000-"
    ]


@both_tools
def test_finished_part_is_not_fetched_again(tool: str, shell: Shell, server: Server) -> None:
    """Killed between the download and the unpacking."""
    shell.offer(tool)
    write_files(shell.data, {"cifar-10-python.tar.gz.part": CIFAR10})
    assert_downloaded(shell, shell("cifar10"))
    assert server.asked == []


@both_tools
@pytest.mark.parametrize("part", [b"x" * 100, b"x" * 10**6], ids=["shorter", "longer"])
def test_foreign_part_is_replaced(tool: str, part: bytes, shell: Shell, server: Server) -> None:
    shell.offer(tool)
    write_files(shell.data, {"cifar-10-python.tar.gz.part": part})
    assert_downloaded(shell, shell("cifar10"))


def test_neither_tool(shell: Shell) -> None:
    result = shell("imdb")
    assert result.returncode == 1
    assert result.stderr == "get_lra_data.sh: needs curl or wget to download; install one of them\n"


def test_no_python(shell: Shell) -> None:
    (shell.home / "bin" / "python").unlink()
    for arguments in (("--check",), ("imdb",)):
        result = shell(*arguments)
        assert result.returncode == 1 and result.stdout == ""
        assert result.stderr == (
            "get_lra_data.sh: needs python; activate the environment or set PYTHON\n"
        )


def test_archive_put_by_hand(shell: Shell, server: Server) -> None:
    write_files(shell.data, {"cifar-10-python.tar.gz": CIFAR10[:-1]})
    damaged = shell("cifar10")
    assert damaged.returncode == 1 and "is damaged" in damaged.stderr
    write_files(shell.data, {"cifar-10-python.tar.gz": CIFAR10})
    assert shell("cifar10").returncode == 0
    # It is not ours to remove.
    assert shell.leftovers() == ["cifar-10-python.tar.gz"] and server.asked == []


def test_incomplete_folder_of_the_user_is_kept(shell: Shell, server: Server) -> None:
    files = dict(list(imdb_files().items())[:5])
    write_files(shell.data, files)
    result = shell("imdb")
    assert result.returncode == 1 and "move it away and run again" in result.stderr
    assert read_files(shell.data) == files and server.asked == []


def any_tool() -> str:
    return "curl" if shutil.which("curl") else "wget"


@pytest.fixture
def slow_unpacking(shell: Shell) -> Callable[[], subprocess.Popen]:
    """Start a download whose tar has written every file and does not come to its end."""
    shell.offer(any_tool())
    shell.stub("tar", f'{shutil.which("tar")} "$@"; echo > "$HOME/unpacked"; exec sleep 60')

    def start() -> subprocess.Popen:
        process = shell.start("cifar10")
        deadline = time.monotonic() + 20
        while not (shell.home / "unpacked").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        return process

    return start


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_unpacking_leaves_nothing(
    number: int, status: int, shell: Shell, slow_unpacking: Callable[[], subprocess.Popen]
) -> None:
    process = slow_unpacking()
    process.send_signal(number)
    process.communicate(timeout=10)  # well before the 60 s of tar: it was ended too
    assert process.returncode == status
    assert os.listdir(shell.data) == ["cifar-10-python.tar.gz.part"]


def test_killed_unpacking_is_repaired(
    shell: Shell, slow_unpacking: Callable[[], subprocess.Popen]
) -> None:
    process = slow_unpacking()
    rival = shell("cifar10")
    assert rival.returncode == 1 and f"process {process.pid} is already at work" in rival.stderr
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=10)
    assert not (shell.data / "cifar-10-batches-py").exists()
    (shell.home / "bin" / "tar").unlink()
    shell.offer("tar")
    assert_downloaded(shell, shell("cifar10"))


def test_archive_without_a_part_is_refused(shell: Shell, server: Server) -> None:
    shell.offer(any_tool())
    files = cifar10_files()
    del files["cifar-10-batches-py/data_batch_3"]
    server.archives["/cifar10"] = tar_gz(files)
    shell.environment["CIFAR10_CHECKSUM"] = ""
    result = shell("cifar10")
    assert result.returncode == 1 and "4 + 1 in" in result.stderr
    assert not (shell.data / "cifar-10-batches-py").exists()


def test_cut_release_is_resumed_not_generated(shell: Shell, server: Server) -> None:
    shell.offer(any_tool())
    server.faults = [("cut", 100)] * 3
    result = shell("lra_release")
    assert result.returncode == 1 and "run again to resume" in result.stderr
    assert not (shell.home / "generated").exists()
    result = shell("lra_release", "listops")
    assert result.returncode == 0, result.stderr
    assert read_files(shell.data) == lra_files()


def test_generated_once(shell: Shell) -> None:
    record = '{\\n "counts": {\\n "train": 1,\\n "val": 1,\\n "test": 1\\n}}'
    shell.stub_generator(f"""
        echo "$@" >> "$HOME/generated"; folder=$4/lra_release/listops-1000; mkdir -p $folder
        for split in train val test; do
            printf 'Source\\tTarget\\n( 1 )\\t1\\n' > $folder/basic_$split.tsv
        done
        printf '{record}' > $folder/GENERATED.json""")
    for _ in range(2):
        result = shell("listops")
        assert result.returncode == 0, result.stderr
        assert row(result.stdout, "listops") == ["complete", "generated"]
    assert len((shell.home / "generated").read_text().splitlines()) == 1


def test_aan_says_where_to_obtain_it(shell: Shell) -> None:
    result = shell("aan")
    assert result.returncode == 1
    assert "may not be redistributed" in result.stderr
    assert "datasets/lra_release/tsv_data/new_aan_pairs.{train,eval,test}.tsv" in result.stderr
    write_files(shell.data, {
        name: content for name, content in lra_files().items() if "tsv_data" in name
    })
    assert shell("aan").returncode == 0


HARD = "lra_release/lra_release/pathfinder32/curv_contour_length_14"

@pytest.mark.parametrize(
    "arguments", [("cifar",), ("--nonsense",), ("imdb", "--dir"), ("--dir", "--check")]
)
def test_wrong_usage(arguments: tuple[str, ...], shell: Shell) -> None:
    result = shell(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert not shell.data.exists()


def test_wrong_checksum_length(shell: Shell) -> None:
    shell.offer(any_tool())
    shell.environment["IMDB_CHECKSUM"] = "abc"
    result = shell("imdb")
    assert result.returncode == 2 and "neither an md5" in result.stderr


@both_tools
def test_a_damaged_download_is_fetched_again_once(tool: str, shell: Shell, server: Server) -> None:
    shell.offer(tool)
    server.faults = [("corrupt",)]
    assert_downloaded(shell, shell("cifar10"))
    server.faults, server.asked = [("corrupt",)] * 9, []
    result = shell("cifar10", "--dir", "other")
    assert result.returncode == 1 and len(server.asked) == 2
    assert f"{server.address}/cifar10 sent a damaged file twice" in result.stderr
    assert "CIFAR10_URL" in result.stderr and not list((shell.home / "other").iterdir())


@both_tools
def test_an_archive_without_a_checksum_must_unzip(tool: str, shell: Shell, server: Server) -> None:
    shell.offer(tool)
    shell.environment["CIFAR10_CHECKSUM"] = ""
    server.faults = [("corrupt",)]
    assert_downloaded(shell, shell("cifar10"))


@both_tools
@pytest.mark.parametrize("code", [403, 503])
def test_a_refusal_says_what_to_do(tool: str, code: int, shell: Shell, server: Server) -> None:
    shell.offer(tool)
    server.faults = [("status", code)] * 9
    result = shell("imdb")
    assert result.returncode == 1
    assert f"no file from {server.address}/imdb" in result.stderr
    assert "put it at datasets/aclImdb_v1.tar.gz or name a mirror in IMDB_URL" in result.stderr
    assert os.listdir(shell.data) == []


NAMES = [
    "cifar10", "imdb", "listops", "pathfinder32", "pathfinder32-intermediate",
    "pathfinder32-baseline", "aan",
]


def test_without_arguments_it_fetches_generates_and_explains(shell: Shell, server: Server) -> None:
    shell.offer(any_tool())
    server.faults = [("status", 403)]  # one failure does not keep the others from being fetched
    result = shell()
    assert [path for path, _ in server.asked] == ["/cifar10", "/imdb"]
    assert read_files(shell.data) == imdb_files()
    assert (shell.home / "generated").read_text().splitlines() == [
        f"{SCRIPT.parent}/generate_lra.py {task} --out datasets --seed 0"
        for task in ("listops", "pathfinder32")
    ]
    assert "may not be redistributed" in result.stderr
    assert result.returncode == 1  # the stub generates nothing
    assert row(result.stdout, "imdb") == ["complete", "downloaded"]
    assert [line.split()[0] for line in result.stdout.splitlines()[-7:]] == NAMES


def test_a_refused_release_is_generated_instead(shell: Shell, server: Server) -> None:
    shell.offer(any_tool())
    server.faults = [("status", 403)]
    result = shell("lra_release")
    assert "https://github.com/lucaslingle/e-lra" in result.stderr
    assert len((shell.home / "generated").read_text().splitlines()) == 2


def test_check_finds_official_and_generated_files(shell: Shell, server: Server) -> None:
    empty = shell("--check")
    assert empty.returncode == 1 and not shell.data.exists()
    assert [row(empty.stdout, name) for name in NAMES] == [["absent", "-"]] * 7

    outer = {name.replace("lra_release/", "", 1): data for name, data in lra_files().items()}
    for release in (lra_files(), outer):  # both depths
        shutil.rmtree(shell.data, ignore_errors=True)
        write_files(shell.data, cifar10_files() | imdb_files() | release)
        result = shell("--check")
        assert result.returncode == 0, result.stdout
        complete = [name for name in NAMES if row(result.stdout, name)[0] == "complete"]
        assert complete == ["cifar10", "imdb", "listops", "pathfinder32", "aan"]
    for folder, split in (("curv_baseline", "baseline"), ("curv_contour_length_9", "intermediate")):
        shutil.copytree(shell.data / "lra_release/pathfinder32/curv_contour_length_14",
                        shell.data / "lra_release/pathfinder32" / folder)
        (shell.data / "lra_release/pathfinder32" / folder / "GENERATED.json").write_text(
            f'{{"split": "{split}", "counts": {{"images": 4}}}}'
        )
    result = shell("--check")
    for split in ("baseline", "intermediate"):
        assert row(result.stdout, f"pathfinder32-{split}") == ["complete", "generated"]
        assert f"4 images of the {split} split" in result.stdout
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
def test_check_calls_a_damaged_data_set_incomplete(
    name: str, damage: dict[str, bytes | None], shell: Shell
) -> None:
    files = cifar10_files() | imdb_files() | lra_files() | damage
    write_files(shell.data, {path: data for path, data in files.items() if data is not None})
    result = shell("--check", name)
    assert result.returncode == 1 and row(result.stdout, name)[0] == "incomplete"


def test_the_layout_program_needs_no_package(tmp_path: Path) -> None:
    write_files(tmp_path, cifar10_files())
    program = SCRIPT.parent / "data" / "layout.py"
    answer = subprocess.run(
        [sys.executable, "-S", program, "state", tmp_path, "cifar10"],
        capture_output=True, text=True, env=SIZES,
    )
    assert answer.stdout.startswith("complete downloaded 5 + 1 in "), answer.stderr
