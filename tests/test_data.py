"""From ListOps files to batches: packing, the cache, damaged files, order and trimming."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_config

import lra_datasets
from data import packing
from data.packing import load_splits
from data.reader import DataError
from data.tasks import ListOpsTokenizer
from dataloader import collate, epoch_batches, evaluation_batches, training_batches
from lra_config import ConfigError
from lra_datasets import open_dataset

CPU = torch.device("cpu")
REAL_ROW = "( ( ( ( [MED 7 ) ( ( ( [SM 3 ) 0 ) ] ) ) 9 ) ] )\t7\n"


@pytest.fixture
def data(tmp_path: Path, listops_dir: Path) -> Path:
    """Return a private copy of the small data, without its cache."""
    target = tmp_path / "datasets"
    shutil.copytree(listops_dir, target, ignore=shutil.ignore_patterns(".cache"))
    return target


def folder(data: Path) -> Path:
    return data / "lra_release" / "listops-1000"


def load(data: Path, split: str = "train", **changes):
    config = tiny_config(data_dir=str(data), **changes)
    return load_splits(open_dataset(config))[split]


def test_a_packed_split_holds_every_row_and_not_the_header(data):
    lines = (folder(data) / "basic_train.tsv").read_text().splitlines()[1:]
    split = load(data)
    assert len(split) == len(lines) == 200
    assert split.tokens.dtype == np.uint8 and isinstance(split.tokens, np.memmap)
    tokenizer = ListOpsTokenizer()
    for i, line in enumerate(lines):
        source, target = line.split("\t")
        sequence = split.tokens[split.starts[i, 0] :][: split.lengths[i, 0]]
        assert np.array_equal(sequence, tokenizer.encode(source))
        assert split.labels[i] == int(target)


def test_official_line_ends_and_the_deeper_folder_are_accepted(data):
    expected = load(data)
    deeper = data / "lra_release" / "lra_release" / "listops-1000"
    shutil.move(folder(data), deeper)
    for path in deeper.glob("*.tsv"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert np.array_equal(load(data).tokens, expected.tokens)


def test_the_cache_is_used_until_a_source_changes(data, monkeypatch):
    load(data)
    packed = []
    original = packing._pack
    monkeypatch.setattr(packing, "_pack", lambda *a: packed.append(1) or original(*a))
    load(data)
    assert not packed
    with open(folder(data) / "basic_train.tsv", "a") as handle:
        handle.write(REAL_ROW)
    assert len(load(data)) == 201
    assert packed == [1]  # of the three parts


@pytest.mark.parametrize(("row", "words"), [
    ("( [MAX 3 ) ] )\n", "columns"),
    ("( [MUL 3 ) ] )\t3\n", "unknown token '[MUL'"),
    ("( [MAX 3 ) ] )\t10\n", "label '10'"),
    ("( ) \t3\n", "empty"),
    ("1 " * 41 + "\t3\n", "41 tokens"),
])
def test_a_damaged_row_is_named_and_leaves_no_cache(data, row, words):
    path = folder(data) / "basic_val.tsv"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4], row, *lines[4:]]))
    with pytest.raises(DataError) as caught:
        load(data, "val")
    message = str(caught.value)
    assert words in message and "row 5" in message and str(path) in message
    assert "\n" not in message
    assert not list((data / ".cache").glob("*val*"))


@pytest.mark.parametrize("content", [b"", b"Source\tTarget\n", b"\xff\xfe\t1\n"])
def test_an_empty_or_foreign_file_is_named(data, content):
    path = folder(data) / "basic_test.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)):
        load(data, "test")


def test_some_missing_files_are_an_error_and_all_missing_are_generated(data, monkeypatch):
    asked, kept = [], shutil.copytree(folder(data), data / "kept")

    def generate(out, **_):
        asked.append(out)
        shutil.copytree(kept, folder(data))

    monkeypatch.setattr(lra_datasets, "generate_listops", generate)
    (folder(data) / "basic_val.tsv").unlink()
    with pytest.raises(DataError, match=r"basic_val\.tsv: missing"):
        load(data)
    assert not asked
    shutil.rmtree(folder(data))
    open_dataset(tiny_config(data_dir=str(data)))
    assert asked == [str(data)]


@pytest.mark.parametrize("bucket", [False, True])
def test_an_epoch_holds_every_example_once_in_an_order_of_its_own(data, bucket):
    split = load(data)
    config = tiny_config(bucket_by_length=bucket, batch_size=8)
    first, again, second = (epoch_batches(split, config, e) for e in (0, 0, 1))
    assert sorted(first.ravel()) == list(range(200))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, epoch_batches(split, tiny_config(seed=1), 0))


def test_buckets_leave_out_other_examples_in_each_epoch(data):
    """The examples of an incomplete batch differ between epochs."""
    split = load(data)
    config = tiny_config(bucket_by_length=True, batch_size=64)
    seen = {row for epoch in range(50) for row in epoch_batches(split, config, epoch).ravel()}
    assert len(split) % 64 and seen == set(range(len(split)))


def test_buckets_waste_less_padding(data):
    split = load(data)

    def padding(bucket: bool) -> int:
        rows = epoch_batches(split, tiny_config(bucket_by_length=bucket), 0)
        lengths = split.lengths[rows, 0]
        return int((lengths.max(axis=1, keepdims=True) - lengths).sum())

    assert padding(True) < 0.25 * padding(False)


def test_batches_resume_at_any_step(data):
    split = load(data)
    config = tiny_config(bucket_by_length=True)
    steps = training_batches(split, config, CPU)
    seen = [next(steps)[0] for _ in range(60)]  # more than two epochs
    for start in (1, 25, 49, 50):
        (resumed,) = next(training_batches(split, config, CPU, start))
        assert torch.equal(resumed.tokens, seen[start].tokens)
        assert torch.equal(resumed.labels, seen[start].labels)


def test_a_batch_is_trimmed_to_its_longest_sequence(data):
    split = load(data)
    config = tiny_config(max_seq_len=48, num_segments=3)
    short = np.argsort(split.lengths[:, 0])[:5]
    batch = collate(split, short, config, CPU)
    longest = int(split.lengths[short].max())
    assert batch.tokens.shape == (5, -(-longest // 16) * 16)
    assert torch.equal(batch.mask.sum(dim=1), torch.from_numpy(split.lengths[short, 0]))
    assert torch.equal(batch.tokens != 0, batch.mask)
    # The last sequence of the file: nothing follows it.
    final = collate(split, np.array([199]), config, CPU)
    assert int((final.tokens != 0).sum()) == split.lengths[199]


def test_evaluation_sees_every_example_once(data):
    split = load(data, "val")
    batches = list(evaluation_batches(split, tiny_config(batch_size=8), CPU))
    labels = torch.cat([b.labels for b in batches])
    assert sorted(labels.tolist()) == sorted(split.labels.tolist())


def test_a_batch_larger_than_the_split_is_refused(data):
    with pytest.raises(ConfigError, match="batch_size=201"):
        next(training_batches(load(data), tiny_config(batch_size=201), CPU))
