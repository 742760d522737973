"""The files that a run uses, and their reported origin and completeness."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, assert_refused, tiny_config, write_config
from test_readers import small_config, write_imdb

from data.layout import LAYOUTS, recorded_split
from data.listops import generate_listops
from data.packing import load_splits
from data.pathfinder import generate_pathfinder
from lra_datasets import open_dataset
from train import train

SMALL = {"train": 40, "val": 20, "test": 20, "workers": 1, "min_length": 9, "max_length": 41}
LISTOPS = Path("lra_release", "listops-1000")


@pytest.fixture(autouse=True)
def fresh_notes(monkeypatch):
    monkeypatch.setattr("run.program._noted", set())


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Return ListOps in the official folder layout, complete by its own record."""
    generate_listops(tmp_path / "made", seed=0, **SMALL)
    deeper = tmp_path / "data" / "lra_release" / LISTOPS
    deeper.parent.mkdir(parents=True)
    shutil.move(tmp_path / "made" / LISTOPS, deeper)
    return tmp_path / "data"


def loaded(config):
    reader = open_dataset(config)
    return reader, load_splits(reader)


@pytest.fixture
def no_generation(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("generates data")

    monkeypatch.setattr("lra_datasets.generate_listops", refuse)
    monkeypatch.setattr("lra_datasets.generate_pathfinder", refuse)


def test_an_empty_folder_counts_as_absent(data, no_generation):
    (data / LISTOPS).mkdir(parents=True)
    reader, splits = loaded(tiny_config(data_dir=str(data)))
    assert len(splits["train"]) == 40 and reader.origin() == "generated"


def test_an_empty_folder_is_generated_into(tmp_path, monkeypatch):
    monkeypatch.setattr("lra_datasets.generate_listops",
                        lambda out, seed: generate_listops(out, seed=seed, **SMALL))
    (tmp_path / LISTOPS).mkdir(parents=True)
    _, splits = loaded(tiny_config(data_dir=str(tmp_path)))
    assert len(splits["train"]) == 40


def test_a_partial_copy_does_not_hide_a_complete_one(data, no_generation):
    outer = data / LISTOPS
    outer.mkdir(parents=True)
    for path in (data / "lra_release" / LISTOPS).glob("*.tsv"):
        shutil.copy(path, outer)
    (outer / "basic_val.tsv").unlink()
    reader, splits = loaded(tiny_config(data_dir=str(data)))
    assert reader.folder == data / "lra_release" / LISTOPS and len(splits["val"]) == 20


@pytest.mark.parametrize("inside", ["lra_release", "lra_release/lra_release/listops-1000"])
def test_data_dir_may_be_the_official_folder_itself(data, inside, no_generation):
    before = sorted(data.rglob("*"))
    _, splits = loaded(tiny_config(data_dir=str(data / inside), cache_dir=str(data.parent / "c")))
    assert len(splits["train"]) == 40 and sorted(data.rglob("*")) == before


def test_data_dir_may_be_the_folder_of_one_data_set(tmp_path):
    write_imdb(tmp_path)
    changes = {"cache_dir": str(tmp_path / "c")}
    _, splits = loaded(small_config("imdb_lra", tmp_path / "aclImdb", **changes))
    assert len(splits["train"]) > 0


def test_an_incomplete_data_set_trains_after_one_line_and_is_called_incomplete(tmp_path, capsys):
    write_imdb(tmp_path)
    summary = train(small_config("imdb_lra", tmp_path, max_seq_len=64, num_segments=4))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "incomplete" in line]
    assert "40 of 25,000 train examples" in line and str(tmp_path / "aclImdb") in line
    assert summary.data == "downloaded, incomplete"
    card = next((tmp_path / "runs").rglob("README.md")).read_text()
    assert "incomplete" in card


def test_generated_data_are_measured_by_their_own_record(data):
    path = data / "lra_release" / LISTOPS / "basic_train.tsv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-5]))
    reader, _ = loaded(tiny_config(data_dir=str(data)))
    assert reader.origin() == "generated, incomplete"
    assert "35 of 40 train examples" in reader.missing()


def test_a_damaged_record_marks_data_as_generated(data):
    (data / "lra_release" / LISTOPS / "GENERATED.json").write_bytes(b"")
    reader, _ = loaded(tiny_config(data_dir=str(data)))
    assert reader.origin().startswith("generated")


@pytest.mark.parametrize("split", ["baseline", "intermediate", "hard"])
def test_the_tested_pathfinder_split_is_named(split, tmp_path):
    folder = generate_pathfinder(tmp_path, seed=0, split=split, images=20, workers=1)
    if split == "baseline":  # under its other name
        folder.rename(folder.with_name("curv_contour_length_6"))
    reader, _ = loaded(small_config("pathfinder32", tmp_path, pathfinder_split=split))
    assert reader.origin() == f"generated, {split} split"


def test_an_easy_split_in_the_folder_of_the_hard_one_is_called_easy(tmp_path, capsys):
    easy = generate_pathfinder(tmp_path, seed=0, split="baseline", images=20, workers=1)
    easy.rename(easy.with_name("curv_contour_length_14"))
    reader, _ = loaded(small_config("pathfinder32", tmp_path))
    assert reader.origin() == "generated, baseline split"
    assert "holds the baseline split" in capsys.readouterr().err


def test_without_a_record_the_metadata_name_the_split_or_it_is_unknown(tmp_path):
    folder = generate_pathfinder(tmp_path, seed=0, split="intermediate", images=20, workers=1)
    (folder / "GENERATED.json").unlink()
    assert recorded_split(folder) == "intermediate"
    for path in (folder / "metadata").iterdir():
        path.write_text(path.read_text().replace("1.0 9 3", "1.0"))
    reader, _ = loaded(small_config(
        "pathfinder32", tmp_path, pathfinder_split="intermediate"
    ))
    assert reader.origin() == "downloaded, incomplete, unknown split"


def test_a_curriculum_is_tested_on_the_hard_split_and_trains_on_both(tmp_path):
    for split in ("baseline", "hard"):
        generate_pathfinder(tmp_path, seed=0, split=split, images=40, workers=1)
    summary = train(small_config(
        "pathfinder32", tmp_path, pathfinder_split={"baseline": 0, "hard": 1}
    ))
    assert summary.data == "generated, hard split"


def test_every_layout_has_a_file_or_folder_for_each_expected_count():
    for layout in LAYOUTS.values():
        assert len(layout.expected) == len(layout.parts)


def test_an_accented_path_in_the_c_locale_names_the_locale_and_not_the_yaml(data, tmp_path):
    accented = tmp_path / "donn\u00e9es"
    data.rename(accented)
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_train.py"), "--config",
         str(write_config(tmp_path, tmp_path)), f"data_dir={accented}"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )
    assert_refused(done, "PYTHONUTF8=1")
    assert "YAML" not in done.stderr
