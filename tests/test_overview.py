"""The first screen of a run, and `--dry_run`, which prints nothing else."""

from __future__ import annotations

import re

import pytest
from conftest import run_cli, tiny_batch, tiny_config, write_config

from model import build_model
from train import plan
from training.diagnostics import count_flop


def test_a_replay_costs_a_forward_pass_and_counting_changes_nothing():
    def flop(**changes) -> float:
        model = build_model(tiny_config(**changes))
        result = count_flop(model, tiny_batch(model.config))
        assert model.training and all(p.grad is None for p in model.parameters())
        return result

    bptt, half, amrb = (
        flop(memory_replay_backprop=False), flop(replay_segments=1), flop(replay_segments="all")
    )
    assert bptt < half < amrb < 4 / 3 * bptt
    assert amrb - bptt == pytest.approx(3 * (half - bptt))  # three of the four segments, or one
    assert count_flop(build_model(tiny_config(attention_type="softmax")), None) is None


def test_backpropagation_through_time_is_expected_to_take_more_memory(listops_dir):
    def memory(**changes) -> int:
        text = plan(tiny_config(data_dir=str(listops_dir), dim=64, batch_size=64, **changes))
        return int(re.search(r"([\d,]+) MiB", text)[1].replace(",", ""))

    assert memory(memory_replay_backprop=False) > memory() + 5


def test_a_dry_run_prints_the_expected_cost_and_makes_no_folder(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir)
    result = run_cli("--config", path, "seed=0,1", "--dry_run", cwd=tmp_path, check=True)
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("runs/")] == [
        "runs/run_seed0", "runs/run_seed1"
    ]
    parameters = sum(p.numel() for p in build_model(tiny_config()).parameters())
    assert sum(f"parameters {parameters:,};" in line for line in lines) == 2
    assert not (tmp_path / "runs").exists()
