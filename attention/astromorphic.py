"""Astromorphic attention: the equations of `equations.py` with their weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
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
from utils import digit_height, digit_positions

# The local start
QUERY_GAIN = 16.0  # the neuron that a row reads has q = +8, all others have -8 or less
KEY_SILENCE = -3.0  # k of every neuron, so that H_neuron starts as a small part of H
BASIS_SILENCE = -3.0  # R of a neuron at the rows that are not its own


def landmark_basis(
    num_heads: int, num_hidden: int, num_memory_tokens: int, segment_len: int
) -> Tensor:
    """A start of B in which every hidden neuron reads one place of the segment.

    A neuron is a Gaussian bump over the rows. In even heads the centres grow geometrically from
    the first token to the last; in odd heads the first neurons take one token each, until the
    geometric centres are further apart than that. The width follows the gap to the next centre.

    Returns:
        (H, m, N) with N = num_memory_tokens + segment_len.
    Deviation: the paper does not publish how B starts. With a random start phi(R) is nearly
        uniform, and singling out one token is a product of two small quantities.
    """
    index = torch.arange(num_hidden + 1, dtype=torch.float64)  # one more: the last neuron has a gap
    geometric = segment_len ** (index / max(num_hidden - 1, 1)) - 1  # 0 ... S - 1, and beyond
    rows = torch.arange(-num_memory_tokens, segment_len, dtype=torch.float64)
    heads = []
    for head in range(num_heads):
        centres = torch.maximum(geometric, index) if head % 2 else geometric
        width = (0.7 * centres.diff()).clamp_min(0.7)[:, None]  # (m, 1)
        bumps = torch.exp(-0.5 * ((rows - centres[:-1, None]) / width) ** 2)  # (m, N)
        heads.append(1.5 / width.sqrt() * bumps)
    basis = torch.stack(heads)
    return (basis + 0.02 * torch.randn_like(basis)).float()


def neighbor_basis(num_heads: int, num_memory_tokens: int, segment_len: int) -> Tensor:
    """A start of B in which every hidden neuron reads one token of the segment, m = S.

    It weighs as much as a whole segment does at phi(0) = 1, S; all others phi(BASIS_SILENCE), which
    is nearly 0.

    Returns:
        (H, S, N) with N = num_memory_tokens + segment_len.
    Deviation: the paper does not publish how B starts. Under phi(R) near 1 everywhere, every row
        reads nearly the same sum.
    """
    S = segment_len
    # Where the kernel of P_pos is 1, a symmetric B has R = B^T B B^T = B^3. The cube root of
    # R = own I + BASIS_SILENCE (J - I) takes those of its two eigenvalues; J / S projects.
    mean = torch.full((S, S), 1 / S)
    deviation, common = S - BASIS_SILENCE, S + (S - 1) * BASIS_SILENCE
    basis = _cube_root(deviation) * (torch.eye(S) - mean) + _cube_root(common) * mean
    return F.pad(basis, (num_memory_tokens, 0)).repeat(num_heads, 1, 1)


def _cube_root(x: float) -> float:
    return math.copysign(abs(x) ** (1 / 3), x)


class AstromorphicAttention(Attention):
    """Attention of a tripartite synapse: Hebbian weights written once, read by every query.

    Each of its terms has a switch: `hebbian_astro`, `hebbian_sigmoid`, `hebbian_divisor`,
    `presynaptic_alpha` and `presynaptic_normalize`. Linear in N.

    Source: RMAAT, astromorphic attention (short-term plasticity); AT, Eqs. 11-17.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.has_positions = config.hebbian_astro
        self.decay_scale = config.decay_scale
        self.terms = Terms(
            alpha=config.presynaptic_alpha,
            scale=config.hebbian_divisor or self.num_hidden,
            sigmoid=config.hebbian_sigmoid,
            normalize=config.presynaptic_normalize,
        )
        if self.has_positions:
            M, S = config.num_memory_tokens, config.segment_len
            if config.basis_init == "landmarks":
                basis = landmark_basis(self.num_heads, self.num_hidden, M, S)
            elif config.basis_init == "neighbors":
                basis = neighbor_basis(self.num_heads, M, S)
                self._read_neighbours(config.neighbor_offsets, config.position_code_digits, S)
            else:
                basis = torch.randn(self.num_heads, self.num_hidden, M + S) / math.sqrt(M + S)
            self.position_basis = nn.Parameter(basis)  # B, (H, m, N)

    @torch.no_grad()
    def _read_neighbours(
        self, lags: Sequence[int], digits: Sequence[int], segment_len: int
    ) -> None:
        """Start W_Q so that row i reads the neuron of token i + lag, of one lag per head in turn.

        The digits of the position code tell rows apart, its constant is what thresholds are made
        of; values do not carry it. The first rows of a segment read its last ones.
        """
        S, D = segment_len, self.to_qkv.in_features
        code = digit_positions(torch.arange(S), D, digits)
        width = sum(digits) + 1
        constant = width - 1
        height = digit_height(D, digits)
        queries, keys, values = self.to_qkv.weight.tensor_split(
            [self.num_heads * S, 2 * self.num_heads * S]
        )
        for head, rows in enumerate(queries.split(S)):
            lag = lags[head % len(lags)]
            rows.copy_(QUERY_GAIN / height * code.roll(lag, dims=0))
            # Between all digits and all but one.
            rows[:, constant] = -(len(digits) - 0.5) * QUERY_GAIN / height
        keys[:, :width] = 0
        keys[:, constant] = KEY_SILENCE / height
        values[:, :width] = 0

    def positions(self) -> Tensor:
        """phi(R) of the relative positions, (H, N, m); linear in N, without the batch.

        D = B P_pos B^T (m x m), R = B^T D: one learned B is both basis change and edge weight.
        """
        basis = self.position_basis  # (H, m, N)
        distances = basis @ apply_position_kernel(basis.mT, self.decay_scale)  # (H, m, m)
        return feature_map(basis.mT @ distances)  # (H, N, m)

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor | None = None) -> Tensor:
        qkv = self.to_qkv(x)
        return self.to_out(
            respond(qkv, self.num_heads, self.num_hidden, mask, positions, self.terms)
        )

    def calcium(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """C of the rows x (B, N, D), (B, H, N, 1); `forward` needs its inverse alone."""
        q, k, _ = self.project(x)
        return calcium_response(feature_map(q), mask_rows(feature_map(k), mask), self.terms.alpha)
