"""The response of `equations.py` as one node of the graph, with a written-out gradient.

It saves less than half as much for the backward pass as autograd does, and needs about three
quarters of the attention's time on a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
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
        qk, v = (  # copies, to overwrite
            x.to(dtype, copy=True, memory_format=torch.contiguous_format)
            for x in _split_qk(qkv, num_heads, num_hidden)
        )
        B, H, N, d = v.shape
        # Before the temporary tensors, which would leave holes between all that is saved.
        output = qkv.new_empty(B, N, H * d)
        if terms.normalize:
            qk[0] -= row_shift(qk[0])
        positive = qk.clamp(min=0)
        qk.clamp_(max=0).exp_().add_(positive)  # phi
        del positive
        q, k = qk
        if mask is not None:
            k *= mask[:, None, :, None]
            v *= mask[:, None, :, None]

        keys = k
        if positions is not None:
            ctx.positions_dtype = positions.dtype
            positions = positions.to(k.dtype)
            keys = k + positions
        hebbian = (keys.mT @ v).div_(terms.divisor)
        if terms.sigmoid:
            hebbian.sigmoid_()
        response = q @ hebbian
        total = plasticity = inverse = None
        heads = output.unflatten(-1, (H, d)).transpose(1, 2)
        if terms.normalize:
            wide = torch.promote_types(q.dtype, torch.float32)
            total = k.sum(dim=2, dtype=wide)  # (B, H, m)
            plasticity = presynaptic_plasticity(total, terms.alpha)  # g
            calcium = q.to(wide) @ plasticity[..., None]
            inverse = calcium.reciprocal().masked_fill_(calcium == 0, 0)  # P
            torch.mul(response, inverse.to(response.dtype), out=heads)
        else:
            heads.copy_(response)

        ctx.save_for_backward(qk, v, mask, positions, hebbian, total, plasticity, inverse, output)
        ctx.terms = terms
        return output

    @staticmethod
    @once_differentiable
    @_in_own_precision
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        qk, v, mask, positions, hebbian, total, plasticity, inverse, output = ctx.saved_tensors
        q, k = qk
        terms: Terms = ctx.terms
        B, H, N, d = v.shape
        m = q.shape[-1]
        grad_heads = grad_output.to(v.dtype).unflatten(-1, (H, d)).transpose(1, 2)
        grad_qk, grad_v, grad_response = (torch.empty_like(x) for x in (qk, v, v))
        grad_q, grad_k = grad_qk

        if terms.normalize:
            torch.mul(grad_heads, inverse.to(v.dtype), out=grad_response)
        else:
            grad_response.copy_(grad_heads)

        # Read
        torch.matmul(grad_response, hebbian.mT, out=grad_q)
        grad_hebbian = q.mT @ grad_response
        if terms.sigmoid:
            grad_hebbian *= hebbian * (1 - hebbian)
        grad_hebbian /= terms.divisor

        # Write
        torch.matmul(v, grad_hebbian.mT, out=grad_k)
        torch.matmul(k if positions is None else k + positions, grad_hebbian, out=grad_v)
        grad_positions = None
        if ctx.needs_input_grad[4]:
            grad_positions = grad_k.sum(0, dtype=ctx.positions_dtype)

        if terms.normalize:
            # The response is proportional to P = 1 / C, so that dC = -<dR, R> P.
            response = output.unflatten(-1, (H, d)).transpose(1, 2)
            grad_calcium = (grad_heads * response).sum(-1, keepdim=True, dtype=inverse.dtype)
            grad_calcium.mul_(inverse).neg_()
            constant = total < least_calcium(total.dtype)
            slope = total.pow(terms.alpha - 1).mul_(terms.alpha).masked_fill_(constant, 0)
            grad_total = slope[:, :, None] * (grad_calcium.mT @ q.to(inverse.dtype))
            grad_q.addcmul_(grad_calcium, plasticity[:, :, None])
            grad_k += grad_total  # (B, H, 1, m)
        grad_qk *= qk.clamp(max=1)  # phi' = min(phi, 1), which is 0 at masked keys
        if mask is not None:
            grad_v *= mask[:, None, :, None]
        grad_qkv = grad_output.new_empty(B, N, H * (2 * m + d))
        for part, grad in zip(_split_qk(grad_qkv, H, m), (grad_qk, grad_v), strict=True):
            part.copy_(grad)
        return grad_qkv, None, None, None, grad_positions, None
