"""Several processes or accumulation take the steps of one process with the full batch."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import TINY, largest_difference, start_process, tiny_config, wait_for

from lra_config import Config, ConfigError, dump_config, make_config
from run import checkpoint
from run.log import read_metrics
from run.processes import joined_processes
from train import prepare, train, train_step

GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4
STEPS = 20


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def config_of(data_dir: Path, folder: Path, name: str, **changes) -> Config:
    return tiny_config(
        data_dir=str(data_dir), output_dir=str(folder), run_name=name, max_steps=STEPS,
        bucket_by_length=True, eval_interval=10, checkpoint_interval=5, **changes,
    )


def first_gradients(config: Config, path: Path) -> None:
    trainer = prepare(config, resume=False)
    train_step(trainer)
    if trainer.processes.is_first:
        torch.save({n: p.grad for n, p in trainer.model.named_parameters()}, path)


def first_gradients_of_one_rank(rank: int, port: int, runs: list[tuple[Config, Path]]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    with joined_processes():
        for config, path in runs:
            first_gradients(config, path)
    # A gloo thread that outlives the interpreter sometimes aborts it.
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads


def test_two_processes_of_half_the_batch_have_the_gradients_of_one(listops_dir, tmp_path):
    def runs(name: str, batch_size: int) -> list[tuple[Config, Path]]:
        return [
            (config_of(listops_dir, tmp_path, f"{name}_{backward}", batch_size=batch_size,
                       grad_clip=0.0, memory_replay_backprop=backward == "amrb"),
             tmp_path / f"{name}_{backward}.pt")
            for backward in ("amrb", "bptt")
        ]

    alone, shared = runs("one", 8), runs("two", 4)
    for config, path in alone:
        first_gradients(config, path)
    mp.spawn(first_gradients_of_one_rank, (free_port(), shared), nprocs=2)
    for (_, one), (_, two) in zip(alone, shared, strict=True):
        assert largest_difference(torch.load(two), torch.load(one)) <= GRADIENT_TOLERANCE, two.name


def test_accumulated_batches_have_the_gradients_of_one(listops_dir, tmp_path):
    for name, changes in (
        ("one", {"batch_size": 8}), ("four", {"batch_size": 2, "accumulate": 4}),
    ):
        config = config_of(listops_dir, tmp_path, name, grad_clip=0.0, **changes)
        first_gradients(config, tmp_path / f"{name}.pt")
    one, four = (torch.load(tmp_path / f"{name}.pt") for name in ("one", "four"))
    assert largest_difference(four, one) <= GRADIENT_TOLERANCE


def run_in_processes(count: int, *arguments: object, cwd: Path) -> subprocess.Popen:
    """Run `run_train.py` under torchrun."""
    launcher = [
        "-m", "torch.distributed.run", f"--nproc_per_node={count}",
        f"--master_port={free_port()}",
    ]
    return start_process("run_train.py", *arguments, cwd=cwd, launcher=launcher)


@pytest.fixture(scope="module")
def one_process(listops_dir, tmp_path_factory) -> Path:
    """Return the folder of a run of one process, batch 8."""
    folder = tmp_path_factory.mktemp("one")
    train(config_of(listops_dir, folder, "run", batch_size=8))
    return folder / "run"


def assert_follows(folder: Path, one: Path) -> None:
    """Assert that the run in `folder` has the weights and metrics of the run `one`."""
    weights, expected = (checkpoint.load(f / "last.pt")["model"] for f in (folder, one))
    assert largest_difference(weights, expected) <= WEIGHT_TOLERANCE
    rows, expected_rows = read_metrics(folder), read_metrics(one)
    assert [row["step"] for row in rows] == [row["step"] for row in expected_rows]
    for row, other in zip(rows, expected_rows, strict=True):
        for key in row.keys() & {"loss", "accuracy", "val_loss", "val_accuracy"}:
            assert row[key] == pytest.approx(other[key], rel=1e-3), (row, other)


def test_torchrun_follows_one_process(listops_dir, one_process, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config_of(listops_dir, tmp_path, "run", batch_size=4)))
    # Interrupted by its own shorter length, then resumed, as a user would.
    for extra in (["stop_after_steps=10"], ["--resume"]):
        process = run_in_processes(2, "--config", path, *extra, cwd=tmp_path)
        output, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
        assert output.count("test_acc") == 1
    assert_follows(tmp_path / "run", one_process)
    with pytest.raises(ConfigError, match="2 processes"):
        prepare(config_of(listops_dir, tmp_path, "run", batch_size=4), resume=True)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["processes"] == 2 and summary["examples"]["test"] == 20
    expected = json.loads((one_process / "summary.json").read_text())
    assert summary["test_accuracy"] == pytest.approx(expected["test_accuracy"])


def test_a_signal_to_torchrun_saves_one_checkpoint(listops_dir, tmp_path):
    config = make_config({
        **TINY, "data_dir": str(listops_dir), "output_dir": str(tmp_path), "run_name": "run",
        "max_steps": 100_000, "checkpoint_interval": 100_000, "eval_interval": 100_000,
    })
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    process = run_in_processes(2, "--config", path, cwd=tmp_path)
    wait_for(process, (tmp_path / "run" / "metrics.jsonl").exists)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("checkpoint saved") == 1
    assert checkpoint.load(tmp_path / "run" / "last.pt")["progress"]["step"] > 0


def test_a_mistake_is_reported_once_by_all_processes(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(f"dataset: aan\ndata_dir: {tmp_path}\n")
    process = run_in_processes(2, "--config", path, cwd=tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("new_aan_pairs") == 1
