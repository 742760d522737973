"""The response of `equations.py` as one node of the graph, with a written-out gradient.

It saves less than half as much for the backward pass as autograd does, and needs about three
quarters of the attention's time on a CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention.equations import (
    Terms,
    astromorphic_response,
    least_calcium,
    presynaptic_plasticity,
    response_dtype,
    row_shift,
)
from attention.heads import join_heads, split_heads
from lra_config import Config

GROUP_WIDTH = 64  # columns of the heads that are computed together


def choose_backend(config: Config) -> str:
    """Return the implementation that `attention_backend` names, `reference` or `fused`."""
    return "fused" if config.attention_backend == "auto" else config.attention_backend


def respond(
    qkv: Tensor, num_heads: int, num_hidden: int, mask: Tensor | None, positions: Tensor | None,
    terms: Terms, backend: str = "fused",
) -> Tensor:
    """Write the Hebbian weights of a segment and read them with every query. Linear in N.

    Args:
        qkv: queries, keys and values next to each other, (B, N, H (2 m + d)).
        num_hidden: m.
        mask: (B, N) bool, True at real rows; None if nothing is padded.
        positions: phi(R), (H, N, m), which adds H_astro to H; None leaves it out.
        backend: `reference` or `fused`. Inside `torch.compile` both are the reference, because
            the compiler fuses the equations itself.
    Returns:
        The heads' responses, (B, N, D).
    """
    if backend == "fused" and not torch.compiler.is_compiling():
        return FusedResponse.apply(qkv, num_heads, num_hidden, mask, positions, terms)
    return reference_response(qkv, num_heads, num_hidden, mask, positions, terms)


def reference_response(
    qkv: Tensor, num_heads: int, num_hidden: int, mask: Tensor | None, positions: Tensor | None,
    terms: Terms,
) -> Tensor:
    """Compute `respond` by the equations, differentiated by autograd."""
    q, k, v = split_heads(qkv, num_heads, num_hidden)
    return join_heads(astromorphic_response(q, k, v, mask, positions, terms))


def _in_own_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Disable autocast in a node's method, whose second argument is a tensor."""

    @functools.wraps(function)
    def call(ctx: Any, x: Tensor, *rest: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False):
            return function(ctx, x, *rest)

    return call


def _heads_per_group(num_heads: int, num_hidden: int) -> int:
    """Return how many heads share a product: as many as fit into `GROUP_WIDTH` columns."""
    return next(
        h for h in range(num_heads, 0, -1)
        if num_heads % h == 0 and (h == 1 or h * num_hidden <= GROUP_WIDTH)
    )


def _split_qk(qkv: Tensor, num_groups: int, width: int) -> tuple[Tensor, Tensor]:
    """Return views of queries and keys together, (2, B, G, N, w), and values, (B, G, N, e)."""
    qk, v = qkv.tensor_split([2 * num_groups * width], dim=-1)
    qk = qk.unflatten(-1, (2, num_groups, width)).permute(2, 0, 3, 1, 4)
    return qk, v.unflatten(-1, (num_groups, -1)).transpose(1, 2)


def _divided_product(x: Tensor, y: Tensor, divisor: float) -> Tensor:
    """Return x y / divisor of (B, G, ...) matrices, by one operation."""
    product = torch.baddbmm(
        y.new_empty(1), x.flatten(0, 1), y.flatten(0, 1), beta=0, alpha=1 / divisor
    )
    return product.unflatten(0, y.shape[:2])


