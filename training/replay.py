"""`replay_segments`: the memory that AMRB may spend on activations in the place of replays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dataloader import Batch
from lra_config import Config
from model import RMAAT
from run.program import log_line
from training.gradients import shared_weights
from utils import free_memory, restore

SHARE = 0.5  # of the memory that is free in the first step, for kept activations


class BudgetedReplay:
    """`amrb_backward` with the activations of as many segments kept as `replay_segments` allows.

    With auto the first step measures what a segment's activations take and keeps as many as fit
    into `SHARE` of the free memory. A step that runs out of memory all the same is done again,
    with half as many kept from then on; `.grad` takes in nothing of the failed one.
    """

    def __init__(self, backward: Callable[..., Any], config: Config) -> None:
        self.backward = backward
        self.num_segments = config.num_segments // config.num_sequences  # T
        asked = config.replay_segments
        self.kept = None if asked == "auto" else self.num_segments - asked

    def __call__(
        self, model: RMAAT, batch: Batch, scale: float | torch.Tensor = 1.0,
        seed: torch.Tensor | None = None,
    ) -> Any:
        """Add the gradients of `scale` times the mean loss to `.grad`; a `train.StepResult`."""
        if seed is None:
            seed = model.dropout_seed()  # here: a step done again must drop the same
        if self.kept is None:
            self.kept = self._fitting(model, batch, seed)
        statistics = [buffer.clone() for buffer in model.head.buffers()]
        while True:
            try:
                return self.backward(model, batch, scale, seed, self.kept)
            except torch.OutOfMemoryError:
                if self.kept == 1:
                    raise
            # Outside of the handler, whose error holds the failed step's tensors.
            kept, self.kept = self.kept, self.kept // 2
            restore(model.head.buffers(), statistics)
            torch.cuda.empty_cache()
            log_line(
                f"out of memory with the activations of {kept} segments kept, "
                f"{self.kept} from now on"
            )

    def _fitting(self, model: RMAAT, batch: Batch, seed: torch.Tensor | None) -> int:
        """How many segments' activations fit, at least 1."""
        free = free_memory(model.memory.device)
        each = activation_bytes(model, batch, seed)
        kept = min(1 + int(SHARE * free / each), self.num_segments)
        log_line(
            f"replay_segments: {self.num_segments - kept} of {self.num_segments}; a segment's "
            f"activations take {each / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free"
        )
        return kept


def activation_bytes(model: RMAAT, batch: Batch, seed: torch.Tensor | None = None) -> int:
    """Bytes that one whole segment of `batch` keeps for its backward pass, run eagerly.

    Compiled segments keep less.
    """
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    segments, _ = model.split(batch.tokens, batch.mask)
    with (
        shared_weights(model) as weights, torch.compiler.set_stance("force_eager"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        positions = model.positions()
        kept.clear()
        outputs = next(model.recur(segments[:1], positions, seed))  # holds what was kept
        for _, leaf in weights:
            kept.pop(leaf.data_ptr(), None)
        del outputs
    M, length = model.memory.shape[0], segments[0].tokens.shape[1]
    return sum(kept.values()) * (M + model.segment_len) // (M + length)
