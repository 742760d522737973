"""Lines for the terminal, from one process."""

from __future__ import annotations

import os
import sys

from tqdm import tqdm


def is_first_process() -> bool:
    """Whether this process speaks for all of them, before they have joined too."""
    return int(os.environ.get("RANK", 0)) == 0


def log_line(text: str) -> None:
    """Print a line without breaking a progress bar; of several processes the first one does."""
    if is_first_process():
        tqdm.write(text)
        sys.stdout.flush()
