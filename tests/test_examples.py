"""The examples run by the commands in their docstrings, from any folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, assert_refused, finished, run_script, start_process

EXAMPLES = ROOT / "examples"
QUICK = ["--config", EXAMPLES / "own_dataset.yaml", "device=cpu", "max_steps=3", "warmup_steps=1",
         "eval_interval=3", "dim=16", "num_layers=1"]


def own_dataset(*arguments: object, cwd) -> object:
    return finished(start_process("examples/own_dataset.py", *arguments, cwd=cwd))


def test_a_custom_data_set_is_swept_and_predicted(tmp_path):
    result = own_dataset(*QUICK, "seed=0,1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "runs/own_seed1/summary.json").read_text())
    assert summary["examples"] == {"train": 1600, "val": 200, "test": 200}
    assert (summary["dataset"], summary["data"]) == ("own", "own")
    (tmp_path / "texts").write_text("abc?\nabc!\n")
    result = own_dataset(
        "--checkpoint", "runs/own_seed0/best.pt", "--predict", "texts", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2


@pytest.mark.parametrize(("content", "words"), [
    ("text,label\nabc,asks\nabc,shouts\n", ["examples.csv row 3", "asks, states"]),
    ("words,label\nabc,asks\n", ["examples.csv row 2"]),
    ("text,label\nabc\xff,asks\n" + "d" * 200_000 + ",states\n,asks\n", ["examples.csv row 4"]),
])
def test_a_wrong_row_of_the_file_is_named(tmp_path, content, words):
    file = tmp_path / "datasets/own/examples.csv"
    file.parent.mkdir(parents=True)
    file.write_text(content, encoding="latin-1")
    assert_refused(own_dataset(*QUICK, cwd=tmp_path), *words)


def test_a_custom_model_trains_by_amrb_and_needs_its_memory(tmp_path):
    result = run_script("examples/own_model.py", "--steps", 60, cwd=tmp_path, check=True)
    difference = re.search(r"gradients differ by (\S+) of their norm", result.stdout)
    assert float(difference[1]) < 1e-5
    accuracy = re.search(r"test accuracy (\S+), chance 0.250", result.stdout)
    assert float(accuracy[1]) > 0.5


@pytest.mark.parametrize("foreign", ["utils.py", "data/__init__.py", "model.py"])
def test_a_foreign_module_that_hides_ours_is_named_with_ours(tmp_path, foreign):
    (tmp_path / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / foreign).write_text("")
    (tmp_path / "program.py").write_text("from train import train\n")
    result = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )
    line = result.stderr.splitlines()[-1]
    assert str(tmp_path / foreign) in line and str(ROOT) in line


def test_a_program_with_its_own_model_may_import_the_attention(tmp_path):
    (tmp_path / "model.py").write_text("from attention import AstromorphicAttention\n")
    result = subprocess.run(
        [sys.executable, "model.py"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0
