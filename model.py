"""Attention mechanisms, the encoder layer and the segment-recurrent encoder.

Shape letters, with the paper's symbol where it differs:

    B  batch                       T  segments of the whole sequence
    L  tokens of the sequence (N)  S  tokens of one segment
    M  memory tokens               N  rows of one segment's input, M + S (n)
    D  width of the model (d)      H  heads
    d  width of a head (m, d_v)    C  classes

In source lines `RMAAT` is the paper (arXiv 2601.00426), `AT` its predecessor (arXiv 2312.10925).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from astrocyte import retention_factors
from lra_config import PADDING_ID, Config
from utils import sinusoidal_positions

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


class EncoderLayer(nn.Module):
    """Attention and feed-forward blocks, each with a residual and a layer norm behind it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attention = ATTENTION[config.attention_type](config)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.ffn_dim, config.dim),
        )
        self.feed_forward_norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.attention(x, mask, positions)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class Segment(NamedTuple):
    """The tokens (B, S) of one segment and their mask (B, S), None if nothing is padded."""

    tokens: Tensor
    mask: Tensor | None


class RMAAT(nn.Module):
    """The segment-recurrent encoder and its classification head.

    The memory that leaves segment t, times its retention factor, enters segment t + 1. With other
    values of `attention_type`, `num_memory_tokens`, `num_segments` and `astro_mem` the same module
    is RMT, RLT, AT, the Transformer or the linear Transformer (PAPER's compared systems).
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.segment_len = config.segment_len
        self.max_seq_len = config.max_seq_len
        self.num_encoded = config.num_encoded  # sequences that one example is encoded as
        self.pooling = config.pooling
        self.precision = config.precision
        self.position_embedding = config.position_embedding
        T = config.num_segments // self.num_encoded
        self.retention_factors = retention_factors(T).tolist() if config.astro_mem else [1.0] * T

        self.token_embedding = nn.Embedding(
            config.task.tokenizer.vocab_size, config.dim, padding_idx=PADDING_ID
        )
        if self.position_embedding == "learned":
            self.position_table = nn.Parameter(0.02 * torch.randn(T * self.segment_len, config.dim))
        self.embedding_norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.memory = nn.Parameter(0.02 * torch.randn(config.num_memory_tokens, config.dim))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        head_dim = config.dim if self.num_encoded == 1 else 4 * config.dim
        self.head = nn.Linear(head_dim, config.task.num_classes)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Classify sequences; autograd through this call is BPTT.

        Args:
            tokens: (B, L) integer ids, L at most `max_seq_len`.
            mask: (B, L) bool, True at real tokens; None if nothing is padded.
        Returns:
            Logits (B, C).
        Raises:
            ValueError: L is 0 or exceeds `max_seq_len`, or the mask has another shape.
        """
        positions = self.positions()
        segments, mask = self.split(tokens, mask)
        memory = self.initial_memory(len(segments[0].tokens))
        readouts = []
        for index, segment in enumerate(segments):
            memory, readout = self.segment(
                segment.tokens, memory, index, segment.mask, positions
            )
            readouts.append(readout)
        return self.head(self.combine(readouts, mask))

    def split(
        self, tokens: Tensor, mask: Tensor | None = None
    ) -> tuple[list[Segment], Tensor | None]:
        """Cut (B, L) tokens and mask into segments of S, of which the last may be shorter.

        With `document_pair: separate` the two halves of a row become two rows, 2B in all.

        Returns:
            The segments, and the mask as `combine` wants it: never None beside a short segment.
        Raises:
            ValueError: L is 0, exceeds `max_seq_len` or has no two equal halves, or the mask has
                another shape.
        """
        L = tokens.shape[1]
        if not 1 <= L <= self.max_seq_len:
            raise ValueError(
                f"got sequences of {L} tokens, max_seq_len={self.max_seq_len} allows "
                f"1 to {self.max_seq_len}; raise max_seq_len or cut the input"
            )
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(
                f"mask {tuple(mask.shape)} and tokens {tuple(tokens.shape)} differ in shape"
            )
        if L % self.num_encoded:
            raise ValueError(f"got {L} tokens for {self.num_encoded} documents of equal length")
        tokens = tokens.reshape(-1, L // self.num_encoded)
        mask = None if mask is None else mask.reshape(tokens.shape)
        if mask is None and tokens.shape[1] % self.segment_len:
            mask = torch.ones_like(tokens, dtype=torch.bool)
        pieces = tokens.split(self.segment_len, dim=1)
        masks = [None] * len(pieces) if mask is None else mask.split(self.segment_len, dim=1)
        return [Segment(*pair) for pair in zip(pieces, masks, strict=True)], mask

    def positions(self) -> Tensor | None:
        """phi(R) of all layers, (layers, H, M + S, d); None where no layer has position terms.

        They depend on parameters alone: compute them once per step and hand them to `segment`.
        """
        terms = [layer.attention.positions() for layer in self.layers
                 if layer.attention.has_positions]
        return torch.stack(terms) if terms else None

    def initial_memory(self, batch_size: int) -> Tensor:
        """mem_1, the learned first memory, (B, M, D)."""
        return self.memory.expand(batch_size, -1, -1)

    def segment(
        self,
        tokens: Tensor,
        memory: Tensor,
        index: int,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode one segment. Pure: the same arguments and random state give the same result.

        Args:
            tokens: (B, S) integer ids; fewer than S columns stand for a shorter last segment.
            memory: mem_t, (B, M, D).
            index: t, counted from 0.
            mask: (B, S) bool, True at real tokens; None if nothing is padded.
            positions: what `positions()` returned; None computes them here.
        Returns:
            mem_{t+1} (B, M, D) and the segment's share of the read-out (B, D). A sample without a
            real token here keeps its memory and adds zero.
        """
        if positions is None:
            positions = self.positions()
        with self.autocast(tokens.device):
            M = memory.shape[1]
            x = torch.cat([memory, self.embed(tokens, index).to(memory.dtype)], dim=1)  # (B, N, D)
            rows = None if mask is None else F.pad(mask, (M, 0), value=True)  # (B, N)
            if positions is None:
                terms = [None] * len(self.layers)
            else:
                terms = positions[:, :, : x.shape[1]].unbind(0)  # (H, N, d) each
            for layer, layer_terms in zip(self.layers, terms, strict=True):
                x = layer(x, rows, layer_terms)
            memory_out = x[:, :M].to(memory.dtype)
            readout = self._read_out(memory_out, x[:, M:], mask)
        next_memory = self.retention_factors[index] * memory_out
        if mask is not None:
            active = mask.any(dim=1)
            next_memory = torch.where(active[:, None, None], next_memory, memory)
            readout = readout * active[:, None]
        return next_memory, readout

    def embed(self, tokens: Tensor, index: int) -> Tensor:
        """Token and position embeddings of segment `index`, normalised, (B, S, D)."""
        x = self.token_embedding(tokens)
        start, S = index * self.segment_len, tokens.shape[1]
        if self.position_embedding == "learned":
            x = x + self.position_table[start : start + S]
        elif self.position_embedding == "sinusoidal":
            at = torch.arange(start, start + S, device=x.device)
            x = x + sinusoidal_positions(at, x.shape[-1], x.dtype)
        return self.dropout(self.embedding_norm(x))

    def _read_out(self, memory_out: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, D): the sum (`mean`) or mean (`last`) of the real rows, or the memory's mean."""
        if self.pooling == "memory":
            return memory_out.mean(dim=1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        if mask is None:
            total, count = x.sum(dim=1, dtype=dtype), x.shape[1]
        else:
            total = (x * mask[..., None]).sum(dim=1, dtype=dtype)
            count = mask.sum(dim=1, keepdim=True).clamp_min(1)  # (B, 1)
        return total if self.pooling == "mean" else total / count

    def combine(self, readouts: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        """Pool the segments' read-outs into the head's input.

        Args:
            readouts: one (B, D) per segment that ran, in order.
            mask: (B, L) bool of the sequence; None if every one of those segments is whole.
        Returns:
            (B, D): the mean over real tokens (`mean`), or the read-out of the last segment that
            holds a real token (`last`, `memory`); zero for a sequence without a real token. With
            `document_pair: separate`, from (2B, D) the match [u, v, u * v, u - v], (B, 4D).
        """
        pooled = self._pool(readouts, mask)
        if self.num_encoded == 1:
            return pooled
        u, v = pooled.unflatten(0, (-1, 2)).unbind(1)  # (B, D) each
        return torch.cat([u, v, u * v, u - v], dim=1)

    def _pool(self, readouts: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        stacked = torch.stack(list(readouts), dim=1)  # (B, T, D)
        if self.pooling == "mean":
            if mask is None:
                return stacked.sum(dim=1) / (len(readouts) * self.segment_len)
            return stacked.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1)
        if mask is None:
            return stacked[:, -1]
        active = torch.stack([m.any(dim=1) for m in mask.split(self.segment_len, dim=1)], dim=1)
        order = torch.arange(1, active.shape[1] + 1, device=active.device)
        last = (active * order).argmax(dim=1)  # (B,)
        return stacked[torch.arange(len(last), device=last.device), last]

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The mixed precision of `precision` on `device`.

        Entered per segment and without the cache of cast weights: one filled in the first pass,
        where gradients are off, would cut the replay off from the weights.
        """
        dtype = autocast_dtype(self.precision, device)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The lower precision to compute in, or None for the weights' own."""
    if precision == "bfloat16" or (precision == "auto" and device.type == "cuda"):
        return torch.bfloat16
    return None


def build_model(config: Config) -> RMAAT:
    """The model of a configuration, initialised from torch's global random state, on the CPU."""
    return RMAAT(config)
