"""Where each data set's official files lie, how many there should be, and what is there.

The readers take the places from here; `get_lra_data.sh` asks this file as a program, with any
Python 3, so it needs the standard library and what of `run/` needs no more:

    inspection.py table ROOT NAME...          a row each; status 1 unless all are usable
    inspection.py state ROOT NAME             `state source what is there`, in one line
    inspection.py archive FILE CHECKSUM       status 1 if it is damaged
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


def lra_release(name: str) -> tuple[str, str]:
    """The two depths at which the official archive unpacks."""
    return f"lra_release/{name}", f"lra_release/lra_release/{name}"


class Layout(NamedTuple):
    """The files of one data set, below the data root."""

    folders: tuple[str, ...]  # the first one that is there counts
    parts: dict[str, tuple[str, ...]]  # of each part its files, or the folders that hold them
    suffix: str = ""  # of the files in those folders
    variable: str = ""  # of the environment: expects other numbers than these, for tests
    expected: tuple[int, ...] = ()  # counts or sizes; what of is said beside them

    def folder(self, root: str | Path) -> Path:
        folders = [Path(root, folder) for folder in self.folders]
        return next((folder for folder in folders if folder.is_dir()), folders[0])


LAYOUTS = {
    "cifar10": Layout(
        ("cifar-10-batches-py",),
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        # Least bytes of a file: the pixels of 10,000 images. It holds a bit more.
        variable="CIFAR10_BATCH_BYTES", expected=(30_720_000,),
    ),
    "imdb": Layout(
        ("aclImdb",),
        {"train": ("train/neg", "train/pos"), "test": ("test/neg", "test/pos")},
        ".txt",
        variable="IMDB_FILES", expected=(12_500,),  # in each folder
    ),
    "listops": Layout(
        lra_release("listops-1000"),
        {part: (f"basic_{part}.tsv",) for part in ("train", "val", "test")},
        variable="LISTOPS_ROWS", expected=(96_000, 2_000, 2_000),  # without the header
    ),
    "pathfinder32": Layout(
        lra_release("pathfinder32/curv_contour_length_14"),
        {"all": ("metadata",)},
        ".npy",
        variable="PATHFINDER32_IMAGES", expected=(200_000,),
    ),
    "aan": Layout(
        lra_release("tsv_data"),
        {
            "train": ("new_aan_pairs.train.tsv",), "val": ("new_aan_pairs.eval.tsv",),
            "test": ("new_aan_pairs.test.tsv",),
        },
        variable="AAN_ROWS", expected=(147_086, 18_090, 17_437),
    ),
}
LISTOPS_HEADER = b"Source\tTarget"
AAN_COLUMNS = 5  # label, two ids, two texts


class Finding(NamedTuple):
    """What the files alone tell, each state beyond the one before.

    `absent`; `incomplete`; `complete`: their number and size are as expected; `usable`: they also
    begin as their reader wants them.
    """

    state: str
    source: str  # downloaded, generated, stand-in or -
    found: str


class Contents(NamedTuple):
    """What an inspection says of a folder."""

    complete: bool
    readable: bool  # as far as the first bytes tell
    found: str


def inspect(name: str, root: str | Path) -> Finding:
    """Look at the files of one data set.

    Raises:
        OSError: one of them cannot be read.
        ValueError: the environment expects something that is not a number.
    """
    layout = LAYOUTS[name]
    folder = layout.folder(root)
    if not folder.is_dir() or not any(folder.iterdir()):
        return Finding("absent", "-", f"nothing at {folder}")
    record = generation_record(folder)
    complete, readable, found = INSPECTIONS[name](folder, layout, record)
    state = "usable" if complete and readable else "complete" if complete else "incomplete"
    source = "downloaded" if record is None else "stand-in" if "stand_in" in record else "generated"
    return Finding(state, source, f"{found}, {readable_size(size_of_tree(folder))}")


def generation_record(folder: Path) -> dict[str, Any] | None:
    """GENERATED.json of a folder; None if its files were not generated, {} if it is damaged."""
    path = folder / "GENERATED.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(first_bytes(path, 1 << 20))
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def expected_numbers(layout: Layout) -> list[int]:
    words = os.environ.get(layout.variable, "").split()
    if not all(word.isdigit() for word in words) or len(words) not in (0, len(layout.expected)):
        raise ValueError(
            f"{layout.variable}={' '.join(words)} is not {len(layout.expected)} whole numbers; "
            "unset it"
        )
    return [int(word) for word in words] or list(layout.expected)


def inspect_cifar10(folder: Path, layout: Layout, _: Any) -> Contents:
    (least,) = expected_numbers(layout)
    paths = [folder / name for names in layout.parts.values() for name in names]
    whole = [path for path in paths if path.is_file() and path.stat().st_size >= least]
    pickles = all(first_bytes(path, 1) == b"\x80" for path in whole)
    return Contents(
        len(whole) == len(paths), pickles, f"{len(whole)} of {len(paths)} batch files"
    )


def inspect_imdb(folder: Path, layout: Layout, _: Any) -> Contents:
    (expected,) = expected_numbers(layout)
    sizes = [
        [review.stat().st_size for review in files_in(folder / name, layout.suffix)]
        for names in layout.parts.values() for name in names
    ]
    counts = [len(part) for part in sizes]
    empty = sum(part.count(0) for part in sizes)
    return Contents(
        counts == [expected] * len(counts), not empty, f"{plus(counts)} reviews ({empty} empty)"
    )


def inspect_rows(
    folder: Path, layout: Layout, record: dict[str, Any] | None, *, headers: int,
    begins_right: Callable[[bytes], bool],
) -> Contents:
    """Files of rows, each part with its number of them; of generated ones their record knows it."""
    expected: list[Any] = expected_numbers(layout)
    names = [name for names in layout.parts.values() for name in names]
    if record is not None:
        counts = record.get("counts")
        expected = list(counts.values()) if isinstance(counts, dict) else []
    paths = [folder / name for name in names]
    rows = [max(count_rows(path) - headers, 0) for path in paths]
    readable = all(begins_right(first_line(path)) for path in paths)
    return Contents(rows == expected, readable, f"{plus(rows)} rows")


def inspect_listops(folder: Path, layout: Layout, record: dict[str, Any] | None) -> Contents:
    return inspect_rows(
        folder, layout, record, headers=1, begins_right=lambda line: line == LISTOPS_HEADER
    )


def inspect_aan(folder: Path, layout: Layout, record: dict[str, Any] | None) -> Contents:
    return inspect_rows(
        folder, layout, record, headers=0,
        begins_right=lambda line: len(line.split(b"\t")) == AAN_COLUMNS,
    )


def inspect_pathfinder32(folder: Path, layout: Layout, record: dict[str, Any] | None) -> Contents:
    (least,) = expected_numbers(layout) if record is None else (1,)
    (metadata,) = layout.parts["all"]
    images = [png for batch in folders_in(folder / "imgs") for png in files_in(batch, ".png")]
    rows = sum(count_rows(Path(entry)) for entry in files_in(folder / metadata, layout.suffix))
    # A few of the released images are empty; the reader skips them.
    filled = [entry for entry in images if entry.stat().st_size]
    return Contents(
        bool(filled) and len(images) == rows >= least,
        bool(filled) and first_bytes(Path(filled[0]), 4) == b"\x89PNG",
        f"{len(images)} images ({len(images) - len(filled)} empty), {rows} rows of metadata",
    )


INSPECTIONS: dict[str, Callable[[Path, Layout, dict[str, Any] | None], Contents]] = {
    "cifar10": inspect_cifar10,
    "imdb": inspect_imdb,
    "listops": inspect_listops,
    "pathfinder32": inspect_pathfinder32,
    "aan": inspect_aan,
}


def entries_of(folder: str | Path) -> list[os.DirEntry]:
    """What a folder holds; nothing where there is no such folder."""
    return list(os.scandir(folder)) if os.path.isdir(folder) else []


def files_in(folder: str | Path, suffix: str = "") -> list[os.DirEntry]:
    return [e for e in entries_of(folder) if e.name.endswith(suffix) and e.is_file()]


def folders_in(folder: str | Path) -> list[os.DirEntry]:
    return [e for e in entries_of(folder) if e.is_dir()]


def size_of_tree(folder: str | Path) -> int:
    """Bytes of all files below."""
    return sum(entry.stat().st_size for entry in files_in(folder)) + sum(
        size_of_tree(entry.path) for entry in folders_in(folder)
    )


def readable_size(size: float) -> str:
    for unit in ("B", "K", "M"):
        if size < 1024:
            return f"{size:.0f}{unit}"
        size /= 1024
    return f"{size:.1f}G"


def plus(counts: list[int]) -> str:
    return " + ".join(map(str, counts))


def blocks(path: str | Path, opener: Callable[..., Any] = open) -> Iterator[bytes]:
    with opener(path, "rb") as file:
        yield from iter(lambda: file.read(1 << 20), b"")


def first_bytes(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def first_line(path: Path) -> bytes:
    """Without its end; b"" where there is no such file."""
    return first_bytes(path, 1 << 20).partition(b"\n")[0].rstrip(b"\r") if path.is_file() else b""


def count_rows(path: Path) -> int:
    """Lines of a file, the last one with or without its end; 0 where there is no such file."""
    count, last = 0, b"\n"
    for block in blocks(path) if path.is_file() else ():
        count, last = count + block.count(b"\n"), block
    return count + (not last.endswith(b"\n"))


def is_whole(archive: str, checksum: str) -> bool:
    """Whether an archive has this md5 or sha256; without one, whether it unzips to its end.

    Raises:
        ValueError: the checksum is of neither length.
    """
    if not os.path.isfile(archive):  # a pipe would make us wait for ever
        return False
    if not checksum:
        try:
            for _ in blocks(archive, gzip.open):
                pass
        except (EOFError, gzip.BadGzipFile, zlib.error):
            return False
        return True
    algorithm = {32: hashlib.md5, 64: hashlib.sha256}.get(len(checksum))
    if algorithm is None:
        raise ValueError(
            f"checksum {checksum} is neither an md5 (32 digits) nor a sha256 (64 digits)"
        )
    digest = algorithm()
    for block in blocks(archive):
        digest.update(block)
    return digest.hexdigest() == checksum.lower()


def print_table(root: str, *names: str) -> bool:
    """A row per data set; whether all are usable."""
    row = "{:<13} {:<8} {:<9} {:<7} {:<11} {}".format
    print(row("data set", "present", "complete", "usable", "source", "found"))
    findings = {name: inspect(name, root) for name in names}
    for name, (state, source, found) in findings.items():
        reached = ("absent", "incomplete", "complete", "usable").index(state)
        answers = ["yes" if reached >= level else "no" for level in (1, 2, 3)]
        print(row(name, *answers, source, found))
    return all(finding.state == "usable" for finding in findings.values())


def print_state(root: str, name: str) -> bool:
    print(*inspect(name, root))
    return True


COMMANDS: dict[str, Callable[..., bool]] = {
    "table": print_table, "state": print_state, "archive": is_whole,
}


def main() -> int:
    """Exit status: 0 yes, 1 no, 2 with one line where nothing can be said."""
    sys.path[0] = str(Path(__file__).parents[1])  # a program finds what lies beside it, in data/
    from run.program import UserError, run_program

    def command() -> int:
        name, *arguments = sys.argv[1:]
        try:
            return 0 if COMMANDS[name](*arguments) else 1
        except ValueError as error:
            raise UserError(error) from None

    return run_program("get_lra_data.sh", command)


if __name__ == "__main__":
    sys.exit(main())
