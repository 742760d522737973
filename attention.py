"""Attention mechanisms: each reads like its equations.

Shape letters are those of `model.py`. In source lines `RMAAT` is the paper (arXiv 2601.00426), `AT`
its predecessor (arXiv 2312.10925).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lra_config import Config

KERNEL_CHUNK = 128  # rows that the position kernel mixes densely at a time


def feature_map(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1, positive."""
    return F.elu(x) + 1


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


class Attention(nn.Module):
    """What all mechanisms share: the projections, and no residual (the encoder layer owns it).

    Called as `attention(x, mask, positions) -> y` with x and y (B, N, D), mask (B, N) bool (True at
    real rows) or None, and positions (H, N, d) for the mechanisms that have position terms. Rows
    of y at padding carry no meaning.
    """

    has_positions = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.dim // config.num_heads
        self.to_qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.to_out = nn.Linear(config.dim, config.dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, N, d)."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, N, 3, H, d)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def merge(self, heads: Tensor) -> Tensor:
        """Concatenate the heads' outputs (B, H, N, d) and project them to (B, N, D)."""
        return self.to_out(heads.transpose(1, 2).flatten(2))


def mask_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """Zero the padded rows of x (B, H, N, d)."""
    return x if mask is None else x * mask[:, None, :, None]


class AstromorphicAttention(Attention):
    """Attention of a tripartite synapse: Hebbian weights written once, read by every query.

    Each of its terms has a switch: `hebbian_astro`, `hebbian_sigmoid`, `hebbian_scale`,
    `presynaptic_alpha` and `presynaptic_normalize`. Linear in N.

    Source: RMAAT, astromorphic attention (short-term plasticity); AT, Eqs. 11-17.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.has_positions = config.hebbian_astro
        self.hebbian_sigmoid = config.hebbian_sigmoid
        self.hebbian_scale = config.hebbian_scale or self.head_dim
        self.alpha = config.presynaptic_alpha
        self.normalize = config.presynaptic_normalize
        self.decay_scale = config.decay_scale
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
        q, k, v = self.project(x)
        q, k = feature_map(q), mask_rows(feature_map(k), mask)
        v = mask_rows(v, mask)

        # Write: sums over N, so that no N x N product is formed. H_neuron and H_astro share V.
        keys = k if positions is None else k + positions
        hebbian = keys.mT @ v / self.hebbian_scale  # H, (B, H, d, d)
        if self.hebbian_sigmoid:
            hebbian = hebbian.sigmoid()

        # Read
        response = q @ hebbian  # (B, H, N, d)
        if self.normalize:
            response = response * inverse_calcium(q, k, self.alpha).to(response.dtype)
        return self.merge(response)


def inverse_calcium(q: Tensor, k: Tensor, alpha: float) -> Tensor:
    """P = 1 / C of the calcium response C = phi(Q) g^T, g = (sum_t phi(k_t))^alpha.

    Args:
        q, k: phi(Q) and phi(K), (B, H, N, d); k is zero at padding.
    Returns:
        (B, H, N, 1), at least float32; 0 where C is 0, with zero gradient.
    """
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        total = k.sum(dim=2, dtype=dtype)  # (B, H, d)
        # Both sides of a `where` are differentiated: replace the 0 before its power is taken.
        positive = total > 0
        presynaptic = torch.where(positive, total, 1).pow(alpha) * positive  # g
        calcium = q.to(dtype) @ presynaptic[..., None]  # C, (B, H, N, 1)
        nonzero = calcium != 0
        return torch.where(nonzero, calcium, 1).reciprocal() * nonzero


class LinearAttention(Attention):
    """phi(Q) (phi(K)^T V) / (phi(Q) sum_t phi(k_t)): no astrocyte.

    Source: Katharopoulos et al. 2020, Eq. 5.
    """

    def forward(self, x: Tensor, mask: Tensor | None, positions: None = None) -> Tensor:
        q, k, v = self.project(x)
        q, k = feature_map(q), mask_rows(feature_map(k), mask)
        response = q @ (k.mT @ v)  # (B, H, N, d)
        return self.merge(response * inverse_calcium(q, k, alpha=1.0).to(response.dtype))


class SoftmaxAttention(Attention):
    """Scaled dot-product attention, quadratic in N.

    Source: Vaswani et al. 2017, Eq. 1.
    """

    def forward(self, x: Tensor, mask: Tensor | None, positions: None = None) -> Tensor:
        q, k, v = self.project(x)
        if mask is not None:
            # A sample that is padding alone must see something: softmax over nothing is NaN.
            mask = (mask | ~mask.any(dim=1, keepdim=True))[:, None, None, :]  # (B, 1, 1, N)
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


ATTENTION = {
    "astro": AstromorphicAttention,
    "softmax": SoftmaxAttention,
    "linear": LinearAttention,
}
