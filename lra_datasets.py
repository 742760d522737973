"""Readers: one class per data set, from its files on disk to (documents, label).

A row of `lra_config.TASKS` names the class; docs/data.md shows a data set from a file of one's own.
"""

from __future__ import annotations

import contextlib
import os
import pkgutil
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from data.cifar_batch import read_batch
from data.inspection import AAN_COLUMNS, LAYOUTS, LISTOPS_HEADER, Layout, generation_record
from data.listops import generate_listops
from data.packing import (
    DataError,
    PackedSplit,
    Reader,
    cached_json,
    fingerprint,
    held_out_rows,
    load_splits,
)
from data.pathfinder import generate_pathfinder
from data.pathfinder_scenes import DIFFICULTIES
from data.source_files import (
    MAX_BATCH,
    MAX_IMAGE,
    MAX_TEXT,
    contents,
    grey_image,
    rows,
    told,
)
from data.tasks import VOCABULARY_WORDS, WordTokenizer
from lra_config import Config, ConfigError
from run.files import whole_folder
from run.program import log_line, one_line, shown

GREY = np.array([0.2989, 0.5870, 0.1140])  # weights of R, G and B
Example = tuple[tuple[np.ndarray, ...], int]


class FileReader:
    """What the readers share: official files, found at any of the usual depths of `data_dir`."""

    layout: Layout
    advice = "put it there"  # where a file is missing

    def __init__(self, config: Config) -> None:
        self.config = config
        self.skipped = 0
        self.parts = tuple(self.layout.parts)
        self.folder = self.layout.folder(config.data_dir)
        if config.task.tokenizer is not WordTokenizer:
            self.tokenizer = config.task.tokenizer()

    def places(self, part: str) -> list[Path]:
        """The files of a part, or the folders that hold them."""
        return [self.folder / name for name in self.layout.parts[part]]

    def prepare(self) -> None:
        """Make sure that the files are there.

        Raises:
            DataError: one of them is not; it says how to obtain it.
        """
        for path in (path for part in self.parts for path in self.places(part)):
            if not (path.is_file() or path.is_dir()):
                raise DataError(f"{path}: missing; {self.advice}")
            if not self._files(path):
                raise DataError(f"{path}: holds nothing to read; {self.advice}")

    def sources(self, part: str) -> list[Path]:
        """The files of a part; those of a folder in the order of their names."""
        return [path for place in self.places(part) for path in self._files(place)]

    def _files(self, place: Path) -> list[Path]:
        if not place.is_dir():
            return [place]
        # Not Path.iterdir: IMDb has 50,000 files.
        return [
            Path(path)
            for path in sorted(e.path for e in os.scandir(place) if e.is_file())
            if path.endswith(self.layout.suffix)
        ]

    def fetch(self, download: Callable[[Path], None]) -> None:
        """Fill the folder, whole or not at all, unless it is there.

        Raises:
            DataError: whatever the import or the network raises, the way out is the same.
        """
        try:
            with whole_folder(self.folder, "downloads it") as half_done:
                download(half_done)
        except FileExistsError:
            pass  # before, or by another process meanwhile
        except Exception as error:
            raise DataError(
                f"{self.folder}: could not be downloaded ({one_line(error, 150)}); {self.advice}"
            ) from None

    def key(self) -> dict[str, Any]:
        return {}

    def origin(self) -> str:
        record = generation_record(self.folder)
        if record is None:
            return "downloaded"
        # A stand-in says so, lest its results pass for those of the data it stands in for.
        return one_line(record.get("stand_in", "generated"), 100)

    def label(self, text: str, where: str) -> int:
        """A class number from its text."""
        classes = self.config.task.num_classes
        # Of thousands of digits no number is made.
        if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < classes):
            raise DataError(
                f"{where}: label {shown(text)} is not one of 0..{classes - 1}; fetch the file again"
            )
        return int(text)


