"""Source files as input: what is damaged or hostile is refused in one line that says where."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import refusal
from PIL import Image
from test_readers import WRITERS, small_config

from data.packing import load_splits
from lra_datasets import load_word_vectors, open_dataset

PATHFINDER = "lra_release/lra_release/pathfinder32/curv_contour_length_14"
AAN = "lra_release/tsv_data/new_aan_pairs.eval.tsv"
LISTOPS = "lra_release/listops-1000/basic_val.tsv"


def write_listops(data: Path) -> None:
    folder = data / LISTOPS
    folder.parent.mkdir(parents=True)
    for part in ("train", "val", "test"):
        (folder.parent / f"basic_{part}.tsv").write_text("Source\tTarget\n( [MAX 3 ) ] )\t3\n")


WRITE = {**WRITERS, "listops": write_listops}


def png(mode: str = "L", size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 40).convert(mode).save(buffer, format="png")
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(
        ">I", zlib.crc32(kind + content)
    )


def png_of(width: int, height: int, bits: int = 8, rows: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


GREY_ROWS = bytes(33 * 32)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


IMAGES = {
    "16 bits": (png("I;16"), "has 16 bits"),
    "wider than tall": (png(size=(33, 32)), "33 x 32 pixels"),
    "a gigabyte of pixels": (png_of(50_000, 50_000), "50000 x 50000"),
    "the largest size": (png_of(2**32 - 1, 2**32 - 1), "expected 32 x 32"),
    "another format": (b"GIF89a" + bytes(100), "not an image"),
    "a text": (b"hello", "not an image"),
    "the signature alone": (b"\x89PNG\r\n\x1a\n", "not an image"),
    "no rows": (png_of(32, 32), ""),
    "too few rows": (png_of(32, 32, rows=GREY_ROWS[:500]), ""),
    "cut in the middle": (png()[:400], ""),
    "cut at the end": (png()[:-13], ""),
    "a flipped bit in the rows": (flipped(png(), 300), ""),
    "a flipped bit in the header": (flipped(png(), 30), ""),
    "a length beyond the file": (png()[:33] + b"\xff\xff\xff\xf0IDAT" + bytes(50), ""),
    "a text that unpacks to much": (
        png()[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000))) + png()[33:], ""
    ),
    "a megabyte and more": (png() + bytes(2**20), "more than 1,048,576 bytes"),
}


def pickled(**changes) -> bytes:
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]}
    batch.update({key.encode(): value for key, value in changes.items()})
    return pickle.dumps(batch, protocol=4)


class Call:
    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


def forged() -> bytes:
    """An array of objects whose state claims that its bytes are pointers."""
    return pickled(data=np.array([[None] * 3072] * 2))


BATCHES = {
    "an array of objects": (forged(), "not one of bytes"),
    "an array of numbers": (pickled(data=np.zeros((2, 3072))), "not one of bytes"),
    "an array by columns": (pickled(data=np.asfortranarray(np.eye(2, 3072, dtype=np.uint8))),
                            "not one of bytes"),
    "numpy's own program": (b"cnumpy.f2py.__main__\nndarray\n.", "asks for numpy.f2py.__main__"),
    "a call": (pickle.dumps(Call(os.system, "touch owned"), 4), "asks for posix.system"),
    "an old call": (pickle.dumps(Call(print, "owned"), 0), "asks for __builtin__.print"),
    "escape codes": (b"c\x1b[31mred\nname\n.", r"\x1b[31mred"),
    "images of another size": (pickled(data=np.zeros((2, 3071), np.uint8)), "(n, 3072)"),
    "no images": (pickled(data=None), "no images"),
    "a label too few": (pickled(labels=[0]), "label for each image"),
    "labels in a text": (pickled(labels="01"), "label for each image"),
    "a label that is no number": (pickled(labels=[0, "1"]), "not a whole number"),
    "a label too large": (pickled(labels=[0, 10]), "label '10' is not one of 0..9"),
    "a label below 0": (pickled(labels=[0, -1]), "label '-1'"),
    "a label of 10,000 digits": (pickled(labels=[0, 10**10_000]), ""),
    "a list": (pickle.dumps([1]), "no dictionary"),
    "a key that takes for ever to hash": (
        b"\x80\x02}K\x01" + b"2\x86" * 60 + b"K\x01s.", ""
    ),
    "a place far off": (b"\x80\x02]r\xff\xff\xff\x7f.", "no dictionary"),
    "a terabyte": (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".", ""),
    "a million brackets": (b"\x80\x02" + b"(" * 10**6, ""),
    "a tower of tuples": (b"\x80\x02)" + b"\x85" * 10**6 + b".", "no end"),
    "nothing": (b"", ""),
    "a text": (b"hello", ""),
    "cut": (pickled()[:-3000], ""),
}

ROWS = {
    ("listops", LISTOPS): {
        "a label of 4,301 digits": (b"1\t" + b"9" * 4301, "row 3: label"),
        "an Arabic digit": ("1\t\N{ARABIC-INDIC DIGIT THREE}".encode(), "row 3: label"),
        "escape codes": (b"\x1b[31m\t1", r"\x1b[31m"),
        "a token of five megabytes": (b"x" * 5_000_000 + b"\t1", "row 3: unknown token"),
        "a row without end": (b"1 " * 2**24, "row 3: has more than 16,777,216 bytes"),
        "NUL": (b"1\x00\t1", "row 3: unknown token"),
        "broken UTF-8": (b"\xff\t1", "row 3: unknown token"),
    },
    ("aan", AAN): {
        "an empty text": (b"1.0\ta\tb\t\tsecond", "row 13: holds an empty text"),
        "no text": (b"1.0\ta\tb\t\t", "row 13: holds an empty text"),
        "a label of 4,301 digits": (b"9" * 4301 + b"\ta\tb\tc\td", "row 13: label"),
        "no label": (b"\ta\tb\tc\td", "row 13: label"),
        "a column too many": (b"1\ta\tb\tc\td\te", "row 13: has 6 columns"),
        "a row without end": (b"1 " * 2**24, "row 13: has more than"),
        "an empty row": (b"", "row 13: has 1 columns"),
    },
    ("pathfinder32", f"{PATHFINDER}/metadata/1.npy"): {
        "NUL in a name": (b"imgs/1 sam\x00ple_0.png 0 1 x", "row 21"),
        "another folder": (b"../../../../imgs sample_0.png 0 1 x", "lies outside"),
        "from the root": (b"/etc passwd 0 1 x", "lies outside"),
        "a folder": (b"imgs 1 0 1 x", "Is a directory"),
        "a label of 4,301 digits": (b"imgs/1 sample_0.png 0 " + b"9" * 4301, "row 21: label"),
        "a name of a megabyte": (b"imgs/1 " + b"x" * 10**6 + b" 0 1 x", "too long"),
        "escape codes": (b"imgs/1 \x1b[31m.png 0 1 x", r"\x1b[31m"),
        "a row without end": (b"1 " * 2**24, "row 21: has more than"),
    },
}

CASES = [
    *(("pathfinder32", f"{PATHFINDER}/imgs/1/sample_7.png", f"image: {name}", content, words, "wb")
      for name, (content, words) in IMAGES.items()),
    *(("cifar10", "cifar-10-batches-py/data_batch_3", f"batch: {name}", content, words, "wb")
      for name, (content, words) in BATCHES.items()),
    *((dataset, path, f"{dataset}: {name}", content + b"\n", words, "ab")
      for (dataset, path), rows in ROWS.items() for name, (content, words) in rows.items()),
    ("imdb", "aclImdb/train/pos/3_7.txt", "no words", b"...", "no text", "wb"),
    ("imdb_lra", "aclImdb/train/pos/3_7.txt", "a long text", bytes(2**24 + 1), "more than", "wb"),
    ("imdb", "aclImdb/train/pos/3_7.txt", "a broken text", b"caf\xe9", "byte 3 is not UTF-8", "wb"),
]


def of(dataset: str, data: Path):
    lengths = {"imdb_lra": 64, "imdb": 64, "aan": 128, "listops": 64}
    changes = {"max_seq_len": lengths[dataset], "num_segments": 4} if dataset in lengths else {}
    return open_dataset(small_config(dataset, data, **changes))


@pytest.mark.parametrize(
    ("dataset", "path", "content", "words", "mode"),
    [pytest.param(*case[:2], *case[3:], id=case[2]) for case in CASES],
)
def test_a_damaged_or_hostile_file_is_refused(
    dataset, path, content, words, mode, tmp_path, monkeypatch, capfd
):
    WRITE[dataset](tmp_path)
    monkeypatch.chdir(tmp_path)
    with open(tmp_path / path, mode) as file:
        file.write(content)
    line = refusal(lambda: load_splits(of(dataset, tmp_path)))
    assert words in line and Path(path).name in line
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".part", ".lock")]
    assert not (tmp_path / "owned").exists() and "owned" not in capfd.readouterr().out


@pytest.mark.parametrize(("dataset", "path"), [
    ("cifar10", "cifar-10-batches-py/test_batch"), ("aan", AAN),
    ("pathfinder32", f"{PATHFINDER}/imgs/1/sample_7.png"),
    ("imdb", "aclImdb/train/pos/3_7.txt"),
])
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "nothing"])
def test_what_is_no_file_is_not_waited_for(dataset, path, kind, tmp_path):
    WRITE[dataset](tmp_path)
    (tmp_path / path).unlink()
    if kind == "a pipe":
        os.mkfifo(tmp_path / path)
    elif kind == "a folder":
        (tmp_path / path).mkdir()
    if dataset == "imdb":  # what is no file is none of the reviews
        assert len(load_splits(of(dataset, tmp_path))["train"]) == 35
    else:
        assert Path(path).name in refusal(lambda: load_splits(of(dataset, tmp_path)))


@pytest.mark.parametrize("record", [
    b"", b"[]", b"{", b'{"stand_in": 3}', b'{"stand_in": ["\\u001b[31m"]}', b"[" * 100_000,
    b'{"counts": 5}', b"\xff\xfe",
])
def test_a_damaged_record_of_the_generation_does_no_harm(record, tmp_path):
    WRITE["aan"](tmp_path)
    (tmp_path / AAN).with_name("GENERATED.json").write_bytes(record)
    origin = of("aan", tmp_path).origin()
    assert origin.isprintable() and len(origin) <= 100 and origin != "downloaded"


@pytest.mark.parametrize("numbers", [b"nan 1", b"1 inf", b"1 x", b"1 " + b"9" * 5000])
def test_word_vectors_are_finite_numbers(numbers, tmp_path):
    path = tmp_path / "glove.txt"
    path.write_bytes(b"other 1 2\nfilm " + numbers + b"\n")
    assert "glove.txt row 2" in refusal(load_word_vectors, str(path), ["film"], 2)


def test_images_of_fewer_bits_and_with_colours_are_read(tmp_path):
    WRITE["pathfinder32"](tmp_path)
    for i, mode in enumerate(("1", "P", "RGB", "LA")):
        (tmp_path / PATHFINDER / f"imgs/1/sample_{i}.png").write_bytes(png(mode))
    assert len(load_splits(of("pathfinder32", tmp_path))["train"]) == 32


# Search


def official_batch() -> bytes:
    """In the operations of the official files: Python 2's strings, numpy's old module names."""
    text = b"U%c%s"
    pixels = np.random.default_rng(0).integers(256, size=3072, dtype=np.uint8).tobytes()
    return b"".join((
        b"\x80\x02}q\x01(", text % (4, b"data"), b"q\x02",
        b"cnumpy.core.multiarray\n_reconstruct\nq\x03",
        b"cnumpy\nndarray\nq\x04K\x00\x85", text % (1, b"b"), b"\x87Rq\x05(K\x01K\x01M\x00\x0c\x86",
        b"cnumpy\ndtype\nq\x06", text % (2, b"u1"), b"K\x00K\x01\x87Rq\x07(K\x03", text % (1, b"|"),
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T", struct.pack("<I", 3072), pixels,
        b"tb", text % (6, b"labels"), b"]q\x08(K\x06eu.",
    ))


def test_the_official_operations_are_read(tmp_path):
    WRITE["cifar10"](tmp_path)
    content = official_batch()
    assert pickle.loads(content, encoding="bytes")[b"labels"] == [6]  # Python agrees
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(content)
    (image,), label = next(of("cifar10", tmp_path).examples("train"))
    assert image.shape == (1024,) and label == 6
