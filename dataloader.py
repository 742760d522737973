"""Batches: packed splits to device tensors, in a seeded order that any step can resume.

The order is a pure function of (seed, epoch), so a checkpoint stores no loader state: the batch of
a step is found from the step's number alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import run.program  # noqa: F401 - before all others, as it refuses foreign modules
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

    It is padded further to a multiple of `TRIM_TOKENS`, or to whole segments where few shapes
    matter more (compilation, CUDA graphs).

    A pair of documents stands in one row of tokens. Encoded jointly, the second begins at the
    fixed column `document_len`; encoded apart, both halves are as long as the longest document.
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
    # Past the end of a document lies the next one, and past the last one nothing: clip, then blank.
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
    """The rows (batches, batch_size) of one epoch; what does not fill a batch is left out.

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
    """Endless steps from `start_step` on, epoch after epoch: the `accumulate` batches of each.

    A step's examples are the same however they are divided among processes and accumulation.

    Args:
        stages: a split; or, by the step from which each is used, the splits of a curriculum.
    Raises:
        ConfigError: a split holds fewer examples than one step.
    """
    if isinstance(stages, PackedSplit):
        stages = {0: stages}
    ends = [*list(stages)[1:], None]
    for (first, split), end in zip(stages.items(), ends, strict=True):
        if end is not None and start_step >= end:
            continue
        steps = stage_batches(
            split, config, device, start_step - first, processes, whole_segments=whole_segments
        )
        yield from itertools.islice(steps, None if end is None else end - start_step)
        start_step = end or 0


def stage_batches(
    split: PackedSplit,
    config: Config,
    device: torch.device,
    start_step: int,
    processes: Processes,
    *,
    whole_segments: bool,
) -> Iterator[list[Batch]]:
    """Yield the steps of one split from `start_step` on, without an end. Raises ConfigError."""
    size = config.batch_size * config.accumulate * processes.world_size
    per_epoch = len(split) // size
    if not per_epoch:
        raise ConfigError(
            f"a step takes batch_size={config.batch_size} x accumulate={config.accumulate} x "
            f"{processes.world_size} processes = {size} examples, the training split has "
            f"{len(split)}; lower batch_size"
        )
    epoch, position = divmod(start_step, per_epoch)
    while True:
        for rows in epoch_batches(split, config, epoch, size)[position:]:
            own = rows.reshape(config.accumulate, processes.world_size, config.batch_size)
            yield [
                collate(split, part, config, device, whole_segments=whole_segments)
                for part in own[:, processes.rank]
            ]
        epoch, position = epoch + 1, 0


def evaluation_batches(
    split: PackedSplit,
    config: Config,
    device: torch.device,
    processes: Processes = ALONE,
    *,
    whole_segments: bool = False,
) -> Iterator[Batch]:
    """Every example once, in batches of like length; of several processes, each its share."""
    rows = np.argsort(split.lengths.max(axis=1), kind="stable")
    for start in range(0, len(rows), config.batch_size)[processes.rank :: processes.world_size]:
        chunk = rows[start : start + config.batch_size]
        yield collate(split, chunk, config, device, whole_segments=whole_segments)
