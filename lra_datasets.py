"""Readers: from a data set's files on disk to packed splits.

A reader is a class with `files(split)` and `examples(split)`; `READERS` names it for its `dataset`.
`load_split` packs what it yields once into small integers under `<data_dir>/.cache` and maps the
result into memory from then on.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from generate_lra import generate_listops
from lra_config import Config
from utils import write_json

SPLITS = ("train", "val", "test")
CACHE_VERSION = 1  # raise it when a reader or the layout below changes


class DataError(ValueError):
    """A mistake in the data on disk, told in one line: file, row, what to do."""


@dataclass(frozen=True)
class PackedSplit:
    """One split, sequences end to end in the smallest integers that hold the vocabulary."""

    tokens: np.ndarray  # (sum of lengths,) uint8 or uint16, mapped from the disk
    starts: np.ndarray  # (examples,) int64, where a sequence begins in `tokens`
    lengths: np.ndarray  # (examples,) int64, in tokens
    labels: np.ndarray  # (examples,) int64

    def __len__(self) -> int:
        return len(self.labels)


class ListOps:
    """`lra_release/listops-1000/basic_{train,val,test}.tsv`, columns Source and Target."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.tokenizer = config.task.tokenizer()
        release = Path(config.data_dir) / "lra_release"
        # The official archive unpacks one level deeper than its own instructions say.
        folders = [release / "listops-1000", release / "lra_release" / "listops-1000"]
        self.folder = next((f for f in folders if any(f.glob("basic_*.tsv"))), folders[0])

    def files(self, split: str) -> list[Path]:
        return [self.folder / f"basic_{split}.tsv"]

    def prepare(self) -> None:
        """Generate the files when none is there.

        Raises:
            DataError: some of the three files are there and some are not.
        """
        paths = [path for split in SPLITS for path in self.files(split)]
        missing = [path for path in paths if not path.exists()]
        if len(missing) == len(paths):
            print(f"no ListOps files in {self.folder}: generating them", flush=True)
            generate_listops(self.config.data_dir, seed=0)
        elif missing:
            raise DataError(
                f"{missing[0]}: missing while the other split files are there; restore it, or "
                "remove all three to have them generated"
            )

    def origin(self) -> str:
        generated = (self.folder / "GENERATED.json").exists()
        return "generated" if generated else "downloaded"

    def examples(self, split: str) -> Iterator[tuple[np.ndarray, int]]:
        """Yield (ids, label) of each row.

        Raises:
            DataError: a row that is not `Source<TAB>Target`, an unknown token, a sequence longer
                than `max_seq_len` or a label outside 0..9.
        """
        path = self.files(split)[0]
        limit, classes = self.config.max_seq_len, self.config.task.num_classes
        # Bytes that are no text become an unknown token of their row, not an error without a place.
        with open(path, encoding="utf-8", errors="backslashreplace", newline="") as handle:
            rows = csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = next(rows, None)
            if header != ["Source", "Target"]:
                raise DataError(
                    f"{path} row 1: expected the header Source<TAB>Target; fetch the file again"
                )
            for number, row in enumerate(rows, start=2):
                where = f"{path} row {number}"
                if len(row) != 2:
                    raise DataError(
                        f"{where}: has {len(row)} columns, expected Source and Target; the file "
                        "may be cut short, fetch it again"
                    )
                source, target = row
                try:
                    ids = self.tokenizer.encode(source)
                except ValueError as error:
                    raise DataError(f"{where}: {error}; fetch the file again") from None
                if len(ids) > limit:
                    raise DataError(
                        f"{where}: has {len(ids)} tokens, max_seq_len={limit} allows {limit}; "
                        "raise max_seq_len"
                    )
                if not (target.isascii() and target.isdigit() and int(target) < classes):
                    raise DataError(
                        f"{where}: label {target!r} is not one of 0..{classes - 1}; "
                        "fetch the file again"
                    )
                yield ids, int(target)


READERS = {"listops": ListOps}


def open_dataset(config: Config) -> ListOps:
    """The reader of `config.dataset`, with its files in place.

    Raises:
        DataError: the files are not there, or only some of them, and cannot be generated.
    """
    reader = READERS[config.dataset](config)
    reader.prepare()
    return reader


def load_split(reader: ListOps, split: str) -> PackedSplit:
    """The packed `split`, from the cache if its sources have not changed since.

    Raises:
        DataError: the source files hold something that is not their format.
    """
    sources = [
        {"path": str(p.resolve()), "size": p.stat().st_size, "mtime_ns": p.stat().st_mtime_ns}
        for p in reader.files(split)
    ]
    config = reader.config
    key = {
        "version": CACHE_VERSION,
        "dataset": config.dataset,
        "split": split,
        "max_seq_len": config.max_seq_len,
        "sources": sources,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.data_dir) / ".cache" / f"{config.dataset}-{split}-{digest}"
    if not folder.exists():
        _pack(reader, split, folder, key)
    lengths = np.load(folder / "lengths.npy")
    return PackedSplit(
        tokens=np.load(folder / "tokens.npy", mmap_mode="r"),
        starts=np.concatenate([[0], np.cumsum(lengths)[:-1]]),
        lengths=lengths,
        labels=np.load(folder / "labels.npy"),
    )


def _pack(reader: ListOps, split: str, folder: Path, key: dict) -> None:
    """Write the packed split into a folder that appears whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=folder.name + ".", suffix=".part", dir=folder.parent))
    try:
        dtype = np.dtype(reader.tokenizer.dtype)
        lengths, labels = [], []
        with open(part / "tokens", "wb") as stream:
            progress = tqdm(
                reader.examples(split), desc=f"packing {reader.config.dataset} {split}",
                unit=" examples", disable=None, leave=False,
            )
            for ids, label in progress:
                stream.write(ids.astype(dtype, copy=False).tobytes())
                lengths.append(len(ids))
                labels.append(label)
        if not labels:
            raise DataError(f"{reader.files(split)[0]}: holds no example; fetch the file again")
        # Copied under its header in one sweep: only now is the length that it states known.
        tokens = np.lib.format.open_memmap(
            part / "tokens.npy", mode="w+", dtype=dtype, shape=(sum(lengths),)
        )
        tokens[:] = np.memmap(part / "tokens", dtype=dtype, mode="r")
        tokens.flush()
        (part / "tokens").unlink()
        np.save(part / "lengths.npy", np.array(lengths, dtype=np.int64))
        np.save(part / "labels.npy", np.array(labels, dtype=np.int64))
        write_json(part / "source.json", key)
        try:
            os.rename(part, folder)
        except OSError:
            if not folder.exists():  # else another process packed the same split meanwhile
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
