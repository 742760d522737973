"""What a run is about to do and to take, on one screen before it starts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from data.packing import PackedSplit, Reader
from dataloader import Batch
from footprint import FLOAT, TRAINING_COPIES
from lra_config import Config
from model import RMAAT
from run.processes import Processes
from training.cost import flop_per_token
from training.replay import activation_bytes
from utils import hardware, held_memory_mib


@dataclass(frozen=True)
class Overview:
    """Kept in `summary.json` as what was expected."""

    text: str
    sequences_per_step: int  # of all processes
    tokens_per_step: int  # real ones, on average
    mflop_per_token: float | None  # of matrix products, replay included; None: not counted
    # Of one process, without what only an operation takes; None where the system does not tell.
    memory_mib: int | None
    seconds: int | None = None  # of the whole run; None before it could be told

    def expected(self) -> dict[str, float | None]:
        """The figures alone."""
        return {
            "tokens_per_step": self.tokens_per_step, "mflop_per_token": self.mflop_per_token,
            "memory_mib": self.memory_mib, "seconds": self.seconds,
        }


def look_ahead(
    config: Config, model: RMAAT, reader: Reader, splits: Mapping[str, PackedSplit], batch: Batch,
    processes: Processes,
) -> Overview:
    """The overview of a run whose model and data are in place.

    Runs a segment of `batch` forwards, and two of its rows forwards and backwards.
    """
    device, train = model.memory.device, splits["train"]
    parameters = sum(p.numel() for p in model.parameters())
    sequences = config.batch_size * config.accumulate * processes.world_size
    tokens = round(sequences * train.lengths.sum() / len(train))
    T = config.num_segments // config.num_sequences
    kept = T
    if config.memory_replay_backprop:
        asked = config.replay_segments
        kept = T - asked if isinstance(asked, int) else 1
    held = held_memory_mib(device)
    bytes_to_come = (TRAINING_COPIES - 1) * FLOAT * parameters  # beside the weights
    bytes_to_come += kept * activation_bytes(model, batch)
    memory = None if math.isnan(held) else round(held + bytes_to_come / 2**20)
    flop = flop_per_token(model, batch)
    mflop = None if flop is None else round(flop / 1e6, 3)

    way = "AMRB" if config.memory_replay_backprop else "BPTT"
    lines = [
        f"{config.dataset} ({reader.origin()}): "
        + ", ".join(f"{name} {len(split):,}" for name, split in splits.items()),
        f"{config.attention_type}, layers {config.num_layers}, width {config.dim}, parameters "
        f"{parameters:,}; segments {config.num_segments} of {config.segment_len} tokens, memory "
        f"tokens {config.num_memory_tokens}",
        f"a step: {sequences} sequences, about {tokens:,} real tokens, {way}"
        + ("" if mflop is None else f", {mflop:.2f} MFLOP a token"),
        f"{config.last_step:,} steps, {config.last_step * sequences / len(train):.2f} epochs; "
        + ("" if memory is None else f"{memory:,} MiB of memory at least; ")
        + f"{model.precision} on {hardware(device)}",
    ]
    return Overview("\n".join(lines), sequences, tokens, mflop, memory)


def expected_seconds(config: Config, examples: Mapping[str, int], sequences: int,
                     step_seconds: float, steps: int) -> float:
    """How long `steps` more steps will take, with the evaluations among and after them."""
    evaluations = math.ceil(steps / config.eval_interval)
    evaluated = evaluations * examples["val"] + examples["test"]
    # The forward pass is one of four in AMRB, the replay and a backward pass of two, else of three.
    share = 1 / 4 if config.memory_replay_backprop else 1 / 3
    return step_seconds * (steps + share * evaluated / sequences)


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
