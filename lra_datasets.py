"""Readers: one class per data set, from its files on disk to (documents, label).

A row of `lra_config.TASKS` names the class; docs/data.md shows a data set from a file of one's own.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.inspection import AAN_COLUMNS, LAYOUTS, LISTOPS_HEADER, Layout
from data.listops import generate_listops
from data.packing import DataError, Reader, cache_dir, fingerprint, held_out_rows
from data.pathfinder import generate_pathfinder
from lra_config import Config, WordTokenizer
from run.files import whole_folder, write_json
from run.terminal import log_line
from utils import first_line

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
        for path in (path for part in self.parts for path in self.places(part)):
            if not path.exists():
                raise DataError(f"{path}: missing; {self.advice}")

    def sources(self, part: str) -> list[Path]:
        """The files of a part; those of a folder in the order of their names."""
        return [path for place in self.places(part) for path in self._files(place)]

    def _files(self, place: Path) -> list[Path]:
        if not place.is_dir():
            return [place]
        # Not Path.iterdir: IMDb has 50,000 files.
        return [
            Path(path)
            for path in sorted(e.path for e in os.scandir(place))
            if path.endswith(self.layout.suffix)
        ]

    def key(self) -> dict[str, Any]:
        return {}

    def origin(self) -> str:
        record = self.folder / "GENERATED.json"
        if not record.exists():
            return "downloaded"
        # A stand-in says so, lest its results pass for those of the data it stands in for.
        return json.loads(record.read_text()).get("stand_in", "generated")

    def label(self, text: str, where: str) -> int:
        """A class number from its text."""
        classes = self.config.task.num_classes
        if not (text.isascii() and text.isdigit() and int(text) < classes):
            raise DataError(
                f"{where}: label {text!r} is not one of 0..{classes - 1}; fetch the file again"
            )
        return int(text)


class ListOps(FileReader):
    """`lra_release/listops-1000/basic_{train,val,test}.tsv`, columns Source and Target."""

    layout = LAYOUTS["listops"]

    def prepare(self) -> None:
        """Generate the files when none is there; some of them are a mistake."""
        paths = [path for part in self.parts for path in self.sources(part)]
        missing = [path for path in paths if not path.exists()]
        if len(missing) == len(paths):
            log_line(f"no ListOps files in {self.folder}: generating them")
            self.folder = generate_listops(self.config.data_dir, seed=0)
        elif missing:
            raise DataError(
                f"{missing[0]}: missing while the other split files are there; restore it, or "
                "remove all three to have them generated"
            )

    def examples(self, part: str) -> Iterator[Example]:
        path = self.sources(part)[0]
        limit = self.config.max_seq_len
        for where, row in tab_separated_rows(path):
            if where.endswith(" row 1"):
                if row != LISTOPS_HEADER.decode().split("\t"):
                    raise DataError(
                        f"{where}: expected the header Source<TAB>Target; fetch the file again"
                    )
                continue
            if len(row) != 2:
                raise DataError(
                    f"{where}: has {len(row)} columns, expected Source and Target; the file may "
                    "be cut short, fetch it again"
                )
            try:
                ids = self.tokenizer.encode(row[0])
            except ValueError as error:
                raise DataError(f"{where}: {error}; fetch the file again") from None
            if len(ids) > limit:
                raise DataError(
                    f"{where}: has {len(ids)} tokens, max_seq_len={limit} allows {limit}; "
                    "raise max_seq_len"
                )
            yield (ids,), self.label(row[1], where)


def tab_separated_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Stream (place, columns) of a file without quoting; bytes that are no UTF-8 stay visible."""
    with open(path, encoding="utf-8", errors="backslashreplace", newline="\n") as handle:
        for number, line in enumerate(handle, start=1):
            yield f"{path} row {number}", line.rstrip("\r\n").split("\t")


