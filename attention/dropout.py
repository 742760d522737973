"""Dropout whose mask is a function of a seed, so that a replay repeats the first pass.

No generator is involved: eager code, torch.compile and CUDA graphs draw the same masks, and AMRB
stores nothing to repeat them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 32
_MASK = 2**_BITS - 1
_MULTIPLIER = 0x45D9F3B  # below 2**31: its product with 32 bits stays inside int64
_SECOND_MULTIPLIER = 0x119DE1F3


def mix(x: Tensor) -> Tensor:
    """Scramble 32-bit integers held in int64, a bijection (an xor-shift-multiply hash)."""
    x = ((x >> 16) ^ x) * _MULTIPLIER & _MASK
    x = ((x >> 16) ^ x) * _MULTIPLIER & _MASK
    return (x >> 16) ^ x


def draw_seed(device: torch.device) -> Tensor:
    """Return a seed () int64 on `device`, drawn from the CPU's global random state.

    A failed capture would leave a CUDA generator unusable, and a copy would wait for the device.
    The drawn number is therefore the argument of a fill.
    """
    return torch.full((), int(torch.randint(2**_BITS, ())), device=device)


def derive_keys(seed: Tensor, first: int, count: int) -> Tensor:
    """Return keys (count,) int64 of the masks number `first`, `first + 1`, ... of a seed ()."""
    numbers = torch.arange(first, first + count, device=seed.device)
    return mix(mix(numbers) ^ seed)


def dropout(x: Tensor, p: float, key: Tensor | None) -> Tensor:
    """Zero each element of x with probability p and scale the others by 1 / (1 - p).

    Args:
        x: (..., D), with fewer than 2**32 rows.
        key: () int64 that decides the mask; None returns x unchanged.
    """
    if key is None:
        return x
    width = x.shape[-1]
    # One exact hash per row and per column; a few 32-bit operations (modulo 2**32) per element
    # then combine them. Mixing every element in 64 bits takes over twice as long on a CPU.
    rows = mix(torch.arange(x.numel() // width, device=x.device) ^ key).to(torch.int32)
    columns = mix(torch.arange(width, device=x.device) ^ mix(key)).to(torch.int32)
    hashed = (rows.view(*x.shape[:-1], 1) ^ columns) * _MULTIPLIER
    hashed ^= hashed >> 15
    hashed *= _SECOND_MULTIPLIER
    threshold = round(p * 2**_BITS) - 2 ** (_BITS - 1)  # int32 is signed
    # 0 or 1 in the type of x, because a product with bool takes several times as long.
    keep = torch.ge(hashed, threshold, out=x.new_empty(x.shape))
    return x * keep * (1 / (1 - p))
