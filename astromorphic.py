"""The mathematics of astromorphic attention, without weights: what `attention.py` is built from.

`plain_response` is the reference and reads like the equations. `FusedResponse` is the same function
with its gradient written out: it keeps less than half as much for the backward pass, and takes
about three quarters of the attention's time on a CPU. Shape letters are those of `model.py`.

Source: RMAAT (arXiv 2601.00426), astromorphic attention; AT (arXiv 2312.10925), Eqs. 11-17.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

KERNEL_CHUNK = 128  # rows that the position kernel mixes densely at a time


def feature_map(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1: exp(x) below 0, where the sum would cancel, and x + 1 above."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def apply_position_kernel(x: Tensor, decay_scale: float) -> Tensor:
    """Multiply by the kernel P_ij = exp(-|i - j| * decay_scale) in time linear in N.

    Inside a chunk of rows the product is dense. What lies left of a chunk reaches its row i as
    exp(-decay_scale * (i - start)) times one carried state, and likewise from the right, because
    the kernel is a first-order recurrence in both directions; every exponent is at most 0.

    Args:
        x: (..., N, d).
        decay_scale: per token, at least 0.
    Returns:
        P x, (..., N, d).
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


def localised_basis(
    num_heads: int, head_dim: int, num_memory_tokens: int, segment_len: int
) -> Tensor:
    """A start of B in which every hidden neuron reads one place of the segment.

    A neuron is a Gaussian bump over the rows. In even heads the centres grow geometrically from
    the first token to the last; in odd heads the first neurons take one token each, until the
    geometric centres are further apart than that. The width follows the gap to the next centre.

    Returns:
        (H, d, N) with N = num_memory_tokens + segment_len.
    Deviation: the paper does not publish how B starts. With a random start phi(R) is nearly
        uniform, and singling out one token is a product of two small quantities.
    """
    index = torch.arange(head_dim + 1, dtype=torch.float64)  # one more: the last neuron has a gap
    geometric = segment_len ** (index / max(head_dim - 1, 1)) - 1  # 0 ... S - 1, and beyond
    rows = torch.arange(-num_memory_tokens, segment_len, dtype=torch.float64)
    heads = []
    for head in range(num_heads):
        centres = torch.maximum(geometric, index) if head % 2 else geometric
        width = (0.7 * centres.diff()).clamp_min(0.7)[:, None]  # (d, 1)
        bumps = torch.exp(-0.5 * ((rows - centres[:-1, None]) / width) ** 2)  # (d, N)
        heads.append(1.5 / width.sqrt() * bumps)
    basis = torch.stack(heads)
    return (basis + 0.02 * torch.randn_like(basis)).float()


def mask_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero the padded rows of x (B, H, N, d)."""
    return x if mask is None else x * mask[:, None, :, None]


class Terms(NamedTuple):
    """What switches the terms of the attention. The defaults are linear attention."""

    alpha: float = 1.0  # exponent of the presynaptic calcium
    scale: float = 1.0  # divisor of H
    sigmoid: bool = False  # H through a sigmoid
    normalize: bool = True  # P


def split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """A view (3, B, H, N, d) of projected queries, keys and values (B, N, 3D)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)


def join_heads(x: Tensor) -> Tensor:
    """Concatenate heads (B, H, N, d) to (B, N, D)."""
    return x.transpose(1, 2).flatten(2)


def respond(
    qkv: Tensor, num_heads: int, mask: Tensor | None, positions: Tensor | None, terms: Terms
) -> Tensor:
    """Write the Hebbian weights of a segment and read them with every query. Linear in N.

    Args:
        qkv: queries, keys and values side by side, (B, N, 3D).
        mask: (B, N) bool, True at real rows; None if nothing is padded.
        positions: phi(R), (H, N, d), which adds H_astro to H; None leaves it out.
    Returns:
        The heads' responses, (B, N, D).
    """
    # The compiler fuses the plain form itself; mixed precision keeps C in float32.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(qkv.device.type):
        return join_heads(plain_response(*split_heads(qkv, num_heads), mask, positions, terms))
    return FusedResponse.apply(qkv, num_heads, mask, positions, terms)


def plain_response(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, positions: Tensor | None, terms: Terms
) -> Tensor:
    """`respond` from queries, keys and values (B, H, N, d) to responses of that shape."""
    q, k = feature_map(q), mask_rows(feature_map(k), mask)
    v = mask_rows(v, mask)

    # Write: sums over N, so that no N x N product is formed. H_neuron and H_astro share V.
    keys = k if positions is None else k + positions
    hebbian = keys.mT @ v / terms.scale  # H, (B, H, d, d)
    if terms.sigmoid:
        hebbian = hebbian.sigmoid()

    # Read
    response = q @ hebbian  # (B, H, N, d)
    if terms.normalize:
        response = response * inverse_calcium(q, k, terms.alpha).to(response.dtype)
    return response


