"""Astromorphic attention: the equations of `equations.py` with their weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attention.equations import (
    Terms,
    apply_position_kernel,
    calcium_response,
    feature_map,
    mask_rows,
)
from attention.fused import respond
from attention.heads import Attention
from lra_config import Config


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


class AstromorphicAttention(Attention):
    """Attention of a tripartite synapse: Hebbian weights written once, read by every query.

    Each of its terms has a switch: `hebbian_astro`, `hebbian_sigmoid`, `hebbian_scale`,
    `presynaptic_alpha` and `presynaptic_normalize`. Linear in N.

    Source: RMAAT, astromorphic attention (short-term plasticity); AT, Eqs. 11-17.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.has_positions = config.hebbian_astro
        self.decay_scale = config.decay_scale
        self.terms = Terms(
            alpha=config.presynaptic_alpha,
            scale=config.hebbian_scale or self.head_dim,
            sigmoid=config.hebbian_sigmoid,
            normalize=config.presynaptic_normalize,
        )
        if self.has_positions:
            M, S = config.num_memory_tokens, config.segment_len
            if config.position_basis == "localised":
                basis = localised_basis(self.num_heads, self.head_dim, M, S)
            else:
                basis = torch.randn(self.num_heads, self.head_dim, M + S) / math.sqrt(M + S)
            self.position_basis = nn.Parameter(basis)  # B, (H, d, N)

    def positions(self) -> Tensor:
        """phi(R) of the relative positions, (H, N, d); linear in N, without the batch.

        D = B P B^T (d x d), R = B^T D: one learned B is both basis change and edge weight.
        """
        basis = self.position_basis  # (H, d, N)
        distances = basis @ apply_position_kernel(basis.mT, self.decay_scale)  # (H, d, d)
        return feature_map(basis.mT @ distances)  # (H, N, d)

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor | None = None) -> Tensor:
        qkv = self.to_qkv(x)
        return self.to_out(respond(qkv, self.num_heads, mask, positions, self.terms))

    def calcium(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """C of the rows x (B, N, D), (B, H, N, 1); `forward` needs its inverse alone."""
        q, k, _ = self.project(x)
        return calcium_response(feature_map(q), mask_rows(feature_map(k), mask), self.terms.alpha)
