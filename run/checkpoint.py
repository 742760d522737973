"""A run's folder: its checkpoints, the state to resume from, and its summary.

Checkpoints may come from strangers: torch reads them with `weights_only=True`, so that no file can
run code. Their structure is validated here and their shapes by `load_state_dict`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import safetensors.torch
import torch
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated
from torch import Tensor

from lra_config import Config, ConfigError, dump_config, load_config, make_config
from run.files import atomic_write, complaint, locked, read_json
from run.log import read_metrics
from run.processes import current_processes
from run.program import UserError, log_line, one_line, shown
from utils import first_line

# The files of a run, except config.yaml and last.pt.
RUN_FILES = (
    "metrics.jsonl", "summary.json", "best.pt", "model.safetensors", "config.json", "README.md",
    "curves.png", "wandb_id",
)
SCHEMA = ConfigDict(arbitrary_types_allowed=True, extra="ignore")
Count = Annotated[int, Field(ge=0, strict=True)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Accuracy = Annotated[float, Field(ge=-1, le=1)]


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be read, or belongs to another model."""

    met_by_all = False


@validated(config=SCHEMA)
class Progress:
    """The counters of a run."""

    step: Count = 0
    best_val_accuracy: Accuracy = -1.0
    best_step: Count = 0
    seconds: Seconds = 0.0  # since the start, evaluations included
    train_seconds: Seconds = 0.0  # of the steps alone, up to the last line of the log
    tokens: Count = 0  # real tokens, up to the last line of the log
    unlogged_seconds: Seconds = 0.0  # since the last line of the log
    unlogged_examples: Count = 0
    validation_due: bool = False  # at this step: a signal came before it ended


@validated(config=SCHEMA)
class TrainedModel:
    """The part of every checkpoint that defines the model."""

    model: dict[str, Tensor]
    config: dict[str, Any]
    vocabulary: list[str] | None = None


@validated(config=SCHEMA, kw_only=True)
class Best(TrainedModel):
    """A `best.pt`: the weights of the best validation so far."""

    step: Count
    val_accuracy: Annotated[float, Field(ge=0, le=1)]


def _by_name(optimizer: Any) -> Any:
    """Return state_dicts by optimizer; before Muon existed, a checkpoint held AdamW's alone."""
    alone = isinstance(optimizer, dict) and "param_groups" in optimizer
    return {"adamw": optimizer} if alone else optimizer


@validated(config=SCHEMA, kw_only=True)
class TrainingState(TrainedModel):
    """A `last.pt`: everything that an uninterrupted run would have at that step."""

    # state_dicts by the optimizer's name
    optimizer: Annotated[dict[str, dict[str, Any]], BeforeValidator(_by_name)]
    scaler: dict[str, float | int]  # of float16
    # Checkpoints that do not name one were trained in float32.
    precision: Annotated[str, BeforeValidator(lambda name: name or "float32")] = "float32"
    processes: Annotated[int, Field(ge=1)]
    data: str | None = None  # digest of the data; unknown in old checkpoints
    running: Tensor  # (3,) sums of loss, correct answers and tokens since the last line of the log
    progress: Progress


@dataclasses.dataclass
class Summary:
    """The contents of `summary.json`. Accuracies are fractions."""

    dataset: str
    test_accuracy: float
    test_loss: float | None  # nats
    best_val_accuracy: float
    best_step: int
    steps: int
    seconds: float  # of training, validation included
    tokens_per_second: float  # real tokens of all processes, validation excluded
    peak_memory_mib: float  # of the first process
    parameters: int
    seed: int
    processes: int
    hardware: str
    data: str  # origin of the data: downloaded, generated, incomplete, unknown or a substitute
    examples: dict[str, int]  # per split
    skipped: int  # examples whose file is empty
    command: str
    versions: dict[str, str]  # when the run was started or resumed
    # Of the test split; summaries of older versions lack the fields from here on.
    test_slices: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    precision: str = ""


def save(path: Path, state: TrainedModel | dict[str, Any]) -> None:
    """Replace the checkpoint at `path`.

    Raises:
        CheckpointError: it could not be written; a previous one is kept.
    """
    if isinstance(state, TrainingState):
        values = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
        state = {**values, "progress": dataclasses.asdict(state.progress)}
    try:
        with atomic_write(path) as handle:
            torch.save(state, handle)
    except (OSError, RuntimeError) as error:  # torch hides the OSError of a full disk
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        previous = "the previous checkpoint is kept" if path.exists() else "no checkpoint exists"
        raise CheckpointError(
            f"{path}: could not be written ({first_line(reason)}); {previous}"
        ) from error


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Raise CheckpointError for any error of a reader of `path`."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, ValidationError):
            reason = complaint(error)
        elif "weights_only" in str(error):  # torch advises to load the file unsafely
            reason = "it holds more than tensors and plain values"
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({reason}); name another one, or remove it"
        ) from None


