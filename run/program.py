"""The frame of every command: errors in one line, exit statuses, signals and the terminal."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

LINE_LENGTH = 400  # characters of a message
VALUE_LENGTH = 100  # characters of a value in a message


def one_line(text: object, limit: int = LINE_LENGTH) -> str:
    """Return `text` on one printable line; beyond `limit` characters its middle is cut out."""
    line = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if len(line) > limit:
        tail = (limit - 3) // 2
        line = f"{line[: limit - 3 - tail]}...{line[-tail:]}"
    return line


def shown(value: object) -> str:
    """Return the `repr` of a value for a message."""
    return one_line(repr(value), VALUE_LENGTH)


class UserError(Exception):
    """A mistake that the user can correct: a command ends with one line and `exit_status`."""

    met_by_all = True  # every process of a run meets it, so that the first one reports it

    def __init__(self, message: object = "", *, exit_status: int = 2, alone: bool = False) -> None:
        """Store the message; `alone`: any one of several processes may meet and report it."""
        super().__init__(message)
        self.exit_status = exit_status
        self.met_by_all = self.met_by_all and not alone

    def __str__(self) -> str:
        return one_line(super().__str__())


def launcher_variable(name: str) -> int:
    """Return a variable of the launcher `torchrun`.

    Args:
        name: RANK, LOCAL_RANK, WORLD_SIZE or LOCAL_WORLD_SIZE; without a launcher a rank is 0 and a
            size is 1.
    """
    started = os.environ if "WORLD_SIZE" in os.environ else {}
    return int(started.get(name, 1 if name.endswith("SIZE") else 0))


def is_first_process() -> bool:
    """Return whether this is the process that writes to the terminal, by its environment."""
    return launcher_variable("RANK") == 0


def log_line(text: str) -> None:
    """Print lines above a progress bar, in the first process.

    A training does not end because its output is no longer read.
    """
    if is_first_process():
        from tqdm import tqdm  # here: commands that only check their arguments stay fast

        try:
            tqdm.write(text)
            sys.stdout.flush()
        except BrokenPipeError:
            discard_output()


_noted: set[str] = set()


def note(text: str) -> None:
    """Print one line to standard error, once, in the first process."""
    if text not in _noted and is_first_process():
        _noted.add(text)
        print(one_line(text), file=sys.stderr)


def print_result(text: str) -> None:
    """Print the result of a command, at once."""
    print(text, flush=True)


def discard_output() -> None:
    """Send standard output to the null device, after its reader has closed the pipe."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


class Terminated(BaseException):
    """SIGTERM as an exception, the counterpart of KeyboardInterrupt."""


ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def end_by_exception() -> None:
    """Let SIGINT raise KeyboardInterrupt and SIGTERM `Terminated`."""

    def leave(_number: int, _frame: object) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, leave)


@contextlib.contextmanager
def caught_signals(then: Callable[[int], object] = lambda number: None) -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM; the second one has its former effect.

    Args:
        then: called with the number of each signal.
    Yields:
        The numbers received so far.
    """
    received: list[int] = []
    previous = {}

    def collect(number: int, frame: object) -> None:
        received.append(number)
        then(number)
        if len(received) > 1 and callable(previous[number]):
            previous[number](number, frame)

    try:
        for number in ENDING_SIGNALS:
            with contextlib.suppress(ValueError):  # not in the main thread
                previous[number] = signal.signal(number, collect)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong argument in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: {message}; see --help") + "\n")


def run_program(name: str, body: Callable[[], int | None]) -> int:
    """Run a command and return its exit status: 0, or that of an error after one line on stderr.

    An error that the user can correct has the status 2, SIGINT 130 and SIGTERM 143.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # characters that the locale lacks are escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        return body() or 0
    except UserError as error:
        return fail(name, error, error.exit_status, by_all=error.met_by_all)
    except BrokenPipeError:  # the reader of the output needs no more of it
        discard_output()
        return 0
    except UnicodeEncodeError as error:
        reason = f"{error.object[:200]} cannot be a file name in the locale's {error.encoding}"
        return fail(name, f"{reason}; set PYTHONUTF8=1", 2)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror or error}" if error.filename else error
        advice = "free some space" if error.errno == errno.ENOSPC else "name another, or repair it"
        return fail(name, f"{reason}; {advice}", 2, by_all=False)
    except KeyboardInterrupt:
        return fail(name, "interrupted", 130)
    except Terminated:
        return fail(name, "terminated", 143)


def fail(name: str, reason: object, exit_status: int, *, by_all: bool = True) -> int:
    """Print the reason; of several processes that all fail (`by_all`) only the first one does."""
    if not by_all or is_first_process():
        print(one_line(f"{name}: {reason}"), file=sys.stderr)
    return exit_status
