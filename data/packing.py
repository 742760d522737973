"""Packed splits: the examples of a reader as small integers, in a cache mapped into memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from data.reader import DataError, Reader
from lra_config import Config
from run.files import atomic_folder
from run.program import note, one_line

SPLITS = ("train", "val", "test")
HELD_OUT = 0.1  # share of the examples that a missing validation or test split is made of
CACHE_VERSION = 4  # raise it when a reader or the files of a packed part change


@dataclass(frozen=True)
class PackedSplit:
    """One split: documents end to end in the smallest integers that hold them.

    `starts` and `lengths` have a row per example and a column per document.
    """

    tokens: np.ndarray  # (sum of lengths,) uint8 or uint16, mapped from the disk
    starts: np.ndarray  # (examples, documents) int64, where a document begins in `tokens`
    lengths: np.ndarray  # (examples, documents) int64, in tokens
    labels: np.ndarray  # (examples,) int64
    offset: int  # a token's id is the stored value plus this

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> PackedSplit:
        """Return the examples `rows`, over the same tokens."""
        return replace(
            self, starts=self.starts[rows], lengths=self.lengths[rows], labels=self.labels[rows]
        )


class Tokenizer(Protocol):
    """Turns one document into small integers."""

    dtype: type
    offset: int  # a token's id is the stored value plus this
    vocab_size: int

    def encode(self, document: Any) -> np.ndarray: ...


def held_out_rows(num_examples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the row numbers into those kept and the share `HELD_OUT`, both ascending."""
    order = np.random.default_rng([seed, num_examples]).permutation(num_examples)
    count = round(HELD_OUT * num_examples)
    return np.sort(order[count:]), np.sort(order[:count])


def holds_out_by_seed(reader: Reader) -> bool:
    """Whether a seed chooses some of the examples that are not trained on."""
    return not set(SPLITS) <= set(reader.parts)


def load_splits(reader: Reader) -> dict[str, PackedSplit]:
    """Return the three splits, from the cache if their sources have not changed since.

    A test split without files is a tenth of all examples. A validation split without files is a
    tenth of all examples, or of the training part. `seed` chooses them.

    Raises:
        DataError: a source file is damaged, or the cache cannot be read or written.
    """
    splits, counts = {}, {}
    for part in reader.parts:
        splits[part], skipped = _load_part(reader, part)
        reader.skipped += skipped
        counts[part] = len(splits[part]) + skipped
    reader.check_counts(counts)
    seed = reader.config.seed
    if "all" in splits:
        everything = splits.pop("all")
        rest, test = held_out_rows(len(everything), seed)
        # Both held-out splits have the same size: the second is a tenth of all examples as well.
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
    """Return a digest of the files' names, sizes and times, and of `key`."""
    # Without the path of the folder: a moved data_dir keeps its cache.
    stats = [(p.parent.name, p.name, (s := os.stat(p)).st_size, s.st_mtime_ns) for p in paths]
    text = json.dumps([CACHE_VERSION, stats, key], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def user_cache() -> Path:
    """Return the folder for data_dirs that cannot be written: ~/.cache/rmaat by default."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "rmaat")


def _is_writable(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return os.access(folder, os.W_OK | os.X_OK)


def cached(config: Config, name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder `name` of the cache, made by `make(folder)` if it is missing.

    The cache is `cache_dir`. By default it is `data_dir`/.cache, and for entries that cannot be
    written there the user's cache folder. The entries in both are used.

    Raises:
        DataError: no cache folder can be written.
    """
    inside = Path(config.data_dir, ".cache")
    caches = [Path(config.cache_dir)] if config.cache_dir else [inside, user_cache()]
    for folder in caches:
        if (folder / name).is_dir():
            return folder / name
    cache = next((folder for folder in caches if _is_writable(folder)), None)
    if cache is None:
        raise DataError(f"{caches[-1]}: cannot be written; set cache_dir to a folder that can")
    if cache != caches[0]:
        note(f"{inside} cannot be written: packed data go to {cache}, or to a cache_dir")
    target = cache / name
    with contextlib.suppress(FileExistsError), atomic_folder(target, "packs it") as folder:
        make(folder)
    return target


def _load_part(reader: Reader, part: str) -> tuple[PackedSplit, int]:
    """Return a part and the number of examples that its reader skipped."""
    config = reader.config
    digest = fingerprint(
        reader.sources(part), dataset=config.dataset, part=part, document_len=config.document_len,
        **reader.key(),
    )
    folder = cached(
        config, f"{config.dataset}-{part}-{digest}", lambda folder: _pack(reader, part, folder)
    )
    try:
        with np.load(folder / "index.npz") as index:
            lengths, labels, skipped = (index[name] for name in ("lengths", "labels", "skipped"))
        tokens = np.memmap(folder / "tokens.bin", reader.tokenizer.dtype, "r")
        if len(tokens) != lengths.sum() or len(labels) != len(lengths):
            raise ValueError(f"{len(tokens)} tokens for lengths of {lengths.sum()}")
    except Exception as error:  # numpy raises many types for damaged files
        raise DataError(f"{folder}: damaged ({one_line(error, 150)}); remove it") from None
    starts = lengths.cumsum().reshape(lengths.shape) - lengths
    return PackedSplit(tokens, starts, lengths, labels, reader.tokenizer.offset), int(skipped)


def _pack(reader: Reader, part: str, folder: Path) -> None:
    """Write a packed part into an empty folder."""
    lengths, labels, skipped = [], [], reader.skipped
    dtype = reader.tokenizer.dtype
    progress = tqdm(
        reader.examples(part), desc=f"packing {reader.config.dataset} {part}", unit=" examples",
        disable=None, leave=False,
    )
    with open(folder / "tokens.bin", "wb") as tokens:
        for documents, label in progress:
            for document in documents:
                tokens.write(document.astype(dtype, copy=False).tobytes())
            lengths.append([len(document) for document in documents])
            labels.append(label)
    if not labels:
        raise DataError(f"{reader.sources(part)[0]}: holds no example; fetch the data again")
    np.savez(
        folder / "index.npz", lengths=np.array(lengths, np.int64),
        labels=np.array(labels, np.int64), skipped=reader.skipped - skipped,
    )
    reader.skipped = skipped


def digest(splits: dict[str, PackedSplit], stages: Mapping[int, PackedSplit]) -> str:
    """Return a fingerprint of the tokens, labels and rows that a run trains and tests on."""
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