def load(path: Path) -> dict[str, Any]:
    """Return the contents of a checkpoint on the CPU.

    Raises:
        CheckpointError: there is none at `path`, or it is damaged.
    """
    with readable(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about foreign pickles
        return torch.load(path, map_location="cpu", weights_only=True)


def read(path: Path, schema: type[TrainedModel] = TrainedModel) -> Any:
    """Read a checkpoint, or a `.safetensors` file with its `config.json`, as a `schema`.

    Raises:
        CheckpointError: there is none, it has another structure, or a weight is not finite.
    """
    if path.suffix == ".safetensors":
        with readable(path):
            weights = safetensors.torch.load_file(path)
        config_path = path.with_name("config.json")
        with readable(config_path):
            values = read_json(config_path, TypeAdapter(dict[str, Any]))
        contents = {"model": weights, "vocabulary": values.pop("vocabulary", None),
                    "config": values}
    else:
        contents = load(path)
    with readable(path):
        state = TypeAdapter(schema).validate_python(contents)
        for name, tensor in state.model.items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} is not finite")
    return state


@contextlib.contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Raise CheckpointError if the contents of `path` do not fit the model."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise CheckpointError(
            f"{path}: its weights are another model's ({one_line(reason[0], 150)}); name another "
            "checkpoint"
        ) from None


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Create a run's folder, and reserve it for this process while the body runs.

    A folder that is still empty afterwards is removed again.

    Raises:
        UserError: another process trains there.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder / "run.lock", "trains there", ", or set another run_name"):
            for stale in folder.glob("*.part"):  # of a process that was killed
                stale.unlink()
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


def check_unclaimed(config: Config) -> None:
    """Raise ConfigError if the run's folder already holds a checkpoint."""
    if (config.run_dir / "last.pt").exists():
        raise ConfigError(
            f"{config.run_dir} holds a checkpoint; add --resume to go on from it, or set another "
            "run_name"
        )


def load_state(config: Config) -> TrainingState:
    """Return the state in the run's `last.pt`, on the CPU.

    Raises:
        ConfigError: the checkpoint belongs to another configuration or number of processes.
        CheckpointError: it cannot be read.
    """
    last, best = config.run_dir / "last.pt", config.run_dir / "best.pt"
    state = read(last, TrainingState)
    check_resumable(config, make_config(state.config, str(last)), last)
    progress, present = state.progress, current_processes().world_size
    if progress.step > config.max_steps:
        raise CheckpointError(
            f"{last}: stands at step {progress.step} of max_steps={config.max_steps}; set another "
            "run_name"
        )
    if state.processes != present:
        raise ConfigError(
            f"{last} was saved by {state.processes} processes, these are {present}; resume with "
            "as many"
        )
    if best.exists():
        # It may be newer than last.pt, and the run tests these weights in the end.
        saved = read(best, Best)
        progress.best_val_accuracy, progress.best_step = saved.val_accuracy, saved.step
    elif progress.best_step:
        log_line(f"{best}: missing; the best weights are chosen from here on")
        progress.best_val_accuracy, progress.best_step = -1.0, 0
    return state


def check_resumable(config: Config, saved: Config, path: Path) -> None:
    """Raise ConfigError if a key differs from `path` that must not change within a run."""
    may_change = Config.keys("may_change")
    for key in Config.model_fields:
        ours, theirs = getattr(config, key), getattr(saved, key)
        if key not in may_change and ours != theirs:
            raise ConfigError(
                f"{key}={shown(ours)} but {path} was saved with {key}={shown(theirs)}; "
                "resume with the same value, or set another run_name"
            )


def begin_folder(config: Config, *, anew: bool) -> None:
    """Write the configuration into the run's folder.

    Args:
        config: the run.
        anew: remove the files of an earlier run.
    Raises:
        UserError: the log of the run to resume is damaged.
    """
    config.run_dir.mkdir(parents=True, exist_ok=True)
    if anew:
        for name in RUN_FILES:
            (config.run_dir / name).unlink(missing_ok=True)
    elif (config.run_dir / "metrics.jsonl").exists():
        read_metrics(config.run_dir)
    with atomic_write(config.run_dir / "config.yaml", "w") as handle:
        handle.write(dump_config(config))


def finished(config: Config) -> Summary | None:
    """Return the summary of the run in `config.run_dir`, or None if it has not ended.

    Raises:
        ConfigError: the finished run has another configuration.
    """
    try:
        summary = read_json(config.run_dir / "summary.json", TypeAdapter(Summary))
    except (OSError, ValueError):  # missing, or of another version: test again
        return None
    if summary.steps < config.last_step and not config.reached(summary.best_val_accuracy):
        return None
    path = config.run_dir / "config.yaml"
    check_resumable(config, load_config(path), path)
    return summary
