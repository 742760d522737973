"""Attention mechanisms inside a segment, by the name that `attention_type` gives them."""

from attention.astromorphic import AstromorphicAttention
from attention.baselines import (
    LinearAttention,
    LunaAttention,
    NystromAttention,
    SoftmaxAttention,
)

__all__ = [
    "ATTENTION", "AstromorphicAttention", "LinearAttention", "LunaAttention", "NystromAttention",
    "SoftmaxAttention",
]

ATTENTION = {
    "astro": AstromorphicAttention,
    "softmax": SoftmaxAttention,
    "linear": LinearAttention,
    "nystrom": NystromAttention,
    "luna": LunaAttention,
}
