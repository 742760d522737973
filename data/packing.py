"""Packed splits: what a reader yields, once, as small integers in a cache mapped into memory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter
from tqdm import tqdm

from data.tasks import PADDING_ID
from lra_config import Config
from run.files import locked, read_json, whole_folder, write_json
from run.program import UserError, one_line

SPLITS = ("train", "val", "test")
HELD_OUT = 0.1  # share of the examples that a missing validation or test split is made of
CACHE_VERSION = 3  # raise it when a reader or the layout below changes


class DataError(UserError, ValueError):
    """A mistake in the data on disk, told in one line: file, row, what to do."""

    met_by_all = False


@dataclass(frozen=True)
class PackedSplit:
    """One split: documents end to end in the smallest integers that hold them.

    `starts` and `lengths` have a row per example and a column per document: one, but for pairs.
    """

    tokens: np.ndarray  # (sum of lengths,) uint8 or uint16, mapped from the disk
    starts: np.ndarray  # (examples, documents) int64, where a document begins in `tokens`
    lengths: np.ndarray  # (examples, documents) int64, in tokens
    labels: np.ndarray  # (examples,) int64
    offset: int  # a token's id is what is stored plus this

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> PackedSplit:
        """The examples `rows`, over the same tokens."""
        return replace(
            self, starts=self.starts[rows], lengths=self.lengths[rows], labels=self.labels[rows]
        )


class Info(BaseModel):
    """`info.json` of a packed part."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    skipped: NonNegativeInt


class Tokenizer(Protocol):
    """What turns one document into small integers."""

    dtype: type
    offset: int  # a token's id is what is stored plus this
    vocab_size: int

    def encode(self, document: Any) -> np.ndarray: ...


class Reader(Protocol):
    """A data set on disk."""

    config: Config
    tokenizer: Tokenizer
    parts: tuple[str, ...]  # what the disk holds: the three SPLITS, train and test, or all
    skipped: int  # examples left out while reading, because their file is empty

    def prepare(self) -> None:
        """Make sure that the files are there. Raises DataError."""

    def sources(self, part: str) -> list[Path]:
        """The files whose change makes the packed part stale."""

    def key(self) -> dict[str, Any]:
        """What else the packed parts depend on, as JSON."""

    def examples(self, part: str) -> Iterator[tuple[tuple[np.ndarray, ...], int]]:
        """Yield (documents, label); the documents as the tokenizer encodes them."""

    def origin(self) -> str:
        """`downloaded`, `generated`, or what the data stand in for."""


