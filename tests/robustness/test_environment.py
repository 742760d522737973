"""The environment: streams, variables, folders and disks that are not as a command needs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    assert_refused,
    called,
    finished,
    run_cli,
    start_process,
    write_config,
)

import run_train
from run.program import open_standard_streams

EXPRESSION = "[MAX 2 9 [MIN 4 7 ] 0 ]\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, listops_dir) -> Path:
    """A folder with `tiny.yaml` and the finished run `runs/run`."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_config(folder, listops_dir)
    run_cli("--config", path, cwd=folder, check=True)
    return folder


# Standard streams


def test_a_training_whose_output_nobody_reads_goes_on(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir)
    process = start_process("run_train.py", "--config", path, cwd=tmp_path)
    process.stdout.close()  # as `| head -0` does
    process.stdout = None
    result = finished(process)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "standard output: Broken pipe; the run goes on without\n"
    assert (tmp_path / "runs/run/summary.json").exists()


PREDICT = ["--checkpoint", "runs/run/best.pt", "--predict"]


def shell(command: str, cwd: Path) -> subprocess.CompletedProcess:
    """A command line with redirections; `rmaat` is the program."""
    function = f"rmaat() {{ '{sys.executable}' '{ROOT / 'run_train.py'}' \"$@\"; }}\n"
    return subprocess.run(
        ["bash", "-c", function + command], cwd=cwd, text=True, capture_output=True,
    )


def test_results_that_cannot_be_written_are_an_error(trained):
    (trained / "input.txt").write_text(EXPRESSION * 200)
    predict = "rmaat --checkpoint runs/run/best.pt --predict"
    assert_refused(shell(f"{predict} input.txt >&-", trained), "standard output")
    assert_refused(shell(f"{predict} - <&-", trained), "standard input")
    result = shell(f"{predict} input.txt | head -1; exit ${{PIPESTATUS[0]}}", trained)
    assert (result.returncode, result.stderr) == (0, "")  # the reader has had enough


def test_closed_streams_never_become_files(tmp_path):
    """A file opened next would have the number of the closed stream, and get what is printed."""
    program = (
        "import os, sys\nsys.path.insert(0, sys.argv[1])\n"
        "from run.program import open_standard_streams\nopen_standard_streams()\n"
        "handle = open('file', 'w')\nassert handle.fileno() > 2\nprint('lost', file=sys.stderr)\n"
    )
    command = f"{sys.executable} -c \"{program}\" {ROOT} <&- >&- 2>&-"
    assert shell(command, tmp_path).returncode == 0
    assert (tmp_path / "file").read_text() == ""


def test_an_encoding_that_lacks_a_letter_shows_its_code(tmp_path):
    program = "from run.program import *; open_standard_streams(); log_line('\\u8a9e')"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (result.stdout, result.stderr) == ("\\u8a9e\n", "")
    open_standard_streams()  # harmless to open ones


def test_an_empty_name_of_a_file_to_predict_trains_nothing(trained):
    result = run_cli("--config", "tiny.yaml", "--predict", "", cwd=trained)
    assert_refused(result, "--predict names no file")


# Variables of a launcher


@pytest.mark.parametrize(("variables", "words"), [
    ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2 without RANK"]),
    ({"WORLD_SIZE": "x"}, ["WORLD_SIZE='x'", "torchrun"]),
    ({"WORLD_SIZE": "0"}, ["WORLD_SIZE='0'"]),
    ({"WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE='999"]),
    ({"WORLD_SIZE": "2", "RANK": "x"}, ["RANK='x'"]),
    ({"WORLD_SIZE": "2", "RANK": "2"}, ["RANK=2", "of 2 processes"]),
    ({"WORLD_SIZE": "2", "RANK": "\x1b[2J"}, [r"RANK='\x1b[2J'"]),
    ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "-1"}, ["LOCAL_RANK='-1'"]),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "http"}, ["MASTER_PORT='http'"]),
], ids=str)
def test_an_environment_that_no_launcher_leaves_is_named(
    tmp_path, listops_dir, monkeypatch, variables, words
):
    launched = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "29500"}
    if len(variables) > 1:
        variables = {**launched, "MASTER_ADDR": "127.0.0.1", **variables}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    path = write_config(tmp_path, listops_dir)
    assert_refused(called(run_train.main, "--config", path, cwd=tmp_path), *words)
    assert not (tmp_path / "runs").exists()


def test_a_rank_without_a_launcher_is_nobodys(tmp_path, listops_dir, monkeypatch):
    monkeypatch.setenv("RANK", "x")
    path = write_config(tmp_path, listops_dir, stop_after_steps=1)
    assert "test_acc" in run_cli("--config", path, cwd=tmp_path, check=True).stdout


# Folders and memory


def test_a_home_that_cannot_be_written_is_not_needed(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir, stop_after_steps=1)
    result = shell(f"HOME=/proc/1 rmaat --config {path}", tmp_path)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(("output_dir", "words"), [
    ("/proc/runs", ["/proc/runs"]), ("tiny.yaml", ["tiny.yaml"]), ("a" * 300, ["aaa", "too long"]),
])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, listops_dir, output_dir, words):
    write_config(tmp_path, listops_dir)
    result = run_cli("--config", "tiny.yaml", f"output_dir={output_dir}", cwd=tmp_path)
    assert_refused(result, *words)
    assert os.listdir(tmp_path) == ["tiny.yaml"]


@pytest.mark.parametrize("work", [
    lambda: torch.empty(2**60, dtype=torch.uint8), lambda: np.empty(2**60, dtype=np.uint8),
], ids=["torch", "numpy"])
def test_memory_that_cannot_be_had_is_told_in_one_line(tmp_path, monkeypatch, work):
    monkeypatch.setattr(run_train, "checked_command", lambda _: (work, 1.0))
    result = called(run_train.main, cwd=tmp_path)
    assert_refused(result, "allocate", "lower batch_size")
