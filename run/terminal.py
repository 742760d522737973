"""The terminal: lines of progress, results, and streams that may be closed."""

from __future__ import annotations

import contextlib
import os
import sys

from run.environment import launched_processes
from run.text import UserError, printable


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
