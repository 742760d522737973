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
    if seed is None:
        seed = model.dropout_seed()  # one for both passes: the replay drops what the first one did
    # All that stays over the segments is allocated before them: small tensors that stay, strewn
    # between activations that go, would leave the heap full of holes.
    B, M, D = initial_memory.shape
    replay_buffer = initial_memory.new_empty(last + 1, B, M, D)
    readouts = initial_memory.new_empty(last + 1, B, D)
    shared = None
    if positions is not None:
        # Every replay adds its gradient here; one backward through `positions()` takes the sum on.
        shared = _leaf(positions)
        shared.grad = torch.zeros_like(shared)

    def run(index: int, memory: Tensor) -> tuple[Tensor, Tensor]:
        tokens, segment_mask = segments[index]
        return model.segment(tokens, memory, index, segment_mask, shared, seed)

    replay_buffer[0] = initial_memory.detach()
    with torch.no_grad():
        for index in range(last):
            replay_buffer[index + 1], readouts[index] = run(index, replay_buffer[index])
    memory_in = _leaf(replay_buffer[last])
    _, readout = run(last, memory_in)
    readouts[last] = readout.detach()

    readouts = _leaf(readouts)
    logits = model.head(model.combine(readouts.unbind(0), mask))
    loss = F.cross_entropy(logits, batch.labels)
    (scale * loss).backward()

    torch.autograd.backward(readout, readouts.grad[last])
    for index in reversed(range(last)):
        memory_grad = memory_in.grad  # of mem_{t+1}, (B, M, D)
        memory_in = _leaf(replay_buffer[index])
        memory_out, readout = run(index, memory_in)
        # One call for both paths: two would need the graph twice.
        torch.autograd.backward([readout, memory_out], [readouts.grad[index], memory_grad])
    torch.autograd.backward(initial_memory, memory_in.grad)
    if positions is not None:
        torch.autograd.backward(positions, shared.grad)
    return StepResult(loss.detach(), logits.detach())


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()
