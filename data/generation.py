"""Functions of all generators: workers in a fixed order, and the checks of their arguments."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from run.files import write_json
from run.program import caught_signals

# Raise it whenever a change alters the bytes that a seed gives.
FORMAT_VERSION = 1


@contextmanager
def _starting_workers() -> Iterator[None]:
    """Leave Ctrl-C to this process: workers that start meanwhile never receive SIGINT.

    A new process inherits a blocked signal, so that not even its imports are interrupted. This
    process acts on a signal at the end, when no worker is half started.
    """
    with caught_signals() as received:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for number in received:
        signal.raise_signal(number)


def _tie_worker_to_parent() -> None:
    """End this worker with its parent, even if that is killed without a clean-up."""

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def results_in_order(function: Callable[[int], Any], workers: int) -> Iterator[Any]:
    """Yield function(0), function(1), ... from `workers` processes, without end until closed.

    Args:
        function: importable by a fresh process; called here when `workers` is 1.
        workers: closing the iterator ends them.
    Yields:
        The results in the order of the indices, whichever worker was first.
    Raises:
        ChildProcessError: a worker died.
    """
    if workers == 1:
        yield from map(function, itertools.count())
        return
    window = 8 * workers  # a bounded number of indices at a time, as their row has no end
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_tie_worker_to_parent
    ) as executor:
        try:
            for first in itertools.count(step=window):
                with _starting_workers():
                    results = executor.map(function, range(first, first + window))
                yield from results
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process died (out of memory, or the calling script runs without an "
                '`if __name__ == "__main__":` guard); use fewer workers'
            ) from error


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    # Containers and batch systems often grant fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_numbers(seed: int, **counts: int) -> None:
    """Raise ValueError, naming the option, for a negative seed or a count below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} is too small; it must be at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; it must be 0 or more")


def write_record(folder: Path, task: str, seed: int, **entries: Any) -> None:
    """Write GENERATED.json, by which generated data are distinguished from official data."""
    record = {"task": task, "format_version": FORMAT_VERSION, "seed": seed, **entries}
    write_json(folder / "GENERATED.json", {**record, "numpy": np.__version__})
