"""A run's folder: one process at a time, nothing left of killed ones, garbage told in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, assert_refused, run_cli, tiny_config, write_config
from test_train import assert_same_outcome

import train as train_module
from run import checkpoint
from run.files import Held, locked, remove_stale
from run.state import Interrupted, claimed
from train import train

HOLD = "import sys\nfrom run.files import locked\nwith locked(sys.argv[1], 'works there'):\n" \
       "    print('held', flush=True)\n    sys.stdin.read()\n"


def holder(path: Path) -> subprocess.Popen:
    """Another process that holds the lock until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == "held\n"
    return process


# One process at a time


def test_a_second_run_in_a_folder_says_who_is_there(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir)
    (tmp_path / "runs/run").mkdir(parents=True)
    other = holder(tmp_path / "runs/run/run.lock")
    for extra in ([], ["--resume"]):
        result = run_cli("--config", path, *extra, cwd=tmp_path)
        assert_refused(result, f"process {other.pid} on", "set another run_name")
    assert os.listdir(tmp_path / "runs/run") == ["run.lock"]
    other.kill()  # no clean-up: the operating system gives the lock back
    other.wait()
    assert run_cli("--config", path, cwd=tmp_path).returncode == 0
    assert not (tmp_path / "runs/run/run.lock").exists()


def test_a_waiting_process_gets_the_lock_when_its_holder_ends(tmp_path, capsys):
    path = tmp_path / "lock"
    other = holder(path)
    end = threading.Timer(0.2, other.stdin.close)
    end.start()
    with locked(path, "works there", wait=True):
        assert other.wait(timeout=30) == 0  # removed by its holder, and made anew
        assert path.exists()
        with pytest.raises(Held):
            with locked(path, "works there"):
                pass
    assert not path.exists()
    assert capsys.readouterr().out.count(f"process {other.pid} on") == 1


def test_a_claimed_folder_in_which_nothing_was_written_is_gone(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "runs/run"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_what_killed_processes_left_half_done_is_removed(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "last.pt.part").write_bytes(b"half")
    (run / "last.pt").write_bytes(b"whole")
    with claimed(run):
        assert sorted(os.listdir(run)) == ["last.pt", "run.lock"]
    cache = tmp_path / "cache"
    for name in ("dead.part", "alive.part"):
        (cache / name).mkdir(parents=True)
    other = holder(cache / "alive.lock")
    remove_stale(cache)
    assert sorted(os.listdir(cache)) == ["alive.lock", "alive.part"]
    other.communicate()


# Signals


def config_of(tmp_path: Path, listops_dir: Path, name: str, **changes):
    return tiny_config(
        data_dir=str(listops_dir), output_dir=str(tmp_path), run_name=name, dropout=0.1, **changes
    )


@pytest.mark.parametrize(("evaluation", "step"), [(0, 5), (2, 12), (3, 12)],
                         ids=["validation", "last validation", "test"])
def test_a_signal_ends_an_evaluation_and_the_resumed_run_makes_up_for_it(
    tmp_path, listops_dir, monkeypatch, evaluation, step
):
    train(config_of(tmp_path, listops_dir, "whole"))
    evaluate, calls = train_module.evaluate, []

    def interrupted(model, batches, *arguments):
        calls.append(0)

        def counted():
            for batch in batches:
                calls[-1] += 1
                if len(calls) == evaluation + 1:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

        return evaluate(model, counted(), *arguments)

    config = config_of(tmp_path, listops_dir, "cut")
    monkeypatch.setattr(train_module, "evaluate", interrupted)
    with pytest.raises(Interrupted, match=f"SIGTERM at step {step}") as caught:
        train(config)
    assert caught.value.exit_status == 143
    assert calls[-1] == 1  # of three batches
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "cut/last.pt")["progress"]["step"] == step
    train(config, resume=True)
    assert_same_outcome(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("step", [0, 4])
def test_a_signal_between_two_batches_of_a_step_leaves_nothing_of_it(
    tmp_path, listops_dir, monkeypatch, step
):
    changes = {"accumulate": 3, "readout_norm": "batch"}  # statistics that each batch changes
    backward, calls = train_module.amrb_backward, []

    def struck(model, batch, *arguments, **options):
        calls.append(1)
        if len(calls) == 3 * step + 2:
            signal.raise_signal(signal.SIGTERM)
        return backward(model, batch, *arguments, **options)

    train(config_of(tmp_path, listops_dir, "whole", **changes))
    config = config_of(tmp_path, listops_dir, "cut", **changes)
    monkeypatch.setattr(train_module, "amrb_backward", struck)
    with pytest.raises(Interrupted, match=f"SIGTERM at step {step}"):
        train(config)
    assert len(calls) == 3 * step + 2
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "cut/last.pt")["progress"]["step"] == step
    train(config, resume=True)
    assert_same_outcome(tmp_path / "cut", tmp_path / "whole")


def test_a_second_signal_ends_at_once_and_harms_no_checkpoint(tmp_path, listops_dir, monkeypatch):
    config = config_of(tmp_path, listops_dir, "run")
    train(config_of(tmp_path, listops_dir, "whole"))
    backward, calls = train_module.amrb_backward, []

    def struck(model, batch, *arguments, **options):
        calls.append(1)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("the second signal was held back")
        return backward(model, batch, *arguments, **options)

    monkeypatch.setattr(train_module, "amrb_backward", struck)
    # As commands do: what a shell starts in the background ignores SIGINT.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config)
    finally:
        signal.signal(signal.SIGINT, handler)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "run/last.pt")["progress"]["step"] == 4
    train(config, resume=True)
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("library", ["pydantic", "numpy"])
def test_a_signal_while_libraries_load_is_one_line(tmp_path, number, library):
    program = (
        "import os, runpy, sys\n"
        "class Struck:\n"
        "    def find_spec(name, path, target):\n"
        f"        if name == {library!r}: os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Struck)\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"runpy.run_path({str(ROOT / 'run_train.py')!r}, run_name='__main__')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "--config", "none.yaml"], cwd=tmp_path, text=True,
        capture_output=True,
    )
    assert result.returncode == 128 + number
    assert result.stderr == f"run_train.py: {number.name}, nothing done yet\n"
