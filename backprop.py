"""Gradients of one batch: BPTT, and AMRB, which replays segments from stored memories."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dataloader import Batch
from model import RMAAT


class StepResult(NamedTuple):
    """What a backward pass leaves behind besides `.grad`."""

    loss: Tensor  # () mean cross-entropy, in nats, detached
    logits: Tensor  # (B, C), detached


def bptt_backward(
    model: RMAAT, batch: Batch, scale: float | Tensor = 1.0, seed: Tensor | None = None
) -> StepResult:
    """Add the gradients of the mean loss to `.grad`, holding all segments' activations at once.

    Args:
        batch: tokens (B, L), mask (B, L) or None, labels (B,).
        scale: factor on the gradients, for accumulation and for float16.
        seed: of the dropout masks; None draws one, if any is needed.
    """
    logits = model(batch.tokens, batch.mask, seed)
    loss = F.cross_entropy(logits, batch.labels)
    (scale * loss).backward()
    return StepResult(loss.detach(), logits.detach())


def amrb_backward(
    model: RMAAT, batch: Batch, scale: float | Tensor = 1.0, seed: Tensor | None = None
) -> StepResult:
    """Add the gradients of the mean loss to `.grad`, holding one segment's activations at a time.

    The gradients are those of `bptt_backward`. The first pass keeps the T memories (B, M, D) that
    enter the segments; the backward pass runs each segment again from its memory. The last
    segment's first run is kept, so a step costs (4T - 1) / (3T) of BPTT's arithmetic.

    Args:
        batch: tokens (B, L), mask (B, L) or None, labels (B,).
        scale: factor on the gradients, for accumulation and for float16.
        seed: of the dropout masks; None draws one, if any is needed.
    Source: RMAAT, astrocytic memory replay backpropagation (PAPER 1.3).
    """
    segments, mask = model.split(batch.tokens, batch.mask)
    last = len(segments) - 1
    initial_memory = model.initial_memory(len(segments[0].tokens))  # (B, M, D)
    positions = model.positions()
    # Every replay adds its gradient here; one backward through `positions()` takes the sum on.
    shared = None if positions is None else _leaf(positions)
    if seed is None:
        seed = model.dropout_seed()  # one for both passes: the replay drops what the first one did

    def run(index: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        tokens, segment_mask = segments[index]
        return model.segment(tokens, memory, index, segment_mask, shared, seed)

    replay_buffer, readouts = [], []
    memory = initial_memory.detach()
    with torch.no_grad():
        for index in range(last):
            replay_buffer.append(memory)
            memory, readout = run(index, memory)
            readouts.append(readout)
    memory_in = _leaf(memory)
    memory_out, readout = run(last, memory_in)

    readout_leaves = [_leaf(r) for r in [*readouts, readout]]  # each (B, D)
    logits = model.head(model.combine(readout_leaves, mask))
    loss = F.cross_entropy(logits, batch.labels)
    (scale * loss).backward()

    torch.autograd.backward(readout, readout_leaves[last].grad)
    for index in reversed(range(last)):
        memory_grad = memory_in.grad  # of mem_{t+1}, (B, M, D)
        memory_in = _leaf(replay_buffer.pop())
        memory_out, readout = run(index, memory_in)
        # One call for both paths: two would need the graph twice.
        torch.autograd.backward([readout, memory_out], [readout_leaves[index].grad, memory_grad])
    torch.autograd.backward(initial_memory, memory_in.grad)
    if positions is not None:
        torch.autograd.backward(positions, shared.grad)
    return StepResult(loss.detach(), logits.detach())


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
