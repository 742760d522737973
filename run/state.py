"""What a run knows of itself: its progress, its summary, its folder and whether it may go on."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass
from torch import Tensor

from lra_config import (
    Config,
    ConfigError,
    Count,
    NonNegative,
    Size,
    UserError,
    dump_config,
    load_config,
    make_config,
)
from run import checkpoint
from run.files import atomic_write, locked, read_json, remove
from run.log import read_metrics
from run.processes import current_processes
from run.program import log_line, shown

# What a run leaves in its folder beside its configuration and last.pt
OF_A_RUN = (
    "metrics.jsonl", "summary.json", "best.pt", "model.safetensors", "config.json", "README.md",
    "curves.png", "wandb_id",
)
OUT_OF_TIME = 75  # exit status: EX_TEMPFAIL of sysexits.h, to be tried again


class Interrupted(UserError):
    """SIGINT or SIGTERM arrived, or time is up; a checkpoint is saved."""

    def __init__(self, exit_status: int, step: int) -> None:
        """Of a signal the exit status is 128 + its number, of `max_minutes` `OUT_OF_TIME`."""
        reason = "max_minutes are over"
        if exit_status != OUT_OF_TIME:
            reason = signal.Signals(exit_status - 128).name
        super().__init__(f"{reason} at step {step}; checkpoint saved; go on with --resume")
        self.exit_status = exit_status


def time_limit(config: Config) -> float:
    """The `time.monotonic()` at which `max_minutes` from now are over, in seconds."""
    return math.inf


class NonFiniteError(UserError, ArithmeticError):
    """A loss or gradient that is not finite, told in one line."""


@dataclass
class Summary:
    """What `summary.json` says of a finished run. Accuracies are fractions."""

    dataset: str
    test_accuracy: float
    test_loss: float | None  # None: not finite
    best_val_accuracy: float
    best_step: int
    steps: int
    seconds: float  # of training, validation included
    tokens_per_second: float  # real tokens of all processes, validation not included
    peak_memory_mib: float  # of the first process
    parameters: int
    seed: int
    processes: int
    hardware: str
    data: str  # downloaded, generated, or what the data stand in for
    examples: dict[str, int]  # per split
    skipped: int  # examples whose file is empty
    command: str
    versions: dict[str, str]  # when the run was started or resumed
    # Of the test split, `training.diagnostics.Slices.shares`; runs of older versions have none.
    test_slices: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    skipped_steps: int = 0
    precision: str = ""  # what `precision` came to; runs of older versions do not tell
    # What the run's first screen said it would take, `training.diagnostics.Overview.expected`.
    expected: dict[str, float | None] = field(default_factory=dict)


@pydantic_dataclass(config=ConfigDict(strict=True, extra="forbid"))
class Progress:
    """Where a run stands: all of a checkpoint that is neither model nor optimizer."""

    step: Count = 0
    best_val_accuracy: Annotated[float, Field(ge=-1, le=1)] = -1.0
    best_step: Count = 0
    seconds: NonNegative = 0.0  # since the start, evaluations included
    train_seconds: NonNegative = 0.0  # of the steps alone, up to the last line of the log
    tokens: Count = 0  # real ones, up to the last line of the log
    skipped_steps: Count = 0  # for a loss or gradient that was not finite
    # Since the last line of the log
    unlogged_seconds: NonNegative = 0.0
    unlogged_examples: Count = 0
    validation_due: bool = False  # of this step; a signal came before its end


class OptimizerState(BaseModel):
    """What an optimizer knew of each parameter; its groups are the configuration's."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    state: Annotated[
        dict[int, Annotated[dict[str, checkpoint.PlainTensor], Field(max_length=10)]],
        Field(max_length=checkpoint.MAX_TENSORS),
    ]


def _by_name(optimizer: Any) -> Any:
    is_adamw = isinstance(optimizer, dict) and "state" in optimizer
    return {"adamw": optimizer} if is_adamw else optimizer


class Best(checkpoint.Trained):
    """A `best.pt`: the weights of the best validation so far."""

    step: Count
    val_accuracy: Annotated[float, Field(ge=0, le=1)]


