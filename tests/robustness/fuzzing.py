"""Mutated input for the boundaries: valid files, damaged a little, and what must hold of each."""

from __future__ import annotations

import contextlib
import faulthandler
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from run.program import LINE_LENGTH, UserError

SECONDS = 10  # in which each input is answered
MEMORY = 2 * 2**30  # bytes beyond what is held before
EDGE = 200  # bytes at both ends, where formats say what they are

# A few in every run of the tests; with `-m fuzz` as many as count as a search.
number_of_inputs = pytest.mark.parametrize(
    "inputs", [60, pytest.param(20_000, marks=pytest.mark.fuzz)]
)


@st.composite
def damaged(draw: st.DrawFn, *valid: bytes) -> bytes:
    """One of the `valid` contents with one to four changes."""
    content = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        size = len(content)
        place = draw(st.one_of(
            st.integers(0, min(size, EDGE)), st.integers(max(size - EDGE, 0), size),
            st.integers(0, size),
        ))
        span = slice(place, place + draw(st.integers(1, 16)))
        kind = draw(st.sampled_from(("replace", "insert", "remove", "repeat", "cut")))
        if kind == "remove":
            del content[span]
        elif kind == "repeat":
            content[place:place] = content[span] * draw(st.integers(1, 50))
        elif kind == "cut":
            del content[place:]
        else:
            new = draw(st.one_of(st.binary(min_size=1, max_size=9), st.sampled_from(TELLING)))
            content[place : place + len(new) * (kind == "replace")] = new
    return bytes(content)


# Texts and numbers on which parsers have fallen before.
TELLING = (
    b"\x00", b"\n", b"\r", b"\t", b" ", b"\x1b[31m", b"\xff" * 4, b"\xff" * 8,
    b"\x7f" + b"\xff" * 7, b"\x80", b"9" * 4301, b"-1", b"1e999", b"nan", b"../", b"\xd9\xa3",
    b"\xed\xa0\x80", b"(", b"[", b"{", b'"', b"null", b"true", b"1.5",
)


def search(
    held: Callable[[bytes], object], contents: st.SearchStrategy[bytes], inputs: int
) -> None:
    """Try `held` on that many contents: each is taken, or refused in one line."""
    @settings(
        max_examples=inputs, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(contents)
    def attempt(content: bytes) -> None:
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            held(content)
        except UserError as error:
            line = str(error)
            assert line.isprintable() and 0 < len(line) <= LINE_LENGTH, line
        finally:
            faulthandler.cancel_dump_traceback_later()

    with limited_memory():
        attempt()


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """Let an allocation of more than `MEMORY` fail while the body runs."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, before[1])
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
