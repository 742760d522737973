"""The training loop and evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
from backprop import StepResult, amrb_backward, bptt_backward
from dataloader import Batch, evaluation_batches, training_batches
from lra_config import LOCAL_KEYS, Config, ConfigError, dump_config, load_config
from lra_datasets import load_word_vectors, open_dataset
from model import RMAAT, build_model
from packing import load_splits
from plots import plot_curves
from run_log import RunLog
from utils import (
    atomic_write,
    hardware,
    peak_memory_mib,
    reset_peak_memory,
    seed_everything,
    seed_step,
    versions,
    write_json,
)

__all__ = [
    "Interrupted", "Metrics", "StepResult", "Trainer", "amrb_backward", "bptt_backward", "evaluate",
    "train",
]


class Metrics(NamedTuple):
    """Means over the examples of an evaluation."""

    loss: float  # nats
    accuracy: float  # fraction
    examples: int


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; the step was finished and a checkpoint saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(signal_number).name} at step {step}; checkpoint saved")
        self.exit_status = 128 + signal_number


@torch.inference_mode()
def evaluate(model: RMAAT, batches: Iterable[Batch]) -> Metrics:
    """Loss and accuracy over all examples of `batches`, without dropout."""
    training = model.training
    model.eval()
    loss, correct, examples = 0.0, 0, 0
    for batch in batches:
        logits = model(batch.tokens, batch.mask)
        loss += F.cross_entropy(logits, batch.labels, reduction="sum").double()
        correct += (logits.argmax(dim=-1) == batch.labels).sum()
        examples += len(batch.labels)
    model.train(training)
    return Metrics(float(loss) / examples, float(correct) / examples, examples)


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
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate)


def resolve_device(config: Config) -> torch.device:
    """The device of the run.

    Raises:
        ConfigError: `device: cuda` on a machine without one.
    """
    present = torch.cuda.is_available()
    if config.device == "cuda" and not present:
        raise ConfigError("device='cuda' but torch sees no CUDA device; set device to cpu or auto")
    return torch.device("cuda" if present and config.device != "cpu" else "cpu")


@dataclass
class Summary:
    """What `summary.json` says of a finished run. Accuracies are fractions."""

    dataset: str
    test_accuracy: float
    test_loss: float
    best_val_accuracy: float
    best_step: int
    steps: int
    seconds: float  # of training, validation included
    tokens_per_second: float  # real tokens, validation not included
    peak_memory_mib: float
    parameters: int
    seed: int
    hardware: str
    data: str  # downloaded or generated
    examples: dict[str, int]  # per split
    skipped: int  # examples whose file is empty
    command: str
    versions: dict[str, str]  # when the run was started or resumed


@dataclass
class Progress:
    """Where a run stands: all of a checkpoint that is neither model nor optimizer."""

    step: int = 0
    best_val_accuracy: float = -1.0
    best_step: int = 0
    seconds: float = 0.0  # since the start, evaluations included
    train_seconds: float = 0.0  # of the steps alone, up to the last line of the log
    tokens: int = 0  # real ones, up to the last line of the log
    # Since the last line of the log
    unlogged_seconds: float = 0.0
    unlogged_examples: int = 0


class Trainer:
    """One run in its folder: model, optimizer, data and progress, from step to step."""

    def __init__(self, config: Config, *, resume: bool) -> None:
        self.config = config
        self.device = resolve_device(config)
        self.folder = config.run_dir
        self.progress = Progress()
        self.versions = versions()  # now: the working tree may change while the run goes on
        reset_peak_memory(self.device)
        state = self._claim_folder(resume)

        self.reader = open_dataset(config)
        self.splits = load_splits(self.reader)
        seed_everything(config.seed)
        vocabulary = getattr(self.reader.tokenizer, "vocabulary", None)
        self.model = build_model(config, vocabulary).to(self.device)
        if config.embedding_path and state is None:
            vectors = load_word_vectors(
                config.embedding_path, vocabulary, config.dim
            )
            for token, vector in vectors.items():
                self.model.token_embedding.weight.data[token] = torch.from_numpy(vector)
        self.optimizer = build_optimizer(self.model, config)
        self.backward = amrb_backward if config.memory_replay_backprop else bptt_backward
        # Sums of loss, correct answers and real tokens since the last line of the log; on the
        # device, so that a step does not wait for it.
        self.running = torch.zeros(3, dtype=torch.float64, device=self.device)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(**state["progress"])
            self.running = state["running"]
        self.log = RunLog(config, keep_until=self.progress.step)
        self._lap_start = time.perf_counter()

    def _claim_folder(self, resume: bool) -> dict[str, Any] | None:
        """Make the run's folder, or find the state to resume from in it."""
        last = self.folder / "last.pt"
        if not resume:
            check_unclaimed(self.config)
        elif last.exists():
            state = checkpoint.load(last, self.device)
            _check_resumable(self.config, state["config"], last)
            return state
        else:
            print(f"{last}: no checkpoint yet, the run starts anew", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in ("metrics.jsonl", "summary.json"):
            (self.folder / stale).unlink(missing_ok=True)
        with atomic_write(self.folder / "config.yaml", "w") as handle:
            handle.write(dump_config(self.config))
        return None

    def run(self) -> Summary:
        """Train to the last step, then test once with the weights of the best validation."""
        config, progress = self.config, self.progress
        batches = training_batches(self.splits["train"], config, self.device, progress.step)
        bar = tqdm(
            total=config.last_step, initial=progress.step, desc=config.run_name,
            unit=" steps", disable=None, smoothing=0.05,
        )
        self.model.train()
        self._lap()
        with bar, _caught_signals() as received:
            while progress.step < config.last_step:
                self.train_step(next(batches))
                progress.unlogged_seconds += self._lap()
                bar.update()

                step, done = progress.step, progress.step == config.last_step
                if step % config.log_interval == 0 or done:
                    bar.set_postfix(self.log_training())
                if step % config.eval_interval == 0 or done:
                    self.validate()
                if step % config.checkpoint_interval == 0 or done or received:
                    self.save()
                if received:
                    raise Interrupted(received[0], step)
        return self.finish()

    def train_step(self, batch: Batch) -> None:
        """One optimizer step."""
        config, progress = self.config, self.progress
        seed_step(config.seed, progress.step)
        factor = learning_rate_factor(progress.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor * group["factor"]
        self.optimizer.zero_grad(set_to_none=True)
        result = self.backward(self.model, batch)
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()

        progress.step += 1
        progress.unlogged_examples += len(batch.labels)
        correct = (result.logits.argmax(dim=-1) == batch.labels).sum()
        tokens = batch.tokens.numel() if batch.mask is None else batch.mask.sum()
        self.running += torch.stack([
            result.loss.double() * len(batch.labels), correct.double(),
            torch.as_tensor(tokens, dtype=torch.float64, device=self.device),
        ])

    def log_training(self) -> dict[str, str]:
        """Write the means since the last line; return what the bar shows."""
        progress = self.progress
        loss, correct, tokens = self.running.tolist()  # waits for the device
        progress.unlogged_seconds += self._lap()
        loss /= progress.unlogged_examples
        accuracy = correct / progress.unlogged_examples
        speed = tokens / progress.unlogged_seconds
        progress.seconds += progress.unlogged_seconds
        progress.train_seconds += progress.unlogged_seconds
        progress.tokens += int(tokens)
        self.log.write(
            progress.step,
            loss=loss,
            accuracy=accuracy,
            learning_rate=self.config.learning_rate
            * learning_rate_factor(progress.step - 1, self.config),
            tokens_per_second=round(speed),
            seconds=round(progress.seconds, 3),
        )
        self.running.zero_()
        progress.unlogged_seconds, progress.unlogged_examples = 0.0, 0
        return {"loss": f"{loss:.3f}", "acc": f"{accuracy:.3f}", "tok/s": f"{speed:,.0f}"}

    def validate(self) -> None:
        """Evaluate on the validation split and keep the weights if they are the best so far."""
        progress = self.progress
        metrics = self._evaluate("val")
        if metrics.accuracy > progress.best_val_accuracy:
            progress.best_val_accuracy, progress.best_step = metrics.accuracy, progress.step
            checkpoint.save(
                self.folder / "best.pt",
                {**checkpoint.describe(self.model), "step": progress.step,
                 "val_accuracy": metrics.accuracy},
            )
        progress.seconds += self._lap()
        self.log.write(progress.step, val_loss=metrics.loss, val_accuracy=metrics.accuracy)
        tqdm.write(
            f"step {progress.step}: val_loss {metrics.loss:.4f}  val_acc {metrics.accuracy:.4f}"
        )

    def save(self) -> None:
        """Write `last.pt`."""
        checkpoint.save(
            self.folder / "last.pt",
            {**checkpoint.describe(self.model), "optimizer": self.optimizer.state_dict(),
             "progress": dataclasses.asdict(self.progress), "running": self.running},
        )

    def finish(self) -> Summary:
        """Test with the best weights; write `summary.json`, the weights and the curves."""
        config, progress = self.config, self.progress
        best = checkpoint.load(self.folder / "best.pt", self.device)
        self.model.load_state_dict(best["model"])
        metrics = self._evaluate("test")
        summary = Summary(
            dataset=config.dataset,
            test_accuracy=metrics.accuracy,
            test_loss=metrics.loss,
            best_val_accuracy=progress.best_val_accuracy,
            best_step=progress.best_step,
            steps=progress.step,
            seconds=round(progress.seconds, 1),
            tokens_per_second=round(progress.tokens / progress.train_seconds),
            peak_memory_mib=round(peak_memory_mib(self.device), 1),
            parameters=sum(p.numel() for p in self.model.parameters()),
            seed=config.seed,
            hardware=hardware(self.device),
            data=self.reader.origin(),
            examples={name: len(split) for name, split in self.splits.items()},
            skipped=self.reader.skipped,
            command=" ".join(sys.argv),
            versions=self.versions,
        )
        checkpoint.export(self.model, self.folder)
        plot_curves({config.run_name: self.folder}, self.folder / "curves.png")
        # Last of all: with it the run is finished.
        write_json(self.folder / "summary.json", dataclasses.asdict(summary))
        self.log.finish(dataclasses.asdict(summary))
        return summary

    def _lap(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        elapsed, self._lap_start = now - self._lap_start, now
        return elapsed

    def _evaluate(self, split: str) -> Metrics:
        batches = evaluation_batches(self.splits[split], self.config, self.device)
        return evaluate(self.model, batches)


# What may differ between the run that saved a checkpoint and the one that resumes it.
_RESUMABLE = (LOCAL_KEYS - {"embedding_path"}) | {
    "run_name", "stop_after_steps", "log_interval", "eval_interval", "checkpoint_interval",
}


def _check_resumable(config: Config, saved: dict[str, Any], path: Path) -> None:
    for key, value in config.model_dump().items():
        if key not in _RESUMABLE and saved.get(key) != value:
            raise ConfigError(
                f"{key}={value!r} but {path} was saved with {key}={saved.get(key)!r}; "
                "resume with the same value, or set another run_name"
            )


@contextlib.contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them, so that the step can be finished."""
    received: list[int] = []
    previous: dict[int, Callable | int | None] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: leave them alone
                previous[number] = signal.signal(number, lambda n, _: received.append(n))
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_unclaimed(config: Config) -> None:
    """Raise ConfigError if the run's folder already holds a checkpoint."""
    if (config.run_dir / "last.pt").exists():
        raise ConfigError(
            f"{config.run_dir} holds a checkpoint; add --resume to go on from it, or set another "
            "run_name"
        )


def finished(config: Config) -> Summary | None:
    """The summary of the run in `config.run_dir`, None while it has not come to its last step.

    Raises:
        ConfigError: the finished run is another configuration's.
    """
    folder = config.run_dir
    try:
        summary = Summary(**json.loads((folder / "summary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not there, or of another version: test again
        return None
    if summary.steps < config.last_step:
        return None
    path = folder / "config.yaml"
    _check_resumable(config, load_config(path).model_dump(), path)
    return summary


def train(config: Config, resume: bool = False) -> Summary:
    """Train one run to its end and test it.

    Args:
        config: the run; its folder is `config.run_dir`.
        resume: go on from the folder's `last.pt`, anew if there is none; a finished run is not
            repeated.
    Raises:
        ConfigError: the folder already holds a run, or the checkpoint is another configuration's.
        DataError: the data are missing or damaged.
        CheckpointError: a checkpoint cannot be read or written.
        Interrupted: a signal arrived; a checkpoint was saved.
    """
    if resume and (summary := finished(config)) is not None:
        return summary
    return Trainer(config, resume=resume).run()