class ListOps(FileReader):
    """`lra_release/listops-1000/basic_{train,val,test}.tsv`, columns Source and Target."""

    layout = LAYOUTS["listops"]
    advice = "restore it, or remove the whole folder to have it generated"

    def prepare(self) -> None:
        """Generate the files when none is there; some of them are a mistake."""
        paths = [path for part in self.parts for path in self.places(part)]
        missing = [path for path in paths if not path.exists()]
        if len(missing) == len(paths):
            log_line(f"no ListOps files in {self.folder}: generating them")
            with contextlib.suppress(FileExistsError):  # another process has done so meanwhile
                generate_listops(self.config.data_dir, seed=0)
            self.folder = self.layout.folder(self.config.data_dir)
        elif missing:
            raise DataError(
                f"{missing[0]}: missing while the other split files are there; restore it, or "
                "remove the whole folder to have them generated"
            )
        super().prepare()

    def examples(self, part: str) -> Iterator[Example]:
        path = self.sources(part)[0]
        limit = self.config.max_seq_len
        for where, line in rows(path):
            row = line.decode("utf-8", "backslashreplace").split("\t")
            if where.endswith(" row 1"):
                if line != LISTOPS_HEADER:
                    raise DataError(
                        f"{where}: expected the header Source<TAB>Target; fetch the file again"
                    )
                continue
            if len(row) != 2:
                raise DataError(
                    f"{where}: has {len(row)} columns, expected Source and Target; the file may "
                    "be cut short, fetch it again"
                )
            with told(where, "fetch the file again"):
                ids = self.tokenizer.encode(row[0])
            if len(ids) > limit:
                raise DataError(
                    f"{where}: has {len(ids)} tokens, max_seq_len={limit} allows {limit}; "
                    "raise max_seq_len"
                )
            yield (ids,), self.label(row[1], where)


class Imdb(FileReader):
    """`aclImdb/{train,test}/{pos,neg}/*.txt`: bytes (`imdb_lra`) or words."""

    layout = LAYOUTS["imdb"]
    advice = (
        "run ./get_lra_data.sh imdb, or pip install -r requirements-download.txt and set "
        "download: true"
    )

    def prepare(self) -> None:
        if self.config.download:
            self.fetch(download_imdb)
        super().prepare()
        if self.config.task.tokenizer is WordTokenizer:
            self.tokenizer = WordTokenizer(self._vocabulary())

    def key(self) -> dict[str, Any]:
        words = self.config.task.tokenizer is WordTokenizer
        return {"vocabulary": self.tokenizer.vocabulary} if words else {}

    def _vocabulary(self) -> list[str]:
        """Words of the training part alone: what is held out for validation has no say."""
        files, seed = self.sources("train"), self.config.seed
        kept, _ = held_out_rows(len(files), seed)
        return cached_json(
            self.config, f"imdb-words-{fingerprint(files, seed=seed)}.json",
            Annotated[list[str], Field(min_length=1, max_length=VOCABULARY_WORDS)],
            lambda: WordTokenizer.build_vocabulary(self._text(files[row]) for row in kept),
        )

    def examples(self, part: str) -> Iterator[Example]:
        words = self.config.task.tokenizer is WordTokenizer
        for path in self.sources(part):
            text = self._text(path) if words else self._bytes(path)
            document = self.tokenizer.encode(text)
            if not len(document):
                raise DataError(f"{path}: holds no text; fetch the data again")
            yield (document[: self.config.max_seq_len],), int(path.parent.name == "pos")

    @staticmethod
    def _bytes(path: Path) -> bytes:
        with told(path, "fetch the data again"):
            return contents(path, MAX_TEXT)

    @classmethod
    def _text(cls, path: Path) -> str:
        try:
            return cls._bytes(path).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: byte {error.start} is not UTF-8; fetch the data again, or use "
                "dataset: imdb_lra, which reads bytes"
            ) from None


class Cifar10(FileReader):
    """`cifar-10-batches-py`, the Python version: pickles of 10,000 images, here as grey levels."""

    layout = LAYOUTS["cifar10"]
    advice = (
        "run ./get_lra_data.sh cifar10, or pip install -r requirements-download.txt and set "
        "download: true"
    )

    def prepare(self) -> None:
        if self.config.download:
            self.fetch(download_cifar10)
        super().prepare()

    def examples(self, part: str) -> Iterator[Example]:
        for path in self.sources(part):
            with told(f"{path}: not a CIFAR-10 batch"):
                images, labels = read_batch(contents(path, MAX_BATCH))
            pixels = images.reshape(-1, 3, self.config.task.max_seq_len)  # (n, RGB, 1024)
            grey = np.rint(np.einsum("c,ncp->np", GREY, pixels)).astype(np.uint8)
            for row, (image, label) in enumerate(zip(grey, labels, strict=True), start=1):
                yield (image,), self.label(str(label), f"{path} row {row}")


