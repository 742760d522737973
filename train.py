"""Training: the gradients of one batch, evaluation, and one run from preparation to summary."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

import run.program  # noqa: F401 - before all others, as it refuses foreign modules
from data.packing import DataError, PackedSplit, Reader, digest, holds_out_by_seed, load_splits
from dataloader import Batch, evaluation_batches, training_batches
from lra_config import Config, ConfigError
from lra_datasets import open_dataset, training_stages
from model import RMAAT, autocast_dtype, build_model
from plots import write_curves
from readout import recompute_statistics
from run import checkpoint, hub
from run.checkpoint import (
    Progress,
    Summary,
    TrainingState,
    begin_folder,
    check_unclaimed,
    claimed,
    finished,
    load_state,
)
from run.files import write_json
from run.log import RunLog
from run.processes import Processes, current_processes
from run.program import UserError, caught_signals, log_line, shown
from training.acceleration import (
    BudgetedReplay,
    ExecutionPlan,
    GraphedBackward,
    compile_model,
    plan_execution,
    resolve_device,
)
from training.diagnostics import (
    Metrics,
    Slices,
    evaluate,
    inspect_model,
    overview,
    peak_memory_mib,
    reset_peak_memory,
)
from training.gradients import StepResult, amrb_backward, bptt_backward
from training.optimizer import build_optimizers, restore_optimizers, set_learning_rate
from utils import hardware, seed_everything, seed_step, versions

__all__ = [
    "Metrics", "StepResult", "amrb_backward", "bptt_backward", "evaluate", "plan", "train",
]

CHECKPOINT_SECONDS = 30.0
STATISTICS_BATCHES = 50  # from which the statistics of the read-out norm are recomputed
MIN_SCALE = 1e-3  # of float16; a model whose gradients overflow here has diverged


@dataclass
class Run:
    """One run in its folder: its objects, and its progress from step to step."""

    config: Config
    processes: Processes
    device: torch.device
    reader: Reader
    splits: dict[str, PackedSplit]
    stages: dict[int, PackedSplit]  # training examples by the step from which they are used
    data_digest: str
    model: RMAAT
    optimizers: dict[str, torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    backward: Callable[..., StepResult]
    graphed: bool  # whether a step is a captured CUDA graph
    progress: Progress
    # Sums of loss, correct answers and real tokens since the last line of the log. They stay on
    # the device, so that a step does not wait for them.
    sums: Tensor
    overview: str
    upcoming: list[Batch]  # the batches of the next step
    steps: Iterator[list[Batch]]
    versions: dict[str, str]
    signals: list[int] = dataclasses.field(default_factory=list)
    log: RunLog | None = None  # only the first process writes
    learning_rate: float = 0.0
    gradient_norm: float = 0.0
    interrupted: bool = False  # a signal arrived, in any process
    checkpoint_due: bool = False
    lap_start: float = dataclasses.field(default_factory=time.perf_counter)
    saved_at: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def done(self) -> bool:
        """Whether the last step is validated, or `target_accuracy` is reached."""
        if self.config.reached(self.progress.best_val_accuracy):
            return True
        return self.progress.step >= self.config.last_step and not self.progress.validation_due

    def lap(self) -> float:
        """Return the seconds since the last call."""
        now = time.perf_counter()
        elapsed, self.lap_start = now - self.lap_start, now
        return elapsed

    def training_steps(self, start: int) -> Iterator[list[Batch]]:
        """Yield the batches of every step from `start` on."""
        return training_batches(
            self.stages, self.config, self.device, start, self.processes,
            whole_segments=self.model.fixed_shapes,
        )


def train(config: Config, resume: bool = False) -> Summary:
    """Train one run to its end and test it, in all processes that `torchrun` started.

    Args:
        config: the run; its folder is `config.run_dir`.
        resume: continue from the folder's `last.pt`, or start if there is none. A finished run is
            not repeated.
    Raises:
        ConfigError: the folder already holds a run, or the checkpoint is another configuration's.
        DataError: the data are missing or damaged.
        CheckpointError: a checkpoint cannot be read or written.
        UserError: the loss, a gradient or a logit is not finite.
        UserError: a signal arrived; a checkpoint was saved.
    """
    if resume and (summary := finished(config)) is not None:
        return summary
    with contextlib.ExitStack() as stack:
        processes = current_processes()
        folder = claimed(config.run_dir) if processes.is_first else contextlib.nullcontext()
        processes.first_alone(lambda: stack.enter_context(folder))
        run = prepare(config, resume)
        run.signals = stack.enter_context(caught_signals())
        log_line(run.overview)
        bar = stack.enter_context(tqdm(
            total=config.last_step, initial=run.progress.step, desc=config.run_name,
            unit=" steps", disable=None if processes.is_first else True, smoothing=0.05,
        ))
        run.lap()
        while not run.done:
            if not run.progress.validation_due:  # a signal may have ended the last validation
                train_step(run)
                log_step(run, bar)
            if run.progress.validation_due and not run.interrupted:
                validate(run)
            if run.checkpoint_due or run.done or run.interrupted:
                save(run)
            if run.interrupted:
                leave(run)
        return finish(run)


def plan(config: Config) -> str:
    """Return the overview of a new run, without its folder, optimizer or weights to start from.

    Raises:
        ConfigError: the run cannot be trained here.
        DataError: the data are missing or damaged.
    """
    processes = current_processes()
    check_processes(config, processes)
    device = resolve_device(config)
    reader, splits, stages = processes.first_alone(lambda: load_data(config))
    model, _ = prepare_model(config, reader, device, begun=None)
    batches = next(training_batches(stages, config, device, 0, processes))
    return overview(config, model, reader, splits, batches[0], processes)


def prepare(config: Config, resume: bool) -> Run:
    """Load the data, build the model and its optimizers, and restore the folder's checkpoint."""
    processes, software = current_processes(), versions()  # now: the code may change during a run
    check_processes(config, processes)
    device = resolve_device(config)
    reset_peak_memory(device)
    state = processes.first_alone(lambda: saved_state(config, resume))
    reader, splits, stages = processes.first_alone(lambda: load_data(config))
    data_digest = digest(splits, stages)
    if state is not None and state.data not in (None, data_digest):
        raise DataError(
            f"{config.data_dir}: {config.dataset} differs from the data that "
            f"{config.run_dir / 'last.pt'} was trained on; restore it, or set another run_name"
        )
    seed_everything(config.seed)
    begun = None if state is None else state.precision
    model, execution = prepare_model(config, reader, device, begun)
    if state is None:
        load_initial_weights(model, reader)
    model.fixed_shapes = execution.compile or execution.cuda_graphs
    float16 = autocast_dtype(model.precision, device) == torch.float16
    run = Run(
        config, processes, device, reader, splits, stages, data_digest, model,
        optimizers=build_optimizers(model, config),
        scaler=torch.amp.GradScaler(device.type, enabled=float16),
        backward=amrb_backward if config.memory_replay_backprop else bptt_backward,
        graphed=execution.cuda_graphs, progress=Progress(), versions=software,
        overview="", upcoming=[], sums=torch.zeros(3, dtype=torch.float64, device=device),
        steps=iter(()),
    )
    if state is not None:
        restore(run, state)
    run.steps = run.training_steps(run.progress.step)
    run.upcoming = next(run.steps)
    if execution.compile:
        compile_model(model, run.backward, run.upcoming[0])
    if run.graphed:
        run.backward = GraphedBackward(run.backward)
    if config.replay_segments != "all":
        run.backward = BudgetedReplay(run.backward, config)
    run.overview = overview(config, model, reader, splits, run.upcoming[0], processes)
    if processes.is_first:
        begin_folder(config, anew=state is None)
        run.log = RunLog(config, keep_until=run.progress.step)
    return run


