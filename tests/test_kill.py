"""Thirty kills of one run: every one is resumed, and the end is that of an unbroken run."""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import TINY, run_cli, start_process, wait_for
from test_train import assert_same_outcome

from data.listops import generate_listops
from lra_config import dump_config, load_config, make_config
from run import checkpoint
from run.log import read_metrics

KILLS = 30
SEED = 0
# Long enough that the run is not over before the last kill.
STEPS = 1500


def write_config(folder: Path) -> Path:
    generate_listops(
        folder / "datasets", seed=0, train=400, val=200, test=20, workers=1, min_length=9,
        max_length=41,
    )
    values = {
        **TINY, "data_dir": str(folder / "datasets"), "output_dir": str(folder), "dim": 32,
        "ffn_dim": 64, "batch_size": 4, "num_segments": 2, "dropout": 0.1, "max_steps": STEPS,
        "log_interval": 5, "eval_interval": 25, "checkpoint_interval": 7,
    }
    path = folder / "config.yaml"
    path.write_text(dump_config(make_config(values)), encoding="utf-8")
    return path


def last_step(folder: Path) -> int:
    try:
        return max((row["step"] for row in read_metrics(folder)), default=0)
    except FileNotFoundError:
        return 0


def evaluating(folder: Path) -> bool:
    """The line of training before an evaluation is there, that of the evaluation is not."""
    try:
        row = read_metrics(folder)[-1]
    except (FileNotFoundError, IndexError):
        return False
    return row["step"] % 25 == 0 and "val_loss" not in row


def kill(process: subprocess.Popen, folder: Path, moments: random.Random) -> str:
    """Kill the process at a random moment of a random kind; return what it hit."""
    kind = moments.choice(["start", "step", "step", "checkpoint", "evaluation"])
    if kind == "start":
        time.sleep(moments.uniform(0.5, 4.0))
    else:
        goal = last_step(folder) + moments.randrange(5, 40)
        wait_for(process, lambda: last_step(folder) >= goal)
    if kind == "step":
        time.sleep(moments.uniform(0, 0.1))
    elif kind == "checkpoint":
        wait_for(process, lambda: any(folder.glob("*.pt.part")))
    elif kind == "evaluation":
        wait_for(process, lambda: evaluating(folder))
        time.sleep(moments.uniform(0, 0.01))
    if process.poll() is not None:
        pytest.fail(f"the run ended before it was killed: {process.stderr.read()}")
    process.kill()
    process.communicate()
    if any(folder.glob("*.part")):
        return "while a file was written"
    if evaluating(folder):
        return "during an evaluation"
    return "before the first step" if kind == "start" else "between"


def assert_nothing_is_damaged(folder: Path) -> None:
    for path in folder.glob("*.pt"):
        state = checkpoint.load(path)
        assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())
    if (folder / "config.yaml").exists():
        load_config(folder / "config.yaml")
    if (folder / "metrics.jsonl").exists():
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        assert len(read_metrics(folder)) >= len(lines) - 1  # the last one may be cut short


@pytest.mark.slow
def test_thirty_kills_leave_no_trace(tmp_path):
    config = write_config(tmp_path)
    run_cli("--config", str(config), "run_name=whole", cwd=tmp_path, check=True)

    moments, hits, folder = random.Random(SEED), Counter(), tmp_path / "killed"
    command = ["--config", str(config), "run_name=killed", "--resume"]
    for number in range(1, KILLS + 1):
        process = start_process(
            "run_train.py", *command, cwd=tmp_path, stdout=subprocess.DEVNULL
        )
        hit = kill(process, folder, moments)
        hits[hit] += 1
        print(f"kill {number}: step {last_step(folder)}, {hit}")
        assert_nothing_is_damaged(folder)
    print(f"{KILLS} kills: {dict(hits)}")
    assert hits["while a file was written"] and hits["during an evaluation"]

    last = run_cli(*command, cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    assert_same_outcome(folder, tmp_path / "whole")
    best, whole = (checkpoint.load(f / "best.pt") for f in (folder, tmp_path / "whole"))
    assert best["step"] == whole["step"] and best["val_accuracy"] == whole["val_accuracy"]
    assert not list(folder.glob("*.part"))
