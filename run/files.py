"""Files and folders that appear complete or not at all, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from run.program import UserError, log_line, one_line


@contextlib.contextmanager
def named_os_errors(path: str | Path) -> Iterator[None]:
    """Add `path` to an OSError without a file name, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that appears complete or not at all.

    The bytes go to `<name>.part`, are flushed to the disk, and the file is renamed on success.
    After an error the previous file at `path` is unchanged.
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
    """Write indented JSON, completely or not at all."""
    with atomic_write(path, "w") as handle:
        handle.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path, schema: TypeAdapter) -> Any:
    """Return the contents of a JSON file, validated by `schema`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not of that schema; in one line.
    """
    return parse_json(Path(path).read_bytes(), schema)


def parse_json(text: bytes, schema: TypeAdapter) -> Any:
    """Return a JSON text, validated by `schema`.

    Raises:
        ValueError: it is not JSON, or not of that schema; in one line.
    """
    try:
        return schema.validate_json(text, strict=True)
    except ValidationError as error:
        raise ValueError(complaint(error)) from None


def complaint(error: ValidationError) -> str:
    """Return the first complaint of pydantic in one line: the key and what is allowed."""
    first = error.errors(include_url=False, include_input=False)[0]
    message = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return one_line(f"{'.'.join(map(str, first['loc']))} {message}".strip(), 160)


@contextlib.contextmanager
def locked(path: str | Path, work: str, advice: str = "", *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` while the body runs, or until the process ends.

    Args:
        path: in a folder that exists.
        work: what the holder does, for the message: "trains there".
        advice: an alternative to waiting, for the message.
        wait: wait until the holder has finished, instead of raising.
    Raises:
        UserError: another process holds the lock.
    """
    path = Path(path)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        holder = "another process"
        with contextlib.suppress(OSError):  # it has just ended
            holder = path.read_text(encoding="utf-8", errors="replace")[:100] or holder
        if not wait:
            raise UserError(
                f"{path}: {holder} {work}; wait until it has ended{advice}", alone=True
            ) from None
        log_line(f"{path}: {holder} {work}; waiting until it has ended")
        lock.acquire()
    try:
        path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is held: a process that waits then opens a new one
        lock.release()


@contextlib.contextmanager
def atomic_folder(target: str | Path, work: str = "writes it") -> Iterator[Path]:
    """Yield an empty folder that becomes `target` if the body succeeds, and is removed otherwise.

    One process at a time makes the same folder; others wait, with a line that names the `work`.

    Raises:
        FileExistsError: `target` exists, possibly after the wait.
        OSError: the folder cannot be written; the error names a file.
    """
    target = Path(target)
    _check_absent(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with locked(target.with_name(target.name + ".lock"), work, wait=True):
        _check_absent(target)
        shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
        try:
            with named_os_errors(target):
                part.mkdir()
                yield part
                os.sync()  # one call instead of an fsync for each of up to 100,000 files
                os.rename(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise


def _check_absent(target: Path) -> None:
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "exists; remove it or choose another", str(target))
