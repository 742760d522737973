"""The examples for clusters: SLURM and W&B sweeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from lra_config import Config, read_mapping
from sweep import load_runs


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (2, False), (143, True)])
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
    words = (tmp_path / "srun.txt").read_text().split()
    assert words[0] == "timeout" and {"run_train.py", "--resume"} <= set(words)
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"


def test_the_wandb_sweep_starts_our_runs(tmp_path):
    """W&B's agent builds the command; `python` is a stub that prints its arguments."""
    sweep = yaml.safe_load((ROOT / "examples/wandb_sweep.yaml").read_text())
    assert sweep["metric"]["name"] == "val_accuracy"  # a key of the runs' log
    assert set(sweep["parameters"]) <= set(Config.model_fields)
    values = {
        name: p["values"][0] if "values" in p else float(p["min"])
        for name, p in sweep["parameters"].items()
    }
    *command, macro = sweep["command"]
    assert macro == "${args_no_hyphens}"
    printer = tmp_path / "python"
    printer.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    printer.chmod(0o755)
    printed = subprocess.run(
        [*command, *(f"{name}={value}" for name, value in values.items())],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "12345678"},
        cwd=ROOT, capture_output=True, text=True, check=True,
    )
    script, option, path, *overrides = json.loads(printed.stdout)
    assert (script, option) == ("run_train.py", "--config")
    (config,), _ = load_runs(ROOT / path, overrides)
    assert config.wandb and config.run_name == "sweep_12345678"
    assert {name: getattr(config, name) for name in values} == values
    assert read_mapping(ROOT / path)["run_name"] != config.run_name
