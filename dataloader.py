"""Batches: packed splits to device tensors, in a seeded order that any step can resume.

The order is a pure function of (seed, epoch), so a checkpoint stores no loader state: the batch of
a step follows from the step's number alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.packing import PackedSplit
from data.tasks import PADDING_ID
from lra_config import Config, ConfigError
from run.processes import ALONE, Processes

BUCKET_BATCHES = 50  # batches that are sorted by length together
TRIM_TOKENS = 64  # batches are padded to a multiple of this, as far as it divides the segment


class Batch(NamedTuple):
    """Sequences on the device, without the segments that are padding for all of them."""

    tokens: Tensor  # (B, L) int64; L may end inside a segment
    mask: Tensor | None  # (B, L) bool, True at real tokens; None if nothing is padded
    labels: Tensor  # (B,) int64


def collate(
    split: PackedSplit,
    rows: np.ndarray,
    config: Config,
    device: torch.device,
    *,
    whole_segments: bool = False,
) -> Batch:
    """Gather the examples `rows` (B,) of a packed split into one batch, padded to the longest.

    The length is a multiple of `TRIM_TOKENS`, or with `whole_segments` of the segment length:
    compilation and CUDA graphs need few shapes.

    A row of tokens holds both documents of a pair. Encoded jointly, the second begins at column
    `document_len`. Encoded separately, both halves are as long as the longest document.
    """
    starts, lengths = split.starts[rows], split.lengths[rows]  # (B, documents)
    num_documents = lengths.shape[1]
    S = config.segment_len
    multiple = S if whole_segments else math.gcd(S, TRIM_TOKENS)
    longest = lengths.max(axis=0)  # (documents,)
    if config.num_sequences == num_documents:
        longest[:] = width = max(-(-longest.max() // multiple), 1) * multiple
    else:
        width = config.document_len
        longest[-1] = max(-(-longest[-1] // multiple), 1) * multiple
    columns = np.arange(width)
    mask = columns < lengths[..., None]  # (B, documents, width)
    # Columns after a document read the next one, or nothing after the last: clip, then mask.
    at = np.minimum(starts[..., None] + columns, len(split.tokens) - 1)
    tokens = np.where(mask, split.tokens[at].astype(np.int64) + split.offset, PADDING_ID)
    L = (num_documents - 1) * width + int(longest[-1])
    tokens, mask = (x.reshape(len(rows), -1)[:, :L] for x in (tokens, mask))

    def to_device(array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    return Batch(
        tokens=to_device(tokens),
        mask=None if mask.all() else to_device(mask),
        labels=to_device(split.labels[rows]),
    )


def epoch_batches(
    split: PackedSplit, config: Config, epoch: int, batch_size: int | None = None
) -> np.ndarray:
    """Return the rows (batches, batch_size) of one epoch; an incomplete batch is dropped.

    With `bucket_by_length` the shuffled rows are sorted by length inside windows of
    `BUCKET_BATCHES` batches, and the batches are shuffled again.
    """
    random = np.random.default_rng([config.seed, epoch])
    B = batch_size or config.batch_size
    rows = random.permutation(len(split))[: len(split) // B * B]  # before they are sorted
    if config.bucket_by_length:
        lengths = split.lengths.max(axis=1)
        window = B * BUCKET_BATCHES
        rows = np.concatenate([
            part[np.argsort(lengths[part], kind="stable")]
            for part in np.split(rows, range(window, len(rows), window))
        ])
    batches = rows.reshape(-1, B)
    return random.permutation(batches, axis=0) if config.bucket_by_length else batches


def training_batches(
    stages: PackedSplit | Mapping[int, PackedSplit],
    config: Config,
    device: torch.device,
    start_step: int = 0,
    processes: Processes = ALONE,
    *,
    whole_segments: bool = False,
) -> Iterator[list[Batch]]:
    """Yield the `accumulate` batches of each step from `start_step` on, epoch after epoch.

    A step's examples are the same however they are divided among processes and accumulation.

    Args:
        stages: a split; or, by the step from which each is used, the splits of a curriculum.
    Raises:
        ConfigError: a split holds fewer examples than one step.
    """
    if isinstance(stages, PackedSplit):
        stages = {0: stages}
    size = config.batch_size * config.accumulate * processes.world_size
    for split in stages.values():
        if len(split) < size:
            raise ConfigError(
                f"a step takes batch_size={config.batch_size} x accumulate={config.accumulate} x "
                f"{processes.world_size} processes = {size} examples, the training split has "
                f"{len(split)}; lower batch_size"
            )

    @functools.lru_cache(maxsize=1)  # sorting is done once per epoch
    def order(first: int, epoch: int) -> np.ndarray:
        return epoch_batches(stages[first], config, epoch, size)

    for step in itertools.count(start_step):
        first = max(first for first in stages if first <= step)
        epoch, position = divmod(step - first, len(stages[first]) // size)
        rows = order(first, epoch)[position].reshape(config.accumulate, processes.world_size, -1)
        yield [
            collate(stages[first], part, config, device, whole_segments=whole_segments)
            for part in rows[:, processes.rank]
        ]


def evaluation_batches(
    split: PackedSplit,
    config: Config,
    device: torch.device,
    processes: Processes = ALONE,
    *,
    whole_segments: bool = False,
) -> Iterator[Batch]:
    """Yield every example once, in batches of similar length. Each process yields its share."""
    rows = np.argsort(split.lengths.max(axis=1), kind="stable")
    for start in range(0, len(rows), config.batch_size)[processes.rank :: processes.world_size]:
        chunk = rows[start : start + config.batch_size]
        yield collate(split, chunk, config, device, whole_segments=whole_segments)
