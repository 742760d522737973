"""What goes wrong inside this model when a run is sick: for `log_internals`."""

from __future__ import annotations

import torch
from torch import Tensor

from attention import AstromorphicAttention
from attention.heads import Attention
from dataloader import Batch
from model import RMAAT


@torch.no_grad()
def inspect_model(model: RMAAT, batch: Batch) -> dict[str, float]:
    """Run one batch without dropout and look inside.

    Returns:
        `calcium_min`, the least C of any real row, layer and segment (where P = 1 / C is on: the
        attention grows as it falls), and `memory_norm/t`, the mean norm of the memory tokens that
        leave segment t, their retention factor included. `attention_spread/l` says how far the
        rows of layer l's attention differ: the deviation over the real rows of a sample against
        the rms, 0 where all rows are alike, averaged over the segments.
    """
    least: list[Tensor] = []

    def record(attention: AstromorphicAttention, arguments: tuple, _: Tensor) -> None:
        x, mask, *_ = arguments
        calcium = attention.calcium(x, mask)[..., 0]  # (B, H, N)
        if mask is not None:
            calcium = calcium.masked_fill(~mask[:, None], torch.inf)
        least.append(calcium.min())

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    spreads: list[list[Tensor]] = [[] for _ in layers]

    def record_spread(layer: int, mask: Tensor | None, y: Tensor) -> None:
        real = torch.ones_like(y[..., :1]) if mask is None else mask[..., None].to(y.dtype)
        mean = (y * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True).clamp_min(1)
        deviation, total = (((x * real).square().sum()) for x in (y - mean, y))
        spreads[layer].append((deviation / total.clamp_min(1e-30)).sqrt())

    hooks = [
        module.register_forward_hook(
            lambda _, arguments, y, layer=layer: record_spread(layer, arguments[1], y)
        )
        for layer, module in enumerate(layers)
    ]
    hooks += [
        module.register_forward_hook(record)
        for module in model.modules()
        if isinstance(module, AstromorphicAttention) and module.terms.normalize
    ]
    training = model.training
    model.eval()
    try:
        segments, _ = model.split(batch.tokens, batch.mask)
        with torch.compiler.set_stance("force_eager"):  # compiled forms would leave the hooks out
            memories = [memory for memory, _ in model.recur(segments)]
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    found = {"calcium_min": float(torch.stack(least).min())} if least else {}
    found |= {
        f"attention_spread/{layer}": float(torch.stack(values).mean())
        for layer, values in enumerate(spreads, start=1)
    }
    if model.config.num_memory_tokens:
        found |= {
            f"memory_norm/{t}": float(memory.norm(dim=-1).mean())
            for t, memory in enumerate(memories, start=1)
        }
    return found