def check_processes(config: Config, processes: Processes) -> None:
    """Raise ConfigError if the run cannot be trained by so many processes."""
    if config.readout_norm == "batch" and processes.world_size > 1:
        raise ConfigError(
            f"readout_norm=batch takes its statistics from one process, and there are "
            f"{processes.world_size}; start one, or set readout_norm=none"
        )


def saved_state(config: Config, resume: bool) -> TrainingState | None:
    """Load the checkpoint to resume from; None if the run starts anew."""
    last = config.run_dir / "last.pt"
    if not resume:
        check_unclaimed(config)
    elif last.exists():
        return load_state(config)
    else:
        log_line(f"{last.absolute()}: no checkpoint yet, the run starts anew")
    return None


def load_data(config: Config) -> tuple[Reader, dict[str, PackedSplit], dict[int, PackedSplit]]:
    """Return the reader, its three splits, and the training examples of each stage."""
    reader = open_dataset(config)
    splits = load_splits(reader)
    return reader, splits, training_stages(config, splits)


def prepare_model(
    config: Config, reader: Reader, device: torch.device, begun: str | None
) -> tuple[RMAAT, ExecutionPlan]:
    """Build the model in the precision of the run, and decide how its steps are computed.

    Args:
        begun: the precision of the run to resume.
    """
    model = build_model(config, getattr(reader.tokenizer, "vocabulary", None)).to(device)
    execution = plan_execution(config, device, sum(p.numel() for p in model.parameters()), begun)
    if execution.reason:
        form = "compiled" if execution.compile else "eager"
        log_line(f"{execution.precision}, {form}: {execution.reason}")
    model.precision = execution.precision
    return model, execution


