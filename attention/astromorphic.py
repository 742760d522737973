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
from attention.fused import choose_backend, respond
from attention.heads import Attention
from lra_config import Config


def landmark_basis(
    num_heads: int, num_hidden: int, num_memory_tokens: int, segment_len: int
) -> Tensor:
    """Return an initial B in which every hidden neuron reads one position of the segment.

    A neuron is a Gaussian bump over the rows. In even heads the centers grow geometrically from
    the first token to the last. In odd heads the first neurons take one token each, until the
    geometric centers are further apart than that. The width follows the gap to the next center.

    Returns:
        (H, m, N) with N = num_memory_tokens + segment_len.
    Deviation: the paper does not publish the initialization of B. With a random B, phi(R) is nearly
        uniform, and selecting one token is a product of two small quantities.
    """
    index = torch.arange(num_hidden + 1, dtype=torch.float64)  # one more: the last neuron has a gap
    geometric = segment_len ** (index / max(num_hidden - 1, 1)) - 1  # 0 ... S - 1, and beyond
    rows = torch.arange(-num_memory_tokens, segment_len, dtype=torch.float64)
    heads = []
    for head in range(num_heads):
        centers = torch.maximum(geometric, index) if head % 2 else geometric
        width = (0.7 * centers.diff()).clamp_min(0.7)[:, None]  # (m, 1)
        bumps = torch.exp(-0.5 * ((rows - centers[:-1, None]) / width) ** 2)  # (m, N)
        heads.append(1.5 / width.sqrt() * bumps)
    basis = torch.stack(heads)
    return (basis + 0.02 * torch.randn_like(basis)).float()


class AstromorphicAttention(Attention):
    """Attention of a tripartite synapse: Hebbian weights written once, read by every query.

    Each of its terms has a switch: `hebbian_astro`, `hebbian_sigmoid`, `hebbian_divisor`,
    `presynaptic_alpha` and `presynaptic_normalize`. Linear in N.

    Source: RMAAT, astromorphic attention (short-term plasticity); AT, Eqs. 11-17.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.backend = choose_backend(config)
        self.has_positions = config.hebbian_astro
        self.decay_scale = config.decay_scale
        self.terms = Terms(
            alpha=config.presynaptic_alpha,
            divisor=config.hebbian_divisor or self.num_hidden,
            sigmoid=config.hebbian_sigmoid,
            normalize=config.presynaptic_normalize,
        )
        if self.has_positions:
            H, m = self.num_heads, self.num_hidden
            M, S = config.num_memory_tokens, config.segment_len
            if config.basis_init == "landmarks":
                basis = landmark_basis(H, m, M, S)
            elif config.basis_init == "random":
                basis = torch.randn(H, m, M + S) / math.sqrt(M + S)
            else:  # `neighbor_init.py` initializes it in the built model
                basis = torch.zeros(H, m, M + S)
            self.position_basis = nn.Parameter(basis)  # B, (H, m, N)

    def positions(self) -> Tensor:
        """Return phi(R) of the relative positions, (H, N, m); linear in N, without the batch.

        D = B P_pos B^T (m x m), R = B^T D: one learned B is both basis change and edge weight.
        """
        basis = self.position_basis  # (H, m, N)
        distances = basis @ apply_position_kernel(basis.mT, self.decay_scale)  # (H, m, m)
        return feature_map(basis.mT @ distances)  # (H, N, m)

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor | None = None) -> Tensor:
        return self.to_out(respond(
            self.to_qkv(x), self.num_heads, self.num_hidden, mask, positions, self.terms,
            self.backend,
        ))

    def calcium(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return C of the rows x (B, N, D), (B, H, N, 1); `forward` needs its inverse only."""
        q, k, _ = self.project(x)
        return calcium_response(feature_map(q), mask_rows(feature_map(k), mask), self.terms.alpha)
