"""Astromorphic attention: the equations of `equations.py` with their weights."""

from __future__ import annotations

import math

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
from utils import periodic_positions

LOCAL_GAIN = 64.0  # phi(q) - 1 of the neuron that a row of the local start reads
LOCAL_SILENCE = -3.0  # R of a neuron at the rows that are not its own

def localised_basis(
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


def local_basis(
    num_heads: int, num_hidden: int, num_memory_tokens: int, segment_len: int
) -> Tensor:
    """A start of B in which the hidden neurons share out the tokens of a segment evenly.

    A neuron reads w = S / m tokens in a row. They weigh as much as a whole segment does at
    phi(0) = 1, S together; all others phi(LOCAL_SILENCE), which is nearly 0.

    Returns:
        (H, m, N) with N = num_memory_tokens + segment_len.
    Raises:
        ValueError: m does not divide S.
    Deviation: the paper does not publish how B starts. Under phi(R) near 1 everywhere, every row
        reads nearly the same sum.
    """
    m, S = num_hidden, segment_len
    if S % m:
        raise ValueError(f"num_hidden={m} does not divide the {S} tokens of a segment")
    w = S // m
    # With a kernel of P_pos = 1 and B = A U, of U the tokens' neurons in orthonormal rows,
    # R = B^T B B^T = U^T A^3: A is the cube root of the R that is wanted.
    U = torch.eye(m, dtype=torch.float64).repeat_interleave(w, dim=1) / math.sqrt(w)  # (m, S)
    wanted = torch.full((m, m), LOCAL_SILENCE, dtype=torch.float64).fill_diagonal_(S / w)
    values, vectors = torch.linalg.eigh(wanted * math.sqrt(w))
    A = vectors * (values.sign() * values.abs() ** (1 / 3)) @ vectors.mT
    return F.pad((A @ U).float(), (num_memory_tokens, 0)).repeat(num_heads, 1, 1)


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
            scale=config.hebbian_scale or self.num_hidden,
            sigmoid=config.hebbian_sigmoid,
            normalize=config.presynaptic_normalize,
        )
        if self.has_positions:
            M, S = config.num_memory_tokens, config.segment_len
            if config.position_basis == "localised":
                basis = localised_basis(self.num_heads, self.num_hidden, M, S)
            elif config.position_basis == "local":
                basis = local_basis(self.num_heads, self.num_hidden, M, S)
                self._read_neighbours(config.local_lags, S)
            else:
                basis = torch.randn(self.num_heads, self.num_hidden, M + S) / math.sqrt(M + S)
            self.position_basis = nn.Parameter(basis)  # B, (H, m, N)

    @torch.no_grad()
    def _read_neighbours(self, lags: list[int], segment_len: int) -> None:
        """Start W_Q so that row i reads the neuron of token i + lag, of one lag per head in turn.

        The periodic position code is what tells rows apart: the first rows of a segment read its
        last ones.
        """
        m, S = self.num_hidden, segment_len
        centres = (torch.arange(m) + 0.5) * S / m - 0.5  # of each neuron's tokens
        for head in range(self.num_heads):
            code = periodic_positions(centres - lags[head % len(lags)], self.to_qkv.in_features, S)
            weight = LOCAL_GAIN * code / code[0].square().sum()  # (m, D)
            self.to_qkv.weight[head * m : (head + 1) * m] = weight

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
