"""IMDb, CIFAR-10, Pathfinder and AAN from small files in the official layouts."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_batch, tiny_config
from PIL import Image

from data.packing import DataError, load_splits
from data.tasks import WordTokenizer
from dataloader import collate
from lra_config import ConfigError, make_config
from lra_datasets import load_word_vectors, open_dataset
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
    assert summary.data == "downloaded" and min(summary.examples.values()) > 0


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


def test_a_byte_is_its_value_plus_one_and_the_first_bytes_are_kept(tmp_path):
    write_imdb(tmp_path)
    config = small_config("imdb_lra", tmp_path, max_seq_len=40, num_segments=4)
    batch = collate(splits_of(config)["test"], np.array([0]), config, CPU)
    text = (tmp_path / "aclImdb/test/neg/0_7.txt").read_bytes()
    real = batch.tokens[0] if batch.mask is None else batch.tokens[0][batch.mask[0]]
    assert real.tolist() == [b + 1 for b in text[:40]]


def test_words_are_lower_case_and_the_vocabulary_knows_the_training_part_alone(tmp_path):
    assert WordTokenizer.words("It's a<br />café_1") == ["it's", "a", "café", "1"]
    assert WordTokenizer.build_vocabulary(["b a", "c b"]) == ["b", "a", "c"]
    write_imdb(tmp_path)
    config = small_config("imdb", tmp_path)
    vocabulary = open_dataset(config).tokenizer.vocabulary
    assert {"film", "it's", "café"} <= set(vocabulary)
    (tmp_path / "aclImdb/test/pos/0_7.txt").write_text("unheard")
    assert "unheard" not in open_dataset(config).tokenizer.vocabulary


def test_grey_levels_are_the_weighted_and_rounded_colours(tmp_path):
    write_cifar10(tmp_path)
    config = small_config("cifar10", tmp_path)
    split = splits_of(config)["test"]
    raw = pickle.loads((tmp_path / "cifar-10-batches-py/test_batch").read_bytes())[b"data"][3]
    r, g, b = raw.reshape(3, 1024).astype(float)
    tokens = collate(split, np.array([3]), config, CPU).tokens[0]
    assert np.array_equal(tokens.numpy(), np.rint(0.2989 * r + 0.5870 * g + 0.1140 * b) + 1)


def test_a_pair_is_one_row_whose_second_half_begins_at_a_fixed_place(tmp_path):
    write_aan(tmp_path)
    config = small_config("aan", tmp_path, max_seq_len=128, num_segments=4)
    split = splits_of(config)["val"]
    batch = collate(split, np.array([0, 1]), config, CPU)
    assert batch.mask[:, 64].all() and batch.tokens[0, 64] == ord("s") + 1
    apart = small_config("aan", tmp_path, max_seq_len=128, num_segments=4,
                         document_pair="separate")
    batch = collate(split, np.array([0, 1]), apart, CPU)
    half = batch.tokens.shape[1] // 2
    assert (batch.tokens[:, half] == ord("s") + 1).all()


def test_documents_encoded_apart_give_equal_gradients_under_amrb():
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


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def damage(data: Path, pattern: str, content: bytes) -> None:
    next(data.rglob(pattern)).write_bytes(content)


@pytest.mark.parametrize(("dataset", "pattern", "content", "words"), [
    ("cifar10", "data_batch_2", pickle.dumps(Evil()), "asks for builtins.print"),
    ("cifar10", "data_batch_2", b"not a pickle", "not a CIFAR-10 batch"),
    ("cifar10", "test_batch", b"", "not a CIFAR-10 batch"),
    ("imdb", "train/pos/3_7.txt", b"\xff\xfe", "not UTF-8"),
    ("imdb_lra", "train/pos/3_7.txt", b"", "no text"),
    ("pathfinder32", "metadata/1.npy", b"imgs/1 sample_0.png\n", "row 1: has 2 fields"),
    ("pathfinder32", "metadata/1.npy", b"imgs/1 sample_0.png 0 2 x\n", "label '2'"),
    ("pathfinder32", "metadata/1.npy", b"imgs/1 absent.png 0 1 x\n", "No such file"),
    ("pathfinder32", "imgs/1/sample_0.png", b"no image", "not an image"),
    ("aan", "new_aan_pairs.eval.tsv", b"1.0\ta\tb\tc\n", "row 1: has 4 columns"),
    ("aan", "new_aan_pairs.eval.tsv", b"3.0\ta\tb\tc\td\n", "label '3'"),
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


def test_word_vectors_are_read_by_word_and_checked(tmp_path):
    path = tmp_path / "glove.txt"
    path.write_text("film 1 2\nother 3 4\na word 5 6\n")
    vectors = load_word_vectors(str(path), ["a", "film"], dim=2)
    assert list(vectors) == [3] and vectors[3].tolist() == [1, 2]
    with pytest.raises(DataError, match="row 1: has 2 values, dim=3"):
        load_word_vectors(str(path), ["film"], dim=3)
    with pytest.raises(ConfigError, match="embedding_path"):
        tiny_config(embedding_path=str(path))


def test_a_data_set_of_ones_own_trains_as_the_documents_have_it(tmp_path):
    page = (ROOT / "docs" / "data.md").read_text()
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


def stub_libraries(monkeypatch, fail_after: int) -> None:
    """In the place of torchvision and `datasets`: small data, and a network that breaks."""
    left = [fail_after]

    def tick() -> None:
        left[0] -= 1
        if left[0] < 0:
            raise ConnectionError("the network is gone\nand more")

    class CIFAR10:
        base_folder = "cifar-10-batches-py"

        def __init__(self, root: Path, download: bool) -> None:
            write_cifar10(root)
            (root / "cifar-10-python.tar.gz").write_bytes(b"archive")
            tick()

    def load_dataset(name: str, split: str) -> list[dict]:
        tick()
        return [{"text": f"A film, {split} {i}", "label": i % 2} for i in range(40)]

    for name, contents in (
        ("torchvision", {}), ("torchvision.datasets", {"CIFAR10": CIFAR10}),
        ("datasets", {"load_dataset": load_dataset}),
    ):
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("dataset", ["cifar10", "imdb_lra"])
def test_a_download_is_whole_or_leaves_nothing(dataset, tmp_path, monkeypatch):
    config = small_config(dataset, tmp_path, download=True)
    stub_libraries(monkeypatch, fail_after=dataset == "imdb_lra")
    with pytest.raises(DataError, match=r"the network is gone and more.*get_lra_data") as caught:
        open_dataset(config)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
    stub_libraries(monkeypatch, fail_after=9)
    sizes = {name: len(split) for name, split in splits_of(config).items()}
    assert sum(sizes.values()) == {"cifar10": 60, "imdb_lra": 80}[dataset]
    assert not list(tmp_path.rglob("*.tar.gz"))
    stub_libraries(monkeypatch, fail_after=0)  # it is there: nothing is fetched
    open_dataset(config)
