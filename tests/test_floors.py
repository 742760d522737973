"""Modules import downwards only; `tach.toml` defines the import layers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

TACH = Path(sys.executable).with_name("tach")


def tach_check(folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run([str(TACH), "check"], cwd=folder, capture_output=True, text=True)


def copy_of_the_code(folder: Path) -> Path:
    ignored = shutil.ignore_patterns(".*", "datasets", "runs", "results", "__pycache__")
    return Path(shutil.copytree(ROOT, folder / "house", ignore=ignored))


def test_imports_run_downwards():
    check = tach_check(ROOT)
    assert check.returncode == 0, check.stdout + check.stderr


def test_an_import_that_runs_upwards_is_found(tmp_path):
    house = copy_of_the_code(tmp_path)
    with open(house / "run" / "checkpoint.py", "a") as handle:
        handle.write("\nimport model\n")
    check = tach_check(house)
    assert check.returncode != 0
    assert "run/checkpoint.py" in check.stdout + check.stderr


def test_every_module_has_a_layer(tmp_path):
    house = copy_of_the_code(tmp_path)
    (house / "homeless.py").write_text("import model\n")
    assert tach_check(house).returncode != 0


def test_the_command_line_answers_without_torch():
    """A configuration is refused before the libraries for training are loaded."""
    heavy = ("torch", "wandb", "matplotlib", "huggingface_hub", "scipy")
    program = (
        "import sys, run_train; sys.argv = ['run_train.py', '--config', 'none.yaml']; "
        f"status = run_train.main(); print([m for m in {heavy!r} if m in sys.modules], status)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert answer.stdout.strip() == "[] 2", answer.stderr
