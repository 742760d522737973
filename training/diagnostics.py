"""What goes wrong inside this model when a run is sick: for `log_internals`."""

from __future__ import annotations

import torch
from torch import Tensor

from attention import AstromorphicAttention
from dataloader import Batch
from model import RMAAT


@torch.no_grad()
def inspect_model(model: RMAAT, batch: Batch) -> dict[str, float]:
    """Run one batch without dropout and look inside.

    Returns:
        `calcium_min`, the least C of any real row, layer and segment (where P = 1 / C is on: the
        attention grows as it falls), and `memory_norm/t`, the mean norm of the memory tokens that
        leave segment t, their retention factor included.
    """
    least: list[Tensor] = []

    def record(attention: AstromorphicAttention, arguments: tuple, _: Tensor) -> None:
        x, mask, *_ = arguments
        calcium = attention.calcium(x, mask)[..., 0]  # (B, H, N)
        if mask is not None:
            calcium = calcium.masked_fill(~mask[:, None], torch.inf)
        least.append(calcium.min())

    hooks = [
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
    if model.config.num_memory_tokens:
        found |= {
            f"memory_norm/{t}": float(memory.norm(dim=-1).mean())
            for t, memory in enumerate(memories, start=1)
        }
    return found