class Imdb(FileReader):
    """`aclImdb/{train,test}/{pos,neg}/*.txt`: bytes (`imdb_lra`) or words."""

    layout = LAYOUTS["imdb"]
    advice = "run ./get_lra_data.sh imdb, or set download: true"

    def prepare(self) -> None:
        if not self.folder.is_dir() and self.config.download:
            download_imdb(self.folder)
        super().prepare()
        for folder in (folder for part in self.parts for folder in self.places(part)):
            if not self._files(folder):
                raise DataError(f"{folder}: holds no reviews; {self.advice}")
        if self.config.task.tokenizer is WordTokenizer:
            self.tokenizer = WordTokenizer(self._vocabulary())

    def key(self) -> dict[str, Any]:
        words = self.config.task.tokenizer is WordTokenizer
        return {"vocabulary": self.tokenizer.vocabulary} if words else {}

    def _vocabulary(self) -> list[str]:
        """Words of the training part alone: what is held out for validation has no say."""
        files, seed = self.sources("train"), self.config.seed
        path = cache_dir(self.config) / f"imdb-words-{fingerprint(files, seed=seed)}.json"
        if not path.exists():
            kept, _ = held_out_rows(len(files), seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = (self._text(files[row]) for row in kept)
            write_json(path, WordTokenizer.build_vocabulary(texts))
        return json.loads(path.read_text(encoding="utf-8"))

    def examples(self, part: str) -> Iterator[Example]:
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


class Cifar10(FileReader):
    """`cifar-10-batches-py`, the Python version: pickles of 10,000 images, here as grey levels."""

    layout = LAYOUTS["cifar10"]
    advice = "run ./get_lra_data.sh cifar10, or set download: true"

    def prepare(self) -> None:
        if not self.folder.is_dir() and self.config.download:
            download_cifar10(Path(self.config.data_dir))
        super().prepare()

    def examples(self, part: str) -> Iterator[Example]:
        for path in self.sources(part):
            images, labels = self._batch(path)
            pixels = images.reshape(-1, 3, self.config.task.max_seq_len)  # (n, RGB, 1024)
            grey = np.rint(np.einsum("c,ncp->np", GREY, pixels)).astype(np.uint8)
            for row, (image, label) in enumerate(zip(grey, labels, strict=True), start=1):
                yield (image,), self.label(str(label), f"{path} row {row}")

    @staticmethod
    def _batch(path: Path) -> tuple[np.ndarray, list[int]]:
        """The images (n, 3072) uint8 and labels of one file."""
        try:
            batch = _PlainUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
            images, labels = batch[b"data"], batch[b"labels"]
            usable = images.dtype == np.uint8 and images.shape == (len(labels), 3072)
        # A damaged pickle raises nearly anything.
        except Exception as error:
            raise DataError(
                f"{path}: not a CIFAR-10 batch ({str(error) or type(error).__name__}); fetch it "
                "again"
            ) from None
        if not usable:
            raise DataError(f"{path}: images are not (n, 3072) bytes; fetch the file again")
        return images, labels


class _PlainUnpickler(pickle.Unpickler):
    """Admits plain containers and numpy arrays; everything else could run code."""

    _admitted = frozenset({"_reconstruct", "ndarray", "dtype"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self._admitted:
            # The official files name numpy's modules of 2009.
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class Pathfinder32(FileReader):
    """`pathfinder32/curv_contour_length_14/{imgs,metadata}`: grey images and rows about them."""

    layout = LAYOUTS["pathfinder32"]

    def sources(self, part: str) -> list[Path]:
        return sorted(super().sources(part), key=lambda path: (len(path.name), path.name))

    def prepare(self) -> None:
        if not self.folder.is_dir():
            log_line(f"no Pathfinder images in {self.folder}: generating them")
            self.folder = generate_pathfinder(self.config.data_dir, seed=0)
        for name in ("imgs", "metadata"):
            if not (self.folder / name).is_dir():
                raise DataError(
                    f"{self.folder / name}: missing; restore it, or remove {self.folder} to have "
                    "it generated"
                )
        if not self.sources("all"):
            raise DataError(f"{self.folder / 'metadata'}: holds no .npy file; fetch it again")

    def examples(self, part: str) -> Iterator[Example]:
        from PIL import Image, UnidentifiedImageError

        side = int(self.config.task.max_seq_len**0.5)
        for metadata in self.sources(part):
            with open(metadata, encoding="utf-8", errors="backslashreplace") as handle:
                for number, line in enumerate(handle, start=1):
                    where = f"{metadata} row {number}"
                    fields = line.split()
                    if len(fields) < 4:
                        raise DataError(
                            f"{where}: has {len(fields)} fields, expected folder, file, number, "
                            "label; fetch the file again"
                        )
                    label = self.label(fields[3], where)
                    path = self.folder / fields[0] / fields[1]
                    try:
                        if path.stat().st_size == 0:  # some of the released ones are
                            self.skipped += 1
                            continue
                        with Image.open(path) as image:
                            pixels = np.asarray(image.convert("L"))
                    except (OSError, UnidentifiedImageError) as error:
                        reason = getattr(error, "strerror", None) or "not an image"
                        raise DataError(f"{path} ({where}): {reason}; fetch it again") from None
                    if pixels.shape != (side, side):
                        raise DataError(
                            f"{path}: is {pixels.shape[1]} x {pixels.shape[0]} pixels, expected "
                            f"{side} x {side}; fetch it again"
                        )
                    yield (pixels.reshape(-1),), label


class Aan(FileReader):
    """`tsv_data/new_aan_pairs.{train,eval,test}.tsv`: label, two ids, two texts, no header."""

    layout = LAYOUTS["aan"]
    advice = "its texts may not be redistributed, ./get_lra_data.sh aan says where to obtain them"

    def examples(self, part: str) -> Iterator[Example]:
        path, limit = self.sources(part)[0], self.config.document_len
        with open(path, "rb") as handle:  # bytes: nothing is decoded, so nothing can be invalid
            for number, line in enumerate(handle, start=1):
                where = f"{path} row {number}"
                columns = line.rstrip(b"\r\n").split(b"\t")
                if len(columns) != AAN_COLUMNS:
                    raise DataError(
                        f"{where}: has {len(columns)} columns, expected label, two ids and two "
                        "texts; the file may be cut short, fetch it again"
                    )
                label = columns[0].decode("ascii", "backslashreplace").removesuffix(".0")
                documents = tuple(self.tokenizer.encode(text[:limit]) for text in columns[3:])
                yield documents, self.label(label, where)


def open_dataset(config: Config) -> Reader:
    """The reader of `config.dataset`, with its files in place.

    Raises:
        DataError: the files are not there, or only some of them, and cannot be generated.
    """
    named = config.task.reader
    reader = (pkgutil.resolve_name(named) if isinstance(named, str) else named)(config)
    reader.prepare()
    return reader


def download_cifar10(data_dir: Path) -> None:
    """Fetch CIFAR-10 through torchvision."""
    try:
        from torchvision.datasets import CIFAR10

        CIFAR10(root=data_dir, download=True)
    # Whatever the import or the network raises, the way out is the same.
    except Exception as error:
        raise DataError(
            f"CIFAR-10 could not be fetched through torchvision ({first_line(error)}); run "
            "./get_lra_data.sh cifar10"
        ) from None


def download_imdb(folder: Path) -> None:
    """Fetch IMDb through Hugging Face `datasets`, laid out as the official archive unpacks."""
    try:
        from datasets import load_dataset

        with whole_folder(folder) as half_done:
            for part, labels in Imdb.layout.parts.items():
                for label in labels:
                    (half_done / label).mkdir(parents=True)
                for number, row in enumerate(load_dataset("stanfordnlp/imdb", split=part)):
                    name = f"{number}_{row['label']}.txt"
                    path = half_done / labels[row["label"]] / name
                    path.write_text(row["text"], encoding="utf-8")
    except Exception as error:
        raise DataError(
            f"IMDb could not be fetched through Hugging Face datasets ({first_line(error)}); run "
            "./get_lra_data.sh imdb"
        ) from None


def load_word_vectors(path: str, vocabulary: list[str], dim: int) -> dict[int, np.ndarray]:
    """Read the vectors of the vocabulary's words from GloVe's text format.

    Args:
        path: a file of lines `word v_1 ... v_dim`.
        vocabulary: the words, in the order of their ids.
        dim: width of the embedding.
    Returns:
        Token id to vector (dim,) float32, for the words found.
    Raises:
        DataError: the file cannot be read, or its vectors have another width.
    """
    ids = {word: i for i, word in enumerate(vocabulary, start=WordTokenizer.unknown_id + 1)}
    vectors = {}
    try:
        with open(path, encoding="utf-8", errors="backslashreplace") as handle:
            for number, line in enumerate(handle, start=1):
                word, *values = line.rstrip("\n").split(" ")
                if word not in ids:
                    continue
                if len(values) != dim:
                    raise DataError(
                        f"{path} row {number}: has {len(values)} values, dim={dim}; set dim to the "
                        "width of the vectors"
                    )
                vectors[ids[word]] = np.array(values, dtype=np.float32)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name a GloVe text file") from None
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} row {number}: holds something that is not a number") from None
    return vectors
