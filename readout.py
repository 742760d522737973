"""The read-out: from the rows of each segment to the logits.

Every segment contributes one vector per sample (`segment_readout`). They are pooled over the
sequence (`combine_readouts`) and classified (`build_head`). The key `pooling` decides what is read:

    mean        the mean over all real tokens of all segments, without the memory rows
    last        the mean over the real tokens of the last segment that holds one
    memory      the mean of the M memory rows that leave that segment, before the retention factor
    intensity   of images: the sum of all rows, each times (gray level / 255)^8, so that a few
                bright pixels, such as Pathfinder's markers, outweigh hundreds of dim ones

A sequence without a real token is read out as zero. Shape letters are those of `model.py`.
Deviation: the paper does not publish its read-out or its head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dataloader import Batch
from lra_config import Config

INTENSITY_POWER = 8  # of a gray level under `pooling: intensity`: a half counts 1 / 256
READOUT_MOMENTUM = 0.02  # of the running statistics that `readout_norm: batch` evaluates with


def intensity(tokens: Tensor) -> Tensor:
    """Return the weight of each pixel under `pooling: intensity`.

    Args:
        tokens: integer ids, gray levels + 1; 0 is padding.
    """
    return ((tokens - 1).clamp_min(0) / 255).pow(INTENSITY_POWER)


def segment_readout(
    pooling: str, memory_out: Tensor, x: Tensor, tokens: Tensor, mask: Tensor | None
) -> Tensor:
    """Return the share of one segment in the read-out.

    Args:
        pooling: one of the four kinds above.
        memory_out: (B, M, D), before the retention factor.
        x: (B, S, D), the encoded tokens.
        tokens: (B, S) integer ids.
        mask: (B, S) bool, True at real tokens; None if nothing is padded.
    Returns:
        (B, D), at least float32 for sums: the sum of the rows (`mean`, `intensity`), their mean
        (`last`) or the mean of the memory rows (`memory`).
    """
    if pooling == "memory":
        return memory_out.mean(dim=1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if pooling == "intensity":
        # Not a matrix product, which autocast would compute in its lower precision.
        return (intensity(tokens)[..., None] * x).sum(dim=1, dtype=dtype)
    if mask is None:
        total, count = x.sum(dim=1, dtype=dtype), x.shape[1]
    else:
        total = (x * mask[..., None]).sum(dim=1, dtype=dtype)
        count = mask.sum(dim=1, keepdim=True).clamp_min(1)  # (B, 1)
    return total if pooling == "mean" else total / count


def combine_readouts(
    pooling: str, readouts: Sequence[Tensor], mask: Tensor | None, segment_len: int
) -> Tensor:
    """Pool the read-outs of all segments into the head's input.

    Args:
        pooling: one of the four kinds above.
        readouts: one (B, D) per segment that ran, in order.
        mask: (B, L) bool of the sequence; None if all these segments are full.
        segment_len: S, in tokens.
    Returns:
        (B, D).
    """
    stacked = torch.stack(list(readouts), dim=1)  # (B, T, D)
    if pooling == "intensity":
        return stacked.sum(dim=1)
    if pooling == "mean":
        if mask is None:
            return stacked.sum(dim=1) / (len(readouts) * segment_len)
        return stacked.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1)
    if mask is None:
        return stacked[:, -1]
    active = torch.stack([m.any(dim=1) for m in mask.split(segment_len, dim=1)], dim=1)
    order = torch.arange(1, active.shape[1] + 1, device=active.device)
    last = (active * order).argmax(dim=1)  # (B,)
    return stacked.take_along_dim(last[:, None, None], dim=1)[:, 0]


class PairLinear(nn.Linear):
    """A linear map of the match [u, v, u * v, u - v] of two separately encoded documents.

    `readout_norm` normalizes u and v before the match. Otherwise the features that all documents
    share would dominate u * v.
    """

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__(4 * dim, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, out_features) of read-outs (2B, D), in which pairs are adjacent."""
        u, v = x.unflatten(0, (-1, 2)).unbind(1)  # (B, D) each
        return super().forward(torch.cat([u, v, u * v, u - v], dim=1))


def build_head(config: Config) -> nn.Module:
    """Return the head: logits (B, C) of read-outs (B, D), or (2B, D) with separate documents.

    Under mean pooling the segments' shares are added. A linear head weighs them but cannot relate
    the findings of two segments. `classifier_dim` adds a hidden layer, as LRA's baselines have it.
    """
    hidden, classes = config.classifier_dim, config.task.num_classes
    first = nn.Linear if config.num_sequences == 1 else PairLinear
    modules: list[nn.Module] = []
    if config.readout_norm == "batch":
        # The next linear map includes scale and shift.
        modules.append(nn.BatchNorm1d(config.dim, momentum=READOUT_MOMENTUM, affine=False))
    modules.append(first(config.dim, hidden or classes))
    if hidden:
        modules += [nn.GELU(), nn.Linear(hidden, classes)]
    return nn.Sequential(*modules) if len(modules) > 1 else modules[0]


@torch.no_grad()
def recompute_statistics(model: nn.Module, batches: Iterable[Batch]) -> None:
    """Recompute the running statistics of `readout_norm: batch` from the current weights.

    At a high learning rate the mean of a read-out drifts by more than its deviation within the
    window of a running average. Evaluated with such an average, a trained model guesses.

    Args:
        model: a `model.RMAAT`; it is in training mode afterwards.
        batches: of the training split; each counts the same.
    """
    norm = model.head[0]
    momentum, norm.momentum = norm.momentum, None  # None: the mean over all batches
    norm.reset_running_stats()
    model.eval()
    norm.train()
    for batch in batches:
        model(batch.tokens, batch.mask)
    norm.momentum = momentum
    model.train()
