"""A run's folder has one writer; after a kill or a signal the resumed run equals a full one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    assert_refused,
    finished,
    run_cli,
    start_process,
    tiny_config,
    wait_for,
    write_config,
)
from test_distributed import free_port
from test_train import assert_same_outcome

import train as train_module
from run import checkpoint
from run.checkpoint import claimed
from run.files import locked
from run.program import UserError
from train import train

HOLD = "import sys\nfrom run.files import locked\nwith locked(sys.argv[1], 'works there'):\n" \
       "    print('held', flush=True)\n    sys.stdin.read()\n"


def holder(path: Path) -> subprocess.Popen:
    """Start a process that holds the lock until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == "held\n"
    return process


# One writer


def test_a_second_run_in_a_folder_is_refused_and_names_the_first(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir)
    (tmp_path / "runs/run").mkdir(parents=True)
    other = holder(tmp_path / "runs/run/run.lock")
    for extra in ([], ["--resume"]):
        result = run_cli("--config", path, *extra, cwd=tmp_path)
        assert_refused(result, f"process {other.pid} on", "set another run_name")
    assert os.listdir(tmp_path / "runs/run") == ["run.lock"]
    other.kill()  # without cleaning up: the operating system releases the lock
    other.wait()
    assert run_cli("--config", path, cwd=tmp_path).returncode == 0
    assert not (tmp_path / "runs/run/run.lock").exists()


def test_a_waiting_process_gets_the_lock_when_its_holder_ends(tmp_path, capsys):
    path = tmp_path / "lock"
    other = holder(path)
    threading.Timer(0.2, other.stdin.close).start()
    with locked(path, "works there", wait=True):
        assert other.wait(timeout=30) == 0 and path.exists()
        with pytest.raises(UserError), locked(path, "works there"):
            pass
    assert not path.exists()
    assert capsys.readouterr().out.count(f"process {other.pid} on") == 1


def test_half_written_files_of_killed_processes_are_removed(tmp_path):
    (tmp_path / "last.pt.part").write_bytes(b"half")
    (tmp_path / "last.pt").write_bytes(b"complete")
    with claimed(tmp_path):
        assert sorted(os.listdir(tmp_path)) == ["last.pt", "run.lock"]


# Kills and signals


def config_of(tmp_path: Path, listops_dir: Path, name: str, **changes):
    return tiny_config(
        data_dir=str(listops_dir), output_dir=str(tmp_path), run_name=name, dropout=0.1, **changes
    )


def test_a_killed_run_resumes_to_the_same_end(tmp_path, listops_dir):
    changes = {"max_steps": 60, "checkpoint_interval": 3}
    train(config_of(tmp_path, listops_dir, "full", **changes))
    path = write_config(
        tmp_path, listops_dir, output_dir=str(tmp_path), dropout=0.1, **changes
    )
    log = tmp_path / "run/metrics.jsonl"

    def rows() -> int:
        return len(log.read_bytes().splitlines()) if log.exists() else 0

    for goal in (8, 21):
        process = start_process("run_train.py", "--config", path, "--resume", cwd=tmp_path)
        wait_for(process, lambda goal=goal: rows() > goal)
        process.kill()
        process.communicate()
        checkpoint.load(tmp_path / "run/last.pt")
    assert run_cli("--config", path, "--resume", cwd=tmp_path).returncode == 0
    assert_same_outcome(tmp_path / "run", tmp_path / "full")
    assert not [*(tmp_path / "run").glob("*.part"), *(tmp_path / "run").glob("*.lock")]


@pytest.mark.parametrize(
    ("evaluation", "early"), [(0, False), (0, True), (2, False), (3, False)],
    ids=["validation", "before its first batch", "last validation", "test"],
)
def test_a_signal_ends_an_evaluation_and_the_resumed_run_repeats_it(
    tmp_path, listops_dir, monkeypatch, evaluation, early
):
    train(config_of(tmp_path, listops_dir, "full"))
    evaluate, calls = train_module.evaluate, []

    def interrupted(model, batches, *arguments, **options):
        calls.append(0)

        def counted():
            for batch in batches:
                calls[-1] += 1
                if len(calls) == evaluation + 1 and not early:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        if early and len(calls) == evaluation + 1:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(model, counted(), *arguments, **options)

    config = config_of(tmp_path, listops_dir, "cut")
    monkeypatch.setattr(train_module, "evaluate", interrupted)
    with pytest.raises(UserError, match=r"SIGTERM at step .*go on with --resume") as caught:
        train(config)
    assert caught.value.exit_status == 143
    assert calls[-1] == 1  # of three batches
    monkeypatch.undo()
    train(config, resume=True)
    assert_same_outcome(tmp_path / "cut", tmp_path / "full")