class Pathfinder32(FileReader):
    """`pathfinder32/curv_contour_length_14/{imgs,metadata}`: grey images and rows about them."""

    layout = LAYOUTS["pathfinder32"]
    advice = "restore it, or remove the whole folder to have it generated"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.folder = self._split_folder()

    def _split_folder(self) -> Path:
        """The folder of the configured split, beside that of the hard one."""
        hard = self.layout.folder(self.config.data_dir)
        return hard.with_name(DIFFICULTIES[self.config.evaluated_split].folder)

    def key(self) -> dict[str, Any]:
        split = self.config.evaluated_split
        return {} if split == "hard" else {"pathfinder_split": split}

    def sources(self, part: str) -> list[Path]:
        return sorted(super().sources(part), key=lambda path: (len(path.name), path.name))

    def prepare(self) -> None:
        if not self.folder.is_dir():
            log_line(f"no Pathfinder images in {self.folder}: generating them")
            with contextlib.suppress(FileExistsError):  # another process has done so meanwhile
                generate_pathfinder(
                    self.config.data_dir, seed=0, split=self.config.evaluated_split
                )
            self.folder = self._split_folder()
        super().prepare()

    def examples(self, part: str) -> Iterator[Example]:
        side = int(self.config.task.max_seq_len**0.5)
        for where, line in (row for metadata in self.sources(part) for row in rows(metadata)):
            fields = line.split()
            if len(fields) < 4:
                raise DataError(
                    f"{where}: has {len(fields)} fields, expected folder, file, number, label; "
                    "fetch the file again"
                )
            label = self.label(fields[3].decode("ascii", "backslashreplace"), where)
            name = Path(os.fsdecode(fields[0]), os.fsdecode(fields[1]))
            with told(f"{self.folder / name} ({where})"):
                if name.is_absolute() or ".." in name.parts:
                    raise ValueError("lies outside the data set's folder")
                content = contents(self.folder / name, MAX_IMAGE)
                if not content:  # some of the released ones are empty
                    self.skipped += 1
                    continue
                pixels = grey_image(content, side)
            yield (pixels.reshape(-1),), label


class Aan(FileReader):
    """`tsv_data/new_aan_pairs.{train,eval,test}.tsv`: label, two ids, two texts, no header."""

    layout = LAYOUTS["aan"]
    advice = "its texts may not be redistributed, ./get_lra_data.sh aan says where to obtain them"

    def examples(self, part: str) -> Iterator[Example]:
        path, limit = self.sources(part)[0], self.config.document_len
        for where, line in rows(path):  # bytes: nothing is decoded, so nothing can be invalid
            columns = line.split(b"\t")
            if len(columns) != AAN_COLUMNS:
                raise DataError(
                    f"{where}: has {len(columns)} columns, expected label, two ids and two texts; "
                    "the file may be cut short, fetch it again"
                )
            if not all(columns[3:]):
                raise DataError(f"{where}: holds an empty text; remove the row")
            label = columns[0].decode("ascii", "backslashreplace").removesuffix(".0")
            documents = tuple(self.tokenizer.encode(text[:limit]) for text in columns[3:])
            yield documents, self.label(label, where)


def open_dataset(config: Config) -> Reader:
    """The reader of `config.dataset`, with its files in place.

    Raises:
        ConfigError: the images do not fit into `max_seq_len`.
        DataError: the files are not there, or only some of them, and cannot be generated.
    """
    pixels = config.task.max_seq_len
    if config.task.is_image and config.max_seq_len < pixels:
        raise ConfigError(
            f"max_seq_len={config.max_seq_len} is less than the {pixels} pixels of an image of "
            f"dataset={config.dataset}; leave it out"
        )
    named = config.task.reader
    reader = (pkgutil.resolve_name(named) if isinstance(named, str) else named)(config)
    reader.prepare()
    return reader


def training_stages(config: Config, splits: dict[str, PackedSplit]) -> dict[int, PackedSplit]:
    """The training examples by the step from which they are used.

    One stage, unless `pathfinder_split` is a curriculum.

    Args:
        splits: of the data set that `config` is evaluated on.
    """
    stages = {}
    for name, first in config.training_splits.items():
        if name == config.evaluated_split:
            stages[first] = splits["train"]
        else:
            easier = config.model_copy(update={"pathfinder_split": name})
            stages[first] = load_splits(open_dataset(easier))["train"]
    return stages


def download_cifar10(folder: Path) -> None:
    """Fetch CIFAR-10 through torchvision."""
    from torchvision.datasets import CIFAR10

    root = folder / "download"
    CIFAR10(root=root, download=True)
    for path in (root / CIFAR10.base_folder).iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(root)


def download_imdb(folder: Path) -> None:
    """Fetch IMDb through Hugging Face `datasets`, laid out as the official archive unpacks."""
    from datasets import load_dataset

    for part, labels in Imdb.layout.parts.items():
        for label in labels:
            (folder / label).mkdir(parents=True)
        for number, row in enumerate(load_dataset("stanfordnlp/imdb", split=part)):
            path = folder / labels[row["label"]] / f"{number}_{row['label']}.txt"
            path.write_text(row["text"], encoding="utf-8")
