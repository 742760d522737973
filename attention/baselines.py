"""The attention mechanisms that RMAAT is compared with, each written like its equations.

Shape letters are those of `model.py`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.equations import Terms, mask_rows
from attention.fused import choose_backend, respond
from attention.heads import Attention
from lra_config import Config

PSEUDO_INVERSE_ITERATIONS = 6  # Nystromformer, section 3.4


class LinearAttention(Attention):
    """phi(Q) (phi(K)^T V) / (phi(Q) sum_t phi(k_t)): no astrocyte.

    Source: Katharopoulos et al. 2020, Eq. 5.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.backend = choose_backend(config)

    def forward(self, x: Tensor, mask: Tensor | None, positions: None = None) -> Tensor:
        return self.to_out(respond(
            self.to_qkv(x), self.num_heads, self.num_hidden, mask, None, Terms(), self.backend
        ))


def visible_keys(mask: Tensor | None) -> Tensor | None:
    """Return the rows (B, N) that a softmax may look at: the real ones.

    A softmax over nothing is NaN, so a sample of padding alone sees all of its rows.
    """
    return None if mask is None else mask | ~mask.any(dim=1, keepdim=True)


class SoftmaxAttention(Attention):
    """Scaled dot-product attention, quadratic in N.

    Source: Vaswani et al. 2017, Eq. 1.
    """

    def forward(self, x: Tensor, mask: Tensor | None, positions: None = None) -> Tensor:
        q, k, v = self.project(x)
        return self.merge(softmax_attention(q, k, v, visible_keys(mask)))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Return softmax(Q K^T / sqrt(d)) V, (B, H, N_q, d), over the `visible` keys (B, N_k)."""
    mask = None if visible is None else visible[:, None, None, :]
    dtype = q.dtype
    if q.device.type == "cpu" and dtype == torch.bfloat16:
        # On a CPU the gradient in bfloat16 takes three times as long as in float32.
        q, k, v = q.float(), k.float(), v.float()
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).to(dtype)


class NystromAttention(Attention):
    """Softmax attention through landmarks, linear in N.

    With landmarks Q~ and K~, the means of equal runs of real rows, softmax(Q K^T / sqrt(d)) V is
    approximated by

        F A^+ B V + DConv(V),   F = softmax(Q K~^T / sqrt(d))     (N x l)
                                A = softmax(Q~ K~^T / sqrt(d))    (l x l)
                                B = softmax(Q~ K^T / sqrt(d))     (l x N)

    where DConv is a convolution along the rows, one kernel per head. With no more real rows than
    landmarks each is its own landmark, and F A^+ B is the softmax matrix itself.

    Source: Xiong et al. 2021, Section 3.2; A^+ by Eq. 15.
    Deviation: a run is made of real rows alone; the original's means count padded rows as zeros.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.num_landmarks = config.nystrom_landmarks
        self.iterations = PSEUDO_INVERSE_ITERATIONS
        self.convolution = None
        if config.nystrom_conv:
            self.convolution = nn.Conv2d(
                self.num_heads, self.num_heads, (config.nystrom_conv, 1), groups=self.num_heads,
                padding=(config.nystrom_conv // 2, 0), bias=False,
            )

    def forward(self, x: Tensor, mask: Tensor | None, positions: None = None) -> Tensor:
        q, k, v = self.project(x)
        q = q / math.sqrt(self.head_dim)
        if mask is None:
            mask = torch.ones_like(x[..., 0], dtype=torch.bool)
        visible = visible_keys(mask)
        runs = landmark_runs(visible, self.num_landmarks)[:, None]  # (B, 1, N, l)
        sizes = runs.sum(dim=2)[..., None]  # (B, 1, l, 1)
        landmarks = (runs.to(q.dtype).mT @ torch.cat([q, k], dim=-1)) / sizes.clamp_min(1)
        landmark_q, landmark_k = landmarks.to(q.dtype).chunk(2, dim=-1)  # (B, H, l, d) each

        present = sizes > 0  # a sample with fewer real rows than landmarks has no others
        keys = visible[:, None, None, :]
        rows_to_landmarks = masked_softmax(q @ landmark_k.mT, present.mT)  # F
        among_landmarks = masked_softmax(landmark_q @ landmark_k.mT, present.mT) * present  # A
        landmarks_to_rows = masked_softmax(landmark_q @ k.mT, keys)  # B
        inverse = pseudo_inverse(among_landmarks, self.iterations).to(q.dtype)
        # From the right, so that no N x N product is formed.
        response = rows_to_landmarks.to(q.dtype) @ (inverse @ (landmarks_to_rows.to(v.dtype) @ v))
        if self.convolution is not None:
            response = response + self.convolution(mask_rows(v, mask))
        return self.merge(response)


def landmark_runs(real: Tensor, num_landmarks: int) -> Tensor:
    """Assign each real row to one of l = min(num_landmarks, N) runs of nearly equal length.

    Padding is not counted: the runs depend on the order of the real rows alone. A sample with
    fewer than l real rows has as many runs of one row, and the last ones are empty.

    Args:
        real: (B, N) bool.
    Returns:
        (B, N, l) bool, True where the row belongs to the run.
    """
    num_runs = min(num_landmarks, real.shape[1])
    rank = real.cumsum(dim=1) - 1  # (B, N), among the real rows
    count = real.sum(dim=1, keepdim=True).clamp_min(1)  # (B, 1)
    run = rank * count.clamp_max(num_runs) // count
    return (run[..., None] == torch.arange(num_runs, device=real.device)) & real[..., None]


def masked_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """Return the softmax over the last dimension, 0 where not `visible` (broadcast)."""
    return scores.masked_fill(~visible, -math.inf).softmax(dim=-1)


def pseudo_inverse(matrix: Tensor, iterations: int) -> Tensor:
    """Return A^+ of matrices A by an iteration of third order that needs products only.

    Z_0 = A^T / (|A|_1 |A|_inf),  Z_{j+1} = Z_j (13 I - A Z_j (15 I - A Z_j (7 I - A Z_j))) / 4.

    Rows and columns of zeros stay zero, as in A^+.

    Args:
        matrix: (..., l, l).
    Returns:
        (..., l, l), at least float32.
    Source: Xiong et al. 2021, Eq. 15.
    """
    with torch.autocast(matrix.device.type, enabled=False):
        A = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
        eye = torch.eye(A.shape[-1], device=A.device, dtype=A.dtype)
        # Norms per matrix: one over the batch would let samples change each other's result.
        sums = [A.abs().sum(dim).amax(dim=-1)[..., None, None] for dim in (-2, -1)]
        Z = A.mT / (sums[0] * sums[1])
        for _ in range(iterations):
            AZ = A @ Z
            Z = 0.25 * Z @ (13 * eye - AZ @ (15 * eye - AZ @ (7 * eye - AZ)))
        return Z


class LunaAttention(Attention):
    """Pack-and-unpack attention: rows exchange information through the M memory rows only.

    The memory rows are Luna's P, which each layer passes to the next. X are the others:

        Y_P = softmax(P W_Q (X W_K)^T / sqrt(d)) X W_V              packs, (M x d)
        Y_X = softmax(X W_Q (Y_P W'_K)^T / sqrt(d)) Y_P W'_V        unpacks, (N - M x d)

    y holds Y_P, and then Y_X after the output projection. Linear in N.

    Source: Ma et al. 2021, Section 3.
    Deviation: P and X share W_Q and the layer norm after the attention; Luna has one for each.
    """

    memory_std = 1.0  # P has the scale of an embedding at first: its rows must differ to pack

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.num_pass_through_rows = config.num_memory_tokens
        self.to_packed_kv = nn.Linear(config.dim, 2 * config.dim, bias=False)  # W'_K, W'_V

    def forward(self, x: Tensor, mask: Tensor | None, positions: None = None) -> Tensor:
        M = self.num_pass_through_rows
        visible = visible_keys(None if mask is None else mask[:, M:])
        (packed_q, q), (_, k), (_, v) = (
            rows.tensor_split([M], dim=2) for rows in self.project(x)
        )
        packed = softmax_attention(packed_q, k, v, visible).transpose(1, 2).flatten(2)  # (B, M, D)
        packed_kv = self.to_packed_kv(packed).unflatten(-1, (2, self.num_heads, self.head_dim))
        unpacked = softmax_attention(q, *packed_kv.permute(2, 0, 3, 1, 4), None)  # (B, H, N - M, d)
        return torch.cat([packed, self.merge(unpacked)], dim=1)
