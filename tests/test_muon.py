"""`optimizer: muon`: which parameters it takes, its schedule, exact resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import tiny_config

from model import build_model
from run import checkpoint
from train import prepare, train, train_step
from training.optimizer import (
    build_optimizers,
    learning_rate_factor,
    restore_optimizers,
    set_learning_rate,
)

# Relative to the distance that the weights moved. Muon orthogonalizes in bfloat16, which turns
# differences in rounding into differences of this size.
TOLERANCE = 0.05


def muon_config(**changes):
    return tiny_config(optimizer="muon", **changes)


def names_of(model, groups) -> list[list[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in groups]


@pytest.mark.parametrize("changes", [
    {}, {"attention_type": "luna"}, {"classifier_dim": 8},
    {"basis_init": "neighbors", "num_hidden": 10},
], ids=str)
def test_muon_takes_the_matrices_of_the_layers_and_adamw_the_rest(changes):
    model = build_model(muon_config(**changes))
    optimizers = build_optimizers(model, model.config)
    (muon,) = names_of(model, optimizers["muon"].param_groups)
    assert sorted(muon) == sorted(
        name for name, p in model.named_parameters()
        if name.startswith("layers.") and name.endswith(".weight") and p.ndim == 2
    )
    assert any("to_out" in name for name in muon) and any("expand" in name for name in muon)
    adamw = names_of(model, optimizers["adamw"].param_groups)
    alone = names_of(model, build_optimizers(model, tiny_config(**changes))["adamw"].param_groups)
    assert adamw == [[n for n in group if n not in muon] for group in alone if set(group) - {*muon}]
    assert {n for group in alone for n in group} == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("step", [0, 2, 3, 7, 11])
def test_both_optimizers_follow_one_schedule(step):
    config = muon_config(muon_lr_factor=5.0, lr_schedule="cosine")
    optimizers = build_optimizers(build_model(config), config)
    learning_rate = set_learning_rate(optimizers, step, config)
    assert learning_rate == config.learning_rate * learning_rate_factor(step, config)
    (muon,) = optimizers["muon"].param_groups
    assert muon["lr"] == pytest.approx(5 * learning_rate)
    assert optimizers["adamw"].param_groups[-1]["lr"] == learning_rate
    assert muon["weight_decay"] == config.weight_decay


def run_config(listops_dir, folder, name, **changes):
    return muon_config(**{
        "data_dir": str(listops_dir), "output_dir": str(folder), "run_name": name, "dropout": 0.1,
        **changes,
    })


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(listops_dir, tmp_path):
    train(run_config(listops_dir, tmp_path, "unbroken"))
    train(run_config(listops_dir, tmp_path, "resumed", stop_after_steps=7))
    train(run_config(listops_dir, tmp_path, "resumed"), resume=True)
    unbroken, resumed = (
        checkpoint.load(tmp_path / name / "last.pt") for name in ("unbroken", "resumed")
    )
    for name, weight in unbroken["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name
    momenta = unbroken["optimizer"]["muon"]["state"]
    assert momenta
    for index, state in momenta.items():
        other = resumed["optimizer"]["muon"]["state"][index]
        assert torch.equal(state["momentum_buffer"], other["momentum_buffer"])


def assert_follows(weights, expected, start) -> None:
    for name, weight in expected.items():
        moved = (weight - start[name]).norm()
        assert (weights[name] - weight).norm() <= TOLERANCE * moved + 1e-6, name


def weights_after(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(folder / "last.pt")["model"]


def test_accumulation_follows_one_large_batch(listops_dir, tmp_path):
    keys = {"max_steps": 4, "eval_interval": 4, "bucket_by_length": True, "dropout": 0.0}

    def config(name, **changes):
        return run_config(listops_dir, tmp_path, name, **{**keys, **changes})

    start = {
        name: x.clone() for name, x in prepare(config("start"), False).model.state_dict().items()
    }
    train(config("one", batch_size=8))
    expected = weights_after(tmp_path / "one")
    train(config("accumulated", batch_size=2, accumulate=4))
    assert_follows(weights_after(tmp_path / "accumulated"), expected, start)


@pytest.mark.parametrize("overflowing", ["layers.0.expand.weight", "head.weight"])
def test_an_overflow_of_float16_steps_neither_optimizer(listops_dir, tmp_path, overflowing):
    run = prepare(run_config(listops_dir, tmp_path, "run", precision="float16"), False)
    backward, scale = run.backward, run.scaler.get_scale()

    def overflow(model, batch, *rest):
        result = backward(model, batch, *rest)
        model.get_parameter(overflowing).grad.fill_(torch.inf)
        return result

    before = [p.clone() for p in run.model.parameters()]
    run.backward = overflow
    train_step(run)
    assert all(map(torch.equal, run.model.parameters(), before))
    assert not any(optimizer.state for optimizer in run.optimizers.values())
    assert run.scaler.get_scale() < scale
    run.backward = backward
    for _ in range(8):  # until the scale fits
        train_step(run)
    assert all(optimizer.state for optimizer in run.optimizers.values())


def test_a_state_of_other_parameters_is_refused():
    config = muon_config()
    optimizers = build_optimizers(build_model(config), config)
    for states in (
        {"adamw": {}},
        {"adamw": {}, "muon": {0: {"momentum_buffer": torch.zeros(3, 3)}}},
        {"adamw": {}, "muon": {0: {"exp_avg": torch.zeros(48, 16)}}},
        {"adamw": {}, "muon": {99: {"momentum_buffer": torch.zeros(48, 16)}}},
    ):
        with pytest.raises(ValueError):
            restore_optimizers(optimizers, states)
