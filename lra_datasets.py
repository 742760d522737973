"""Readers: one class per data set, from its files on disk to (documents, label).

A row of `data.tasks.TASKS` names the class and the layout of the files.
"""

from __future__ import annotations

import json
import os
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.cifar import read_batch
from data.layout import recorded_split, split_layout
from data.listops import generate_listops
from data.packing import PackedSplit, cached, fingerprint, held_out_rows, load_splits
from data.pathfinder import generate_pathfinder
from data.reader import DataError, Example, Reader, located, rows
from data.tasks import WordTokenizer
from lra_config import Config, ConfigError
from run.program import note

GRAY = np.array([0.2989, 0.5870, 0.1140])  # weights of R, G and B


class ListOps(Reader):
    """`lra_release/listops-1000/basic_{train,val,test}.tsv`, columns Source and Target."""

    advice = "restore it, or remove the folder to have it generated"

    def prepare(self) -> None:
        """Generate the files if none of them is there."""
        self.generate(generate_listops)
        super().prepare()

    def examples(self, part: str) -> Iterator[Example]:
        """Yield the token ids of each expression, and its value."""
        limit = self.config.max_seq_len
        table = rows(self.sources(part)[0])
        where, header = next(table, (str(self.sources(part)[0]), b""))
        if header != b"Source\tTarget":
            raise DataError(
                f"{where}: expected the header Source<TAB>Target; fetch the file again"
            )
        for where, line in table:
            columns = line.decode("utf-8", "backslashreplace").split("\t")
            if len(columns) != 2:
                raise DataError(
                    f"{where}: has {len(columns)} columns, expected Source and Target; the file "
                    "may be cut short, fetch it again"
                )
            with located(where):
                ids = self.tokenizer.encode(columns[0])
            if len(ids) > limit:
                raise DataError(
                    f"{where}: has {len(ids)} tokens, max_seq_len={limit} allows {limit}; "
                    "raise max_seq_len"
                )
            yield (ids,), self.label(columns[1], where)


class Imdb(Reader):
    """`aclImdb/{train,test}/{pos,neg}/*.txt`: bytes (`imdb_lra`) or words."""

    advice = "run ./get_lra_data.sh imdb, or set download: true"

    def prepare(self) -> None:
        """Download the reviews if asked for, and build the vocabulary of words."""
        self.download("imdb")
        super().prepare()
        if self.config.task.tokenizer is WordTokenizer:
            self.tokenizer = WordTokenizer(self._vocabulary())

    def key(self) -> dict[str, Any]:
        """Return the vocabulary, on which the ids of words depend."""
        words = self.config.task.tokenizer is WordTokenizer
        return {"vocabulary": self.tokenizer.vocabulary} if words else {}

    def _vocabulary(self) -> list[str]:
        """Return the words of the training part, without the reviews held out for validation."""
        files, seed = self.sources("train"), self.config.seed
        kept, _ = held_out_rows(len(files), seed)

        def make(folder: Path) -> None:
            words = WordTokenizer.build_vocabulary(self._text(files[row]) for row in kept)
            (folder / "words.json").write_text(json.dumps(words), encoding="utf-8")

        folder = cached(self.config, f"imdb-words-{fingerprint(files, seed=seed)}", make)
        with located(folder, "remove it"):
            return json.loads((folder / "words.json").read_text(encoding="utf-8"))

    def examples(self, part: str) -> Iterator[Example]:
        """Yield the first `max_seq_len` tokens of each review, and 1 if it is positive."""
        words = self.config.task.tokenizer is WordTokenizer
        for path in self.sources(part):
            document = self.tokenizer.encode(self._text(path) if words else path.read_bytes())
            if not len(document):
                raise DataError(f"{path}: holds no text; fetch the data again")
            yield (document[: self.config.max_seq_len],), int(path.parent.name == "pos")

    @staticmethod
    def _text(path: Path) -> str:
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: byte {error.start} is not UTF-8; fetch the data again, or use "
                "dataset: imdb_lra, which reads bytes"
            ) from None


