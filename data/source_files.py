"""Source files are input: read in bounded pieces, whatever is wrong with them told in one line."""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data.packing import DataError
from run.files import opened
from run.program import one_line

# Far more than the official files hold, in bytes.
MAX_ROW = 2**24
MAX_TEXT = 2**24
MAX_IMAGE = 2**20
MAX_BATCH = 2**26

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEADER = struct.Struct(">8x4x4sIIB")  # signature, length, IHDR, width, height, bits


@contextlib.contextmanager
def told(place: object, advice: str = "fetch it again") -> Iterator[None]:
    """Raise DataError, with the place, for whatever a parser raises of a damaged file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{place}: {one_line(reason, 150)}; {advice}") from None


def contents(path: Path, limit: int) -> bytes:
    """All of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger than `limit` bytes.
    """
    with opened(path) as handle:
        content = handle.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"has more than {limit:,} bytes")
    return content


def rows(path: Path) -> Iterator[tuple[str, bytes]]:
    """Stream (place, row without its end) of a file; only a line feed, or CR LF, ends a row.

    Raises:
        DataError: a row is longer than `MAX_ROW`.
        OSError: the file cannot be read.
    """
    with opened(path) as handle:
        number = 0
        while row := handle.readline(MAX_ROW + 1):
            number += 1
            place = f"{path} row {number}"
            if len(row) > MAX_ROW:
                raise DataError(f"{place}: has more than {MAX_ROW:,} bytes; fetch the file again")
            yield place, row.rstrip(b"\r\n")


def grey_image(content: bytes, side: int) -> np.ndarray:
    """The grey values (side, side) uint8 of a PNG.

    Raises:
        ValueError: it is no PNG of that size with samples of at most 8 bits.
        Exception: what Pillow raises of a damaged one.
    """
    if len(content) < PNG_HEADER.size or not content.startswith(PNG_SIGNATURE):
        raise ValueError("not an image in PNG format")
    chunk, width, height, bits = PNG_HEADER.unpack_from(content)
    # Looked at before anything is decoded: a few bytes can claim to be a gigabyte of pixels.
    if chunk != b"IHDR" or (width, height) != (side, side):
        raise ValueError(f"is {width} x {height} pixels, expected {side} x {side}")
    if bits > 8:
        raise ValueError(f"has {bits} bits per sample, expected 8; Pillow would cut them off")
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        image.verify()  # the sums of all chunks, which decoding does not look at
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        return np.asarray(image.convert("L"))
