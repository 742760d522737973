"""What `torchrun` tells a process by its environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from run.text import UserError, shown

REQUIRED = ("RANK", "LOCAL_RANK", "MASTER_PORT")


class EnvironmentMistake(UserError, ValueError):
    """An environment that no launcher leaves, told in one line."""


@dataclass(frozen=True)
class Launched:
    """A process's place among those that were started together, on all machines and on its own."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def launched_processes() -> Launched:
    """This process's place; one alone where WORLD_SIZE does not say otherwise.

    Raises:
        EnvironmentMistake: the variables are not those that a launcher sets.
    """
    world_size = _number("WORLD_SIZE", least=1) if "WORLD_SIZE" in os.environ else 1
    if world_size == 1:
        return Launched()
    for name in (*REQUIRED, "MASTER_ADDR"):
        if not os.environ.get(name):
            raise EnvironmentMistake(
                f"WORLD_SIZE={world_size} without {name} in the environment; start the processes "
                "with torchrun, or unset WORLD_SIZE"
            )
    rank, local_rank, _ = (_number(name) for name in REQUIRED)
    if rank >= world_size:
        raise EnvironmentMistake(
            f"RANK={rank} in the environment, of {world_size} processes; start them with torchrun"
        )
    on_this_machine = "LOCAL_WORLD_SIZE"
    return Launched(
        rank, world_size, local_rank,
        _number(on_this_machine, least=1) if on_this_machine in os.environ else 1,
    )


def _number(name: str, least: int = 0) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise EnvironmentMistake(
            f"{name}={shown(text)} in the environment is no number from {least} up; start the "
            f"processes with torchrun, or unset {name}"
        )
    return int(text)
