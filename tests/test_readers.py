"""IMDb, CIFAR-10, Pathfinder and AAN from small files in the official layouts."""

from __future__ import annotations

import io
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, refusal, tiny_batch, tiny_config
from PIL import Image

from data.cifar import read_batch
from data.packing import load_splits
from data.reader import DataError
from dataloader import collate
from lra_config import ConfigError, make_config
from lra_datasets import open_dataset
from model import build_model
from train import amrb_backward, bptt_backward, train

CPU = torch.device("cpu")


def write_imdb(data: Path) -> None:
    for part in ("train", "test"):
        for label in ("neg", "pos"):
            folder = data / "aclImdb" / part / label
            folder.mkdir(parents=True)
            for i in range(20):
                (folder / f"{i}_7.txt").write_text(f"It's a {label} film<br />No {i}, café")


def write_cifar10(data: Path) -> None:
    folder = data / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        images = random.integers(256, size=(10, 3072), dtype=np.uint8)
        batch = {b"data": images, b"labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=4))


def write_pathfinder32(data: Path) -> None:
    folder = data / "lra_release" / "lra_release" / "pathfinder32" / "curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    for batch in range(2):
        images = folder / "imgs" / str(batch)
        images.mkdir(parents=True)
        rows = []
        for i in range(20):
            pixels = np.full((32, 32), 10 * batch + i, dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"sample_{i}.png")
            rows.append(f"imgs/{batch} sample_{i}.png {i} {i % 2} 1.0 14\n")
        (folder / "metadata" / f"{batch}.npy").write_text("".join(rows))


def write_aan(data: Path) -> None:
    folder = data / "lra_release" / "tsv_data"
    folder.mkdir(parents=True)
    for part in ("train", "eval", "test"):
        rows = [f'{i % 2}.0\ta{i}\tb{i}\tfirst "{i}\t{"second " * (i + 1)}\n' for i in range(12)]
        (folder / f"new_aan_pairs.{part}.tsv").write_text("".join(rows))


WRITERS = {
    "imdb": write_imdb, "imdb_long": write_imdb, "imdb_lra": write_imdb,
    "cifar10": write_cifar10, "pathfinder32": write_pathfinder32, "aan": write_aan,
}


def small_config(dataset: str, data: Path, **changes):
    return make_config({
        "dataset": dataset, "data_dir": str(data), "dim": 8, "num_heads": 2, "ffn_dim": 8,
        "num_layers": 1, "batch_size": 4, "max_steps": 2, "warmup_steps": 1, "device": "cpu",
        "output_dir": str(data / "runs"), **changes,
    })


def splits_of(config):
    return load_splits(open_dataset(config))


@pytest.mark.parametrize("dataset", WRITERS)
def test_a_data_set_trains_from_its_official_files(dataset, tmp_path):
    WRITERS[dataset](tmp_path)
    changes = {"max_seq_len": 64, "num_segments": 4} if dataset not in {"cifar10", "pathfinder32"} \
        else {}
    summary = train(small_config(dataset, tmp_path, **changes))
    assert min(summary.examples.values()) > 0


@pytest.mark.parametrize("dataset", ["imdb_lra", "cifar10", "pathfinder32"])
def test_held_out_splits_are_disjoint_and_follow_the_seed(dataset, tmp_path):
    WRITERS[dataset](tmp_path)
    splits = [splits_of(small_config(dataset, tmp_path, seed=seed)) for seed in (0, 0, 1)]
    sizes = {name: len(split) for name, split in splits[0].items()}
    expected = {
        "imdb_lra": {"train": 36, "val": 4, "test": 40},
        "cifar10": {"train": 45, "val": 5, "test": 10},
        "pathfinder32": {"train": 32, "val": 4, "test": 4},
    }
    assert sizes == expected[dataset]
    starts = [split.starts.ravel() for name, split in splits[0].items()
              if dataset == "pathfinder32" or name != "test"]
    assert len(np.unique(np.concatenate(starts))) == sum(map(len, starts))
    assert np.array_equal(splits[0]["val"].starts, splits[1]["val"].starts)
    assert not np.array_equal(splits[0]["val"].starts, splits[2]["val"].starts)


def test_separate_documents_begin_at_the_same_column(tmp_path):
    write_aan(tmp_path)
    apart = small_config("aan", tmp_path, max_seq_len=128, num_segments=4,
                         document_pair="separate")
    batch = collate(splits_of(apart)["val"], np.array([0, 1]), apart, CPU)
    half = batch.tokens.shape[1] // 2
    assert (batch.tokens[:, half] == ord("s") + 1).all()


def test_separate_documents_give_equal_gradients_under_amrb():
    config = tiny_config(dataset="aan", max_seq_len=48, num_segments=4, dropout=0.2,
                         document_pair="separate")
    batch = tiny_batch(config, [48, 30, 24])
    gradients = []
    for backward in (bptt_backward, amrb_backward):
        torch.manual_seed(0)
        model = build_model(config).double()
        backward(model, batch)
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-10, atol=1e-10)


