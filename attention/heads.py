"""The base of all attention mechanisms: heads and projections."""

from __future__ import annotations

from torch import Tensor, nn

from lra_config import Config


def split_heads(qkv: Tensor, num_heads: int, num_hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return views of projected queries, keys and values, which are next to each other.

    Args:
        qkv: (B, N, H (2 m + d)).
        num_hidden: m, the width of a head's queries and keys.
    Returns:
        Queries and keys (B, H, N, m) and values (B, H, N, d).
    """
    width = num_heads * num_hidden
    q, k, v = qkv.tensor_split([width, 2 * width], dim=-1)
    return tuple(x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))


def join_heads(x: Tensor) -> Tensor:
    """Concatenate heads (B, H, N, d) to (B, N, D)."""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """The projections of a mechanism; the encoder layer adds the residual.

    Called as `attention(x, mask, positions) -> y` with x and y (B, N, D), mask (B, N) bool (True at
    real rows) or None, and positions (H, N, m) for the mechanisms that have position terms. Rows
    of y at padding have no meaning.
    """

    backend: str | None = None  # `reference` or `fused`; None: there is only one implementation
    has_positions = False
    memory_std = 0.02  # of the first memory's initial values
    num_pass_through_rows = 0  # leading rows that the layer's feed-forward block does not change

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.dim // config.num_heads
        self.num_hidden = config.num_hidden or self.head_dim  # m
        width = self.num_heads * (2 * self.num_hidden + self.head_dim)
        self.to_qkv = nn.Linear(config.dim, width, bias=False)
        self.to_out = nn.Linear(config.dim, config.dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys (B, H, N, m) and values (B, H, N, d)."""
        return split_heads(self.to_qkv(x), self.num_heads, self.num_hidden)

    def merge(self, heads: Tensor) -> Tensor:
        """Concatenate the heads' outputs (B, H, N, d) and project them to (B, N, D)."""
        return self.to_out(join_heads(heads))
