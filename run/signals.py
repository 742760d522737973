"""SIGINT and SIGTERM: an end at once, an orderly exit, or a list to look at between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from typing import NoReturn

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