def load_initial_weights(model: RMAAT, reader: Reader) -> None:
    """Load the weights of `initial_checkpoint`, if the configuration names one.

    Raises:
        CheckpointError: it cannot be read, holds another model's weights, or was trained on the
            examples that are held out here.
    """
    config = model.config
    if not config.initial_checkpoint:
        return
    path = Path(config.initial_checkpoint)
    start = checkpoint.read(path)
    if start.vocabulary != model.vocabulary:
        raise checkpoint.CheckpointError(
            f"{path}: its vocabulary is not that of {config.data_dir}; use a run on the same data, "
            "or set initial_checkpoint=null"
        )
    dataset, seed = (start.config.get(key) for key in ("dataset", "seed"))
    if dataset == config.dataset and seed != config.seed and holds_out_by_seed(reader):
        raise checkpoint.CheckpointError(
            f"{path}: trained with seed={shown(seed)} on examples that seed={config.seed} "
            f"holds out for its evaluations; set seed={shown(seed)}"
        )
    with checkpoint.fitting(path):
        model.load_state_dict(start.model)


def restore(run: Run, state: TrainingState) -> None:
    """Restore weights, optimizers, scaler and progress from a checkpoint."""
    with checkpoint.fitting(run.config.run_dir / "last.pt"):
        run.model.load_state_dict(state.model)
        restore_optimizers(run.optimizers, {k: v["state"] for k, v in state.optimizer.items()})
        if run.scaler.is_enabled() and state.scaler:  # empty after another device's precision
            run.scaler.load_state_dict(state.scaler)
        if run.processes.is_first:  # the sums are those of all processes
            run.sums.copy_(state.running)
    run.progress = state.progress


def train_step(run: Run) -> None:
    """Take one optimizer step over the upcoming batches.

    Raises:
        UserError: the loss or the gradient is not finite; the weights are unchanged.
    """
    config, progress, model, batches = run.config, run.progress, run.model, run.upcoming
    seed_step(config.seed, progress.step, run.processes.rank)
    run.learning_rate = set_learning_rate(run.optimizers, progress.step, config)
    # Captured graphs write into the same gradient tensors again.
    model.zero_grad(set_to_none=not run.graphed)
    scale = 1 / len(batches)
    if run.scaler.is_enabled():
        scale = run.scaler.scale(torch.full((), scale, device=run.device))
    results = [run.backward(model, batch, scale) for batch in batches]
    run.upcoming = next(run.steps)  # gathered while a CUDA device is still busy

    loss = torch.stack([result.loss for result in results]).mean()
    parameters = [p for p in model.parameters() if p.grad is not None]
    flags = [torch.full_like(loss, f) for f in (len(run.signals), checkpoint_is_due(run))]
    loss, *flags = run.processes.average_gradients(parameters, torch.stack([loss, *flags]))
    for optimizer in run.optimizers.values():
        run.scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
    # The only wait for the device in a step: a non-finite gradient must not reach the weights.
    loss, run.gradient_norm, *flags = torch.stack([loss, norm.to(loss), *flags]).tolist()
    run.interrupted, run.checkpoint_due = (flag > 0 for flag in flags)  # in any process
    overflow = not math.isfinite(run.gradient_norm) and run.scaler.is_enabled()
    if not math.isfinite(loss) or not (overflow or math.isfinite(run.gradient_norm)):
        raise UserError(
            f"step {progress.step + 1}: loss {loss} and gradient norm {run.gradient_norm} at "
            f"learning rate {run.learning_rate:.3g}; {last_checkpoint(config)}; lower "
            "learning_rate or grad_clip"
        )
    if not overflow:  # an overflow of float16 leaves the step out and lowers the scale
        for optimizer in run.optimizers.values():
            optimizer.step()
    run.scaler.update()
    count(run, batches, results)
    progress.step += 1
    progress.validation_due = (
        progress.step % config.eval_interval == 0 or progress.step == config.last_step
    )
    progress.unlogged_seconds += run.lap()


