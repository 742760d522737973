"""Machines that are shared: time limits, runs side by side, SLURM and W&B sweeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import (
    ENDING_SIGNALS,
    ROOT,
    assert_refused,
    finished,
    run_cli,
    start_process,
    wait_for,
    write_config,
)
from test_train import assert_same_outcome

from experiments.grid import load_runs, single_run_arguments
from lra_config import Config, read_mapping
from run.log import read_metrics
from run.state import OUT_OF_TIME

AT_ONCE = "max_minutes=1e-9"  # over before the first step, of which every command takes one


def last_line(path: Path) -> str:
    return path.read_text().splitlines()[-1]


# max_minutes


def test_a_run_out_of_time_is_gone_on_with_to_the_same_end(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir, max_steps=3, warmup_steps=1)
    run_cli("--config", path, "run_name=whole", cwd=tmp_path, check=True)
    for step in (1, 2):
        cut = run_cli("--config", path, "--resume", AT_ONCE, cwd=tmp_path)
        assert cut.returncode == OUT_OF_TIME
        assert f"max_minutes are over at step {step}; checkpoint saved" in cut.stderr
    run_cli("--config", path, "--resume", "max_minutes=60", cwd=tmp_path, check=True)
    assert_same_outcome(tmp_path / "runs/run", tmp_path / "runs/whole")


def test_time_is_that_of_the_whole_sweep(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir)
    run_cli("--config", path, "run_name=run_seed0", "seed=0", cwd=tmp_path, check=True)
    result = run_cli("--config", path, "seed=0,1,2", "--resume", AT_ONCE, cwd=tmp_path)
    assert result.returncode == OUT_OF_TIME
    assert (tmp_path / "runs/run_seed1/last.pt").exists()
    assert not (tmp_path / "runs/run_seed2").exists()


# Side by side


def test_a_run_of_a_sweep_has_a_command_line_of_its_own(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir)
    overrides = ["seed=0,1", "dropout=0.1", "neighbor_offsets=[-2, 2],[1]", 'run_name="12"']
    configs, varied = load_runs(path, overrides)
    assert len(configs) == 4
    for config in configs:
        _, name, *own = single_run_arguments(path, overrides, config, varied)
        (alone,), left = load_runs(name, own)
        assert (alone, left) == (config, [])


def test_runs_side_by_side_come_to_what_they_come_to_alone(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir)
    one_by_one = run_cli("--config", path, "seed=0,1", "output_dir=alone", cwd=tmp_path)
    together = finished(start_process(
        "run_train.py", "--config", path, "seed=0,1", "output_dir=both", "--jobs", 2, cwd=tmp_path
    ))
    assert together.returncode == 0, together.stderr
    tables = [
        [line for line in result.stdout.splitlines() if line.startswith("|")]
        for result in (one_by_one, together)
    ]
    assert tables[0] == tables[1] and len(tables[0]) == 7
    for seed in range(2):
        folders = [tmp_path / side / f"run_seed{seed}" for side in ("alone", "both")]
        assert_same_outcome(*folders)
        assert "test_acc" in last_line(folders[1] / "output.log")


def test_a_failing_run_beside_others_ends_them_all(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir, max_steps=100_000)
    command = ["--config", path, "learning_rate=1e-3,1e30", "warmup_steps=0", "--jobs", 2]
    result = finished(start_process("run_train.py", *command, cwd=tmp_path))
    assert_refused(result, "runs/run_learning_rate1e+30: step 2: loss nan")
    assert not (tmp_path / "runs/run_learning_rate0.001/summary.json").exists()


@ENDING_SIGNALS
def test_a_signal_ends_runs_side_by_side_with_their_checkpoints(
    tmp_path, listops_dir, send, number
):
    path = write_config(tmp_path, listops_dir, max_steps=100_000, checkpoint_interval=100_000)
    process = start_process(
        "run_train.py", "--config", path, "seed=0,1", "--jobs", 2, cwd=tmp_path,
        start_new_session=True,
    )
    folders = [tmp_path / f"runs/run_seed{seed}" for seed in (0, 1)]
    wait_for(process, lambda: all((f / "metrics.jsonl").exists() for f in folders))
    send(process.pid, number)
    result = finished(process)
    assert result.returncode == 128 + number
    assert result.stderr == "run_train.py: interrupted; go on with --resume\n"
    for folder in folders:
        assert (folder / "last.pt").exists() and read_metrics(folder)


@pytest.mark.parametrize("jobs", [0, -1])
def test_a_sweep_has_a_job_at_least(tmp_path, listops_dir, jobs):
    path = write_config(tmp_path, listops_dir)
    assert_refused(run_cli("--config", path, "--jobs", jobs, cwd=tmp_path), f"--jobs {jobs}")


# Examples


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (75, True), (143, True)])
def test_the_slurm_job_queues_itself_again_when_it_was_cut(tmp_path, status, requeued):
    for name, body in {
        "srun": f'echo "$@" > {tmp_path}/srun.txt; exit {status}',
        "scontrol": f'echo "$@" > {tmp_path}/scontrol.txt',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    result = subprocess.run(
        ["bash", ROOT / "examples/slurm.sh", "configs/text.yaml", "run_name=a b"], cwd=ROOT,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"},
    )
    assert (tmp_path / "scontrol.txt").exists() == requeued
    assert result.returncode == (0 if requeued else status)
    _, script, *arguments = (tmp_path / "srun.txt").read_text().split()
    assert script == "run_train.py" and "--resume" in arguments
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"


def test_the_wandb_sweep_starts_runs_of_ours(tmp_path):
    """As W&B's agent puts the command together, with a `python` that only tells its arguments."""
    sweep = yaml.safe_load((ROOT / "examples/wandb_sweep.yaml").read_text())
    assert sweep["metric"]["name"] == "val_accuracy"  # a key of the runs' log
    assert set(sweep["parameters"]) <= set(Config.model_fields)
    values = {
        name: p["values"][0] if "values" in p else float(p["min"])
        for name, p in sweep["parameters"].items()
    }
    *command, macro = sweep["command"]
    assert macro == "${args_no_hyphens}"
    teller = tmp_path / "python"
    teller.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    teller.chmod(0o755)
    told = subprocess.run(
        [*command, *(f"{name}={value}" for name, value in values.items())],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "12345678"},
        cwd=ROOT, capture_output=True, text=True, check=True,
    )
    script, option, path, *overrides = json.loads(told.stdout)
    assert (script, option) == ("run_train.py", "--config")
    (config,), _ = load_runs(ROOT / path, overrides)
    assert config.wandb and config.run_name == "sweep_12345678"
    assert {name: getattr(config, name) for name in values} == values
    assert read_mapping(ROOT / path)["run_name"] != config.run_name