def struck(monkeypatch, call: int, *numbers: int) -> None:
    """Send the signals within that call of the backward pass."""
    backward, calls = train_module.amrb_backward, []

    def replacement(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            for number in numbers:
                signal.raise_signal(number)
        return backward(*arguments, **options)

    monkeypatch.setattr(train_module, "amrb_backward", replacement)


@pytest.mark.parametrize("step", [0, 4])
def test_a_signal_within_a_step_changes_nothing_for_the_resumed_run(
    tmp_path, listops_dir, monkeypatch, step
):
    changes = {"accumulate": 3, "readout_norm": "batch"}  # statistics change with each batch
    train(config_of(tmp_path, listops_dir, "full", **changes))
    config = config_of(tmp_path, listops_dir, "cut", **changes)
    struck(monkeypatch, 3 * step + 2, signal.SIGTERM)
    with pytest.raises(UserError, match="SIGTERM at step"):
        train(config)
    monkeypatch.undo()
    train(config, resume=True)
    assert_same_outcome(tmp_path / "cut", tmp_path / "full")


def test_a_second_signal_ends_at_once_and_harms_no_checkpoint(tmp_path, listops_dir, monkeypatch):
    train(config_of(tmp_path, listops_dir, "full"))
    config = config_of(tmp_path, listops_dir, "run")
    struck(monkeypatch, 7, signal.SIGINT, signal.SIGINT)
    # As the commands do; a shell's background processes ignore SIGINT.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config)
    finally:
        signal.signal(signal.SIGINT, handler)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "run/last.pt")["progress"]["step"] == 4
    train(config, resume=True)
    assert_same_outcome(tmp_path / "run", tmp_path / "full")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_torch_is_imported_is_one_line(tmp_path, number):
    program = (
        "import os, runpy, sys\n"
        "class Struck:\n"
        "    def find_spec(name, path, target):\n"
        f"        if name == 'torch': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Struck)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / 'run_train.py')!r}, run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "--config", str(ROOT / "configs/quickstart.yaml")],
        cwd=tmp_path, text=True, capture_output=True,
    )
    assert result.returncode == 128 + number
    assert result.stderr in ("run_train.py: interrupted\n", "run_train.py: terminated\n")


# Several processes


def test_the_others_end_with_one_line_when_a_process_is_killed(tmp_path, listops_dir):
    config = write_config(tmp_path, listops_dir, max_steps=10**6, checkpoint_interval=2)
    shared = {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    first, second = (
        start_process(
            "run_train.py", "--config", config, cwd=tmp_path,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    )
    wait_for(first, (tmp_path / "runs/run/last.pt").exists)
    second.kill()
    second.communicate()
    assert_refused(finished(first), "no longer meet", "--resume")
    assert checkpoint.load(tmp_path / "runs/run/last.pt")["progress"]["step"] > 0


# Output


def test_a_reader_that_closes_the_pipe_ends_predictions_quietly(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir, stop_after_steps=1)
    run_cli("--config", path, cwd=tmp_path, check=True)
    (tmp_path / "input.txt").write_text("[MAX 2 9 [MIN 4 7 ] 0 ]\n" * 2000)
    command = f"'{sys.executable}' '{ROOT / 'run_train.py'}' --checkpoint runs/run/best.pt " \
              "--predict input.txt | head -1; exit ${PIPESTATUS[0]}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, text=True, capture_output=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_training_whose_output_is_no_longer_read_goes_on(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir)
    process = start_process("run_train.py", "--config", path, cwd=tmp_path)
    process.stdout.close()
    process.stdout = None
    result = finished(process)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "runs/run/summary.json").exists()
