"""CIFAR-10's batch files, read without a pickle machine.

They are pickles, and a pickle is a program: what runs one can be made to crash, to hang or to do
what its author likes. The few operations that the files consist of are carried out here instead,
on bytes, whole numbers, lists, tuples and one array of bytes; what else a file asks for is refused.
"""

from __future__ import annotations

import itertools
import pickletools
from typing import Any

import numpy as np

MAX_OPERATIONS = 200_000  # an official file has 20,000
PIXELS = 3072  # of an image: 1,024 of red, of green and of blue

BYTES = {
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINUNICODE",
    "SHORT_BINUNICODE",
}
NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# The official files name numpy's modules of 2009.
RECONSTRUCT = {b"numpy.core.multiarray _reconstruct", b"numpy._core.multiarray _reconstruct"}
NDARRAY, DTYPE = b"numpy ndarray", b"numpy dtype"


class Name:
    """Something that a file refers to by module and name; nothing is looked up."""

    def __init__(self, name: bytes) -> None:
        if name not in {*RECONSTRUCT, NDARRAY, DTYPE}:
            raise ValueError(f"it asks for {name.decode(errors='replace').replace(' ', '.')}")
        self.name = name

    def call(self, arguments: Any) -> Images | ByteType:
        if self.name in RECONSTRUCT:
            return Images()
        if self.name == DTYPE and isinstance(arguments, tuple) and arguments[:1] == (b"u1",):
            return ByteType()
        raise ValueError("its array is not one of bytes")


class ByteType:
    """numpy's uint8."""

    def build(self, state: Any) -> None:
        """Of an unsigned byte there is nothing more to say."""


class Images:
    """An array of bytes, empty until its state comes."""

    array: np.ndarray | None = None

    def build(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise ValueError("its array has no state of numpy's")
        _, shape, kind, by_columns, content = state
        if not (isinstance(kind, ByteType) and type(content) is bytes and not by_columns):
            raise ValueError("its array is not one of bytes")
        if shape != (len(content) // PIXELS, PIXELS) or len(content) % PIXELS:
            raise ValueError(f"its images are not (n, {PIXELS}) bytes")
        self.array = np.frombuffer(content, np.uint8).reshape(shape)


def read_batch(content: bytes) -> tuple[np.ndarray, list[int]]:
    """The images (n, 3072) uint8 and the labels of a batch file.

    Raises:
        ValueError: the file is damaged, or asks for what no such file does.
    """
    try:
        batch = _Reader().read(content)
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from None
    if not isinstance(batch, dict):
        raise ValueError("it holds no dictionary")
    images, labels = batch.get(b"data"), batch.get(b"labels")
    if not isinstance(images, Images) or images.array is None:
        raise ValueError("it holds no images")
    if not isinstance(labels, list) or len(labels) != len(images.array):
        raise ValueError("it holds no label for each image")
    if not all(type(label) is int for label in labels):
        raise ValueError("a label is not a whole number")
    return images.array, labels


class _Reader:
    """Carries out the operations of one file."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def read(self, content: bytes) -> Any:
        """What the file leaves. Whatever a damaged one makes of it, no object acts by itself."""
        operations = itertools.islice(pickletools.genops(content), MAX_OPERATIONS)
        for operation, argument, _ in operations:
            if operation.name == "STOP":
                return self.stack.pop()
            self._carry_out(operation.name, argument)
        raise ValueError("it has no end within reason")

    def _carry_out(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in BYTES:
            stack.append(_to_bytes(argument, name))
        elif name in NUMBERS:
            stack.append(argument)
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in TUPLES:
            stack[-TUPLES[name] :] = [tuple(stack[-TUPLES[name] :])]
        elif name in ("APPEND", "APPENDS"):
            items = self._since_mark() if name == "APPENDS" else [stack.pop()]
            _of_type(stack[-1], list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            target = _of_type(stack[-1], dict)
            for key, value in zip(items[::2], items[1::2], strict=True):
                # Other keys would be hashed, which takes as long as their author likes.
                target[_of_type(key, bytes)] = value
        elif name == "GLOBAL":
            stack.append(Name(argument.encode()))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(Name(_of_type(module, bytes) + b" " + _of_type(attribute, bytes)))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_of_type(function, Name).call(arguments))
        elif name == "BUILD":
            state = stack.pop()
            _of_type(stack[-1], ByteType, Images).build(state)
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it does {name}, which no batch does")

    def _since_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items


def _to_bytes(argument: Any, name: str) -> bytes:
    """Python 2's strings are bytes, which `pickletools` hands over as Latin-1."""
    if isinstance(argument, bytes):
        return argument
    return argument.encode("utf-8" if "UNICODE" in name else "latin-1")


def _of_type(value: Any, *types: type) -> Any:
    if type(value) not in types:
        raise ValueError("its pickle is damaged")
    return value
