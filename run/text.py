"""Text from outside made fit for a terminal: printable, on one line, of a sane length.

Names in files, values in a configuration and the words of libraries can hold anything: escape codes
that a terminal obeys, line breaks, megabytes. Every message passes through here.
"""

from __future__ import annotations

import reprlib

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