class FusedResponse(torch.autograd.Function):
    """`respond` as one node of the graph.

    It saves phi(Q), phi(K), V and the responses. Autograd through the reference saves almost every
    intermediate, and copies of the strided heads for each product. C and P have the type of the
    responses; g is at least float32, as in the reference.

    Narrow heads are computed in groups. G groups of h heads have w = h m columns of Q and K, and
    e = h d of V. A product of two heads of a group is a block off the diagonal, which is zeroed.
    On a CPU an operation on 16 adjacent numbers takes several times as long as one on 64.
    """

    @staticmethod
    @_in_own_precision
    def forward(
        ctx: Any, qkv: Tensor, num_heads: int, num_hidden: int, mask: Tensor | None,
        positions: Tensor | None, terms: Terms,
    ) -> Tensor:
        dtype = response_dtype(qkv.dtype)
        h, m = _heads_per_group(num_heads, num_hidden), num_hidden
        G = num_heads // h
        projected, v = (x.to(dtype) for x in _split_qk(qkv, G, h * m))
        v = v.clone(memory_format=torch.contiguous_format)  # to overwrite
        B, _, N, e = v.shape
        # Before the temporary tensors, which would leave holes between all that is saved.
        qk = v.new_empty(projected.shape)
        output = qkv.new_empty(B, N, G * e)
        torch.clamp(projected, max=0, out=qk)
        q, k = qk
        if terms.normalize:
            shift = row_shift(projected[0].unflatten(-1, (h, m)))  # (B, G, N, h, 1)
            q -= shift.flatten(-2).repeat_interleave(m, dim=-1)
        qk.exp_().add_(projected.clamp(min=0))  # phi; where a row is shifted, all of it is below 0
        if mask is not None:
            mask = mask[:, None, :, None].to(dtype)
            k *= mask
            v *= mask

        keys = k
        if positions is not None:
            ctx.positions_dtype = positions.dtype
            # (G, N, w)
            positions = positions.to(dtype).unflatten(0, (G, h)).transpose(1, 2).flatten(2)
            keys = k + positions
        # 1 where the column is of the head, (h, w), and where both columns are of one head, (w, e)
        heads = torch.eye(h, dtype=dtype, device=v.device).repeat_interleave(m, dim=1)
        blocks = heads.mT.repeat_interleave(e // h, dim=1)
        hebbian = _divided_product(keys.mT, v, terms.divisor)  # (B, G, w, e)
        if terms.sigmoid:
            hebbian.sigmoid_()
        hebbian *= blocks
        response = q @ hebbian
        total = weights = calcium = None
        out = output.unflatten(-1, (G, e)).transpose(1, 2)
        if terms.normalize:
            wide = torch.promote_types(dtype, torch.float32)
            total = k.sum(dim=2, keepdim=True, dtype=wide)  # (B, G, 1, w)
            weights = presynaptic_plasticity(total, terms.alpha) * heads  # g, (B, G, h, w)
            # C (B, G, N, h), infinite where it is 0, so that P = 1 / C is 0 there
            calcium = F.threshold(q @ weights.to(dtype).mT, 0, math.inf)
            torch.div(response, calcium.repeat_interleave(e // h, dim=-1), out=out)
        else:
            out.copy_(response)

        ctx.save_for_backward(
            qk, v, mask, positions, heads, blocks, hebbian, total, weights, calcium, output
        )
        ctx.terms = terms
        return output

    @staticmethod
    @once_differentiable
    @_in_own_precision
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (
            qk, v, mask, positions, heads, blocks, hebbian, total, weights, calcium, output
        ) = ctx.saved_tensors
        q, k = qk
        terms: Terms = ctx.terms
        B, G, N, e = v.shape
        h, w = heads.shape
        grad_out = grad_output.to(v.dtype).unflatten(-1, (G, e)).transpose(1, 2)
        grad_qk, grad_v, grad_response = (torch.empty_like(x) for x in (qk, v, v))
        grad_q, grad_k = grad_qk

        if terms.normalize:
            torch.div(grad_out, calcium.repeat_interleave(e // h, dim=-1), out=grad_response)
        else:
            grad_response.copy_(grad_out)

        # Read
        torch.matmul(grad_response, hebbian.mT, out=grad_q)
        grad_hebbian = _divided_product(q.mT, grad_response, terms.divisor)
        grad_hebbian *= blocks
        if terms.sigmoid:
            grad_hebbian *= hebbian * (1 - hebbian)

        # Write
        torch.matmul(v, grad_hebbian.mT, out=grad_k)
        torch.matmul(k if positions is None else k + positions, grad_hebbian, out=grad_v)
        grad_positions = None
        if ctx.needs_input_grad[4]:
            grad_positions = grad_k.sum(0, dtype=ctx.positions_dtype)  # (G, N, w)
            grad_positions = grad_positions.unflatten(-1, (h, -1)).transpose(1, 2).flatten(0, 1)

        if terms.normalize:
            # The response is proportional to P = 1 / C, so that dC = -<dR, R> P.
            response = output.unflatten(-1, (G, e)).transpose(1, 2)
            minus_grad_calcium = (grad_response * response) @ blocks[:: w // h].mT
            grad_q.flatten(0, 1).baddbmm_(
                minus_grad_calcium.flatten(0, 1), weights.to(q.dtype).flatten(0, 1), alpha=-1
            )
            slope = weights / total.clamp(min=least_calcium(total.dtype))  # times alpha
            minus_grad_total = (minus_grad_calcium.mT @ q * slope).sum(2, keepdim=True)
            grad_k.sub_(minus_grad_total, alpha=terms.alpha)
        phi_slope = qk.clamp(max=1)  # min(phi, 1), which is 0 at masked keys
        grad_qkv = grad_output.new_empty(B, N, G * (2 * w + e))
        qk_part, v_part = _split_qk(grad_qkv, G, w)
        torch.mul(grad_qk, phi_slope, out=qk_part)
        if mask is None:
            v_part.copy_(grad_v)
        else:
            torch.mul(grad_v, mask, out=v_part)
        return grad_qkv, None, None, None, grad_positions, None
