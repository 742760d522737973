"""`optimizer: muon`: which parameters it takes, its schedule, exact resume, several processes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from conftest import (
    assert_refused,
    finished,
    run_cli,
    start_process,
    tiny_batch,
    tiny_config,
    write_config,
)

from lra_config import dump_config
from model import build_model
from run import checkpoint
from train import amrb_backward, prepare, train, train_step
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
    {}, {"attention_type": "softmax"}, {"attention_type": "luna"}, {"classifier_dim": 8},
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


def test_without_muon_a_step_is_that_of_adamw():
    config = tiny_config(weight_decay=0.1, position_lr_factor=2.0)
    torch.manual_seed(0)
    model = build_model(config)
    torch.manual_seed(0)
    twin = build_model(config)
    optimizers = build_optimizers(model, config)
    assert list(optimizers) == ["adamw"]
    groups: dict[str, list] = {"basis": [], "decayed": [], "undecayed": []}
    for name, p in twin.named_parameters():
        is_decayed = p.ndim == 2 and name.endswith("weight") and "embedding" not in name
        kind = "basis" if name.endswith("position_basis") else "decayed" if is_decayed else None
        groups[kind or "undecayed"].append(p)
    expected = torch.optim.AdamW([
        {"params": groups["basis"], "factor": 2.0, "weight_decay": 0.0},
        {"params": groups["decayed"], "factor": 1.0, "weight_decay": 0.1},
        {"params": groups["undecayed"], "factor": 1.0, "weight_decay": 0.0},
    ])
    for step in range(4):
        batch = tiny_batch(config, [40, 17, 9], seed=step)
        set_learning_rate(optimizers, step, config)
        for group in expected.param_groups:
            group["lr"] = config.learning_rate * learning_rate_factor(step, config)
            group["lr"] *= group["factor"]
        for trained, optimizer in ((model, optimizers["adamw"]), (twin, expected)):
            trained.zero_grad()
            amrb_backward(trained, batch)
            optimizer.step()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


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


def test_accumulation_and_two_processes_follow_one_large_batch(listops_dir, tmp_path):
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

    path = tmp_path / "two.yaml"
    path.write_text(dump_config(config("two", batch_size=4)))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    result = finished(start_process(
        "run_train.py", "--config", path, cwd=tmp_path,
        launcher=["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"],
    ))
    assert result.returncode == 0, result.stderr
    assert_follows(weights_after(tmp_path / "two"), expected, start)


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


def test_a_state_of_other_parameters_is_refused(listops_dir, tmp_path):
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

    path = write_config(tmp_path, listops_dir, optimizer="muon")
    run_cli("--config", path, "stop_after_steps=4", cwd=tmp_path, check=True)
    last = tmp_path / "runs" / "run" / "last.pt"
    state = torch.load(last)
    state["optimizer"]["muon"]["state"][0]["momentum_buffer"] = torch.zeros(3, 3)
    torch.save(state, last)
    assert_refused(run_cli("--config", path, "--resume", cwd=tmp_path), "last.pt")
