"""Files and folders that appear complete or not at all, and locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from pydantic import TypeAdapter, ValidationError

from run.program import UserError, log_line, one_line

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


# What a file system without locks answers.
UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EBADF}


class Held(UserError):
    """Another process is at work there."""

    met_by_all = False


@contextlib.contextmanager
def locked(path: str | Path, work: str, advice: str = "", *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` while the body runs; it names its holder.

    The lock ends with the process, however that ends; the file is removed if it can be.

    Args:
        path: in a folder that exists.
        work: what is done there, for those who find it locked.
        advice: what they can do, beside waiting.
        wait: until the holder has finished; otherwise:
    Raises:
        Held: another process holds it.
        OSError: the file cannot be made.
    """
    path = Path(path)
    handle = _acquired(path, work, advice, wait)
    try:
        yield
    finally:
        # Removed while it is held: who opened it meanwhile finds it gone, and makes it anew.
        with contextlib.suppress(OSError):
            path.unlink()
        handle.close()


def _acquired(path: Path, work: str, advice: str, wait: bool) -> IO[str]:
    told = False
    while True:
        handle = open(path, "a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            held = f"{path}: {handle.read(200).strip() or 'another process'} {work}"
            if not wait:
                raise Held(f"{held}; wait for its end{advice}") from None
            if not told:
                log_line(f"{held}; waiting for its end")
                told = True
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            log_line(f"{path}: no lock ({error.strerror}); see that one process alone {work}")
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle.fileno()), os.stat(path)):
                break
        handle.close()  # the holder removed it before we held it
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%F %T')},")
    handle.flush()
    return handle


def remove_stale(folder: Path, pattern: str = "*.part") -> None:
    """Remove what processes that were killed have left half done: nobody holds `<name>.lock`."""
    for part in folder.glob(pattern):
        with contextlib.suppress(Held, OSError):
            with locked(part.with_suffix(".lock"), "writes it"):
                remove(part)


@contextlib.contextmanager
def whole_folder(target: str | Path, work: str = "writes it") -> Iterator[Path]:
    """Give an empty folder that becomes `target` when the body ends, or vanishes.

    Where another process makes the same folder, its end is waited for.

    Args:
        target: its parents are created if missing.
        work: what is done, for those who wait.
    Raises:
        FileExistsError: something is there already, or after the wait; it is left as it is.
        OSError: the folder cannot be written; the error names a file.
    """
    target = Path(target)
    _refuse_to_overwrite(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with locked(target.with_name(target.name + ".lock"), work, wait=True):
        _refuse_to_overwrite(target)
        remove(part)  # of a process that was killed
        try:
            with named_os_errors(target):
                part.mkdir()
                yield part
                # One call instead of an fsync per file, of which there may be 100,000s.
                if hasattr(os, "sync"):
                    os.sync()
                _refuse_to_overwrite(target)
                os.rename(part, target)
        except BaseException:
            with contextlib.suppress(OSError):
                remove(part)
            raise


def _refuse_to_overwrite(target: Path) -> None:
    if os.path.lexists(target):
        advice = "exists; remove it or choose another place"
        raise FileExistsError(errno.EEXIST, advice, str(target))
