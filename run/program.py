"""The frame of a command: whatever its user can mend ends it with one line and a status."""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import sys
from collections.abc import Callable
from typing import NoReturn

from run.signals import Terminated
from run.terminal import is_first_process, open_standard_streams
from run.text import UserError, one_line

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
