"""The optimizers and the learning-rate schedule they share."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lra_config import Config
from model import RMAAT

MUON_MOMENTUM = 0.95
# The tensors that an optimizer keeps for each parameter, by the optimizer's name.
STATE_TENSORS = {
    "adamw": {"step", "exp_avg", "exp_avg_sq"},
    "muon": {"momentum_buffer"},
}


def learning_rate_factor(step: int, config: Config) -> float:
    """Return the schedule's factor at `step` (from 0): warm-up from 0, then decay to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    if config.lr_schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - progress if config.lr_schedule == "linear" else 1.0


def set_learning_rate(
    optimizers: Mapping[str, torch.optim.Optimizer], step: int, config: Config
) -> float:
    """Set every group's learning rate for `step` and return the one of factor 1."""
    learning_rate = config.learning_rate * learning_rate_factor(step, config)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["factor"]
    return learning_rate


def build_optimizers(model: RMAAT, config: Config) -> dict[str, torch.optim.Optimizer]:
    """Build the optimizers of a run, by name: `adamw`, and `muon` if `optimizer: muon`.

    Muon takes the matrices of the encoder layers (W_QKV as one matrix, the output projection and
    the two feed-forward matrices). AdamW takes everything else, in three groups: the position
    basis B, matrices, and parameters without weight decay (embeddings, biases, norms, memory).
    Muon's updates are scaled to the size of AdamW's ("match_rms_adamw"), so that one learning rate
    serves both; `muon_lr_factor` multiplies it for Muon.

    Source: Jordan et al. 2024 (Muon); Liu et al. 2025, arXiv 2502.16982 (the scaling).
    """
    hidden, basis, decayed, undecayed = [], [], [], []
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith("weight") and parameter.ndim == 2 and "embedding" not in name
        if name.endswith("position_basis"):
            basis.append(parameter)
        elif is_matrix and name.startswith("layers.") and config.optimizer == "muon":
            hidden.append(parameter)
        elif is_matrix:
            decayed.append(parameter)
        else:
            undecayed.append(parameter)
    groups = [
        {"params": basis, "factor": config.position_lr_factor, "weight_decay": 0.0},
        {"params": decayed, "factor": 1.0, "weight_decay": config.weight_decay},
        {"params": undecayed, "factor": 1.0, "weight_decay": 0.0},
    ]
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.learning_rate,
            # One kernel for all parameters on CUDA; on a CPU it saves nothing.
            fused=model.memory.device.type == "cuda" or None,
        )
    }
    if hidden:
        optimizers["muon"] = torch.optim.Muon(
            [{"params": hidden, "factor": config.muon_lr_factor}],
            lr=config.learning_rate, momentum=MUON_MOMENTUM, weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
    return optimizers


def restore_optimizers(
    optimizers: Mapping[str, torch.optim.Optimizer],
    states: Mapping[str, Mapping[int, Mapping[str, Tensor]]],
) -> None:
    """Load the saved tensors of each optimizer, by the parameter's number.

    Raises:
        ValueError: the states belong to other optimizers or parameters.
    """
    if states.keys() != optimizers.keys():
        raise ValueError(f"it holds the state of {', '.join(states)}, not {', '.join(optimizers)}")
    for name, optimizer in optimizers.items():
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, tensors in states[name].items():
            if not 0 <= index < len(parameters) or tensors.keys() != STATE_TENSORS[name]:
                raise ValueError(f"the state {index} of {name} has other tensors")
            for key, tensor in tensors.items():
                if tensor.shape != (() if key == "step" else parameters[index].shape):
                    raise ValueError(f"{name}'s {key} of parameter {index} has another shape")
        # Copies: tensors read from a checkpoint are mapped from its file.
        copies = {
            i: {key: x.clone() for key, x in tensors.items()}
            for i, tensors in states[name].items()
        }
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": copies, "param_groups": groups})
