"""The gradients of one batch: backpropagation through time (BPTT) and memory replay (AMRB)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataloader import Batch
from model import autocast_dtype
from recurrence import SegmentRecurrent

Source = tuple[Tensor, Tensor]  # a tensor, and the leaf that stands for it in the segments


class StepResult(NamedTuple):
    """The loss and the logits of one batch."""

    loss: Tensor  # () mean cross-entropy, in nats, detached
    logits: Tensor  # (B, C), detached


def bptt_backward(
    model: SegmentRecurrent, batch: Batch, scale: float | Tensor = 1.0, seed: Tensor | None = None
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
    model: SegmentRecurrent, batch: Batch, scale: float | Tensor = 1.0, seed: Tensor | None = None,
    kept: int = 1,
) -> StepResult:
    """Add the gradients of the mean loss to `.grad`, holding `kept` segments' activations at most.

    The gradients are those of `bptt_backward`. The first pass keeps the memories (B, M, D) that
    enter the segments, and the activations of the last `kept` ones; the backward pass runs each
    other segment again from its memory. With k of T segments kept a step costs
    (4T - k) / (3T) of BPTT's arithmetic.

    Args:
        batch: tokens (B, L), mask (B, L) or None, labels (B,).
        scale: factor on the gradients, for accumulation and for float16.
        seed: of the dropout masks; None draws one, if any is needed.
        kept: at least 1, the algorithm as published but for the last segment's second run.
    Source: RMAAT, astrocytic memory replay backpropagation.
    """
    segments, mask = model.split(batch.tokens, batch.mask)
    replayed = max(len(segments) - kept, 0)
    initial_memory = model.initial_memory(len(segments[0].tokens))  # (B, M, D)
    positions = model.positions()
    shared = None if positions is None else _leaf(positions)
    if seed is None:
        seed = model.dropout_seed()  # one for both passes, so that both drop the same
    # Tensors that outlive the segments are allocated before them: small ones between activations
    # that are freed would fragment the heap.
    B, M, D = initial_memory.shape
    replay_buffer = initial_memory.new_empty(replayed + 1, B, M, D)
    readouts = initial_memory.new_empty(len(segments), B, D)

    def run(first: int, last: int, memory: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        return model.recur(segments[first:last], shared, seed, first=first, memory=memory)

    with shared_weights(model) as weights:
        gradients = GradientSums([*weights, *([] if shared is None else [(positions, shared)])])
        replay_buffer[0] = initial_memory.detach()
        with torch.no_grad():
            for index, passed in enumerate(run(0, replayed, replay_buffer[0])):
                replay_buffer[index + 1], readouts[index] = passed
        memory_in = _leaf(replay_buffer[replayed])
        held = [readout for _, readout in run(replayed, len(segments), memory_in)]
        readouts[replayed:] = torch.stack(held).detach()

        readouts = _leaf(readouts)
        logits = model.head(model.combine(readouts.unbind(0), mask))
        loss = F.cross_entropy(logits, batch.labels)
        readout_grads = gradients.add([scale * loss], None, readouts).unbind(0)  # T of (B, D)

        memory_grad = gradients.add(held, readout_grads[replayed:], memory_in)
        del held
        for index in reversed(range(replayed)):
            memory_in = _leaf(replay_buffer[index])
            memory_out, readout = next(run(index, index + 1, memory_in))
            # One call for both paths: two would need the graph twice.
            memory_grad = gradients.add(
                [readout, memory_out], [readout_grads[index], memory_grad], memory_in
            )
    gradients.send_on((initial_memory, memory_grad))
    return StepResult(loss.detach(), logits.detach())


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def score(
    model: SegmentRecurrent, batch: Batch, scale: float = 1.0, seed: Tensor | None = None
) -> StepResult:
    """Return the mean loss and the logits of a batch, without gradients."""
    with shared_weights(model):
        logits = model(batch.tokens, batch.mask, seed)
    return StepResult(scale * F.cross_entropy(logits, batch.labels), logits)


@contextlib.contextmanager
def shared_weights(model: SegmentRecurrent) -> Iterator[list[Source]]:
    """Cast the weights of matrix products once, for all segments that are run inside.

    Yields:
        Every trained parameter and the leaf that the segments read for it: a copy in the lower
        precision, or the parameter itself if nothing is cast.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    dtype = autocast_dtype(model.precision, next(model.parameters()).device)
    slots = [] if dtype is None else [
        (module, name, parameter)
        for module in model.layers.modules() if isinstance(module, nn.Linear | nn.Conv2d)
        for name, parameter in module.named_parameters(recurse=False)
    ]
    originals = [parameter for _, _, parameter in slots]
    casts = [
        nn.Parameter(torch.empty_like(p, dtype=dtype), requires_grad=p.requires_grad)
        for p in originals
    ]
    if casts:
        with torch.no_grad():
            torch._foreach_copy_(casts, originals)
    leaves = dict(zip(originals, casts, strict=True))
    try:
        for (module, name, _), cast in zip(slots, casts, strict=True):
            setattr(module, name, cast)
        yield [(p, leaves.get(p, p)) for p in trained]
    finally:
        for module, name, original in slots:
            setattr(module, name, original)


