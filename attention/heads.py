"""What all attention mechanisms share: heads, projections, and no residual."""

from __future__ import annotations

from torch import Tensor, nn

from lra_config import Config


def split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """A view (3, B, H, N, d) of projected queries, keys and values (B, N, 3D)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)


def join_heads(x: Tensor) -> Tensor:
    """Concatenate heads (B, H, N, d) to (B, N, D)."""
    return x.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """What all mechanisms share: the projections, and no residual (the encoder layer owns it).

    Called as `attention(x, mask, positions) -> y` with x and y (B, N, D), mask (B, N) bool (True at
    real rows) or None, and positions (H, N, d) for the mechanisms that have position terms. Rows
    of y at padding carry no meaning.
    """

    has_positions = False
    memory_std = 0.02  # of the first memory's initial values
    num_pass_through_rows = 0  # leading rows that the layer's feed-forward block leaves as they are

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.dim // config.num_heads
        self.to_qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.to_out = nn.Linear(config.dim, config.dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (B, H, N, d)."""
        return split_heads(self.to_qkv(x), self.num_heads).unbind(0)

    def merge(self, heads: Tensor) -> Tensor:
        """Concatenate the heads' outputs (B, H, N, d) and project them to (B, N, D)."""
        return self.to_out(join_heads(heads))
