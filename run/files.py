"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter, ValidationError

from run.text import one_line

MAX_JSON = 64 * 2**20  # bytes


@contextlib.contextmanager
def named_os_errors(path: str | Path) -> Iterator[None]:
    """Let an OSError of a write, which knows no file (a full disk), say that it was `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else it is no system's: with a name it would lose its words
            error.filename = error.filename or str(path)
        raise


def opened(path: str | Path, mode: str = "rb") -> IO:
    """Open a file to read it, and nothing else: a pipe could be waited for without end.

    Raises:
        OSError: it cannot be read, or is a pipe or a device.
    """
    handle = open(
        path, mode, encoding=None if "b" in mode else "utf-8",
        opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK),  # no effect on files
    )
    if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
        handle.close()
        raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))
    return handle


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that appears under its name whole, or not at all.

    The bytes go to a sibling `<name>.part`, are flushed to the disk and renamed on success;
    on any error the sibling is removed and what stood at `path` stays.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with (
            named_os_errors(path),
            open(part, mode, encoding=None if "b" in mode else "utf-8") as handle,
        ):
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON, whole or not at all."""
    with atomic_write(path, "w") as handle:
        handle.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path, schema: TypeAdapter) -> Any:
    """The contents of a JSON file, as the schema has them.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or not what the schema asks for; in one line.
    """
    with opened(path) as handle:
        text = handle.read(MAX_JSON + 1)
    if len(text) > MAX_JSON:
        raise ValueError(f"has more than {MAX_JSON:,} bytes")
    return parse_json(text, schema)


def parse_json(text: bytes, schema: TypeAdapter) -> Any:
    """What `read_json` does, for a text."""
    try:
        return schema.validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(complaint(error)) from None


def complaint(error: ValidationError) -> str:
    """The first of pydantic's complaints: where, and what is asked for."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = one_line(".".join(map(str, first["loc"])), 60)
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return one_line(f"{where} {message}".strip(), 160)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