class GradientSums:
    """The gradients of leaves, summed over several backward passes.

    `.grad` is unchanged until `send_on`. The gradients of each pass are added in one multi-tensor
    operation, in the precision of the leaf's source. Sources that are not trained are ignored.
    """

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = [(source, leaf) for source, leaf in sources if source.requires_grad]
        self.sums: dict[int, Tensor] = {}  # by the source's index

    def add(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None] | None, entered: Tensor
    ) -> Tensor | None:
        """Go back once through the graph of `outputs`, given their gradients.

        Args:
            gradients: one per output, None where the output does not reach the loss; None: all 1.
            entered: a further leaf, which the outputs depend on.
        Returns:
            Its gradient, which is part of no sum; None where the loss does not depend on it.
        """
        if gradients is None:
            gradients = [torch.ones_like(output) for output in outputs]
        pairs = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if output.requires_grad and gradient is not None
        ]
        if not pairs:
            return None
        leaves = [entered, *(leaf for _, leaf in self.sources)]
        outputs, gradients = zip(*pairs, strict=True)
        gradient, *found = torch.autograd.grad(outputs, leaves, gradients, allow_unused=True)
        found = self._widened({i: g for i, g in enumerate(found) if g is not None})
        again = [i for i in found if i in self.sums]
        if again:
            torch._foreach_add_([self.sums[i] for i in again], [found[i] for i in again])
        self.sums = {**found, **self.sums}
        # A copy: the gradient of a memory is a view that keeps the gradient of all rows alive.
        return None if gradient is None else gradient.clone()

    def _widened(self, found: dict[int, Tensor]) -> dict[int, Tensor]:
        """Return gradients in the precision of their sources."""
        dtypes = {i: self.sources[i][0].dtype for i in found}
        narrow = {i: g for i, g in found.items() if g.dtype != dtypes[i]}
        wide = [torch.empty_like(g, dtype=dtypes[i]) for i, g in narrow.items()]
        if narrow:
            torch._foreach_copy_(wide, list(narrow.values()))
        return {**found, **dict(zip(narrow, wide, strict=True))}

    def send_on(self, *further: tuple[Tensor, Tensor | None]) -> None:
        """Take the sums on from the sources: into `.grad` of parameters, back through graphs.

        Args:
            further: tensors and their gradients, which go the same way. Those that are not
                trained, or have no gradient, are ignored.
        """
        ends = [(self.sources[i][0], total) for i, total in self.sums.items()]
        ends += [(x, g) for x, g in further if x.requires_grad and g is not None]
        if ends:
            torch.autograd.backward(*zip(*ends, strict=True))
