"""SIGINT and SIGTERM: collected, handed on, or turned into an orderly exit."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn


def exit_on_sigterm() -> None:
    """Let SIGTERM end the program by an exception, so that half-written files are removed."""

    def leave(number: int, _frame: object) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


@contextlib.contextmanager
def caught_signals(then: Callable[[int], object] = lambda number: None) -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them.

    Args:
        then: called with the number of each signal that arrives.
    Yields:
        The numbers received so far.
    """
    received: list[int] = []
    previous: dict[int, Callable | int | None] = {}

    def note(number: int, _frame: object) -> None:
        received.append(number)
        then(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: leave them alone
                previous[number] = signal.signal(number, note)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
