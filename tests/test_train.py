"""Runs: schedule, optimizer, the run folder, interruption and resumption."""

from __future__ import annotations

import functools
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import refusal, start_process, tiny_batch, tiny_config, wait_for
from safetensors.torch import load_file

import train as train_module
from data.packing import load_splits
from dataloader import training_batches
from lra_config import ConfigError, dump_config, load_config
from lra_datasets import open_dataset
from model import build_model
from readout import READOUT_MOMENTUM, recompute_statistics
from run import checkpoint
from run.log import read_metrics
from run.processes import Processes
from train import (
    amrb_backward,
    evaluate,
    load_initial_weights,
    prepare,
    train,
    train_step,
)
from training.optimizer import build_optimizers, learning_rate_factor
from utils import seed_step

TIMINGS = {"seconds", "tokens_per_second"}


def test_the_schedule_at_its_corners():
    for schedule, middle, end in [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1, 1)]:
        config = tiny_config(max_steps=110, warmup_steps=10, lr_schedule=schedule)
        assert learning_rate_factor(0, config) == pytest.approx(0.1)
        assert learning_rate_factor(9, config) == learning_rate_factor(10, config) == 1
        assert learning_rate_factor(60, config) == pytest.approx(middle)
        assert learning_rate_factor(110, config) == pytest.approx(end)


def test_an_earlier_end_keeps_the_schedule():
    full, cut = tiny_config(), tiny_config(stop_after_steps=6)
    assert cut.last_step == 6 and full.last_step == 12
    assert learning_rate_factor(5, cut) == learning_rate_factor(5, full)


