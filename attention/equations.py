"""Astromorphic attention as equations: pure functions, without weights.

One head, one segment of n = M + S rows X (memory tokens, then tokens). In the equations a letter is
the paper's symbol; in shapes, as (B, H, N, d), it is one of `model.py`.

    phi(x)   = elu(x) + 1                                     feature_map
    Q, K, V  = X W_Q, X W_K, X W_V      (n x m, m, d_v)       Attention.to_qkv; d_v = d
    P_pos,ij = exp(-|i - j| decay_scale)     (n x n)          apply_position_kernel
    D        = B P_pos B^T              (m x m)               AstromorphicAttention.positions
    R        = B^T D                    (n x m)               its result is phi(R)

    Write, once per segment; the size of the results does not depend on n:
    H_neuron = phi(K)^T V / m           (m x d_v)             keys.mT @ v / divisor, together:
    H_astro  = phi(R)^T V / m           (m x d_v)             keys = phi(K) + phi(R)
    H        = H_neuron + H_astro                             hebbian; AT takes its sigmoid
    g        = (sum_t phi(k_t))^alpha   (1 x m)               presynaptic_plasticity

    Read, row by row:
    C        = phi(Q) g^T               (n x 1)               calcium_response
    P        = 1 / C, 0 where C is 0    (n x 1)               inverse_calcium
    L        = (phi(Q) H) * P + X       (n x d_v)             astromorphic_response + the residual

B (`position_basis`) is learned; m is `num_hidden`, by default d; alpha is `presynaptic_alpha`, the
divisor is `hebbian_divisor`. The encoder layer adds the residual "+ X" once. Padded rows are no
keys: they are left out of H_neuron, H_astro and g (`mask_rows`), and their own responses have no
meaning. The paper writes P for the position kernel too, which is P_pos here.

`attention_backend: reference` executes `astromorphic_response`. `fused.py` holds the same function
with a written-out gradient, and `astromorphic.py` the weights.

Source: RMAAT (arXiv 2601.00426), astromorphic attention; AT (arXiv 2312.10925), Eqs. 11-17.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KERNEL_CHUNK = 128  # rows that the position kernel mixes densely at a time


def feature_map(x: Tensor) -> Tensor:
    """Return phi(x) = elu(x) + 1: exp(x) below 0, where the sum would cancel, else x + 1."""
    return torch.where(x >= 0, x + 1, x.clamp(max=0).exp())


def apply_position_kernel(x: Tensor, decay_scale: float) -> Tensor:
    """Multiply by the kernel P_pos,ij = exp(-|i - j| * decay_scale) in time linear in N.

    Inside a chunk of rows the product is dense. The kernel is a first-order recurrence in both
    directions. All rows left of a chunk therefore reach its row i through one state, times
    exp(-decay_scale * (i - start)). The same holds for the rows right of it. No exponent is
    positive.

    Args:
        x: (..., N, d).
        decay_scale: per token, at least 0.
    Returns:
        P_pos x, (..., N, d).
    """
    N = x.shape[-2]
    size = min(KERNEL_CHUNK, N)
    chunks = F.pad(x, (0, 0, 0, -N % size)).unflatten(-2, (-1, size))  # (..., chunks, size, d)
    offset = torch.arange(size, device=x.device, dtype=x.dtype)
    from_left = torch.exp(-decay_scale * (offset + 1))[:, None]  # (size, 1)
    from_right = from_left.flip(0)
    inside = torch.exp(-decay_scale * (offset[:, None] - offset).abs())  # (size, size)

    mixed = inside @ chunks
    # The sums that leave a chunk over its last row to the right and over its first to the left.
    leaving_right = mixed[..., -1, :].unbind(-2)
    leaving_left = mixed[..., 0, :].unbind(-2)
    decay = math.exp(-decay_scale * size)
    left, right = [torch.zeros_like(leaving_right[0])], [torch.zeros_like(leaving_left[0])]
    for k in range(len(leaving_right) - 1):
        left.append(leaving_right[k] + decay * left[-1])
        right.append(leaving_left[-1 - k] + decay * right[-1])
    left, right = torch.stack(left, -2), torch.stack(right[::-1], -2)  # (..., chunks, d)
    mixed = mixed + from_left * left[..., None, :] + from_right * right[..., None, :]
    return mixed.flatten(-3, -2)[..., :N, :]


def mask_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero the padded rows of x (B, H, N, d)."""
    return x if mask is None else x * mask[:, None, :, None]


