"""The packed cache: its location, its users, and that data are packed only once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, refusal, tiny_config

from data import packing
from data.packing import load_splits
from lra_datasets import open_dataset


@pytest.fixture
def data(tmp_path: Path, listops_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a private copy of the small data, packed, with an empty cache of the user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    target = tmp_path / "datasets"
    shutil.copytree(listops_dir, target, ignore=shutil.ignore_patterns(".cache"))
    load(target)
    return target


def load(data: Path, **changes):
    return load_splits(open_dataset(tiny_config(data_dir=str(data), **changes)))


def make_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse writes below a folder; permissions do not bind an administrator."""
    access, mkdir = os.access, Path.mkdir

    def refused_mkdir(path: Path, *arguments, **options) -> None:
        if path.is_relative_to(folder):
            raise PermissionError(13, "Permission denied", str(path))
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(
        os, "access", lambda path, mode: folder not in Path(path).parents and access(path, mode)
    )
    monkeypatch.setattr(Path, "mkdir", refused_mkdir)


def packed(cache: Path) -> list[str]:
    return sorted(path.name.rsplit("-", 1)[0] for path in cache.iterdir())


PARTS = ["listops-test", "listops-train", "listops-val"]


def test_a_read_only_cache_is_used(data, tmp_path, monkeypatch, capsys):
    make_read_only(data, monkeypatch)
    assert len(load(data)["val"]) == 20
    assert capsys.readouterr().err == "" and not (tmp_path / "home").exists()


def test_packing_for_read_only_data_goes_to_the_users_cache_and_says_so(
    data, tmp_path, monkeypatch, capsys
):
    make_read_only(data, monkeypatch)
    load(data, max_seq_len=48)  # not yet packed for this length
    (line,) = capsys.readouterr().err.splitlines()
    assert str(data / ".cache") in line and "cache_dir" in line
    assert packed(tmp_path / "home" / "rmaat") == PARTS
    assert packed(data / ".cache") == PARTS
    load(data, max_seq_len=48)
    assert capsys.readouterr().err == ""


def test_cache_dir_names_the_cache(data, tmp_path):
    shutil.rmtree(data / ".cache")
    load(data, cache_dir=str(tmp_path / "fast"))
    assert packed(tmp_path / "fast") == PARTS and not (data / ".cache").exists()


def truncate(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()  # mapped by other processes
    path.write_bytes(content[:-1])


@pytest.mark.parametrize("change", [truncate, Path.unlink])
@pytest.mark.parametrize("name", ["index.npz", "tokens.bin"])
def test_a_damaged_entry_is_refused_and_packed_again_once_removed(name, change, data):
    (folder,) = (data / ".cache").glob("listops-val-*")
    change(folder / name)
    line = refusal(load, data)
    assert str(folder) in line and "remove it" in line
    shutil.rmtree(folder)
    assert len(load(data)["val"]) == 20


LOAD = (
    "import sys, functools; from lra_config import make_config; from data import packing;"
    "import lra_datasets;"
    "original = packing._pack;"
    "packing._pack = lambda *a: (print('packs', flush=True), original(*a));"
    "lra_datasets.generate_listops = functools.partial(lra_datasets.generate_listops, train=4_000,"
    " val=20, test=20, workers=1, min_length=9, max_length=41);"
    "config = make_config({'dataset': 'listops', 'data_dir': sys.argv[1], 'max_seq_len': 40,"
    " 'num_segments': 4});"
    "print({k: len(v) for k, v in packing.load_splits(lra_datasets.open_dataset(config)).items()})"
)


def test_two_processes_generate_and_pack_once(tmp_path):
    """The second waits for the first, and reads its result."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD, str(tmp_path)], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert all("{'train': 4000, 'val': 20, 'test': 20}" in output for output, _ in outputs)
    assert [path.name for path in (tmp_path / "lra_release").iterdir()
            if path.suffix != ".lock"] == ["listops-1000"]
    assert packed(tmp_path / ".cache") == PARTS


def test_a_full_disk_names_the_entry_and_leaves_nothing(data, monkeypatch):
    shutil.rmtree(data / ".cache")

    def full(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing.np, "savez", full)
    with pytest.raises(OSError, match="No space left") as caught:
        load(data)
    assert str(data / ".cache") in caught.value.filename
    assert not [path for path in (data / ".cache").iterdir() if path.suffix != ".lock"]
