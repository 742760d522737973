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


def _split_qk(qkv: Tensor, num_heads: int, num_hidden: int) -> tuple[Tensor, Tensor]:
    """Return views of queries and keys together, (2, B, H, N, m), and values, (B, H, N, d)."""
    qk, v = qkv.tensor_split([2 * num_heads * num_hidden], dim=-1)
    qk = qk.unflatten(-1, (2, num_heads, num_hidden)).permute(2, 0, 3, 1, 4)
    return qk, v.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _divided_product(x: Tensor, y: Tensor, divisor: float) -> Tensor:
    """Return x y / divisor of (B, H, ...) matrices, by one operation."""
    product = torch.baddbmm(
        y.new_empty(1), x.flatten(0, 1), y.flatten(0, 1), beta=0, alpha=1 / divisor
    )
    return product.unflatten(0, y.shape[:2])


class FusedResponse(torch.autograd.Function):
    """`respond` as one node of the graph.

    It saves phi(Q), phi(K), V and the responses. Autograd through the reference saves almost every
    intermediate, and copies of the strided heads for each product. The types of C, P and all other
    intermediates are those of the reference.
    """

    @staticmethod
    @_in_own_precision
    def forward(
        ctx: Any, qkv: Tensor, num_heads: int, num_hidden: int, mask: Tensor | None,
        positions: Tensor | None, terms: Terms,
    ) -> Tensor:
        dtype = response_dtype(qkv.dtype)
        projected, v = (x.to(dtype) for x in _split_qk(qkv, num_heads, num_hidden))
        v = v.clone(memory_format=torch.contiguous_format)  # to overwrite
        B, H, N, d = v.shape
        # Before the temporary tensors, which would leave holes between all that is saved.
        qk = v.new_empty(projected.shape)
        output = qkv.new_empty(B, N, H * d)
        torch.clamp(projected, max=0, out=qk)
        q, k = qk
        if terms.normalize:
            q -= row_shift(projected[0])
        qk.exp_().add_(projected.clamp(min=0))  # phi; where a row is shifted, all of it is below 0
        if mask is not None:
            k *= mask[:, None, :, None]
            v *= mask[:, None, :, None]

        keys = k
        if positions is not None:
            ctx.positions_dtype = positions.dtype
            positions = positions.to(k.dtype)
            keys = k + positions
        hebbian = _divided_product(keys.mT, v, terms.divisor)
        if terms.sigmoid:
            hebbian.sigmoid_()
        response = q @ hebbian
        total = plasticity = calcium = None
        heads = output.unflatten(-1, (H, d)).transpose(1, 2)
        if terms.normalize:
            wide = torch.promote_types(q.dtype, torch.float32)
            total = k.sum(dim=2, dtype=wide)  # (B, H, m)
            plasticity = presynaptic_plasticity(total, terms.alpha)  # g
            # C, infinite where it is 0, so that P = 1 / C is 0 there
            calcium = F.threshold(q.to(wide) @ plasticity[..., None], 0, math.inf)
            torch.div(response, calcium.to(response.dtype), out=heads)
        else:
            heads.copy_(response)

        ctx.save_for_backward(qk, v, mask, positions, hebbian, total, plasticity, calcium, output)
        ctx.terms = terms
        return output

    @staticmethod
    @once_differentiable
    @_in_own_precision
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        qk, v, mask, positions, hebbian, total, plasticity, calcium, output = ctx.saved_tensors
        q, k = qk
        terms: Terms = ctx.terms
        B, H, N, d = v.shape
        m = q.shape[-1]
        grad_heads = grad_output.to(v.dtype).unflatten(-1, (H, d)).transpose(1, 2)
        grad_qk, grad_v, grad_response = (torch.empty_like(x) for x in (qk, v, v))
        grad_q, grad_k = grad_qk

        if terms.normalize:
            torch.div(grad_heads, calcium.to(v.dtype), out=grad_response)
        else:
            grad_response.copy_(grad_heads)

        # Read
        torch.matmul(grad_response, hebbian.mT, out=grad_q)
        grad_hebbian = _divided_product(q.mT, grad_response, terms.divisor)
        if terms.sigmoid:
            grad_hebbian *= hebbian * (1 - hebbian)

        # Write
        torch.matmul(v, grad_hebbian.mT, out=grad_k)
        torch.matmul(k if positions is None else k + positions, grad_hebbian, out=grad_v)
        grad_positions = None
        if ctx.needs_input_grad[4]:
            grad_positions = grad_k.sum(0, dtype=ctx.positions_dtype)

        if terms.normalize:
            # The response is proportional to P = 1 / C, so that dC = -<dR, R> P.
            response = output.unflatten(-1, (H, d)).transpose(1, 2)
            wide = calcium.dtype
            minus_grad_calcium = (grad_response * response).sum(-1, keepdim=True, dtype=wide)
            grad_q.addcmul_(minus_grad_calcium, plasticity[:, :, None], value=-1)
            minus_grad_plasticity = minus_grad_calcium.mT @ q.to(wide)  # (B, H, 1, m)
            slope = plasticity / total.clamp(min=least_calcium(wide))  # times alpha
            grad_k.addcmul_(minus_grad_plasticity, slope[:, :, None], value=-terms.alpha)
        phi_slope = qk.clamp(max=1)  # min(phi, 1), which is 0 at masked keys
        grad_qkv = grad_output.new_empty(B, N, H * (2 * m + d))
        qk_part, v_part = _split_qk(grad_qkv, H, m)
        torch.mul(grad_qk, phi_slope, out=qk_part)
        if mask is None:
            v_part.copy_(grad_v)
        else:
            torch.mul(grad_v, mask[:, None, :, None], out=v_part)
        return grad_qkv, None, None, None, grad_positions, None