def log_step(run: Run, bar: tqdm) -> None:
    """Advance the bar; every `log_interval` steps write the means since the last line."""
    config, progress = run.config, run.progress
    bar.update()
    if progress.step % config.log_interval and progress.step != config.last_step:
        return
    loss, correct, tokens = run.processes.sum(run.sums).tolist()  # waits for the device
    run.sums.zero_()
    progress.unlogged_seconds += run.lap()
    examples, seconds = progress.unlogged_examples, progress.unlogged_seconds
    progress.unlogged_examples, progress.unlogged_seconds = 0, 0.0
    progress.seconds += seconds
    progress.train_seconds += seconds
    progress.tokens += int(tokens)
    if run.scaler.is_enabled() and run.scaler.get_scale() < MIN_SCALE:
        raise UserError(
            f"step {progress.step}: gradients overflow float16 at every scale; set "
            "precision=float32 or lower learning_rate"
        )
    values = {"loss": loss / examples, "accuracy": correct / examples}
    speed = tokens / seconds
    bar.set_postfix(**{k: f"{v:.3f}" for k, v in values.items()}, tokens_s=f"{speed:,.0f}")
    if run.log is not None:
        internals = {}
        if config.log_internals:
            internals = inspect_model(run.model, run.upcoming[0])
            internals["gradient_norm"] = run.gradient_norm
        run.log.write(
            progress.step, **values, learning_rate=run.learning_rate,
            tokens_per_second=round(speed), seconds=round(progress.seconds, 3), **internals,
        )


def validate(run: Run) -> None:
    """Evaluate on the validation split, and keep the weights if they are the best so far."""
    progress, config = run.progress, run.config
    if config.readout_norm == "batch":
        steps = run.training_steps(max(progress.step - STATISTICS_BATCHES, 0))
        batches = (batches[0] for batches in itertools.islice(steps, STATISTICS_BATCHES))
        recompute_statistics(run.model, batches)
    metrics = evaluate_split(run, "val")
    if metrics is None:
        return
    progress.validation_due = False
    if metrics.accuracy > progress.best_val_accuracy:
        progress.best_val_accuracy, progress.best_step = metrics.accuracy, progress.step
        if run.processes.is_first:
            best = {"step": progress.step, "val_accuracy": metrics.accuracy}
            checkpoint.save(config.run_dir / "best.pt", {**run.model.state(), **best})
    progress.seconds += run.lap()
    if run.log is not None:
        run.log.write(progress.step, val_loss=metrics.loss, val_accuracy=metrics.accuracy)
    log_line(f"step {progress.step}: val_loss {metrics.loss:.4f}  val_acc {metrics.accuracy:.4f}")


def evaluate_split(run: Run, split: str, slices: Slices | None = None) -> Metrics | None:
    """Return the metrics of a split; None if a signal interrupted the evaluation."""
    batches = evaluation_batches(
        run.splits[split], run.config, run.device, run.processes,
        whole_segments=run.model.fixed_shapes,
    )

    def until_signal() -> Iterator[Batch]:
        for batch in batches:
            yield batch  # at least one, as there is no mean over no example
            if run.signals:
                return

    metrics = evaluate(run.model, until_signal(), run.processes, slices)
    run.interrupted = run.processes.largest(len(run.signals)) > 0
    return None if run.interrupted else metrics


