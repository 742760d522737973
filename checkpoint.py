"""Checkpoints of a run: written whole or not at all, read without executing anything."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from utils import atomic_write


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, told in one line."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint beside the one at `path`, then put it in its place.

    Raises:
        CheckpointError: it could not be written; what stood at `path` is still there.
    """
    try:
        with atomic_write(path) as handle:
            torch.save(state, handle)
    # torch's zip writer turns a full disk into a RuntimeError.
    except (OSError, RuntimeError) as error:
        kept = "the previous checkpoint is kept" if path.exists() else "no checkpoint exists yet"
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: could not be written ({reason}); {kept}") from error


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        CheckpointError: there is none at `path`, or it is not a checkpoint.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no checkpoint; start without --resume") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({reason[:100]}); remove it to start anew"
        ) from None
