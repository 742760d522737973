"""What the generators share: workers in a fixed order, and files that appear together or not."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, BinaryIO

# Raise it whenever a change alters the bytes that a seed gives.
FORMAT_VERSION = 1


def _tie_worker_to_parent() -> None:
    """Leave Ctrl-C to the parent, and end with it even if it is killed without a clean-up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

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
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_tie_worker_to_parent
    )
    indices = itertools.count()
    try:
        # A bounded window: Pool.imap would queue the endless indices without waiting for results.
        pending = deque(executor.submit(function, next(indices)) for _ in range(2 * workers))
        while True:
            result = pending.popleft().result()
            pending.append(executor.submit(function, next(indices)))
            yield result
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process died (out of memory, or the calling script runs without an "
            '`if __name__ == "__main__":` guard); use fewer workers'
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def whole_files(folder: Path, names: Sequence[str]) -> Iterator[list[BinaryIO]]:
    """Open one file per name that appear in `folder` together when the body ends, or not at all.

    Args:
        folder: created if missing.
        names: renamed into place in this order.
    Raises:
        FileExistsError: a file of that name is there already; it is left as it is.
        OSError: the folder cannot be written.
    """
    targets = [folder / name for name in names]

    def refuse_to_overwrite() -> None:
        for target in targets:
            if os.path.lexists(target):
                raise FileExistsError(f"{target} exists; remove it or choose another --out")

    refuse_to_overwrite()
    folder.mkdir(parents=True, exist_ok=True)
    temporaries = [folder / f".{name}.{os.getpid()}.tmp" for name in names]
    files: list[BinaryIO] = []
    placed: list[Path] = []
    try:
        for temporary in temporaries:
            files.append(open(temporary, "wb"))
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        refuse_to_overwrite()
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
            placed.append(target)
    except BaseException:
        for file in files:
            # On a full disk, closing tries to write the rest and fails again.
            with contextlib.suppress(OSError):
                file.close()
        for path in [*temporaries, *placed]:
            path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `target` when the body ends, or vanishes.

    Args:
        target: its parents are created if missing.
    Raises:
        FileExistsError: the target is there already; it is left as it is.
        OSError: the folder cannot be written.
    """

    def refuse_to_overwrite() -> None:
        if os.path.lexists(target):
            raise FileExistsError(f"{target} exists; remove it or choose another --out")

    refuse_to_overwrite()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        # One call instead of an fsync per file, of which there may be hundreds of thousands.
        if hasattr(os, "sync"):
            os.sync()
        refuse_to_overwrite()
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def available_cores() -> int:
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
