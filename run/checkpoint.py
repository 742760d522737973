"""Checkpoints and exported weights: written whole or not at all, read without running code."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError

from lra_config import Config, UserError, make_config
from run.files import atomic_write, write_json
from run.model_card import model_card
from utils import first_line


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be used, told in one line."""

    met_by_all = False


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint beside the one at `path`, then put it in its place.

    Raises:
        CheckpointError: it could not be written; what stood at `path` is still there.
    """
    try:
        with atomic_write(path) as handle:
            torch.save(state, handle)
    # torch's zip writer covers the OSError of a full disk with a RuntimeError of its own.
    except (OSError, RuntimeError) as error:
        kept = "the previous checkpoint is kept" if path.exists() else "no checkpoint exists yet"
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise CheckpointError(f"{path}: could not be written ({reason}); {kept}") from error


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        CheckpointError: there is none at `path`, or it is not a checkpoint.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise _unreadable(path, error) from None


def export(state: dict[str, Any], folder: Path, summary: dict[str, Any] | None) -> None:
    """Write what `RMAAT.from_pretrained(folder)` reads and a model card, `README.md`, of it.

    `config.json` holds the configuration, less what concerns this machine alone, and at the word
    level the vocabulary.

    Args:
        state: as `RMAAT.state` lays it out.
        summary: of the finished run that the weights are from, if any; `summary.json` itself is the
            caller's, as with it a run is finished.
    """
    weights = {name: tensor.contiguous() for name, tensor in state["model"].items()}
    with atomic_write(folder / "model.safetensors") as handle:
        handle.write(safetensors.torch.save(weights, metadata={"format": "pt"}))
    local = Config.keys("local")
    values = {key: value for key, value in state["config"].items() if key not in local}
    if state["vocabulary"] is not None:
        values["vocabulary"] = state["vocabulary"]
    write_json(folder / "config.json", values)
    with atomic_write(folder / "README.md", "w") as handle:
        handle.write(model_card(make_config(state["config"]), summary))


def load_exported(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a `.safetensors` file and the `config.json` beside it, as `RMAAT.state` lays them out.

    Raises:
        CheckpointError: one of the two is missing or damaged.
    """
    config_path = path.with_name("config.json")
    try:
        weights = safetensors.torch.load_file(path, device=str(device))
        values = json.loads(config_path.read_text(encoding="utf-8"))
        vocabulary = values.pop("vocabulary", None)
    except FileNotFoundError:
        missing = config_path if path.exists() else path
        raise CheckpointError(
            f"{missing}: missing; weights as safetensors need the config.json of their run beside "
            "them"
        ) from None
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise _unreadable(path, error) from None
    return {"model": weights, "config": values, "vocabulary": vocabulary}


def load_summary(source: str, **hub: Any) -> dict[str, Any] | None:
    """The `summary.json` of a folder or of a model on the Hugging Face Hub; None without one.

    Args:
        hub: how to reach it, as `hf_hub_download` takes it.
    Raises:
        CheckpointError: it is damaged.
    """
    path = Path(source) / "summary.json"
    if not Path(source).is_dir():
        try:
            path = Path(hf_hub_download(source, "summary.json", **hub))
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = first_line(error)
    return CheckpointError(
        f"{path}: not a readable checkpoint ({reason[:100]}); name another one, or remove it to "
        "start anew"
    )