def save(run: Run) -> None:
    """Write `last.pt`; with non-finite weights keep the previous one and raise UserError."""
    run.saved_at = time.perf_counter()
    run.processes.sum(run.sums)
    if not run.processes.is_first:
        run.sums.zero_()  # the first process holds the sums of all
        return
    if not all(bool(x.isfinite().all()) for x in run.model.state_dict().values()):
        raise UserError(
            f"step {run.progress.step}: weights are not finite; {last_checkpoint(run.config)}; "
            "lower learning_rate"
        )
    checkpoint.save(run.config.run_dir / "last.pt", TrainingState(
        **run.model.state(), progress=run.progress, running=run.sums, data=run.data_digest,
        optimizer={name: o.state_dict() for name, o in run.optimizers.items()},
        scaler=run.scaler.state_dict(), precision=run.model.precision,
        processes=run.processes.world_size,
    ))


def leave(run: Run) -> NoReturn:
    """End an interrupted run, whose checkpoint is saved, in all processes alike."""
    number = run.processes.largest(run.signals[0] if run.signals else 0)
    raise UserError(
        f"{signal.Signals(number).name} at step {run.progress.step}; checkpoint saved; go on with "
        "--resume", exit_status=128 + number,
    )


def finish(run: Run) -> Summary:
    """Test the weights of the best validation; write the summary, the weights and the curves."""
    config, progress = run.config, run.progress
    run.processes.barrier()  # until the best weights are written
    best = config.run_dir / "best.pt"
    if not best.exists():  # the run ended at a step before that of its checkpoint
        validate(run)
    if run.interrupted:
        leave(run)
    with checkpoint.fitting(best):
        run.model.load_state_dict(checkpoint.read(best).model)
    slices = Slices(config, run.device)
    metrics = evaluate_split(run, "test", slices)
    if metrics is None:
        leave(run)
    # A run that has reached its target may end between two lines of the log.
    train_seconds = progress.train_seconds + progress.unlogged_seconds
    tokens = progress.tokens + int(run.sums[2])
    lower = autocast_dtype(run.model.precision, run.device)
    summary = Summary(
        dataset=config.dataset, test_accuracy=metrics.accuracy, test_loss=metrics.loss,
        best_val_accuracy=progress.best_val_accuracy, best_step=progress.best_step,
        steps=progress.step, seconds=round(progress.seconds + progress.unlogged_seconds, 1),
        tokens_per_second=round(tokens / max(train_seconds, 1e-9)),
        peak_memory_mib=round(peak_memory_mib(run.device), 1),
        parameters=sum(p.numel() for p in run.model.parameters()), seed=config.seed,
        processes=run.processes.world_size, hardware=hardware(run.device),
        data=run.reader.origin(), skipped=run.reader.skipped,
        examples={name: len(split) for name, split in run.splits.items()},
        command=" ".join(sys.argv), versions=run.versions,
        precision=str(lower or torch.float32).removeprefix("torch."),
        test_slices=slices.shares(run.processes),
    )
    if run.log is not None:
        values = dataclasses.asdict(summary)
        hub.export(run.model.state(), config.run_dir, values)
        write_json(config.run_dir / "summary.json", values)
        write_curves(config.run_dir)
        run.log.finish(values)
    return summary


def checkpoint_is_due(run: Run) -> bool:
    """Return whether this process asks for a checkpoint after the current step."""
    interval = run.config.checkpoint_interval
    if interval is not None:
        return (run.progress.step + 1) % interval == 0
    return time.perf_counter() - run.saved_at >= CHECKPOINT_SECONDS


def last_checkpoint(config: Config) -> str:
    """Name the last checkpoint, for a message."""
    last = config.run_dir / "last.pt"
    return f"the last good checkpoint is {last}" if last.exists() else "no checkpoint exists yet"


def count(run: Run, batches: list[Batch], results: list[StepResult]) -> None:
    """Add a step to the sums of the log."""
    for batch, result in zip(batches, results, strict=True):
        correct = (result.logits.argmax(dim=-1) == batch.labels).sum()
        # Filled on the device: copying a number there would wait for it.
        tokens = result.loss.new_full((), batch.tokens.numel(), dtype=torch.float64)
        if batch.mask is not None:
            tokens = batch.mask.sum().double()
        loss = result.loss.double() * len(batch.labels)
        run.sums += torch.stack([loss, correct.double(), tokens])
        run.progress.unlogged_examples += len(batch.labels) * run.processes.world_size
