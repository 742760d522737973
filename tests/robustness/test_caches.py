"""The packed cache as input: what disagrees with itself is refused, and nobody packs twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, refusal, tiny_config
from test_readers import small_config, write_imdb

from data.packing import load_splits
from lra_datasets import open_dataset


@pytest.fixture
def data(tmp_path: Path, listops_dir: Path) -> Path:
    """A private copy of the small data, packed."""
    target = tmp_path / "datasets"
    shutil.copytree(listops_dir, target, ignore=shutil.ignore_patterns(".cache"))
    load(target)
    return target


def load(data: Path):
    return load_splits(open_dataset(tiny_config(data_dir=str(data))))


def packed(data: Path, part: str = "val") -> Path:
    (folder,) = (data / ".cache").glob(f"listops-{part}-*")
    return folder


def array(change):
    """A change of an array in a file."""
    def apply(path: Path) -> None:
        new = change(np.load(path))
        path.unlink()  # mapped by others
        np.save(path, new)

    return apply


def written(content: bytes):
    return lambda path: path.write_bytes(content)


def put(where, value):
    def change(values: np.ndarray) -> np.ndarray:
        values[where] = value
        return values

    return array(change)


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-1])


def claim(shape: str):
    """Let the header say another shape than the file holds."""
    def apply(path: Path) -> None:
        content = path.read_bytes()
        start, end = content.index(b"(", 60), content.index(b")", 60) + 1
        header = content[: content.index(b"\n", 60) + 1]
        claimed = header[:start] + shape.encode() + header[end:-1].rstrip()
        path.unlink()
        path.write_bytes(claimed.ljust(len(header) - 1) + b"\n" + content[len(header) :])

    return apply


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES = {
    "fewer labels": ("labels.npy", array(lambda a: a[:-1]), "labels"),
    "no labels": ("labels.npy", array(lambda a: a[:0]), ""),
    "labels of another type": ("labels.npy", array(lambda a: a.astype(np.float64)), "float64"),
    "objects": ("labels.npy", lambda p: np.save(p, np.array([None]), allow_pickle=True), ""),
    "a label too large": ("labels.npy", put(3, 10), "label"),
    "a label below 0": ("labels.npy", put(0, -1), "label"),
    "labels cut": ("labels.npy", cut, ""),
    "labels that claim an exabyte": ("labels.npy", claim(f"({2**57},)"), ""),
    "labels that claim more than there is": ("labels.npy", claim(f"({2**63},)"), ""),
    "another length": ("lengths.npy", put(0, 11), "tokens"),
    "a length of 0": ("lengths.npy", put(0, 0), "between 1 and 40"),
    "a length below 0": ("lengths.npy", put(0, -5), "between 1 and 40"),
    "a length beyond the sequence": ("lengths.npy", put(0, 41), "between 1 and 40"),
    "lengths in a row": ("lengths.npy", array(np.ravel), "dimensions"),
    "two documents": ("lengths.npy", array(lambda a: np.repeat(a, 2, axis=1)), "lengths"),
    "a token too large": ("tokens.npy", put(9, 16), "token"),
    "a token that is padding": ("tokens.npy", put(9, 0), "token"),
    "a token too many": ("tokens.npy", array(lambda a: np.append(a, a[-1:])), "tokens for lengths"),
    "wider tokens": ("tokens.npy", array(lambda a: a.astype(np.uint16)), "uint16"),
    "tokens cut": ("tokens.npy", cut, ""),
    "tokens and something more": ("tokens.npy", lambda p: p.write_bytes(p.read_bytes() + b"x"), ""),
    "tokens that claim more": ("tokens.npy", claim("(99999999,)"), ""),
    "a text": ("tokens.npy", written(b"hello"), ""),
    "nothing": ("tokens.npy", written(b""), ""),
    "tokens from a pipe": ("tokens.npy", pipe, "a pipe or a device"),
    "info from a pipe": ("info.json", pipe, "a pipe or a device"),
    "no tokens": ("tokens.npy", Path.unlink, "No such file"),
    "info without a key": ("info.json", written(b"{}"), ""),
    "info of another type": ("info.json", written(b'{"skipped": "1"}'), ""),
    "info below 0": ("info.json", written(b'{"skipped": -1}'), ""),
    "info cut": ("info.json", written(b'{"skip'), ""),
    "nested info": ("info.json", written(b"[" * 100_000), ""),
}


@pytest.mark.parametrize(("name", "change", "words"), CHANGES.values(), ids=CHANGES)
def test_a_cache_that_disagrees_is_refused_and_packed_again_once_removed(
    name, change, words, data
):
    folder = packed(data)
    change(folder / name)
    line = refusal(load, data)
    assert str(folder) in line and "remove it" in line and words in line
    shutil.rmtree(folder)
    assert len(load(data)["val"]) == 20


@pytest.mark.parametrize("content", [
    b"", b"[", b'["a", "b"', b'{"a": 1}', b'["a", 1]', b"[]", b'"words"', b"[" * 100_000,
    json.dumps([str(i) for i in range(20_001)]).encode(),
])
def test_a_damaged_word_list_is_refused_and_made_again_once_removed(content, tmp_path):
    write_imdb(tmp_path)
    config = small_config("imdb", tmp_path)
    words = open_dataset(config).tokenizer.vocabulary
    (path,) = (tmp_path / ".cache").glob("imdb-words-*.json")
    path.write_bytes(content)
    line = refusal(open_dataset, config)
    assert str(path) in line and "remove it" in line
    path.unlink()
    assert open_dataset(config).tokenizer.vocabulary == words


def outputs_of_three(program: str, folder: Path) -> list[str]:
    """What three processes print that do the same in one folder at the same time."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(folder)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    return [output for output, _ in outputs]


