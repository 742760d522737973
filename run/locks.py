"""One process at a time: locks of the operating system, which every death releases."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from run.files import remove
from run.terminal import log_line
from run.text import UserError

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
