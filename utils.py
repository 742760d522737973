"""Positional encodings, random states and the description of the machine."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import random
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def sinusoidal_positions(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Sinusoidal position embeddings of the given positions, without a table.

    Args:
        positions: (S,) integer positions, in tokens.
        dim: even width of the embedding.
    Returns:
        (S, dim) of `dtype`: sines in the first half, cosines in the second.
    Source: Vaswani et al. 2017, section 3.5.
    """
    exponents = torch.arange(dim // 2, device=positions.device, dtype=torch.float64)
    frequencies = torch.exp(exponents * (-math.log(10_000) / (dim // 2)))
    # float64: at position 10^6 a float32 angle is off by a tenth of a radian.
    angles = positions[:, None].double() * frequencies  # (S, dim / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).to(dtype)


def grid_positions(positions: Tensor, side: int, dim: int) -> Tensor:
    """Sinusoids of the row and of the column of pixels, a quarter of the features each.

    A flat index tells a column only through waves that happen to fit a row. Wave lengths here range
    from twice the side to 4 pixels, and the likeness of two rows, or columns, is of their distance.

    Args:
        positions: (S,) int64, in pixels of a square image read row by row.
        side: of that image, in pixels.
        dim: at least 4; what is left over of a multiple of 4 stays zero.
    Returns:
        (S, dim) float32: sines and cosines of the row, sines and cosines of the column.
    Deviation: the paper leaves the position embedding open.
    """
    exponents = torch.linspace(0, math.log2(side / 2), dim // 4)
    frequencies = math.pi / side * 2**exponents
    angles = [x[:, None] * frequencies for x in (positions // side, positions % side)]
    waves = torch.cat([wave(x) for x in angles for wave in (torch.sin, torch.cos)], dim=1)
    return F.pad(waves, (0, dim - waves.shape[1]))


def sinusoidal_segments(
    num_segments: int, segment_len: int, dim: int
) -> tuple[Tensor, Tensor]:
    """Two factors of the sinusoidal embeddings of T S positions, without a table of them.

    Position t S + i turns every wave at i by the angle of t S, so that its embedding is
    waves[0, i] * turns[0, t] + waves[1, i] * turns[1, t].

    Args:
        num_segments: T.
        segment_len: S, in tokens.
    Returns:
        waves (2, S, dim) and turns (2, T, dim), float64.
    """
    def at(positions: Tensor) -> list[Tensor]:
        return sinusoidal_positions(positions, dim, torch.float64).chunk(2, dim=-1)

    sin, cos = at(torch.arange(segment_len))
    waves = torch.stack([torch.cat([sin, cos], dim=-1), torch.cat([cos, -sin], dim=-1)])
    sin, cos = at(segment_len * torch.arange(num_segments))
    return waves, torch.stack([cos.repeat(1, 2), sin.repeat(1, 2)])


def digit_positions(positions: Tensor, dim: int, digits: Sequence[int]) -> Tensor:
    """Position code of one-hot digits and a constant, in the first features.

    Two positions share the constant and each digit that they agree in, so that a linear map with a
    threshold tells one position from all others. Of the features in use, the constant is the last.

    Args:
        positions: (S,) int64, in tokens.
        dim: enough for all digits and the constant.
        digits: how many values each takes, the lowest digit first.
    Returns:
        (S, dim) float32: a one for every digit and one for the constant.
    Deviation: the paper leaves the position embedding open.
    """
    features, first, place = [], 0, 1
    for size in digits:
        features.append(first + positions // place % size)
        first, place = first + size, place * size
    features.append(torch.full_like(positions, first))
    return torch.zeros(len(positions), dim).scatter_(1, torch.stack(features, dim=1), 1.0)


def digit_height(dim: int, digits: Sequence[int]) -> float:
    """What a layer norm makes of the ones of `digit_positions`, beside features of mean square 1.

    Args:
        dim: of the normalised vectors.
        digits: how many values each takes.
    """
    return math.sqrt(dim / (dim - sum(digits) + len(digits)))


def ordinal_embedding(levels: int, dim: int) -> Tensor:
    """Start of the vectors of ordered levels, such as grey levels: like levels, like vectors.

    Feature f of level g is sqrt(2) sin(a_f z + b_f) with z from -1 to 1 over the levels, a_f normal
    of deviation 3, which decides how far likeness reaches, and b_f uniform over the circle. Its
    mean square is 1, as that of a random start.

    Args:
        levels: at least 2.
        dim: of the vectors.
    Returns:
        (levels, dim).
    Deviation: the paper leaves open how the embedding starts.
    """
    z = 2 * torch.arange(levels) / (levels - 1) - 1  # (levels,)
    frequency, phase = 3 * torch.randn(dim), 2 * math.pi * torch.rand(dim)
    return math.sqrt(2) * torch.sin(frequency * z[:, None] + phase)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch for one training step, so that a resumed run draws what an unbroken one draws."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Give tensors, in place, the values they had."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def first_line(error: BaseException) -> str:
    """What an error says, without the story that follows it."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def versions() -> dict[str, str]:
    """The software that a result depends on, our own commit included."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda or "none",
        "commit": _commit(),
    }


def hardware(device: torch.device) -> str:
    """The name of the processor in use, and for a CPU the threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux knows the model's name
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()}"


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
