"""The response of `equations.py` as one node of the graph, its gradient written out.

It keeps less than half as much for the backward pass as autograd does, and takes about three
quarters of the attention's time on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention.equations import (
    Terms,
    astromorphic_response,
    inverse_calcium,
    presynaptic_plasticity,
)
from attention.heads import join_heads, split_heads


def respond(
    qkv: Tensor, num_heads: int, num_hidden: int, mask: Tensor | None, positions: Tensor | None,
    terms: Terms,
) -> Tensor:
    """Write the Hebbian weights of a segment and read them with every query. Linear in N.

    Args:
        qkv: queries, keys and values side by side, (B, N, H (2 m + d)).
        num_hidden: m.
        mask: (B, N) bool, True at real rows; None if nothing is padded.
        positions: phi(R), (H, N, m), which adds H_astro to H; None leaves it out.
    Returns:
        The heads' responses, (B, N, D).
    """
    # The compiler fuses the plain form itself; mixed precision keeps C in float32.
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(qkv.device.type):
        q, k, v = split_heads(qkv, num_heads, num_hidden)
        return join_heads(astromorphic_response(q, k, v, mask, positions, terms))
    return FusedResponse.apply(qkv, num_heads, num_hidden, mask, positions, terms)


class FusedResponse(torch.autograd.Function):
    """`respond` as one node of the graph.

    It keeps phi(Q), phi(K), V and the responses; autograd through the plain form keeps a copy of
    almost every intermediate, of the strided heads once per product too.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, num_heads: int, num_hidden: int, mask: Tensor | None,
        positions: Tensor | None, terms: Terms,
    ) -> Tensor:
        q, k, v = (  # ours to overwrite
            x.clone(memory_format=torch.contiguous_format)
            for x in split_heads(qkv, num_heads, num_hidden)
        )
        for x in (q, k):
            positive = x.clamp(min=0)
            x.clamp_(max=0).exp_().add_(positive)  # phi
        if mask is not None:
            k *= mask[:, None, :, None]
            v *= mask[:, None, :, None]

        keys = k if positions is None else k + positions
        hebbian = (keys.mT @ v).div_(terms.scale)
        if terms.sigmoid:
            hebbian.sigmoid_()
        inverse = inverse_calcium(q, k, terms.alpha) if terms.normalize else q.new_ones(())
        B, H, N, d = v.shape
        output = q.new_empty(B, N, H * d)
        torch.mul(q @ hebbian, inverse, out=output.unflatten(-1, (H, d)).transpose(1, 2))

        ctx.save_for_backward(q, k, v, mask, positions, hebbian, inverse, output)
        ctx.terms = terms
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, positions, hebbian, inverse, output = ctx.saved_tensors
        terms: Terms = ctx.terms
        B, H, N, d = v.shape
        grad_response = grad_output.unflatten(-1, (H, d)).transpose(1, 2)
        grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))

        if terms.normalize:
            # The response is proportional to P = 1 / C, so that dC = -<dR, R> P.
            response = output.unflatten(-1, (H, d)).transpose(1, 2)
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
        grad_positions = grad_k.sum(0) if ctx.needs_input_grad[4] else None

        if terms.normalize:
            total = k.sum(dim=2)  # (B, H, m)
            slope = terms.alpha * presynaptic_plasticity(total, terms.alpha - 1)
            grad_total = slope[:, :, None] * (grad_calcium.mT @ q)  # (B, H, 1, m)
            grad_q.addcmul_(grad_calcium, presynaptic_plasticity(total, terms.alpha)[:, :, None])
            grad_k += grad_total
        grad_q *= q.clamp(max=1)  # phi' = min(phi, 1), which is 0 at masked keys
        grad_k *= k.clamp(max=1)
        if mask is not None:
            grad_v *= mask[:, None, :, None]
        m = q.shape[-1]
        grad_qkv = grad_output.new_empty(B, N, H * (2 * m + d))
        for part, grad in zip(split_heads(grad_qkv, H, m), (grad_q, grad_k, grad_v), strict=True):
            part.copy_(grad)
        return grad_qkv, None, None, None, grad_positions, None
