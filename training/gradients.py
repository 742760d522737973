"""What all segments of a step share: weights cast once, gradients added in one operation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from model import SegmentRecurrent, autocast_dtype

Source = tuple[Tensor, Tensor]  # a tensor, and the leaf that stands for it in the segments


@contextlib.contextmanager
def shared_weights(model: SegmentRecurrent) -> Iterator[list[Source]]:
    """Cast the weights of matrix products once, for all segments that are run inside.

    Yields:
        Every trained parameter and the leaf that the segments read in its place: a copy in the
        lower precision, or itself where nothing is cast.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    dtype = autocast_dtype(model.precision, next(model.parameters()).device)
    places = [] if dtype is None else [
        (module._parameters, name)
        for module in model.layers.modules() if isinstance(module, nn.Linear | nn.Conv2d)
        for name, _ in module.named_parameters(recurse=False)
    ]
    originals = [registry[name] for registry, name in places]
    casts = [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in originals]
    if casts:
        with torch.no_grad():
            torch._foreach_copy_(casts, originals)
    for cast, original in zip(casts, originals, strict=True):
        cast.requires_grad_(original.requires_grad)
    leaves = dict(zip(originals, casts, strict=True))
    try:
        for (registry, name), cast in zip(places, casts, strict=True):
            registry[name] = cast
        yield [(p, leaves.get(p, p)) for p in parameters]
    finally:
        for (registry, name), original in zip(places, originals, strict=True):
            registry[name] = original


class GradientSums:
    """The gradients of leaves, summed over several backward passes.

    `.grad` stays as it is until `send_on`, and each pass's gradients are added in one multi-tensor
    operation, in the precision of the leaf's source whatever the leaf's own. Sources that are not
    trained are left out.
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
        return gradient

    def _widened(self, found: dict[int, Tensor]) -> dict[int, Tensor]:
        """Gradients in the precision of their sources."""
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
                trained, or have no gradient, are left out.
        """
        ends = [(self.sources[i][0], total) for i, total in self.sums.items()]
        ends += [(x, g) for x, g in further if x.requires_grad and g is not None]
        if ends:
            torch.autograd.backward(*zip(*ends, strict=True))