def test_the_position_basis_learns_faster_and_takes_no_weight_decay():
    config = tiny_config(position_lr_factor=7.0, weight_decay=0.5)
    model = build_model(config)
    groups = build_optimizers(model, config)["adamw"].param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g["factor"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(names)
    assert found["layers.0.attention.position_basis"] == (7.0, 0.0)
    assert found["layers.0.attention.to_qkv.weight"] == (1.0, 0.5)
    for name in ("token_embedding.weight", "position_table", "memory", "head.bias",
                 "layers.0.attention_norm.weight"):
        assert found[name] == (1.0, 0.0), name


def test_evaluation_is_a_mean_over_examples_without_dropout():
    config = tiny_config(dropout=0.5)
    model = build_model(config)
    large, small = tiny_batch(config, [40, 3, 20]), tiny_batch(config, [9], seed=1)
    both = evaluate(model, [large, small])
    parts = [evaluate(model, [b]) for b in (large, small)]
    assert both.examples == 4 and model.training
    assert both.loss == pytest.approx((3 * parts[0].loss + parts[1].loss) / 4)
    assert both.accuracy == pytest.approx((3 * parts[0].accuracy + parts[1].accuracy) / 4)


def outcome(folder: Path) -> tuple[dict, list[dict]]:
    """Return the weights and the metrics of a run, without timings."""
    rows = [{k: v for k, v in row.items() if k not in TIMINGS} for row in read_metrics(folder)]
    return checkpoint.load(folder / "last.pt")["model"], rows


def assert_same_outcome(a: Path, b: Path) -> None:
    (weights_a, rows_a), (weights_b, rows_b) = outcome(a), outcome(b)
    assert rows_a == rows_b
    assert all(torch.equal(weights_a[name], weights_b[name]) for name in weights_b)
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def run_config(tmp_path: Path, listops_dir: Path, name: str, **changes):
    return tiny_config(
        data_dir=str(listops_dir), output_dir=str(tmp_path), run_name=name, dropout=0.1,
        bucket_by_length=True, **changes,
    )


def test_a_run_leaves_the_promised_files(trained):
    folder = trained / "runs/run"
    written = json.loads((folder / "summary.json").read_text())
    assert written["data"] == "generated" and written["steps"] == 12
    assert written["precision"] == "float32"
    assert written["examples"] == {"train": 200, "val": 20, "test": 20}
    assert {"best_val_accuracy", "test_accuracy", "seconds", "tokens_per_second", "parameters",
            "peak_memory_mib", "seed", "versions"} <= set(written)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = read_metrics(folder)
    assert [r["step"] for r in rows if "loss" in r] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in rows if "val_accuracy" in r] == [5, 10, 12]
    best = max(r["val_accuracy"] for r in rows if "val_accuracy" in r)
    assert written["best_val_accuracy"] == best
    weights = load_file(folder / "model.safetensors")
    stored = checkpoint.load(folder / "best.pt")["model"]
    assert all(torch.equal(weights[name], stored[name]) for name in stored)
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize("stop", [3, 5, 8])
def test_an_interrupted_run_equals_an_uninterrupted_one(
    tmp_path, listops_dir, trained, stop, monkeypatch
):
    config = run_config(tmp_path, listops_dir, "cut")

    original, calls = train_module.amrb_backward, []

    def killed(model, batch, scale):
        if len(calls) == stop:
            raise KeyboardInterrupt  # not caught by the loop: like a kill, it saves nothing
        calls.append(1)
        return original(model, batch, scale)

    monkeypatch.setattr(train_module, "amrb_backward", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    train(config, resume=True)  # from the start where no checkpoint was saved yet
    assert_same_outcome(tmp_path / "cut", trained / "runs/run")


def test_a_copied_checkpoint_continues_in_another_folder(
    tmp_path, listops_dir, trained
):
    stopped = run_config(tmp_path, listops_dir, "cut", stop_after_steps=10)
    train(stopped)
    with pytest.raises(ConfigError, match="--resume"):
        train(stopped)
    with pytest.raises(ConfigError, match="learning_rate"):
        train(run_config(tmp_path, listops_dir, "cut", learning_rate=0.5), resume=True)
    (tmp_path / "moved").mkdir()
    (tmp_path / "cut" / "last.pt").rename(tmp_path / "moved" / "last.pt")
    moved = run_config(tmp_path, listops_dir, "moved")
    train(moved, resume=True)
    weights, full = (checkpoint.load(folder / "last.pt")["model"] for folder in (
        tmp_path / "moved", trained / "runs/run"
    ))
    assert all(torch.equal(weights[name], full[name]) for name in full)
    assert load_config(tmp_path / "moved" / "config.yaml") == moved


def test_a_resumed_run_names_the_step_of_the_weights_that_it_tests(tmp_path, listops_dir):
    """A kill can come between a new best.pt and the next last.pt."""
    train(run_config(tmp_path, listops_dir, "cut", stop_after_steps=10))
    best = tmp_path / "cut" / "best.pt"
    state = checkpoint.load(best)
    checkpoint.save(best, {**state, "step": 11, "val_accuracy": 1.0})
    summary = train(run_config(tmp_path, listops_dir, "cut"), resume=True)
    assert (summary.best_step, summary.best_val_accuracy) == (11, 1.0)


def test_a_restarted_run_keeps_nothing_of_the_previous_one(tmp_path, listops_dir, trained):
    folder = shutil.copytree(trained / "runs/run", tmp_path / "run")
    (folder / "wandb_id").write_text("of the run before")
    (folder / "last.pt").unlink()
    prepare(run_config(tmp_path, listops_dir, "run"), resume=False)
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_a_run_starts_from_the_weights_of_another(tmp_path, listops_dir, trained, monkeypatch):
    first = trained / "runs/run"
    changes = {
        "pooling": "memory", "astro_mem": False, "seed": 1, "max_steps": 4, "eval_interval": 2,
        "initial_checkpoint": str(first / "model.safetensors"),
    }
    config = run_config(tmp_path, listops_dir, "full", **changes)
    config.run_dir.mkdir()
    begun = prepare(config, resume=False).model.state_dict()
    weights = checkpoint.load(first / "best.pt")["model"]
    assert all(torch.equal(begun[name], weights[name]) for name in weights)

    train(config)
    assert not torch.equal(outcome(tmp_path / "full")[0]["memory"], weights["memory"])
    train(run_config(tmp_path, listops_dir, "cut", stop_after_steps=2, **changes))
    # A resumed run has weights of its own and does not need the initial ones.
    monkeypatch.setattr(train_module, "load_initial_weights", None)
    train(run_config(tmp_path, listops_dir, "cut", **changes), resume=True)
    assert_same_outcome(tmp_path / "cut", tmp_path / "full")


def test_weights_that_were_trained_on_held_out_examples_are_refused(
    tmp_path, listops_dir, trained
):
    start = {"initial_checkpoint": str(trained / "runs/run/best.pt"), "seed": 1}
    model = build_model(run_config(tmp_path, listops_dir, "second", **start))
    reader = open_dataset(model.config)
    load_initial_weights(model, reader)  # ListOps has its own validation and test files
    reader.parts = ("train", "test")
    line = refusal(load_initial_weights, model, reader)
    assert "best.pt: trained with seed=0" in line and "set seed=0" in line


@pytest.mark.parametrize("changes, words", [
    ({"initial_checkpoint": "none.pt"}, ["none.pt: no such checkpoint"]),
    ({"num_memory_tokens": 3}, ["best.pt: its weights are another model's", "size mismatch"]),
    ({"num_layers": 1}, ["best.pt: its weights are another model's", "layers.1"]),
])
def test_weights_of_another_model_are_refused(tmp_path, listops_dir, trained, changes, words):
    start = {"initial_checkpoint": str(trained / "runs/run/best.pt"), **changes}
    line = refusal(train, run_config(tmp_path, listops_dir, "second", **start))
    assert all(word in line for word in words), line
    assert not (tmp_path / "second").exists()


def test_a_run_ends_at_the_first_validation_that_reaches_its_target(
    tmp_path, listops_dir, trained
):
    step, target = next(
        (row["step"], row["val_accuracy"])
        for row in read_metrics(trained / "runs/run") if "val_accuracy" in row
    )
    changes = {"target_accuracy": target, "log_interval": 100}  # between two lines of the log
    reached = run_config(tmp_path, listops_dir, "reached", **changes)
    summary = train(reached)
    assert (summary.steps, summary.best_val_accuracy) == (step, target)
    assert summary.steps < reached.max_steps and summary.tokens_per_second > 0
    assert train(reached, resume=True) == summary  # finished
    missed = run_config(tmp_path, listops_dir, "reached", target_accuracy=1.0)
    assert train(missed, resume=True).steps == missed.max_steps
    weights, full = (outcome(folder)[0] for folder in (tmp_path / "reached", trained / "runs/run"))
    assert all(torch.equal(weights[name], full[name]) for name in full)


@pytest.mark.parametrize(("interval", "seconds", "expected"), [
    (None, 1e-9, [1, 2, 3, 4]), (None, 3600, [4]), (3, 1e-9, [3, 4]),
], ids=["always", "hourly", "steps"])
def test_checkpoints_follow_the_clock_unless_an_interval_is_given(
    tmp_path, listops_dir, monkeypatch, interval, seconds, expected
):
    saved, save = [], train_module.save

    def noted(run):
        saved.append(run.progress.step)
        save(run)

    monkeypatch.setattr(train_module, "save", noted)
    monkeypatch.setattr(train_module, "CHECKPOINT_SECONDS", seconds)
    config = run_config(
        tmp_path, listops_dir, "run", checkpoint_interval=interval, max_steps=4, warmup_steps=1
    )
    train(config)
    assert saved == expected


def test_a_failed_write_keeps_the_previous_file(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})

    class Full:
        def __reduce__(self):
            raise OSError(28, "No space left on device")

    with pytest.raises(checkpoint.CheckpointError, match="previous checkpoint is kept"):
        checkpoint.save(path, {"step": Full()})
    assert checkpoint.load(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path, listops_dir):
    config = run_config(
        tmp_path, listops_dir, "run", max_steps=100_000, checkpoint_interval=100_000,
        eval_interval=100_000,
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    process = start_process("run_train.py", "--config", path, cwd=tmp_path)
    wait_for(process, (tmp_path / "run" / "metrics.jsonl").exists)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "checkpoint saved" in errors and "Traceback" not in errors
    assert checkpoint.load(tmp_path / "run" / "last.pt")["progress"]["step"] > 0


def test_a_run_learns(listops_dir, tmp_path):
    config = run_config(
        tmp_path, listops_dir, "run", max_steps=120, learning_rate=3e-3, eval_interval=120,
        log_interval=20,
    )
    train(config)
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert losses[-1] < 0.87 * math.log(10) < losses[0]


def test_a_run_by_bptt_follows_a_run_by_amrb(tmp_path, listops_dir, trained):
    train(run_config(tmp_path, listops_dir, "bptt", memory_replay_backprop=False))
    (amrb, _), (bptt, _) = outcome(trained / "runs/run"), outcome(tmp_path / "bptt")
    for name, expected in bptt.items():
        torch.testing.assert_close(amrb[name], expected, rtol=1e-3, atol=1e-5)


def test_a_step_of_the_loop_uses_the_gradients_of_amrb_backward(listops_dir, tmp_path):
    """The loop changes the gradients by clipping only."""
    config = run_config(tmp_path, listops_dir, "run", grad_clip=0.0)
    config.run_dir.mkdir()
    trainer = train_module.prepare(config, resume=False)
    (batch,) = trainer.upcoming
    twin = build_model(config)
    twin.load_state_dict(trainer.model.state_dict())
    train_step(trainer)
    seed_step(config.seed, 0)
    amrb_backward(twin, batch)
    for ours, expected in zip(trainer.model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)


def test_batch_norm_statistics_are_those_of_the_evaluated_weights(tmp_path, listops_dir):
    """They are recomputed, not averaged over the outputs of earlier weights."""
    config = tiny_config(
        data_dir=str(listops_dir), output_dir=str(tmp_path), readout_norm="batch",
        learning_rate=0.1, warmup_steps=0, lr_schedule="constant",
    )
    train(config)
    model = build_model(config)
    model.load_state_dict(checkpoint.load(config.run_dir / "last.pt")["model"])
    norm, before = model.head[0], model.head[0].running_mean.clone()
    seen, start = [], {name: p.clone() for name, p in model.named_parameters()}
    norm.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    batches = training_batches(
        load_splits(open_dataset(config))["train"], config, torch.device("cpu")
    )
    recompute_statistics(model, [next(batches)[0] for _ in range(config.max_steps)])
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)
    close(norm.running_mean, before)  # the file that the run wrote
    close(norm.running_mean, torch.stack([x.mean(dim=0) for x in seen]).mean(dim=0))
    close(norm.running_var, torch.stack([x.var(dim=0) for x in seen]).mean(dim=0))
    assert norm.training and norm.momentum == READOUT_MOMENTUM
    assert all(p.equal(start[name]) for name, p in model.named_parameters())


def test_batch_norm_is_refused_with_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "current_processes", lambda: Processes(0, 2))
    config = tiny_config(readout_norm="batch", output_dir=str(tmp_path))
    with pytest.raises(ConfigError, match="2; start one, or set readout_norm=none"):
        train_module.prepare(config, resume=False)
    assert not list(tmp_path.iterdir())