def test_empty_images_are_skipped_and_counted(tmp_path):
    write_pathfinder32(tmp_path)
    image = next(tmp_path.rglob("imgs/1/sample_3.png"))
    image.write_bytes(b"")
    for _ in range(2):  # packed, then from the cache
        reader = open_dataset(small_config("pathfinder32", tmp_path))
        assert sum(map(len, load_splits(reader).values())) == 39
        assert reader.skipped == 1


def batch(**changes) -> bytes:
    values = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1], **changes}
    return pickle.dumps({key.encode(): value for key, value in values.items()}, protocol=4)


def png(mode: str = "L", size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 40).convert(mode).save(buffer, format="png")
    return buffer.getvalue()


def test_images_of_fewer_bits_and_in_color_are_read(tmp_path):
    write_pathfinder32(tmp_path)
    for i, mode in enumerate(("1", "P", "RGB", "LA")):
        next(tmp_path.rglob(f"imgs/1/sample_{i}.png")).write_bytes(png(mode))
    assert len(splits_of(small_config("pathfinder32", tmp_path))["train"]) == 32


def test_the_pickles_of_python_2_and_numpy_1_are_read(tmp_path):
    """The official files have strings of Python 2, and numpy's module names of 2009."""
    text = b"U%c%s"
    pixels = np.random.default_rng(0).integers(256, size=3072, dtype=np.uint8).tobytes()
    content = b"".join((
        b"\x80\x02}q\x01(", text % (4, b"data"), b"q\x02",
        b"cnumpy.core.multiarray\n_reconstruct\nq\x03",
        b"cnumpy\nndarray\nq\x04K\x00\x85", text % (1, b"b"), b"\x87Rq\x05(K\x01K\x01M\x00\x0c\x86",
        b"cnumpy\ndtype\nq\x06", text % (2, b"u1"), b"K\x00K\x01\x87Rq\x07(K\x03", text % (1, b"|"),
        b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T", struct.pack("<I", 3072), pixels,
        b"tb", text % (6, b"labels"), b"]q\x08(K\x06eu.",
    ))
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    images, labels = read_batch(path)
    assert images.tobytes() == pixels and images.shape == (1, 3072) and labels == [6]


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def damage(data: Path, pattern: str, content: bytes) -> None:
    next(data.rglob(pattern)).write_bytes(content)


