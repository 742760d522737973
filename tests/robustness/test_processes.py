"""Two processes of one run: when one is lost, the other ends with one line."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
from conftest import assert_refused, finished, start_process, wait_for, write_config
from test_distributed import free_port

from run import checkpoint

TIMEOUT = 5  # seconds, `process_timeout`


def two_processes(config: Path, cwd: Path) -> list[subprocess.Popen]:
    """Both processes of a run, without a launcher that would end one for the other."""
    shared = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        start_process(
            "run_train.py", "--config", config, cwd=cwd,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]


@pytest.mark.parametrize(("lost", "loss"), [
    pytest.param(0, signal.SIGKILL, id="first killed"),
    pytest.param(1, signal.SIGSTOP, id="second stopped"),
    pytest.param(1, signal.SIGKILL, id="second killed", marks=pytest.mark.slow),
    pytest.param(0, signal.SIGSTOP, id="first stopped", marks=pytest.mark.slow),
])
def test_a_process_that_is_left_alone_ends_with_one_line(tmp_path, listops_dir, loss, lost):
    config = write_config(
        tmp_path, listops_dir, max_steps=10**6, process_timeout=TIMEOUT, checkpoint_interval=2,
    )
    processes = two_processes(config, tmp_path)
    left, gone = processes[1 - lost], processes[lost]
    try:
        wait_for(left, (tmp_path / "runs/run/last.pt").exists)
        gone.send_signal(loss)
        assert_refused(finished(left), "no longer meet", "--resume")
    finally:
        gone.kill()
        gone.communicate()
    assert checkpoint.load(tmp_path / "runs/run/last.pt")["progress"]["step"] > 0


def test_a_process_whose_fellow_never_comes_ends_with_one_line(tmp_path, listops_dir):
    config = write_config(tmp_path, listops_dir, process_timeout=1)
    first, second = two_processes(config, tmp_path)
    second.kill()
    second.communicate()
    assert_refused(finished(first), "no longer meet")
    assert not (tmp_path / "runs").exists()
