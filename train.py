"""Training, from the gradients of one batch to a whole run: gradients, evaluation, step, loop."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.packing import DataError, PackedSplit, Reader, digest, holds_out_by_seed, load_splits
from dataloader import Batch, evaluation_batches, training_batches
from footprint import check_fits
from lra_config import Config, ConfigError
from lra_datasets import open_dataset, training_stages
from model import RMAAT, autocast_dtype, build_model
from run import checkpoint
from run.figures import curves_figure, save_figure
from run.files import write_json
from run.log import RunLog
from run.processes import ALONE, Processes, current_processes
from run.program import caught_signals, log_line, shown
from run.state import (
    OUT_OF_TIME,
    Interrupted,
    NonFiniteError,
    Progress,
    Resumable,
    Summary,
    begin_folder,
    claim_folder,
    claimed,
    finished,
    load_state,
    time_limit,
)
from training.acceleration import (
    Graphed,
    GraphedBackward,
    choose_manner,
    compile_model,
    resolve_device,
    uses_cuda_graphs,
)
from training.diagnostics import check_finite, inspect_model
from training.gradients import StepResult, amrb_backward, bptt_backward, score
from training.optimizer import (
    build_optimizers,
    learning_rate_factor,
    restore_optimizers,
    set_learning_rate,
)
from training.overview import Overview, duration, expected_seconds, look_ahead
from training.replay import BudgetedReplay
from training.slices import Slices
from utils import (
    hardware,
    peak_memory_mib,
    reset_peak_memory,
    restore,
    seed_everything,
    seed_step,
    versions,
)

__all__ = [
    "Metrics", "StepResult", "Trainer", "amrb_backward", "bptt_backward", "evaluate", "train",
]


CHECKPOINT_SECONDS = 30.0
TIMED_STEPS = 10  # from which a run's time is told
SETTLING_BATCHES = 50  # that the statistics of a norm of the read-out are taken from
LEAST_SCALE = 1e-3  # of float16: a model that still overflows there is sick


class Metrics(NamedTuple):
    """Means over the examples of an evaluation."""

    loss: float  # nats
    accuracy: float  # fraction
    examples: int


@torch.inference_mode()
def evaluate(
    model: RMAAT,
    batches: Iterable[Batch],
    processes: Processes = ALONE,
    slices: Slices | None = None,
    score: Callable[..., StepResult] = score,
) -> Metrics:
    """Loss and accuracy over all examples of `batches`, without dropout.

    Args:
        processes: those over which the examples are spread.
        slices: counts the correct answers of this process as well.
        score: what scores a batch.
    Raises:
        NonFiniteError: a logit is not finite.
    """
    training = model.training
    model.eval()
    device = model.memory.device
    # Loss, correct answers, examples, and examples with a logit that is not finite.
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in batches:
        logits = score(model, batch).logits
        totals[0] += F.cross_entropy(logits, batch.labels, reduction="sum")
        correct = logits.argmax(dim=-1) == batch.labels
        totals[1] += correct.sum()
        totals[2] += len(batch.labels)
        totals[3] += (~logits.isfinite().all(dim=-1)).sum()
        if slices is not None:
            slices.add(batch, correct)
    model.train(training)
    loss, correct, examples, failed = processes.sum(totals).tolist()
    check_finite(model, int(failed), f"evaluation of {int(examples):,} examples")
    return Metrics(loss / examples, correct / examples, int(examples))


@torch.no_grad()
def settle_statistics(model: RMAAT, batches: Iterable[Batch]) -> None:
    """Take the running statistics of `readout_norm: batch` anew, from the weights as they are.

    While the learning rate is high a read-out's mean moves by more than its deviation in the time
    that running statistics look back: evaluated with those, a model that has learned guesses.

    Args:
        batches: of the training split; every one counts the same.
    """
    norm = model.head[0]
    momentum, norm.momentum = norm.momentum, None  # the mean over all batches
    norm.reset_running_stats()
    model.eval()
    norm.train()
    for batch in batches:
        score(model, batch)
    norm.momentum = momentum
    model.train()


def load_initial_weights(model: RMAAT, reader: Reader) -> None:
    """Give a new model what its configuration names: a checkpoint's weights, or word vectors.

    Raises:
        CheckpointError: `initial_checkpoint` cannot be read, holds another model's weights, or has
            trained on what is held out here.
    """
    config = model.config
    if config.initial_checkpoint:
        path = Path(config.initial_checkpoint)
        start = checkpoint.read(path)
        if start.vocabulary != model.vocabulary:
            raise checkpoint.CheckpointError(
                f"{path}: its vocabulary is not that of {config.data_dir}; start from a run on the "
                "same data, or set initial_checkpoint=null"
            )
        dataset, seed = (start.config.get(key) for key in ("dataset", "seed"))
        if dataset == config.dataset and seed != config.seed and holds_out_by_seed(reader):
            raise checkpoint.CheckpointError(
                f"{path}: trained with seed={shown(seed)} on examples that seed={config.seed} "
                f"holds out for its evaluations; set seed={shown(seed)}"
            )
        with checkpoint.fitting(path):
            model.load_state_dict(start.model)


def check_processes(config: Config, processes: Processes) -> None:
    """Raise ConfigError where the run cannot be trained by so many processes."""
    if config.readout_norm == "batch" and processes.world_size > 1:
        raise ConfigError(
            f"readout_norm=batch takes its statistics from one process, and there are "
            f"{processes.world_size}; start one, or set readout_norm=none"
        )


def check_memory(config: Config, device: torch.device) -> None:
    """Raise ConfigError where the device, or on the CPU the machine, cannot hold the training."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    check_fits(config, training=True, memory=free)


