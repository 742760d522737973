"""The optimizer and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lra_config import Config
from model import RMAAT

MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of AdamW, per parameter


def learning_rate_factor(step: int, config: Config) -> float:
    """The schedule's factor on the learning rate at `step` (from 0): warm-up, then decay to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    if config.lr_schedule == "cosine":
        return (1 + math.cos(math.pi * progress)) / 2
    return 1 - progress if config.lr_schedule == "linear" else 1.0


def build_optimizer(model: RMAAT, config: Config) -> torch.optim.AdamW:
    """AdamW in three groups: the position basis, matrices, and what takes no weight decay."""
    basis, decayed, undecayed = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("position_basis"):
            basis.append(parameter)
        elif name.endswith("weight") and parameter.ndim == 2 and "embedding" not in name:
            decayed.append(parameter)
        else:
            undecayed.append(parameter)
    groups = [
        {"params": basis, "factor": config.position_lr_factor, "weight_decay": 0.0},
        {"params": decayed, "factor": 1.0, "weight_decay": config.weight_decay},
        {"params": undecayed, "factor": 1.0, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.learning_rate,
        fused=model.memory.device.type == "cuda" or None,  # one kernel; on a CPU it saves nothing
    )


def restore_optimizer(
    optimizer: torch.optim.Optimizer, state: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """Take over what an optimizer of the same groups knew of each parameter, by its number.

    Raises:
        ValueError: it is of other parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in state.items():
        if not 0 <= index < len(parameters) or moments.keys() != MOMENTS:
            raise ValueError(f"the optimizer's state {index} is none of AdamW's")
        for name, moment in moments.items():
            if moment.shape != (() if name == "step" else parameters[index].shape):
                raise ValueError(f"the optimizer's {name} of parameter {index} has another shape")
    # Copies: what is read from a checkpoint is mapped from its file.
    copies = {i: {name: x.clone() for name, x in moments.items()} for i, moments in state.items()}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": copies, "param_groups": groups})
