"""An optional convolution in front of the attention. Extension: off by default; not published."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ImageConvolution(nn.Module):
    """x + gelu(depthwise 3 x 3 convolution), over the pixels of one segment.

    A segment is a strip of full rows of the image. Memory tokens pass unchanged. The convolution
    does not cross the border between two segments, so a segment stays a pure function of its
    tokens and its memory, as AMRB requires.
    """

    def __init__(self, dim: int, num_memory_tokens: int, image_width: int) -> None:
        super().__init__()
        self.num_memory_tokens = num_memory_tokens
        self.image_width = image_width
        self.convolution = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix neighboring pixels of x (B, M + S, D)."""
        memory, pixels = x[:, : self.num_memory_tokens], x[:, self.num_memory_tokens :]
        image = pixels.mT.unflatten(2, (-1, self.image_width))  # (B, D, rows, width)
        mixed = F.gelu(self.convolution(image)).flatten(2).mT  # (B, S, D)
        return torch.cat([memory, pixels + mixed], dim=1)
