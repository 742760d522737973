"""Positional encodings, seeding, and a description of the machine."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import random
import subprocess
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def sinusoidal_positions(positions: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Return the sinusoidal embeddings of the given positions, without a table.

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
    """Return sinusoids of the row and of the column of pixels, a quarter of the features each.

    A flat index encodes the column only through waves that happen to fit a row. Here the wave
    lengths are 4 pixels to twice the side. The similarity of two rows depends on their distance.

    Args:
        positions: (S,) int64, in pixels of a square image read row by row.
        side: of that image, in pixels.
        dim: at least 4; features beyond a multiple of 4 are zero.
    Returns:
        (S, dim) float32: sines and cosines of the row, sines and cosines of the column.
    Deviation: the paper does not publish its position embedding.
    """
    exponents = torch.linspace(0, math.log2(side / 2), dim // 4)
    frequencies = math.pi / side * 2**exponents
    angles = [x[:, None] * frequencies for x in (positions // side, positions % side)]
    waves = torch.cat([wave(x) for x in angles for wave in (torch.sin, torch.cos)], dim=1)
    return F.pad(waves, (0, dim - waves.shape[1]))


def sinusoidal_segments(num_segments: int, segment_len: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return two factors of the sinusoidal embeddings of T S positions, without a table of them.

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


def ordinal_embedding(levels: int, dim: int) -> Tensor:
    """Return initial vectors of ordered levels, such as gray levels; similar levels are similar.

    Feature f of level g is sqrt(2) sin(a_f z + b_f) with z from -1 to 1 over the levels. a_f is
    normal with deviation 3, which decides how far the similarity reaches, and b_f uniform over the
    circle. The mean square is 1, as for a random initialization.

    Args:
        levels: at least 2.
        dim: of the vectors.
    Returns:
        (levels, dim).
    Deviation: the paper does not publish the initialization of its embedding.
    """
    z = 2 * torch.arange(levels) / (levels - 1) - 1  # (levels,)
    frequency, phase = 3 * torch.randn(dim), 2 * math.pi * torch.rand(dim)
    return math.sqrt(2) * torch.sin(frequency * z[:, None] + phase)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch for one training step, so that a resumed run repeats an uninterrupted one."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0]))


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    """Copy earlier values back into tensors, in place."""
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut to 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def versions() -> dict[str, str]:
    """Return the versions of the software that a result depends on, this commit included."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cuda": torch.version.cuda or "none",
        "commit": _commit(),
    }


def hardware(device: torch.device) -> str:
    """Return the name of the processor in use, and for a CPU the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux knows the model's name
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.get_num_threads()} of {os.cpu_count()} CPU threads"


def _commit() -> str:
    folder = Path(__file__).resolve().parent
    # A copy inside another repository must not record that repository's commit.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=folder, env=environment, capture_output=True, text=True, check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