def held_out_rows(num_examples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the row numbers into those kept and the share `HELD_OUT`, both ascending."""
    order = np.random.default_rng([seed, num_examples]).permutation(num_examples)
    count = round(HELD_OUT * num_examples)
    return np.sort(order[count:]), np.sort(order[:count])


def holds_out_by_seed(reader: Reader) -> bool:
    """Whether a seed chooses some of the examples that are not trained on."""
    return not set(SPLITS) <= set(reader.parts)


def load_splits(reader: Reader) -> dict[str, PackedSplit]:
    """The three splits, from the cache if their sources have not changed since.

    A test split that the disk does not hold is a tenth of all examples, a validation split a tenth
    of all (or of the training part), chosen by `seed`.

    Raises:
        DataError: the source files hold something that is not their format.
    """
    splits = {part: _load_part(reader, part) for part in reader.parts}
    seed = reader.config.seed
    if "all" in splits:
        everything = splits.pop("all")
        rest, test = held_out_rows(len(everything), seed)
        # Both held-out splits are of one size: the second is a tenth of the whole as well.
        order = np.random.default_rng([seed, len(rest)]).permutation(rest)
        splits["test"] = everything.take(test)
        splits["val"] = everything.take(np.sort(order[: len(test)]))
        splits["train"] = everything.take(np.sort(order[len(test) :]))
    elif "val" not in splits:
        kept, held_out = held_out_rows(len(splits["train"]), seed)
        splits["val"] = splits["train"].take(held_out)
        splits["train"] = splits["train"].take(kept)
    for name, split in splits.items():
        if not len(split):
            source = reader.sources(reader.parts[0])[0]
            raise DataError(f"{source}: too few examples for a {name} split; fetch the data again")
    return {name: splits[name] for name in SPLITS}


def fingerprint(paths: list[Path], **key: Any) -> str:
    """A digest of the files' names, sizes and times, and of `key`."""
    # Without the way to the folder: IMDb has 50,000 files, and a moved data_dir keeps its cache.
    stats = [(p.parent.name, p.name, (s := os.stat(p)).st_size, s.st_mtime_ns) for p in paths]
    text = json.dumps([CACHE_VERSION, stats, key], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def cache_dir(config: Config) -> Path:
    return Path(config.data_dir) / ".cache"


def cached_json(config: Config, name: str, schema: Any, make: Callable[[], Any]) -> Any:
    """What the cache keeps as JSON under a name, as pydantic reads `schema`; made if missing.

    Raises:
        DataError: it is damaged, or could not be written.
    """
    path = cache_dir(config) / name
    if not path.exists():
        with _written(path, name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.with_name(name + ".lock"), "makes it", wait=True):
                if not path.exists():
                    write_json(path, make())
    with _read(path):
        return read_json(path, TypeAdapter(schema))


def _load_part(reader: Reader, part: str) -> PackedSplit:
    config = reader.config
    digest = fingerprint(
        reader.sources(part), dataset=config.dataset, part=part, document_len=config.document_len,
        **reader.key(),
    )
    folder = cache_dir(config) / f"{config.dataset}-{part}-{digest}"
    if not folder.exists():
        with _written(folder, f"the packed {part} split"):
            _pack(reader, part, folder)
    with _read(folder):
        return _read_packed(reader, folder)


@contextlib.contextmanager
def _written(path: Path, what: str) -> Iterator[None]:
    """Raise DataError, with advice, where a source cannot be read or the cache not written."""
    try:
        yield
    except FileExistsError:
        pass  # another process has written the same meanwhile
    except OSError as error:
        place = Path(error.filename or path)
        advice = "restore the file"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None):
            advice = "free some space or set another data_dir"
        elif place.is_relative_to(path.parent):
            advice = "make it writable, or copy the data to another data_dir"
        raise DataError(
            f"{place}: {error.strerror or error}; {what} was not written, {advice}"
        ) from error


@contextlib.contextmanager
def _read(path: Path) -> Iterator[None]:
    """Raise DataError for whatever a damaged part of the cache makes its reader raise."""
    try:
        yield
    except Exception as error:
        reason = one_line(str(error) or type(error).__name__, 150)
        raise DataError(f"{path}: damaged ({reason}); remove it") from None


def _read_packed(reader: Reader, folder: Path) -> PackedSplit:
    """Map a packed part.

    Raises:
        Exception: its files are damaged, or say different things.
    """
    config, task = reader.config, reader.config.task
    skipped = read_json(folder / "info.json", TypeAdapter(Info)).skipped
    labels = _mapped(folder / "labels.npy", np.int64, 1)
    lengths = _mapped(folder / "lengths.npy", np.int64, 2)  # (examples, documents)
    tokens = _mapped(folder / "tokens.npy", reader.tokenizer.dtype, 1)
    if not len(labels) or lengths.shape != (len(labels), task.num_documents):
        raise ValueError(f"{lengths.shape} lengths for {len(labels)} labels")
    if lengths.min() < 1 or lengths.max() > config.document_len:
        raise ValueError(f"a document has not between 1 and {config.document_len} tokens")
    if lengths.sum() != len(tokens):
        raise ValueError(f"{len(tokens)} tokens for lengths of {lengths.sum()} together")
    if labels.min() < 0 or labels.max() >= task.num_classes:
        raise ValueError(f"a label is not one of 0..{task.num_classes - 1}")
    offset, size = reader.tokenizer.offset, reader.tokenizer.vocab_size
    if int(tokens.min()) + offset <= PADDING_ID or int(tokens.max()) + offset >= size:
        raise ValueError(f"a token is not one of {PADDING_ID + 1}..{size - 1}")
    ends = lengths.cumsum().reshape(lengths.shape)
    reader.skipped += skipped
    return PackedSplit(
        tokens=tokens, starts=ends - lengths, lengths=np.array(lengths), labels=np.array(labels),
        offset=offset,
    )


def _mapped(path: Path, dtype: type, dimensions: int) -> np.ndarray:
    """An array in its file: one that claims more than the file holds is refused, not allocated."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        array = np.lib.format.open_memmap(path, mode="r")
    if array.dtype != dtype or array.ndim != dimensions:
        raise ValueError(f"{path.name} holds {array.ndim} dimensions of {array.dtype}")
    if array.offset + array.nbytes != path.stat().st_size:
        raise ValueError(f"{path.name} holds more than its array")
    return array


def _pack(reader: Reader, part: str, folder: Path) -> None:
    """Write a packed part into a folder that appears whole or not at all."""
    with whole_folder(folder, "packs it") as half_done:
        dtype = np.dtype(reader.tokenizer.dtype)
        lengths, labels = [], []
        skipped_before = reader.skipped
        with open(half_done / "stream", "wb") as stream:
            progress = tqdm(
                reader.examples(part), desc=f"packing {reader.config.dataset} {part}",
                unit=" examples", disable=None, leave=False,
            )
            for documents, label in progress:
                for document in documents:
                    stream.write(document.astype(dtype, copy=False).tobytes())
                lengths.append([len(document) for document in documents])
                labels.append(label)
        if not labels:
            raise DataError(f"{reader.sources(part)[0]}: holds no example; fetch the data again")
        lengths = np.array(lengths, dtype=np.int64)
        # Copied under a header in one sweep: only now is the length that it states known. Not
        # through a map: on a full disk that ends the process without a word.
        header = {
            "descr": dtype.str, "fortran_order": False, "shape": (int(lengths.sum()),),
        }
        with open(half_done / "stream", "rb") as source, open(half_done / "tokens.npy", "wb") as to:
            np.lib.format.write_array_header_1_0(to, header)
            shutil.copyfileobj(source, to)
        (half_done / "stream").unlink()
        np.save(half_done / "lengths.npy", lengths)
        np.save(half_done / "labels.npy", np.array(labels, dtype=np.int64))
        write_json(half_done / "info.json", {"skipped": reader.skipped - skipped_before})
        reader.skipped = skipped_before


def digest(splits: dict[str, PackedSplit], stages: Mapping[int, PackedSplit]) -> str:
    """A fingerprint of what a run trains and tests on: tokens, labels and rows of each split."""
    # The last stage trains on splits["train"].
    trained = [*splits.values(), *list(stages.values())[:-1]]
    tokens = {id(split.tokens): split.tokens for split in trained}  # often shared
    result = hashlib.sha256()
    for split in trained:
        for array in (split.starts, split.lengths, split.labels):
            result.update(np.ascontiguousarray(array).data)
    for array in tokens.values():
        result.update(array.data)
    return result.hexdigest()
