"""`replay_segments`: stored activations, their cost, and steps that run out of memory."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import gradients_of, refusal, tiny_batch, tiny_config

import train as train_module
from model import build_model
from run.log import read_metrics
from train import amrb_backward, bptt_backward, train
from training import acceleration
from training.acceleration import BudgetedReplay, activation_bytes

CONFIG = {"max_seq_len": 64, "num_segments": 8, "dropout": 0.2}


def kept_bytes(model, backward, batch) -> int:
    """Return the bytes that autograd stores in a step, without the weights."""
    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), tensor  # holds its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backward(model, batch)
    return sum(size for place, (size, _) in kept.items() if place not in weights)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stored_activations_are_measured_in_bytes(precision):
    config = tiny_config(max_seq_len=256, precision=precision, position_embedding="none")
    model, batch = build_model(config), tiny_batch(config)
    measured = activation_bytes(model, batch)
    whole = kept_bytes(model, functools.partial(amrb_backward, kept=4), batch)
    assert measured == pytest.approx(whole / 4, rel=0.1)
    short = batch._replace(tokens=batch.tokens[:, :32])  # half a segment
    assert activation_bytes(model, short) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("fits", "kept"), [(0, 1), (2.5, 3), (100, 8)])
def test_auto_stores_what_fits_into_half_of_the_free_memory(monkeypatch, capsys, fits, kept):
    config = tiny_config(**CONFIG, replay_segments="auto")
    model, batch = build_model(config), tiny_batch(config)
    free = fits / acceleration.REPLAY_SHARE * activation_bytes(model, batch)
    monkeypatch.setattr(acceleration, "free_memory", lambda device: free)
    seen = []

    def backward(model, batch, scale, seed, kept):
        seen.append(kept)
        return amrb_backward(model, batch, scale, seed, kept)

    budgeted = BudgetedReplay(backward, config)
    budgeted(model, batch)
    budgeted(model, batch)
    assert seen == [kept, kept]
    assert capsys.readouterr().out.startswith(f"replay_segments: {8 - kept} of 8; ")


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_step_without_memory_is_done_again_with_less(monkeypatch, capsys, norm):
    """It fails in the middle of its replays; the second try starts from clean gradients."""
    config = tiny_config(**CONFIG, readout_norm=norm, replay_segments=3)
    batch = tiny_batch(config, [64, 30, 9])
    expected, _ = gradients_of(config, bptt_backward, batch)

    def backward(model, batch, scale, seed, kept):
        if kept < 5:
            return amrb_backward(model, batch, scale, seed, kept)
        recur, calls = model.recur, []

        def failing(*arguments, **keywords):
            calls.append(1)
            if len(calls) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            return recur(*arguments, **keywords)

        monkeypatch.setattr(model, "recur", failing)
        try:
            return amrb_backward(model, batch, scale, seed, kept)
        finally:
            monkeypatch.setattr(model, "recur", recur)

    budgeted = BudgetedReplay(backward, config)
    actual, _ = gradients_of(config, budgeted, batch)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert budgeted.kept == 2
    said = capsys.readouterr().out
    assert said == "out of memory with the activations of 5 segments kept, 2 from now on\n"


def test_a_step_that_never_fits_says_so():
    config = tiny_config(**CONFIG, replay_segments=0)

    def backward(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        BudgetedReplay(backward, config)(build_model(config), tiny_batch(config))


@pytest.mark.parametrize("asked", ["auto", 1])
def test_training_does_not_depend_on_the_replayed_segments(
    listops_dir, tmp_path, monkeypatch, asked
):
    kept = []
    original = amrb_backward

    def recorded(*arguments):
        kept.append(arguments[4] if len(arguments) > 4 else 1)
        return original(*arguments)

    monkeypatch.setattr(train_module, "amrb_backward", recorded)
    losses = []
    for name, value in (("all", "all"), ("other", asked)):
        train(tiny_config(
            data_dir=str(listops_dir), output_dir=str(tmp_path), run_name=name,
            replay_segments=value, max_steps=6, eval_interval=6,
        ))
        losses.append([row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert kept == [1] * 6 + [4 if asked == "auto" else 3] * 6


@pytest.mark.parametrize("changes", [
    {"replay_segments": 9}, {"replay_segments": "some"},
    {"replay_segments": "auto", "memory_replay_backprop": False},
], ids=str)
def test_impossible_replays_are_refused(changes):
    assert "replay_segments" in refusal(lambda: tiny_config(**CONFIG, **changes))
