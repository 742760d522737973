"""Neighbor initialization: attention that copies single neighboring tokens before any training.

`basis_init: neighbors` gives every token of a segment one hidden neuron. `build_model` then calls
`copy_neighbors` once, which sets the initial weights so that

    row i of a head reads token i + offset        W_Q, one offset per head, layer after layer
    neuron j answers to token j alone             B, through phi(R)
    rows differ by their position code            added to the embeddings, passed on by every layer

The position code of a segment is a one-hot vector per digit of the position, and a constant. It
occupies the first features of the model, to which nothing else writes at initialization. The code
is part of the model's input; all other effects are initial values, which training may change.

Deviation: the paper does not publish the initialization of its attention. Extension: off by
default.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUERY_GAIN = 16.0  # the neuron that a row reads has q = +8, all others have -8 or less
KEY_SILENCE = -3.0  # k of every neuron, so that H_neuron is a small part of H at first
BASIS_SILENCE = -3.0  # R of a neuron at all rows but its own


def position_code(length: int, dim: int, digits: Sequence[int]) -> Tensor:
    """Return the code of the positions of a segment: one-hot digits and a constant.

    Two positions share the constant and every digit in which they agree. A linear map with a
    threshold can therefore distinguish one position from all others.

    Args:
        length: S, in tokens.
        dim: D, at least one feature per value of each digit, and one for the constant.
        digits: number of values of each digit, lowest digit first.
    Returns:
        (S, D) float32; of the features in use the constant is the last.
    """
    positions, features, first, base = torch.arange(length), [], 0, 1
    for size in digits:
        features.append(first + positions // base % size)
        first, base = first + size, base * size
    features.append(torch.full_like(positions, first))
    return torch.zeros(length, dim).scatter_(1, torch.stack(features, dim=1), 1.0)


def code_height(dim: int, digits: Sequence[int]) -> float:
    """Return the value of the code's ones behind a layer norm.

    The other features are assumed to have mean square 1.
    """
    return math.sqrt(dim / (dim - sum(digits) + len(digits)))


def neighbor_basis(num_heads: int, num_memory_tokens: int, segment_len: int) -> Tensor:
    """Return an initial B with one hidden neuron per token of the segment, m = S.

    A neuron has R = S at its own token, as much as the full segment has at phi(0) = 1, and
    R = BASIS_SILENCE elsewhere, where phi(R) is nearly 0.

    Returns:
        (H, S, N) with N = num_memory_tokens + segment_len.
    """
    S = segment_len
    # Where the position kernel is the identity, a symmetric B has R = B^T B B^T = B^3. The cube
    # root of R = S I + BASIS_SILENCE (J - I) takes those of its two eigenvalues; J / S projects.
    mean = torch.full((S, S), 1 / S)
    deviation, common = S - BASIS_SILENCE, S + (S - 1) * BASIS_SILENCE
    basis = _cube_root(deviation) * (torch.eye(S) - mean) + _cube_root(common) * mean
    return F.pad(basis, (num_memory_tokens, 0)).repeat(num_heads, 1, 1)


def _cube_root(x: float) -> float:
    return math.copysign(abs(x) ** (1 / 3), x)


@torch.no_grad()
def copy_neighbors(model: nn.Module) -> None:
    """Initialize a built model so that its attention copies the tokens at `neighbor_offsets`.

    The code's features are cleared in all weights that write to them: the token and position
    embeddings and the last linear map of every block. The code thus reaches every layer.

    Args:
        model: a `model.RMAAT` whose configuration has `copies_neighbors`.
    """
    config = model.config
    digits = config.position_code_digits
    code, used = model.position_code, slice(config.position_code_width)
    model.token_embedding.weight[:, used] = 0
    # The memory rows read as the last token does.
    model.memory[:, used] = code_height(config.dim, digits) * code[-1, used]
    if config.position_embedding == "learned":
        model.position_table[:, used] = 0
    basis = neighbor_basis(config.num_heads, config.num_memory_tokens, config.segment_len)
    offsets = itertools.cycle(config.neighbor_offsets)
    for layer in model.layers:
        for block in (layer.attention.to_out, layer.contract):
            block.weight[used] = 0
            block.bias[used] = 0
        if config.hebbian_astro:
            layer.attention.position_basis.copy_(basis)
            layer_offsets = list(itertools.islice(offsets, config.num_heads))
            _read_neighbors(layer.attention.to_qkv.weight, code, layer_offsets, digits)


def _read_neighbors(
    to_qkv: Tensor, code: Tensor, offsets: Sequence[int], digits: Sequence[int]
) -> None:
    """Set the rows of W_Q, W_K and W_V that read the position code.

    Query i matches neuron i + offset, modulo S: the constant makes a threshold between all digits
    and all digits but one. Keys are equally small for all positions, and values are without code.

    Args:
        to_qkv: the weight (H (2 S + d), D) of a layer's projection.
        code: the position code (S, D).
        offsets: one per head.
    """
    S, D = code.shape
    num_heads = len(offsets)
    constant = sum(digits)
    height = code_height(D, digits)
    queries, keys, values = to_qkv.tensor_split([num_heads * S, 2 * num_heads * S])
    for offset, rows in zip(offsets, queries.split(S), strict=True):
        rows.copy_(QUERY_GAIN / height * code.roll(offset, dims=0))
        rows[:, constant] = -(len(digits) - 0.5) * QUERY_GAIN / height
    keys[:, : constant + 1] = 0
    keys[:, constant] = KEY_SILENCE / height
    values[:, : constant + 1] = 0
