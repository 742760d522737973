"""A look inside the model: what goes wrong when a run is sick, and what its attention reads."""

from __future__ import annotations

import torch
from torch import Tensor

from attention import AstromorphicAttention, LinearAttention, SoftmaxAttention
from attention.baselines import softmax_attention, visible_keys
from attention.equations import Terms, astromorphic_response
from attention.heads import Attention
from dataloader import Batch
from model import RMAAT, autocast_dtype
from run.state import NonFiniteError


def check_finite(model: RMAAT, failed: int, what: str) -> None:
    """Raise NonFiniteError if logits of a validation, a test or a prediction are not finite.

    Args:
        failed: the number of examples with such logits.
        what: the name of what was classified, for the message.
    """
    if not failed:
        return
    lower = autocast_dtype(model.precision, model.memory.device)
    advice = "lower learning_rate and train again, or name another checkpoint"
    if lower is not None:
        advice = f"set precision=float32 instead of {str(lower).removeprefix('torch.')}"
    raise NonFiniteError(f"{what}: the logits of {failed:,} are not finite; {advice}")


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


@torch.no_grad()
def attention_rows(model: RMAAT, tokens: Tensor, index: int) -> Tensor:
    """The weights A with which the rows of one segment read its values, per layer and head.

    These mechanisms are linear in V: what they answer to V = 1 is A, whose N x N entries none of
    them forms in training.

    Args:
        tokens: (1, L) integer ids, L at most `max_seq_len`.
        index: of the segment, from 0.
    Returns:
        (layers, H, N, N); A V is the heads' response.
    Raises:
        ValueError: there is no such segment, or the attention has no such weights.
    """
    segments, _ = model.split(tokens)
    if not 0 <= index < len(segments):
        raise ValueError(f"segment {index} of {len(segments)}; count them from 0")
    found: list[Tensor] = []

    def record(attention: Attention, arguments: tuple, _: Tensor) -> None:
        x, mask, positions = arguments
        q, k, _ = attention.project(x)
        unit = torch.eye(x.shape[1], dtype=q.dtype, device=q.device).expand(*q.shape[:2], -1, -1)
        if isinstance(attention, SoftmaxAttention):
            found.append(softmax_attention(q, k, unit, visible_keys(mask))[0])
            return
        terms = attention.terms if isinstance(attention, AstromorphicAttention) else Terms()
        found.append(astromorphic_response(q, k, unit, mask, positions, terms)[0])

    layers = [module for module in model.modules() if isinstance(module, Attention)]
    for layer in layers:
        kinds = (AstromorphicAttention, LinearAttention, SoftmaxAttention)
        if not isinstance(layer, kinds) or model.config.hebbian_sigmoid:
            raise ValueError(
                "only attention that is linear in its values reads by weights: astro (without "
                "hebbian_sigmoid), linear and softmax"
            )
    training = model.training
    model.eval()
    hooks = []
    try:
        memory = model.initial_memory(1)
        for passed in model.recur(segments[:index]):
            memory = passed[0]
        hooks = [layer.register_forward_hook(record) for layer in layers]
        with torch.compiler.set_stance("force_eager"):
            model.segment(segments[index].tokens, memory, index, segments[index].mask)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return torch.stack(found)