@pytest.mark.parametrize(("dataset", "pattern", "content", "words"), [
    ("cifar10", "data_batch_2", pickle.dumps(Evil()), "asks for builtins.print"),
    ("cifar10", "data_batch_2", b"not a pickle", "not a CIFAR-10 batch"),
    ("cifar10", "test_batch", batch(labels=[0]), "holds 1 labels for 2 images"),
    ("cifar10", "test_batch", batch(labels=[0, 10]), "row 2: label '10' is not one of 0..9"),
    ("cifar10", "test_batch", batch(data=np.zeros((2, 3071), np.uint8)), "not (n, 3072) bytes"),
    ("cifar10", "test_batch", batch()[:-3000], "not a CIFAR-10 batch"),
    ("imdb", "train/pos/3_7.txt", b"\xff\xfe", "not UTF-8"),
    ("imdb_lra", "train/pos/3_7.txt", b"", "no text"),
    ("pathfinder32", "metadata/1.npy", b"imgs/1 sample_0.png\n", "row 1: has 2 fields"),
    ("pathfinder32", "metadata/1.npy", b"imgs/1 sample_0.png 0 2 x\n", "label '2'"),
    ("pathfinder32", "metadata/1.npy", b"imgs/1 absent.png 0 1 x\n", "No such file"),
    ("pathfinder32", "imgs/1/sample_0.png", b"no image", "cannot identify image"),
    ("pathfinder32", "imgs/1/sample_0.png", png("I;16"), "expected 32 x 32 of 8 bits"),
    ("pathfinder32", "imgs/1/sample_0.png", png(size=(33, 32)), "is 33 x 32 pixels"),
    ("aan", "new_aan_pairs.eval.tsv", b"1.0\ta\tb\tc\n", "row 1: has 4 columns"),
    ("aan", "new_aan_pairs.eval.tsv", b"3.0\ta\tb\tc\td\n", "label '3'"),
    ("aan", "new_aan_pairs.eval.tsv", b"1.0\ta\tb\t\td\n", "row 1: holds an empty text"),
    ("aan", "new_aan_pairs.eval.tsv", b"", "holds no example"),
])
def test_damaged_files_are_named_in_one_line(dataset, pattern, content, words, tmp_path, capsys):
    WRITERS[dataset](tmp_path)
    damage(tmp_path, pattern, content)
    with pytest.raises(DataError) as caught:
        splits_of(small_config(dataset, tmp_path))
    message = str(caught.value)
    assert words in message and Path(pattern).name in message and "\n" not in message
    assert "executed" not in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("dataset", ["imdb", "cifar10", "aan"])
def test_missing_data_say_how_to_get_them(dataset, tmp_path):
    with pytest.raises(DataError, match=r"get_lra_data\.sh"):
        open_dataset(small_config(dataset, tmp_path))


@pytest.mark.parametrize("dataset", ["cifar10", "pathfinder32"])
def test_an_image_is_not_cut(dataset, tmp_path):
    with pytest.raises(ConfigError, match="max_seq_len=512 is less than the 1024 pixels"):
        open_dataset(small_config(dataset, tmp_path, max_seq_len=512, num_segments=4))
    assert not list(tmp_path.iterdir())


def test_a_custom_data_set_trains_as_documented(tmp_path):
    page = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    (program,) = (block for block in blocks if 'TASKS["letters"]' in block)
    (tmp_path / "letters.py").write_text(program)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        folder = tmp_path / "datasets" / "letters" / name
        folder.mkdir(parents=True)
        for i in range(12):
            (folder / f"{i}.txt").write_text(f"{name[-1]} text, {i}")
    tiny = "dim=8 num_heads=2 ffn_dim=8 batch_size=4 max_steps=2 warmup_steps=1 max_seq_len=64"
    done = subprocess.run(
        [sys.executable, "letters.py", "--config", ROOT / "configs" / "imdb.yaml",
         "dataset=letters", "device=cpu", *tiny.split()],
        cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and "test_acc" in done.stdout, done.stderr
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert '"train": 22' in summary.read_text() and '"test": 24' in summary.read_text()


def test_a_failed_download_says_what_else_to_do(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CIFAR10_URL", "http://127.0.0.1:1/none")
    line = refusal(open_dataset, small_config("cifar10", tmp_path, download=True))
    assert "get_lra_data.sh cifar10 failed" in line
    assert "name a mirror" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
