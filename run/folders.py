"""Folders that appear whole or not at all, made by one process at a time."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from run.files import named_os_errors, remove
from run.locks import locked


@contextmanager
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
            with suppress(OSError):
                remove(part)
            raise


def _refuse_to_overwrite(target: Path) -> None:
    if os.path.lexists(target):
        advice = "exists; remove it or choose another place"
        raise FileExistsError(errno.EEXIST, advice, str(target))