class Trainer:
    """One run in its folder: model, optimizer, data and progress, from step to step."""

    def __init__(self, config: Config, *, resume: bool, stop_at: float | None = None) -> None:
        self.config = config
        self.stop_at = time_limit(config) if stop_at is None else stop_at
        self.processes = current_processes()
        check_processes(config, self.processes)
        self.device = resolve_device(config)
        self.folder = config.run_dir
        self.progress = Progress()
        self.signals: list[int] = []  # that arrived during `run`
        self.versions = versions()  # now: the working tree may change while the run goes on
        reset_peak_memory(self.device)
        state = self.processes.first_alone(lambda: self._claim_folder(resume))

        self.reader, self.splits = self.processes.first_alone(lambda: self._load_data(state))
        check_memory(config, self.device)
        seed_everything(config.seed)
        vocabulary = getattr(self.reader.tokenizer, "vocabulary", None)
        self.model = build_model(config, vocabulary).to(self.device)
        if state is None:
            load_initial_weights(self.model, self.reader)
        self.optimizers = build_optimizers(self.model, config)
        parameters = sum(p.numel() for p in self.model.parameters())
        # Checkpoints from before the choice existed are of float32 where nothing was asked for.
        begun = None if state is None else state.precision or "float32"
        manner = choose_manner(config, self.device, parameters, begun)
        if manner.why:
            form = "compiled" if manner.compile else "eager"
            log_line(f"{manner.precision}, {form}: {manner.why}")
        self.model.precision = manner.precision
        float16 = autocast_dtype(manner.precision, self.device) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=float16)
        # Sums of loss, correct answers and real tokens since the last line of the log; on the
        # device, so that they do not make a step wait for it.
        self.running = torch.zeros(3, dtype=torch.float64, device=self.device)
        if state is not None:
            with checkpoint.fitting(self.folder / "last.pt"):
                self.model.load_state_dict(state.model)
                saved = {name: s.state for name, s in state.optimizer.items()}
                restore_optimizers(self.optimizers, saved)
                if float16 and state.scaler:  # it may go on from another device's precision
                    self.scaler.load_state_dict(state.scaler)
                if self.is_writer:  # it holds the sums of all processes
                    self.running.copy_(state.running)
            self.progress = state.progress

        self.compiled = manner.compile
        self.graphed = uses_cuda_graphs(config, self.device)
        self.model.fixed_shapes = self.compiled or self.graphed
        self.steps = training_batches(
            self.stages, config, self.device, self.progress.step, self.processes,
            whole_segments=self.model.fixed_shapes,
        )
        self.upcoming = next(self.steps)  # the batches of the next step
        self.backward = amrb_backward if config.memory_replay_backprop else bptt_backward
        self.score = score
        if self.compiled:
            compile_model(self.model, self.backward, self.upcoming[0])
        if self.graphed:
            self.backward, self.score = GraphedBackward(self.backward), Graphed(self.score)
        if config.replay_segments != "all":
            self.backward = BudgetedReplay(self.backward, config)
        self.overview = look_ahead(
            config, self.model, self.reader, self.splits, self.upcoming[0], self.processes
        )
        self.step_ends: list[float] = []  # of the first steps here, s
        self.log = None
        if self.is_writer:
            begin_folder(config, anew=state is None)
            self.log = RunLog(config, keep_until=self.progress.step)
        self._lap_start = self._saved_at = time.perf_counter()

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the run's files."""
        return self.processes.is_first

    def _claim_folder(self, resume: bool) -> Resumable | None:
        if self.is_writer:
            return claim_folder(self.config, resume=resume)
        return load_state(self.config) if (self.folder / "last.pt").exists() else None

    def _load_data(self, state: Resumable | None) -> tuple[Reader, dict[str, PackedSplit]]:
        reader = open_dataset(self.config)
        splits = load_splits(reader)
        self.stages = training_stages(self.config, splits)
        self.data_digest = digest(splits, self.stages)
        if state is not None and state.data not in (None, self.data_digest):
            raise DataError(
                f"{self.config.data_dir}: {self.config.dataset} is not what "
                f"{self.folder / 'last.pt'} was trained on; restore it, or set another run_name"
            )
        return reader, splits

    def run(self) -> Summary:
        """Train until `done`, then test once with the weights of the best validation."""
        config, progress = self.config, self.progress
        bar = tqdm(
            total=config.last_step, initial=progress.step, desc=config.run_name,
            unit=" steps", disable=None if self.is_writer else True, smoothing=0.05,
        )
        self.model.train()
        log_line(self.overview.text)
        self._lap()
        with bar, caught_signals() as self.signals:
            while not self.done:
                interrupted = is_due = False
                if not progress.validation_due:  # as a signal during a validation leaves it
                    interrupted, is_due = self.train_step(is_due=self._checkpoint_is_due())
                    progress.unlogged_seconds += self._lap()
                    bar.update()
                    self._tell_expected_time()
                    step, last = progress.step, progress.step == config.last_step
                    if step % config.log_interval == 0 or last:
                        bar.set_postfix(self.log_training())
                    progress.validation_due = step % config.eval_interval == 0 or last

                if progress.validation_due and not interrupted:
                    interrupted = not self.validate()
                if interrupted:
                    self._leave()
                if is_due or self.done:
                    self.save()
            summary = self.finish()
            if summary is None:
                raise Interrupted(self.processes.largest(self._leaving_status()), progress.step)
            if self.signals:  # too late for this run, not for what comes after it
                raise Interrupted(self._leaving_status(), progress.step)
        return summary

    def _tell_expected_time(self) -> None:
        """Once `TIMED_STEPS` are made, the first one left out for what it prepares."""
        if len(self.step_ends) == TIMED_STEPS:
            return
        self.step_ends.append(time.perf_counter())
        if len(self.step_ends) < TIMED_STEPS:
            return
        config, progress = self.config, self.progress
        seconds = expected_seconds(
            config, {name: len(split) for name, split in self.splits.items()},
            self.overview.sequences_per_step,
            (self.step_ends[-1] - self.step_ends[0]) / (TIMED_STEPS - 1),
            config.last_step - progress.step,
        )
        total = progress.seconds + progress.unlogged_seconds + seconds
        self.overview = dataclasses.replace(self.overview, seconds=round(total))
        log_line(f"step {progress.step}: about {duration(seconds)} to go")

    @property
    def done(self) -> bool:
        """Whether the last step is made and validated, or `target_accuracy` is reached."""
        progress, config = self.progress, self.config
        if config.reached(progress.best_val_accuracy):
            return True
        return progress.step >= config.last_step and not progress.validation_due

    def _leaving_status(self) -> int:
        """The exit status to leave with after this step or batch; 0 to go on."""
        if self.signals:
            return 128 + self.signals[0]
        return OUT_OF_TIME if time.monotonic() >= self.stop_at else 0

    def _leave(self) -> NoReturn:
        """Save a checkpoint and go, all processes for one reason, once it is whole."""
        self.save()
        raise Interrupted(self.processes.largest(self._leaving_status()), self.progress.step)

    def _checkpoint_is_due(self) -> bool:
        """After the step that comes next."""
        interval = self.config.checkpoint_interval
        if interval is not None:
            return (self.progress.step + 1) % interval == 0
        return time.perf_counter() - self._saved_at >= CHECKPOINT_SECONDS

    def train_step(self, *, is_due: bool = False) -> tuple[bool, bool]:
        """One optimizer step over the upcoming batches.

        Args:
            is_due: a checkpoint should follow, by this process's clock.
        Returns:
            Whether any process is to leave, and whether any wants a checkpoint.
        Raises:
            Interrupted: a signal came before the last batch. Nothing of the step stays: the
                resumed run makes it.
            NonFiniteError: the loss or the gradient is not finite, and `on_nonfinite` is stop.
        """
        config, progress, batches = self.config, self.progress, self.upcoming
        seed_step(config.seed, progress.step, self.processes.rank)
        learning_rate = set_learning_rate(self.optimizers, progress.step, config)
        self.model.zero_grad(set_to_none=not self.graphed)
        scale = 1 / len(batches)
        if self.scaler.is_enabled():
            scale = self.scaler.scale(torch.full((), scale, device=self.device))
        statistics = [buffer.clone() for buffer in self.model.head.buffers()]
        results: list[StepResult] = []
        for batch in batches:
            results.append(self.backward(self.model, batch, scale))
            if self.signals:
                break
        unfinished = len(results) < len(batches)
        interrupted = bool(self._leaving_status())
        self.upcoming = next(self.steps)  # gathered while a CUDA device is still busy

        loss = torch.stack([result.loss for result in results]).mean()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        flags = [torch.full_like(loss, flag) for flag in (unfinished, interrupted, is_due)]
        loss, *flags = self.processes.average_gradients(parameters, torch.stack([loss, *flags]))
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
        # The one wait for the device in a step: weights are not touched by a sick one.
        loss, norm, *flags = torch.stack([loss, norm.to(loss), *flags]).tolist()
        unfinished, interrupted, is_due = (flag > 0 for flag in flags)  # of any process
        if unfinished:
            restore(self.model.head.buffers(), statistics)
            self._leave()
        self.gradient_norm = norm
        if math.isfinite(loss) and math.isfinite(norm):
            for optimizer in self.optimizers.values():
                optimizer.step()
            self._count(batches, results)
        elif math.isfinite(loss) and self.scaler.is_enabled():
            # An overflow of float16: the step is left out, and the scaler scales less from here on.
            self._count(batches, results)
        else:
            self._report_nonfinite(learning_rate, loss, norm)
            restore(self.model.head.buffers(), statistics)
        self.scaler.update()
        progress.step += 1
        return interrupted, is_due

    def _count(self, batches: Sequence[Batch], results: Sequence[StepResult]) -> None:
        """Add a step to the sums of the log."""
        for batch, result in zip(batches, results, strict=True):
            correct = (result.logits.argmax(dim=-1) == batch.labels).sum()
            # A fill: a number that is copied there would wait for the device.
            tokens = result.loss.new_full((), batch.tokens.numel(), dtype=torch.float64)
            if batch.mask is not None:
                tokens = batch.mask.sum().double()
            self.running += torch.stack([
                result.loss.double() * len(batch.labels), correct.double(),
                tokens,
            ])
            self.progress.unlogged_examples += len(batch.labels) * self.processes.world_size

    def _report_nonfinite(self, learning_rate: float, loss: float, norm: float) -> None:
        """End the run, or leave the step out, as `on_nonfinite` says."""
        progress = self.progress
        what = (
            f"step {progress.step + 1}: loss {loss} and gradient norm {norm} at learning rate "
            f"{learning_rate:.3g}"
        )
        raise NonFiniteError(
            f"{what}; {self._last_good()}; lower learning_rate or grad_clip"
        )

    def _last_good(self) -> str:
        last = self.folder / "last.pt"
        if not last.exists():
            return "no checkpoint exists yet"
        return f"the last good checkpoint is {last}"

    def log_training(self) -> dict[str, str]:
        """Write the means since the last line; return what the bar shows."""
        progress = self.progress
        loss, correct, tokens = self.processes.sum(self.running).tolist()  # waits for the device
        self.running.zero_()
        progress.unlogged_seconds += self._lap()
        examples, seconds = progress.unlogged_examples, progress.unlogged_seconds
        progress.unlogged_examples, progress.unlogged_seconds = 0, 0.0
        progress.seconds += seconds
        progress.train_seconds += seconds
        progress.tokens += int(tokens)
        if not examples:  # every step since then was skipped
            return {}
        if self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE:
            raise NonFiniteError(
                f"step {progress.step}: gradients overflow float16 at every scale; set "
                "precision=float32 or lower learning_rate"
            )
        loss, accuracy, speed = loss / examples, correct / examples, tokens / seconds
        if self.log is not None:
            factor = learning_rate_factor(progress.step - 1, self.config)
            self.log.write(
                progress.step,
                loss=loss,
                accuracy=accuracy,
                learning_rate=self.config.learning_rate * factor,
                tokens_per_second=round(speed),
                seconds=round(progress.seconds, 3),
                **self._internals(),
            )
        return {"loss": f"{loss:.3f}", "acc": f"{accuracy:.3f}", "tok/s": f"{speed:,.0f}"}

    def _internals(self) -> dict[str, float]:
        """What `log_internals` asks for, of the first batch of the next step."""
        if not self.config.log_internals:
            return {}
        return {"gradient_norm": self.gradient_norm, **inspect_model(self.model, self.upcoming[0])}

    def validate(self) -> bool:
        """Evaluate on the validation split and keep the weights if they are the best so far.

        Returns:
            Whether it came to its end, before any signal.
        """
        progress = self.progress
        if self.config.readout_norm == "batch":
            settle_statistics(self.model, self._until_signal(self._last_batches(SETTLING_BATCHES)))
        metrics = self._evaluate("val")
        if metrics is None:
            return False
        progress.validation_due = False
        if metrics.accuracy > progress.best_val_accuracy:
            progress.best_val_accuracy, progress.best_step = metrics.accuracy, progress.step
            if self.is_writer:
                checkpoint.save(
                    self.folder / "best.pt",
                    {**self.model.state(), "step": progress.step,
                     "val_accuracy": metrics.accuracy},
                )
        progress.seconds += self._lap()
        if self.log is not None:
            self.log.write(progress.step, val_loss=metrics.loss, val_accuracy=metrics.accuracy)
        log_line(
            f"step {progress.step}: val_loss {metrics.loss:.4f}  val_acc {metrics.accuracy:.4f}"
        )
        return True

    def save(self) -> None:
        """Write `last.pt`.

        Raises:
            NonFiniteError: a weight is not finite; the previous checkpoint stays.
        """
        self._saved_at = time.perf_counter()
        self.processes.sum(self.running)
        if not self.is_writer:
            self.running.zero_()
            return
        if not all(bool(x.isfinite().all()) for x in self.model.state_dict().values()):
            raise NonFiniteError(
                f"step {self.progress.step}: weights are not finite; {self._last_good()}; lower "
                "learning_rate"
            )
        checkpoint.save(
            self.folder / "last.pt",
            {**self.model.state(),
             "optimizer": {name: o.state_dict() for name, o in self.optimizers.items()},
             "precision": self.model.precision,
             "scaler": self.scaler.state_dict(), "processes": self.processes.world_size,
             "progress": dataclasses.asdict(self.progress), "running": self.running,
             "data": self.data_digest},
        )

    def finish(self) -> Summary | None:
        """Test with the best weights; write `summary.json`, the weights and the curves.

        Returns:
            The summary; None if a signal came before the end of an evaluation.
        """
        config, progress = self.config, self.progress
        self.processes.barrier()  # until the best weights are written
        if not (self.folder / "best.pt").exists():  # ended earlier than the checkpoint it is from
            if not self.validate():
                return None
        best = self.folder / "best.pt"
        weights = checkpoint.read(best).model
        with checkpoint.fitting(best):
            self.model.load_state_dict(weights)
        slices = Slices(config, self.device)
        metrics = self._evaluate("test", slices)
        if metrics is None:
            return None
        lower = autocast_dtype(self.model.precision, self.device)
        # A run that has reached its target may end between two lines of the log.
        tokens = progress.tokens + int(self.running[2])
        train_seconds = progress.train_seconds + progress.unlogged_seconds
        summary = Summary(
            dataset=config.dataset,
            test_accuracy=metrics.accuracy,
            test_loss=metrics.loss,
            best_val_accuracy=progress.best_val_accuracy,
            best_step=progress.best_step,
            steps=progress.step,
            seconds=round(progress.seconds + progress.unlogged_seconds, 1),
            tokens_per_second=round(tokens / max(train_seconds, 1e-9)),
            peak_memory_mib=round(peak_memory_mib(self.device), 1),
            parameters=sum(p.numel() for p in self.model.parameters()),
            seed=config.seed,
            skipped_steps=progress.skipped_steps,
            processes=self.processes.world_size,
            hardware=hardware(self.device),
            data=self.reader.origin(),
            examples={name: len(split) for name, split in self.splits.items()},
            skipped=self.reader.skipped,
            command=" ".join(sys.argv),
            versions=self.versions,
            test_slices=slices.shares(self.processes),
            precision=str(lower or torch.float32).removeprefix("torch."),
            expected=self.overview.expected(),
        )
        if self.log is not None:
            checkpoint.export(self.model.state(), self.folder, dataclasses.asdict(summary))
            save_figure(curves_figure({config.run_name: self.folder}), self.folder / "curves.png")
            # Last of all: with it the run is finished.
            write_json(self.folder / "summary.json", dataclasses.asdict(summary))
            self.log.finish(dataclasses.asdict(summary))
        return summary

    def _lap(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        elapsed, self._lap_start = now - self._lap_start, now
        return elapsed

    def _evaluate(self, split: str, slices: Slices | None = None) -> Metrics | None:
        """The metrics of a split; None if a signal came before the end, to any process."""
        batches = evaluation_batches(
            self.splits[split], self.config, self.device, self.processes,
            whole_segments=self.model.fixed_shapes,
        )
        metrics = evaluate(
            self.model, self._until_signal(batches), self.processes, slices, self.score
        )
        return None if self.processes.largest(len(self.signals)) else metrics

    def _last_batches(self, count: int) -> Iterator[Batch]:
        """One training batch of each of the last `count` steps."""
        steps = training_batches(
            self.stages, self.config, self.device, max(self.progress.step - count, 0),
            self.processes, whole_segments=self.model.fixed_shapes,
        )
        return (batches[0] for batches in itertools.islice(steps, count))

    def _until_signal(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        # Not until `max_minutes` are over: one that takes longer would never come to its end.
        for batch in batches:
            yield batch
            if self.signals:
                return


def train(config: Config, resume: bool = False, stop_at: float | None = None) -> Summary:
    """Train one run to its end and test it, in all processes that `torchrun` started.

    Args:
        config: the run; its folder is `config.run_dir`.
        resume: go on from the folder's `last.pt`, anew if there is none; a finished run is not
            repeated.
        stop_at: the `time.monotonic()` at which to leave with a checkpoint; None: `max_minutes`
            from now.
    Raises:
        ConfigError: the folder already holds a run, or the checkpoint is another configuration's.
        Held: another process trains in the folder.
        DataError: the data are missing or damaged.
        CheckpointError: a checkpoint cannot be read or written.
        NonFiniteError: the loss or a gradient is not finite.
        Interrupted: a signal arrived, or time is up; a checkpoint was saved.
    """
    if resume and (summary := finished(config)) is not None:
        return summary
    processes = current_processes()
    with contextlib.ExitStack() as held:
        processes.first_alone(
            lambda: held.enter_context(claimed(config.run_dir)) if processes.is_first else None
        )
        return Trainer(config, resume=resume, stop_at=stop_at).run()


def plan(config: Config) -> Overview:
    """What `train` would say first of a new run.

    Data are read, or generated; the run's folder and the weights or word vectors that it would
    start from are not looked at.

    Raises:
        ConfigError: the run cannot be trained here.
        DataError: the data are missing or damaged.
    """
    device, processes = resolve_device(config), current_processes()
    check_processes(config, processes)

    def load() -> tuple[Reader, dict[str, PackedSplit]]:
        reader = open_dataset(config)
        return reader, load_splits(reader)

    reader, splits = processes.first_alone(load)
    check_memory(config, device)
    model = build_model(config, getattr(reader.tokenizer, "vocabulary", None)).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    model.precision = choose_manner(config, device, parameters, None).precision
    batches = next(training_batches(splits["train"], config, device, 0, processes))
    return look_ahead(config, model, reader, splits, batches[0], processes)