class Resumable(checkpoint.Trained):
    """A `last.pt`: all that an unbroken run would have at that step."""

    # By name; older checkpoints hold AdamW's state alone.
    optimizer: Annotated[dict[str, OptimizerState], BeforeValidator(_by_name)]
    scaler: Annotated[dict[str, int | float], Field(max_length=10)]
    processes: Size
    progress: Annotated[Progress, BeforeValidator(lambda values: Progress(**values))]
    running: checkpoint.PlainTensor
    precision: Annotated[str, Field(max_length=10)] | None = None  # as above
    data: Annotated[str, Field(max_length=100)] | None = None  # older ones do not tell

    def tensors(self) -> dict[str, Tensor]:
        moments = {
            f"optimizer.{optimizer}.{index}.{name}": tensor
            for optimizer, saved in self.optimizer.items()
            for index, values in saved.state.items() for name, tensor in values.items()
        }
        return {**self.model, **moments, "running": self.running}


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep a run's folder to this process while the body runs, without what killed ones left.

    It is made if missing, and removed again where nothing was written.

    Raises:
        Held: another process is at work in it.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / "run.lock", "trains there", ", or set another run_name"):
            for stale in folder.glob("*.part"):
                remove(stale)
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in made:
                path.rmdir()


def check_unclaimed(config: Config) -> None:
    """Raise ConfigError if the run's folder already holds a checkpoint."""
    if (config.run_dir / "last.pt").exists():
        raise ConfigError(
            f"{config.run_dir} holds a checkpoint; add --resume to go on from it, or set another "
            "run_name"
        )


def load_state(config: Config) -> Resumable:
    """The state in the run's `last.pt`, on the CPU: an optimizer's step counts must not leave it.

    Raises:
        ConfigError: the checkpoint is another configuration's, or of another number of processes.
        CheckpointError: it cannot be read, or is none to go on from.
    """
    last = config.run_dir / "last.pt"
    state = checkpoint.read(last, Resumable)
    check_resumable(config, make_config(state.config, str(last)), last)
    if state.progress.step > config.max_steps:
        raise checkpoint.CheckpointError(
            f"{last}: stands at step {state.progress.step} of max_steps={config.max_steps}; set "
            "another run_name"
        )
    here = current_processes().world_size
    if state.processes != here:
        raise ConfigError(
            f"{last} was saved by {state.processes} processes, these are {here}; resume with as "
            "many"
        )
    path, progress = config.run_dir / "best.pt", state.progress
    if path.exists():
        # It may be of a validation after last.pt: what is tested in the end is what it holds.
        best = checkpoint.read(path, Best)
        progress.best_val_accuracy, progress.best_step = best.val_accuracy, best.step
    elif progress.best_step:
        log_line(f"{path}: missing beside last.pt; the best weights are chosen from here on")
        progress.best_val_accuracy, progress.best_step = -1.0, 0
    return state


def claim_folder(config: Config, *, resume: bool) -> Resumable | None:
    """Find the state to resume from in the run's folder; nothing is written.

    Raises:
        ConfigError: the folder holds a checkpoint that may not be gone on from.
        CheckpointError: the checkpoint cannot be read.
    """
    last = config.run_dir / "last.pt"
    if not resume:
        check_unclaimed(config)
    elif last.exists():
        return load_state(config)
    else:
        log_line(f"{last}: no checkpoint yet, the run starts anew")
    return None


def begin_folder(config: Config, *, anew: bool) -> None:
    """Note the configuration in the run's folder, once nothing can refuse the run any more.

    Args:
        anew: nothing of an earlier run stays.
    Raises:
        LogError: the log to go on with is damaged.
    """
    config.run_dir.mkdir(parents=True, exist_ok=True)
    log = config.run_dir / "metrics.jsonl"
    if anew:
        for name in OF_A_RUN:
            (config.run_dir / name).unlink(missing_ok=True)
    elif log.exists():
        read_metrics(config.run_dir)
    with atomic_write(config.run_dir / "config.yaml", "w") as handle:
        handle.write(dump_config(config))


def check_resumable(config: Config, saved: Config, path: Path) -> None:
    """Raise ConfigError where a key differs from the `saved` ones of `path` that may not."""
    may_change = Config.keys("may_change")
    for key in Config.model_fields:
        ours, theirs = getattr(config, key), getattr(saved, key)
        if key not in may_change and ours != theirs:
            raise ConfigError(
                f"{key}={shown(ours)} but {path} was saved with {key}={shown(theirs)}; "
                "resume with the same value, or set another run_name"
            )


def finished(config: Config) -> Summary | None:
    """The summary of the run in `config.run_dir`, None while it has not come to its last step.

    Raises:
        ConfigError: the finished run is another configuration's.
    """
    folder = config.run_dir
    try:
        summary = read_json(folder / "summary.json", TypeAdapter(Summary))
    except (OSError, ValueError):  # not there, or of another version: test again
        return None
    if summary.steps < config.last_step and not config.reached(summary.best_val_accuracy):
        return None
    path = folder / "config.yaml"
    check_resumable(config, load_config(path), path)
    return summary