class FusedResponse(torch.autograd.Function):
    """`respond` as one node of the graph.

    It keeps phi(Q), phi(K), V and the responses; autograd through `plain_response` keeps a copy
    of almost every intermediate, of the strided heads once per product too.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, num_heads: int, mask: Tensor | None, positions: Tensor | None,
        terms: Terms,
    ) -> Tensor:
        # (3, B, H, N, d), ours to overwrite
        heads = split_heads(qkv, num_heads).clone(memory_format=torch.contiguous_format)
        positive = heads[:2].clamp(min=0)
        heads[:2].clamp_(max=0).exp_().add_(positive)  # phi
        if mask is not None:
            heads[1:] *= mask[:, None, :, None]
        q, k, v = heads

        keys = k if positions is None else k + positions
        hebbian = (keys.mT @ v).div_(terms.scale)
        if terms.sigmoid:
            hebbian.sigmoid_()
        inverse = inverse_calcium(q, k, terms.alpha) if terms.normalize else q.new_ones(())
        B, H, N, d = q.shape
        output = q.new_empty(B, N, H * d)
        torch.mul(q @ hebbian, inverse, out=output.unflatten(-1, (H, d)).transpose(1, 2))

        ctx.save_for_backward(heads, mask, positions, hebbian, inverse, output)
        ctx.terms = terms
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        heads, mask, positions, hebbian, inverse, output = ctx.saved_tensors
        terms: Terms = ctx.terms
        q, k, v = heads
        shape = q.shape[1], q.shape[3]  # (H, d)
        grad_response = grad_output.unflatten(-1, shape).transpose(1, 2)
        grads = torch.empty_like(heads)
        grad_q, grad_k, grad_v = grads

        if terms.normalize:
            # The response is proportional to P = 1 / C, so that dC = -<dR, R> P.
            response = output.unflatten(-1, shape).transpose(1, 2)
            grad_calcium = (grad_response * response).sum(-1, keepdim=True).mul_(inverse).neg_()
        grad_response = grad_response * inverse

        # Read
        torch.matmul(grad_response, hebbian.mT, out=grad_q)
        grad_hebbian = q.mT @ grad_response
        if terms.sigmoid:
            grad_hebbian *= hebbian * (1 - hebbian)
        grad_hebbian /= terms.scale

        # Write
        torch.matmul(v, grad_hebbian.mT, out=grad_k)
        torch.matmul(k if positions is None else k + positions, grad_hebbian, out=grad_v)
        grad_positions = grad_k.sum(0) if ctx.needs_input_grad[3] else None

        if terms.normalize:
            total = k.sum(dim=2)  # (B, H, d)
            slope = terms.alpha * presynaptic_response(total, terms.alpha - 1)
            grad_total = slope[:, :, None] * (grad_calcium.mT @ q)  # (B, H, 1, d)
            grad_q.addcmul_(grad_calcium, presynaptic_response(total, terms.alpha)[:, :, None])
            grad_k += grad_total
        grads[:2] *= heads[:2].clamp(max=1)  # phi' = min(phi, 1), which is 0 at masked keys
        if mask is not None:
            grad_v *= mask[:, None, :, None]
        return grads.permute(1, 3, 0, 2, 4).flatten(2), None, None, grad_positions, None


def presynaptic_response(total: Tensor, alpha: float) -> Tensor:
    """total^alpha, and 0 with a zero gradient where `total` is 0; g from the sums of phi(k)."""
    # Both sides of a `where` are differentiated: replace the 0 before its power is taken.
    positive = total > 0
    return torch.where(positive, total, 1).pow(alpha) * positive


def calcium_response(q: Tensor, k: Tensor, alpha: float) -> Tensor:
    """C = phi(Q) g^T with g = (sum_t phi(k_t))^alpha.

    Args:
        q, k: phi(Q) and phi(K), (B, H, N, d); k is zero at padding.
    Returns:
        (B, H, N, 1), at least float32.
    """
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        total = k.sum(dim=2, dtype=dtype)  # (B, H, d)
        return q.to(dtype) @ presynaptic_response(total, alpha)[..., None]


def inverse_calcium(q: Tensor, k: Tensor, alpha: float) -> Tensor:
    """P = 1 / C of `calcium_response`, 0 where C is 0, with zero gradient."""
    calcium = calcium_response(q, k, alpha)
    nonzero = calcium != 0
    return torch.where(nonzero, calcium, 1).reciprocal() * nonzero
