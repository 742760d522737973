"""The layout of each data set: its folders and files, and the number of examples in them.

`get_lra_data.sh` runs `layout.py ROOT NAME...` with any Python 3, for the standard library alone.
It prints a row per data set, and its exit status is 1 unless all are complete.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

RELEASE = "lra_release"  # the official archive unpacks to lra_release/lra_release
CONTOUR_LENGTHS = {"baseline": 6, "intermediate": 9, "hard": 14}  # paddles, by Pathfinder split
BATCH_IMAGES = 10_000  # of a CIFAR-10 file


def count_images(path: Path) -> int:
    """Count the images of a CIFAR-10 file by its size, which exceeds that of the pixels."""
    return min(path.stat().st_size // 3072, BATCH_IMAGES) if path.is_file() else 0


def count_texts(folder: Path) -> int:
    """Count the text files of a folder."""
    return len(names_in(folder, ".txt"))


def count_rows(path: Path) -> int:
    """Count the lines of a file, with or without a line break at its end."""
    count, last = 0, b"\n"
    if path.is_file():
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                count, last = count + block.count(b"\n"), block
    return count + (not last.endswith(b"\n"))


def count_pathfinder(metadata: Path) -> int:
    """Count the rows of Pathfinder's metadata, or its images if they are fewer."""
    images = metadata.parent / "imgs"
    rows = sum(count_rows(metadata / name) for name in names_in(metadata, ".npy"))
    return min(rows, sum(len(names_in(images / batch, ".png")) for batch in names_in(images)))


def names_in(folder: Path, suffix: str = "") -> list[str]:
    """List the names in a folder; none if there is no such folder."""
    names = os.listdir(folder) if folder.is_dir() else []
    return [name for name in names if name.endswith(suffix)]


class Layout(NamedTuple):
    """The files of one data set."""

    paths: tuple[str, ...]  # of the folder below the data root; generated files go to the first
    parts: dict[str, tuple[str, ...]]  # the files of each part, or the folders that hold them
    suffix: str = ""  # of the files in those folders
    expected: tuple[int, ...] = ()  # published number of examples of each part; empty: unknown
    count: Callable[[Path], int] = count_texts  # examples in one of the files or folders

    def folders(self, root: str | Path) -> Iterator[Path]:
        """Yield the folders to look into. The root itself may lie inside the usual path."""
        for path in self.paths:
            names = Path(path).parts
            yield Path(root, path)
            if names[0] == RELEASE:
                yield Path(root, RELEASE, path)
            for depth in range(1, len(names) + 1):
                yield Path(root, *names[depth:])

    def is_present(self, folder: Path) -> bool:
        """Whether a folder holds any of the files. An empty folder does not."""
        paths = [folder / name for names in self.parts.values() for name in names]
        return any(path.is_file() or names_in(path) for path in paths)

    def find(self, root: str | Path) -> Path:
        """Return the first complete folder, else the first with any file, else the usual one."""
        present = [folder for folder in self.folders(root) if self.is_present(folder)]
        # Counting takes a while, so it is done only where there is a choice.
        complete = (f for f in present if self.is_complete(f)) if len(present) > 1 else iter(())
        return next(complete, (present or [Path(root, self.paths[0])])[0])

    def counts(self, folder: Path) -> list[int]:
        """Count the examples of each part."""
        return [sum(self.count(folder / n) for n in names) for names in self.parts.values()]

    def expected_counts(self, folder: Path) -> list[int]:
        """Return the examples that each part should have: by the data's own record, if any."""
        recorded = (generation_record(folder) or {}).get("counts", {})
        return list(recorded.values() or self.expected)[: len(self.parts)]

    def is_complete(self, folder: Path, counts: list[int] | None = None) -> bool:
        """Whether each part has as many examples as it should; `counts` if they are known."""
        counts = self.counts(folder) if counts is None else counts
        pairs = zip(counts, self.expected_counts(folder), strict=False)
        return all(count >= expected for count, expected in pairs)

    def source(self, folder: Path) -> str:
        """Return `downloaded`, `generated`, the record's name of a substitute, or `unknown`."""
        record = generation_record(folder)
        if record is None:
            return "downloaded" if self.expected else "unknown"
        return str(record.get("stand_in", "generated"))