class Terms(NamedTuple):
    """The switches of the attention's terms. The defaults are those of linear attention."""

    alpha: float = 1.0  # exponent of the presynaptic calcium
    divisor: float = 1.0  # of H
    sigmoid: bool = False  # H through a sigmoid
    normalize: bool = True  # P


def response_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type to compute a response to inputs of `dtype` in.

    It is float32 for float16. Sums over tokens exceed float16's largest number, 65,504, and P
    amplifies sums below its smallest.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def astromorphic_response(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, positions: Tensor | None, terms: Terms
) -> Tensor:
    """Write the Hebbian weights of a segment and read them with every query. Linear in N.

    Args:
        q, k: (B, H, N, m).
        v: (B, H, N, d).
        mask: (B, N) bool, True at real rows; None if nothing is padded.
        positions: phi(R), (H, N, m), which adds H_astro to H; None leaves it out.
    Returns:
        The heads' responses (phi(Q) H) * P, (B, H, N, d), of the type of v.
    """
    dtype = response_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        response = _response(q.to(dtype), k.to(dtype), v.to(dtype), mask, positions, terms)
    return response.to(v.dtype)


def _response(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, positions: Tensor | None, terms: Terms
) -> Tensor:
    """Compute `astromorphic_response` in the type of its arguments."""
    if terms.normalize:
        q = q - row_shift(q)
    q, k = feature_map(q), mask_rows(feature_map(k), mask)
    v = mask_rows(v, mask)

    # Write: sums over N, so that no N x N product is formed. H_neuron and H_astro share V.
    keys = k if positions is None else k + positions.to(k.dtype)
    hebbian = keys.mT @ v / terms.divisor  # H, (B, H, m, d)
    if terms.sigmoid:
        hebbian = hebbian.sigmoid()

    # Read
    response = q @ hebbian  # (B, H, N, d)
    if terms.normalize:
        response = response * inverse_calcium(q, k, terms.alpha).to(response.dtype)
    return response


def row_shift(q: Tensor) -> Tensor:
    """Return the largest q of a row if it is negative, else 0, (..., N, 1), a constant.

    Where all q of a row are negative, phi is the exponential. Subtracting the shift then multiplies
    the row of phi(Q), and its C, by one factor, which P cancels. Without the shift, C of a row of
    very negative q vanishes and P grows beyond all bounds.
    """
    return q.detach().amax(dim=-1, keepdim=True).clamp(max=0)


def least_calcium(dtype: torch.dtype) -> float:
    """Return the sum of phi(k) up to which a neuron has no calcium, 6e-16 in float32.

    The gradient of P through g grows up to the power -2 of that sum: it stays in the range of
    `dtype`. Deviation: the paper has no lower bound.
    """
    return torch.finfo(dtype).tiny ** 0.4


def presynaptic_plasticity(total: Tensor, alpha: float) -> Tensor:
    """Return g = total^alpha of the sums `total` of phi(k), and 0 up to `least_calcium`."""
    return F.threshold(total, least_calcium(total.dtype), 0).pow(alpha)


def calcium_response(q: Tensor, k: Tensor, alpha: float) -> Tensor:
    """Return C = phi(Q) g^T with g = (sum_t phi(k_t))^alpha.

    Args:
        q, k: phi(Q) and phi(K), (B, H, N, m); k is zero at padding.
    Returns:
        (B, H, N, 1), at least float32.
    """
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        total = k.sum(dim=2, dtype=dtype)  # (B, H, m)
        return q.to(dtype) @ presynaptic_plasticity(total, alpha)[..., None]


def inverse_calcium(q: Tensor, k: Tensor, alpha: float) -> Tensor:
    """Return P = 1 / C of `calcium_response`, and 0 with a zero gradient where C is 0."""
    # An infinite C in place of 0 has P = 0 and passes no gradient.
    return F.threshold(calcium_response(q, k, alpha), 0, math.inf).reciprocal()
