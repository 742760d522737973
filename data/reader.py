"""The base of all readers: finds the files of a data set, and reports their errors."""

from __future__ import annotations

import abc
import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.tasks import WordTokenizer
from lra_config import Config
from run.program import UserError, log_line, note, one_line, shown

Example = tuple[tuple[np.ndarray, ...], int]  # its documents, as the tokenizer encodes them; label


class DataError(UserError, ValueError):
    """A mistake in the data on disk, in one line: file, row, what to do."""

    met_by_all = False


@contextlib.contextmanager
def located(where: object, advice: str = "fetch the file again") -> Iterator[None]:
    """Raise DataError, with the file and the row, for any error that a damaged file causes."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{where}: {one_line(reason, 150)}; {advice}") from None


def rows(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (file and row number, row without its line break). Only LF and CR LF end a row."""
    with open(path, "rb") as file:
        for number, row in enumerate(file, start=1):
            yield f"{path} row {number}", row.rstrip(b"\r\n")


class Reader(abc.ABC):
    """A data set on disk, in the files that the layout of its task describes."""

    tokenizer: Any
    advice = "put it there"  # for a missing file

    def __init__(self, config: Config) -> None:
        self.config = config
        self.skipped = 0
        self.counts: dict[str, int] = {}  # examples of each part, once they are loaded
        self.layout = config.task.layout
        self.parts = tuple(self.layout.parts)
        self.folder = self.layout.find(config.data_dir)
        if config.task.tokenizer is not WordTokenizer:
            self.tokenizer = config.task.tokenizer()

    def prepare(self) -> None:
        """Make sure that the files are there.

        Raises:
            DataError: one of them is missing; it says how to obtain it.
        """
        for path in (self.folder / name for part in self.parts for name in self.layout.parts[part]):
            if not path.exists():
                raise DataError(f"{path}: missing; {self.advice}")
            if not self._files(path):
                raise DataError(f"{path}: holds no {self.layout.suffix} file; {self.advice}")

    def sources(self, part: str) -> list[Path]:
        """Return the files of a part; those of a folder in the order of their names."""
        names = self.layout.parts[part]
        return [path for name in names for path in self._files(self.folder / name)]

    def _files(self, path: Path) -> list[Path]:
        if not path.is_dir():
            return [path]
        # Not Path.iterdir: IMDb has 50,000 files.
        files = sorted(entry.path for entry in os.scandir(path) if entry.is_file())
        return [Path(name) for name in files if name.endswith(self.layout.suffix)]

    @abc.abstractmethod
    def examples(self, part: str) -> Iterator[Example]:
        """Yield the documents and the label of each example of a part. Raises DataError."""

    def generate(self, generator: Callable[..., Path], **options: Any) -> None:
        """Generate the files from seed 0 if none is there."""
        if self.layout.is_present(self.folder):
            return
        log_line(f"no files of {self.config.dataset} in {self.folder}: generating them")
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # an empty folder counts as absent
        with contextlib.suppress(FileExistsError):  # another process has generated them meanwhile
            generator(self.config.data_dir, seed=0, **options)
        self.folder = self.layout.find(self.config.data_dir)

    def download(self, name: str) -> None:
        """Let get_lra_data.sh fetch the data set `name` if `download` is set and it is absent."""
        if not self.config.download or self.layout.is_present(self.folder):
            return
        script = Path(__file__).parents[1] / "get_lra_data.sh"
        if subprocess.run(["bash", script, name, "--dir", self.config.data_dir]).returncode:
            raise DataError(f"{script.name} {name} failed for the reason above; {self.advice}")
        self.folder = self.layout.find(self.config.data_dir)

    def key(self) -> dict[str, Any]:
        """Return further values that the packed parts depend on, as JSON."""
        return {}

    def check_counts(self, counts: dict[str, int]) -> None:
        """Report in one line that a part has fewer examples than recorded or published."""
        self.counts = counts
        if missing := self.missing():
            note(f"{self.folder}: incomplete, it holds {missing}; training uses what is there")

    def missing(self) -> str:
        """Return `found of expected` for each part that lacks examples; empty if none does."""
        expected = self.layout.expected_counts(self.folder)
        return ", ".join(
            f"{found:,} of {count:,} {part} examples"
            for (part, found), count in zip(self.counts.items(), expected, strict=False)
            if found < count
        )

    def origin(self) -> str:
        """Return the source of the files, from their own record, and whether they are incomplete.

        Files that the paper's results may be compared with are `downloaded` and nothing else.
        """
        source = one_line(self.layout.source(self.folder), 100)
        return f"{source}, incomplete" if self.missing() else source

    def label(self, text: str, where: str) -> int:
        """Read a class number."""
        classes = self.config.task.num_classes
        if text not in map(str, range(classes)):
            raise DataError(
                f"{where}: label {shown(text)} is not one of 0..{classes - 1}; fetch the file again"
            )
        return int(text)