def pathfinder_layout(*folders: str) -> Layout:
    """Return the layout of a Pathfinder split; each split has 200,000 images."""
    paths = tuple(f"{RELEASE}/pathfinder32/{folder}" for folder in folders)
    return Layout(paths, {"all": ("metadata",)}, ".npy", (200_000,), count_pathfinder)


LAYOUTS = {
    "cifar10": Layout(
        ("cifar-10-batches-py",),
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        expected=(50_000, 10_000), count=count_images,
    ),
    "imdb": Layout(
        ("aclImdb",),
        {"train": ("train/neg", "train/pos"), "test": ("test/neg", "test/pos")},
        ".txt", (25_000, 25_000), count_texts,
    ),
    "listops": Layout(
        (f"{RELEASE}/listops-1000",),
        {part: (f"basic_{part}.tsv",) for part in ("train", "val", "test")},
        expected=(96_000, 2_000, 2_000),
        count=lambda path: max(count_rows(path) - 1, 0),  # the first line is a header
    ),
    "pathfinder32": pathfinder_layout("curv_contour_length_14"),
    "pathfinder32-intermediate": pathfinder_layout("curv_contour_length_9"),
    "pathfinder32-baseline": pathfinder_layout("curv_baseline", "curv_contour_length_6"),
    "aan": Layout(
        (f"{RELEASE}/tsv_data",),
        {
            "train": ("new_aan_pairs.train.tsv",), "val": ("new_aan_pairs.eval.tsv",),
            "test": ("new_aan_pairs.test.tsv",),
        },
        expected=(147_086, 18_090, 17_437), count=count_rows,
    ),
}


def split_layout(split: str) -> Layout:
    """Return the layout of one of Pathfinder's splits."""
    return LAYOUTS["pathfinder32" if split == "hard" else f"pathfinder32-{split}"]


def generation_record(folder: Path) -> dict[str, Any] | None:
    """Read GENERATED.json of a folder; None if there is none, {} if it is damaged."""
    path = folder / "GENERATED.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}


def recorded_split(folder: Path) -> str:
    """Return the Pathfinder split by GENERATED.json, else by the metadata, else `unknown`.

    The sixth column of the metadata is the length of the contours in paddles.
    """
    split = (generation_record(folder) or {}).get("split")
    if split not in CONTOUR_LENGTHS:
        files = sorted(names_in(folder / "metadata", ".npy"))
        text = (folder / "metadata" / files[0]).read_bytes() if files else b""
        column = text.partition(b"\n")[0].split()[5:6]
        lengths = {str(length).encode(): name for name, length in CONTOUR_LENGTHS.items()}
        split = lengths.get(column[0], "unknown") if column else "unknown"
    return split


def describe(root: str, name: str) -> tuple[str, str, str]:
    """Return the state (absent, incomplete or complete), the source and the examples found."""
    layout = LAYOUTS[name]
    folder = layout.find(root)
    if not layout.is_present(folder):
        return "absent", "-", f"nothing at {folder}"
    counts = layout.counts(folder)
    state = "complete" if layout.is_complete(folder, counts) else "incomplete"
    found = " + ".join(f"{count:,}" for count in counts)
    if name.startswith("pathfinder32"):
        found += f" images of the {recorded_split(folder)} split"
    return state, layout.source(folder).partition(" ")[0], f"{found} in {folder}"


def print_table(root: str, *names: str) -> bool:
    """Print a row per data set. Return whether all are complete but those named `?NAME`."""
    row = "{:<26} {:<10} {:<10} {}".format
    print(row("data set", "state", "source", "examples"))
    complete = True
    for name in names:
        state, source, found = describe(root, name.lstrip("?"))
        print(row(name.lstrip("?"), state, source, found))
        complete &= state == "complete" or name.startswith("?")
    return complete


if __name__ == "__main__":
    sys.exit(not print_table(*sys.argv[1:]))
