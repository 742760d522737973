"""The frame of every command: errors in one line, signals, processes and the terminal."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import reprlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

LINE_LENGTH = 400  # characters of a message
VALUE_LENGTH = 100  # of one value in it
LONGEST_INTEGER = 10**30


def one_line(text: object, limit: int = LINE_LENGTH) -> str:
    """`text` on one line of at most `limit` characters: its beginning and its end.

    What is not printable is escaped, so that no terminal takes it for a command.
    """
    line = str(text)
    if len(line) > 2 * limit:  # of megabytes only the ends are looked at
        line = f"{line[:limit]}\N{HORIZONTAL ELLIPSIS}{line[-limit:]}"
    line = printable(" ".join(line.split()))
    if len(line) > limit:
        tail = (limit - 3) // 2
        line = f"{line[: limit - 3 - tail]}...{line[-tail:]}"
    return line


def printable(text: str) -> str:
    """`text` with its control characters, marks of direction and broken code points escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object) -> str:
    """A value as a message shows it: its `repr`, whatever its size and depth, cut."""
    return one_line(_REPR.repr(value), VALUE_LENGTH)


class _BoundedRepr(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = VALUE_LENGTH

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write out integers of thousands of digits.
        if abs(value) < LONGEST_INTEGER:
            return repr(value)
        return f"an integer of {value.bit_length()} bits"


_REPR = _BoundedRepr()


class UserError(Exception):
    """What a user can mend, told in one line: it ends a program in the place of a traceback."""

    exit_status = 2
    met_by_all = True  # of several processes each meets it alike: the first one tells

    def __str__(self) -> str:
        return one_line(super().__str__())


REQUIRED = ("RANK", "LOCAL_RANK", "MASTER_PORT")


class EnvironmentMistake(UserError, ValueError):
    """An environment that no launcher leaves, told in one line."""


@dataclass(frozen=True)
class Launched:
    """A process's place among those that were started together, on all machines and on its own."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def launched_processes() -> Launched:
    """This process's place; one alone where WORLD_SIZE does not say otherwise.

    Raises:
        EnvironmentMistake: the variables are not those that a launcher sets.
    """
    world_size = _number("WORLD_SIZE", least=1) if "WORLD_SIZE" in os.environ else 1
    if world_size == 1:
        return Launched()
    for name in (*REQUIRED, "MASTER_ADDR"):
        if not os.environ.get(name):
            raise EnvironmentMistake(
                f"WORLD_SIZE={world_size} without {name} in the environment; start the processes "
                "with torchrun, or unset WORLD_SIZE"
            )
    rank, local_rank, _ = (_number(name) for name in REQUIRED)
    if rank >= world_size:
        raise EnvironmentMistake(
            f"RANK={rank} in the environment, of {world_size} processes; start them with torchrun"
        )
    on_this_machine = "LOCAL_WORLD_SIZE"
    return Launched(
        rank, world_size, local_rank,
        _number(on_this_machine, least=1) if on_this_machine in os.environ else 1,
    )


def _number(name: str, least: int = 0) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= least):
        raise EnvironmentMistake(
            f"{name}={shown(text)} in the environment is no number from {least} up; start the "
            f"processes with torchrun, or unset {name}"
        )
    return int(text)


class OutputLost(UserError):
    """A result could not be written to standard output."""

    met_by_all = False

    def __init__(self, error: OSError) -> None:
        super().__init__(f"standard output: {error.strerror}; what was asked for is not written")
        self.reader_gone = isinstance(error, BrokenPipeError)


def is_first_process() -> bool:
    """Whether this process speaks for all of them, before they have joined too."""
    return launched_processes().rank == 0


def log_line(text: str) -> None:
    """Print lines without breaking a progress bar; of several processes the first one does.

    Where standard output is closed or full, that is told once and the work goes on: no training
    ends because nobody reads its log any more.
    """
    if not is_first_process():
        return
    from tqdm import tqdm  # here: the rest of this file does without packages, as its users do

    try:
        tqdm.write("\n".join(map(printable, text.splitlines())))
        sys.stdout.flush()
    except OSError as error:
        discard_output()
        with contextlib.suppress(OSError):
            print(f"standard output: {error.strerror}; the run goes on without", file=sys.stderr)


_noted: set[str] = set()


def note(text: str) -> None:
    """Print one line to standard error, once, in the first process."""
    if text not in _noted and is_first_process():
        _noted.add(text)
        print(one_line(text), file=sys.stderr)


def print_result(text: str) -> None:
    """Print what a command was called for.

    Raises:
        OutputLost: it cannot be written, or nobody reads it any more.
    """
    try:
        print(text)
        sys.stdout.flush()
    except OSError as error:
        discard_output()
        raise OutputLost(error) from None


def discard_output() -> None:
    """Let standard output take what is left to be written to it, and all to come."""
    null = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):
        os.dup2(null, sys.stdout.fileno())
    os.close(null)


def open_standard_streams() -> None:
    """Make the three standard streams safe to use, whatever the caller left of them.

    One that is closed would give its number to the next file that is opened, and what is printed
    would end up in that file. In its place stands one that fails as a closed one does; to a closed
    standard error nothing can be told, it takes all. What an encoding lacks is escaped.
    """
    stand_ins = (("stdin", "r", os.O_WRONLY), ("stdout", "w", os.O_RDONLY),
                 ("stderr", "w", os.O_WRONLY))
    for number, (name, mode, access) in enumerate(stand_ins):
        stream = getattr(sys, name)
        if stream is None:
            null = os.open(os.devnull, access)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, open(number, mode, closefd=False))
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


NUMBERS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable | int | None


class Terminated(BaseException):
    """SIGTERM, as an exception that passes through everything, as KeyboardInterrupt does."""


def end_at_once(program: str) -> None:
    """Let either signal end the program with one line: while libraries load nothing is open."""

    def leave(number: int, _frame: object) -> NoReturn:
        os.write(2, f"{program}: {signal.Signals(number).name}, nothing done yet\n".encode())
        os._exit(128 + number)

    _set(leave)


def end_by_exception() -> None:
    """Let SIGINT raise KeyboardInterrupt and SIGTERM `Terminated`: half-written files go."""

    def leave(_number: int, _frame: object) -> NoReturn:
        raise Terminated

    _set(signal.default_int_handler)
    signal.signal(signal.SIGTERM, leave)


def _set(handler: Handler) -> None:
    for number in NUMBERS:
        signal.signal(number, handler)


@contextlib.contextmanager
def caught_signals(then: Callable[[int], object] = lambda number: None) -> Iterator[list[int]]:
    """Collect the first signal instead of dying of it; the second one is not held back.

    Args:
        then: called with the number of each signal that arrives.
    Yields:
        The numbers received so far.
    """
    received: list[int] = []
    previous: dict[int, Handler] = {}

    def note(number: int, frame: object) -> None:
        received.append(number)
        then(number)
        if len(received) > 1 and callable(previous[number]):
            previous[number](number, frame)

    try:
        for number in NUMBERS:
            with contextlib.suppress(ValueError):  # not in the main thread: leave them alone
                previous[number] = signal.signal(number, note)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable or name another"),
    errno.EISDIR: "name a file",
    errno.ENOENT: "name one that exists",
}


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"{self.prog}: {message}; see --help") + "\n")


def run_program(name: str, body: Callable[[], int | None]) -> int:
    """Carry out a command and return its exit status.

    What `body` returns, or 0; for what the user can mend 2, or what the error says, with one line
    on standard error; 130 and 143 after SIGINT and SIGTERM.
    """
    open_standard_streams()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of its cache in a read-only HOME
    try:
        return body() or 0
    except UserError as error:
        return fail(name, error, error.exit_status, by_all=error.met_by_all)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror or error}" if error.filename else error
        advice = ADVICE.get(error.errno, "see that it is there, and that it may be used")
        return fail(name, f"{reason}; {advice}", 2, by_all=False)
    except KeyboardInterrupt:
        return fail(name, "interrupted", 130)
    except Terminated:
        return fail(name, "terminated", 143)


def fail(name: str, reason: object, exit_status: int, *, by_all: bool = True) -> int:
    """Say why, once: of several processes that all fail alike (`by_all`) the first one speaks."""
    try:
        speaks = is_first_process() or not by_all
    except UserError:  # of the environment, which is the reason then
        speaks = True
    if speaks:
        with contextlib.suppress(OSError):  # nobody reads it
            print(one_line(f"{name}: {reason}"), file=sys.stderr)
    return exit_status
