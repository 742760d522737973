"""Sweeps: overrides with several values become several runs, and their results one table."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

import torch

from data.packing import load_splits
from experiments.grid import value_text
from experiments.tables import markdown
from lra_config import Config
from lra_datasets import open_dataset
from run.program import UserError, caught_signals, log_line
from run.state import OUT_OF_TIME, Summary, check_unclaimed, finished, time_limit
from train import train

COLUMNS = {"test accuracy, %": "test_accuracy", "best validation accuracy, %": "best_val_accuracy"}
OUTPUT = "output.log"  # in a run's folder: what a run beside others prints
POLL_SECONDS = 0.2


class SweepStopped(UserError):
    """Of runs side by side one failed, or all were told to leave; told in one line."""

    def __init__(self, reason: str, exit_status: int) -> None:
        super().__init__(reason)
        self.exit_status = exit_status


def run_sweep(
    configs: Sequence[Config], commands: Sequence[Sequence[str]], *, resume: bool, jobs: int = 1
) -> list[Summary]:
    """Train the runs, one after the other here, or `jobs` at a time in processes of their own.

    Args:
        configs: the runs.
        commands: the arguments by which `run_train.py` trains each of them alone.
        resume: leave finished runs as they are, go on with those that were interrupted.
        jobs: at least 1; they share out the CUDA devices, or else the cores.
    Raises:
        ConfigError: without `resume`, one of the folders already holds a run.
        SweepStopped: of runs side by side the first failure ends all, as a signal does.
        What `train` raises: of runs one after the other the first failure ends the sweep.
    """
    if not resume:  # before the first run, not hours later
        for config in configs:
            check_unclaimed(config)
    stop_at = time_limit(configs[0])
    if jobs > 1:
        _train_side_by_side(configs, commands, jobs, stop_at)
        return [finished(config) for config in configs]
    summaries = []
    for number, config in enumerate(configs, start=1):
        log_line(f"run {number} of {len(configs)}: {config.run_dir}")
        summaries.append(train(config, resume=resume, stop_at=stop_at))
    return summaries


def _train_side_by_side(
    configs: Sequence[Config], commands: Sequence[Sequence[str]], jobs: int, stop_at: float
) -> None:
    """Keep `jobs` child processes training. One that fails, a signal and `stop_at` end them all."""
    waiting, running = iter(zip(configs, commands, strict=True)), {}  # slot to run and process
    with caught_signals() as received:
        try:
            while True:
                for slot in set(range(jobs)) - running.keys():
                    if (next_run := next(waiting, None)) is not None:
                        running[slot] = next_run[0], _start(*next_run, slot, jobs)
                if not running:
                    return
                time.sleep(POLL_SECONDS)
                if received:
                    raise SweepStopped("interrupted; go on with --resume", 128 + received[0])
                if time.monotonic() >= stop_at:
                    raise SweepStopped("max_minutes are over; go on with --resume", OUT_OF_TIME)
                for slot, (config, child) in list(running.items()):
                    if child.poll() is not None:
                        del running[slot]
                        _tell_end(config, child.returncode)
        finally:
            children = [child for _, child in running.values()]
            for child in children:
                child.terminate()  # it saves a checkpoint first
            for child in children:
                child.wait()


def _start(config: Config, command: Sequence[str], slot: int, jobs: int) -> subprocess.Popen:
    """Start a run that writes what it prints into its folder."""
    load_splits(open_dataset(config))  # generated and packed here, lest several do it at once
    config.run_dir.mkdir(parents=True, exist_ok=True)
    output = config.run_dir / OUTPUT
    log_line(f"{config.run_dir}: started, prints to {output}")
    with open(output, "w") as handle:
        # This program, which may have registered a data set of its own. In a session of its own: a
        # terminal's signal would reach it besides ours, and a second one ends it at once.
        return subprocess.Popen(
            [sys.executable, sys.argv[0], *command, "--resume"],
            stdout=handle, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, **_share(config, slot, jobs)},
        )


def _share(config: Config, slot: int, jobs: int) -> dict[str, str]:
    """The variables that give one of `jobs` processes a CUDA device or a part of the cores."""
    devices = torch.cuda.device_count()
    if config.device == "cpu" or not devices:
        return {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[slot % devices]}


def _tell_end(config: Config, status: int) -> None:
    """Print a finished run's result.

    Raises:
        SweepStopped: it failed.
    """
    lines = (config.run_dir / OUTPUT).read_text(errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    if status:
        raise SweepStopped(
            f"{config.run_dir}: {last.removeprefix('run_train.py: ')}",
            status if status > 0 else 128 - status,  # negative: killed by that signal
        )
    log_line(f"{config.run_dir}: {last}")


def sweep_table(
    configs: Sequence[Config], summaries: Sequence[Summary], varied: Sequence[str]
) -> str:
    """The runs as a Markdown table, and where seeds vary the means and deviations over them.

    The deviation is that of a sample (n - 1); a single run has none.
    """
    runs, groups = [], defaultdict(list)
    fixed = [key for key in varied if key != "seed"]
    for config, summary in zip(configs, summaries, strict=True):
        text = {key: value_text(getattr(config, key)) for key in varied}
        accuracies = [f"{100 * getattr(summary, name):.2f}" for name in COLUMNS.values()]
        runs.append([config.run_name, *text.values(), *accuracies])
        groups[tuple(text[key] for key in fixed)].append(summary)
    table = markdown(["run", *varied, *COLUMNS], runs, numbers=len(COLUMNS)) + "\n"
    if "seed" not in varied:
        return table
    means = [
        [*values, str(len(group)), *(
            _mean_and_deviation([100 * getattr(summary, name) for summary in group])
            for name in COLUMNS.values()
        )]
        for values, group in groups.items()
    ]
    header = [*fixed, "seeds", *COLUMNS]
    return table + "\n" + markdown(header, means, numbers=len(COLUMNS)) + "\n"


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
