"""CIFAR-10's batch files. They are pickles, and none of them can run code here."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

PIXELS = 3072  # of an image: 1,024 of red, of green and of blue


class _Images:
    """The array of a batch: every class that the official files name is read as this one."""

    array: np.ndarray

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: tuple) -> None:
        if len(state) == 5:  # of an array: version, shape, dtype, column order, content
            content = state[4]
            if not isinstance(content, bytes) or state[3] or state[1] != (
                len(content) // PIXELS, PIXELS
            ):
                raise ValueError(f"its images are not (n, {PIXELS}) bytes in rows")
            self.array = np.frombuffer(content, np.uint8).reshape(-1, PIXELS)


class _Unpickler(pickle.Unpickler):
    # The official files name the modules of numpy 1, our tests' files those of numpy 2.
    allowed = ("multiarray._reconstruct", "numpy.ndarray", "numpy.dtype")

    def find_class(self, module: str, name: str) -> type:
        if not (module.startswith("numpy") and f"{module}.{name}".endswith(self.allowed)):
            raise ValueError(f"asks for {module}.{name}")
        return _Images


def read_batch(path: Path) -> tuple[np.ndarray, list[int]]:
    """Return the images (n, 3072) uint8 and the n labels of a batch file.

    Raises:
        Exception: the file is damaged, or asks for another class than an array of bytes.
    """
    with open(path, "rb") as file:
        batch = _Unpickler(file, encoding="bytes").load()
    images, labels = batch[b"data"].array, batch[b"labels"]
    if len(labels) != len(images):
        raise ValueError(f"holds {len(labels)} labels for {len(images)} images")
    return images, labels