PACK = (
    "import sys; from lra_config import make_config; from data import packing; import lra_datasets;"
    "original = packing._pack;"
    "packing._pack = lambda *a: (print('packs', flush=True), original(*a));"
    "config = make_config({'dataset': 'listops', 'data_dir': sys.argv[1], 'max_seq_len': 40,"
    " 'num_segments': 4});"
    "print({k: len(v) for k, v in packing.load_splits(lra_datasets.open_dataset(config)).items()})"
)


def test_three_processes_pack_once(data):
    """The others wait for the first, and read what that has packed."""
    shutil.rmtree(data / ".cache")
    outputs = outputs_of_three(PACK, data)
    assert all("{'train': 200, 'val': 20, 'test': 20}" in output for output in outputs)
    assert sum(output.count("packs") for output in outputs) >= 3
    assert not [p.name for p in (data / ".cache").iterdir() if p.suffix in (".part", ".lock")]


GENERATE = (
    "import sys, functools; from lra_config import make_config; import lra_datasets;"
    "from data.packing import load_splits;"
    "lra_datasets.generate_listops = functools.partial(lra_datasets.generate_listops, train=20_000,"
    " val=20, test=20, workers=1, min_length=9, max_length=41);"
    "config = make_config({'dataset': 'listops', 'data_dir': sys.argv[1], 'max_seq_len': 40,"
    " 'num_segments': 4});"
    "print(len(load_splits(lra_datasets.open_dataset(config))['train']))"
)


def test_three_processes_generate_once(tmp_path):
    outputs = outputs_of_three(GENERATE, tmp_path)
    assert [output.split()[-1] for output in outputs] == ["20000"] * 3, outputs
    assert [p.name for p in (tmp_path / "lra_release").iterdir()] == ["listops-1000"]


def test_a_folder_that_cannot_be_written_is_named_with_what_helps(data, monkeypatch):
    shutil.rmtree(data / ".cache")

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    line = refusal(load, data)
    assert str(data / ".cache") in line and "make it writable" in line


def test_a_packed_part_survives_its_own_check(data):
    """The check itself is no obstacle: what is packed is read, byte for byte the same twice."""
    first, second = load(data), load(data)
    for name in first:
        assert np.array_equal(first[name].tokens, second[name].tokens)
    assert os.listdir(packed(data))