class Cifar10(Reader):
    """`cifar-10-batches-py`, the Python version: pickles of 10,000 images, here as gray levels."""

    advice = "run ./get_lra_data.sh cifar10, or set download: true"

    def prepare(self) -> None:
        """Download the images if asked for."""
        self.download("cifar10")
        super().prepare()

    def examples(self, part: str) -> Iterator[Example]:
        """Yield the 1,024 gray levels of each image, row by row, and its class."""
        for path in self.sources(part):
            with located(f"{path}: not a CIFAR-10 batch"):
                images, labels = read_batch(path)
            pixels = images.reshape(-1, 3, self.config.task.max_seq_len)  # (n, RGB, 1024)
            gray = np.rint(np.einsum("c,ncp->np", GRAY, pixels)).astype(np.uint8)
            for row, (image, label) in enumerate(zip(gray, labels, strict=True), start=1):
                yield (image,), self.label(str(label), f"{path} row {row}")


class Pathfinder32(Reader):
    """`pathfinder32/curv_*/{imgs,metadata}`: gray images and rows about them."""

    advice = "restore it, or remove the folder to have it generated"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.layout = split_layout(config.evaluated_split)
        self.folder = self.layout.find(config.data_dir)

    def prepare(self) -> None:
        """Generate the images if none is there, and compare their split with the configured."""
        asked = self.config.evaluated_split
        self.generate(generate_pathfinder, split=asked)
        super().prepare()
        if (found := recorded_split(self.folder)) not in (asked, "unknown"):
            note(
                f"{self.folder}: holds the {found} split by its own record, and pathfinder_split="
                f"{asked}; restore it or set pathfinder_split"
            )

    def sources(self, part: str) -> list[Path]:
        """Return the metadata files in the order of their numbers."""
        return sorted(super().sources(part), key=lambda path: (len(path.name), path.name))

    def origin(self) -> str:
        """Return the source, and the split that the files themselves record."""
        return f"{super().origin()}, {recorded_split(self.folder)} split"

    def examples(self, part: str) -> Iterator[Example]:
        """Yield the 1,024 gray levels of each image, and whether its markers are connected."""
        for where, line in (row for metadata in self.sources(part) for row in rows(metadata)):
            fields = line.split()
            if len(fields) < 4:
                raise DataError(
                    f"{where}: has {len(fields)} fields, expected folder, file, number, label; "
                    "fetch the file again"
                )
            label = self.label(fields[3].decode("ascii", "backslashreplace"), where)
            path = self.folder / os.fsdecode(fields[0]) / os.fsdecode(fields[1])
            with located(f"{path} ({where})"):
                if not path.stat().st_size:  # some of the released images are empty
                    self.skipped += 1
                    continue
                pixels = self._pixels(path)
            yield (pixels,), label

    def _pixels(self, path: Path) -> np.ndarray:
        """Return the gray levels (pixels,) uint8 of an image."""
        side = self.config.image_width
        with Image.open(path) as image:
            if image.size != (side, side) or image.mode.startswith("I"):
                raise ValueError(
                    f"is {image.width} x {image.height} pixels of mode {image.mode}, expected "
                    f"{side} x {side} of 8 bits"
                )
            return np.asarray(image.convert("L")).reshape(-1)


class Aan(Reader):
    """`tsv_data/new_aan_pairs.{train,eval,test}.tsv`: label, two ids, two texts, no header."""

    advice = "its texts may not be redistributed, ./get_lra_data.sh aan says where to obtain them"

    def examples(self, part: str) -> Iterator[Example]:
        """Yield the first bytes of both texts, and whether one cites the other."""
        path, limit = self.sources(part)[0], self.config.document_len
        for where, line in rows(path):  # bytes: nothing is decoded, so nothing can be invalid
            columns = line.split(b"\t")
            if len(columns) != 5:
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
    """Return the reader of `config.dataset`, and make sure that its files are there.

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
    """Return the training examples by the step from which they are used.

    There is one stage, unless `pathfinder_split` is a curriculum.

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
