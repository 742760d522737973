"""Damaged input for the configuration, checkpoints, run folders, predictions and the environment.

Whatever it is, it is taken, or refused in one line: no other exception, no hang, no gigabytes.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from fuzzing import damaged, number_of_inputs, search
from hypothesis import strategies as st

from lra_config import dump_config, load_config
from model import build_model
from predict import load_trained, predict
from run import checkpoint
from run.log import read_metrics
from run.program import launched_processes
from run.state import finished, load_state
from sweep import load_runs
from train import train
from training.optimizer import build_optimizers, restore_optimizers


@pytest.fixture(scope="module")
def run(tmp_path_factory, listops_dir) -> Path:
    """The folder of a run that stands at step 4 of 12."""
    folder = tmp_path_factory.mktemp("fuzzed")
    train(config_of(listops_dir, folder, stop_after_steps=4))
    return folder / "run"


def config_of(data_dir: Path, folder: Path, **changes):
    return tiny_config(
        data_dir=str(data_dir), output_dir=str(folder), run_name="run", num_layers=1, **changes
    )


CONFIGURATION = (
    b"dataset: listops\nseed: 1\nlearning_rate: 1e-3\nwandb: false\nnum_hidden: null\n"
    b"neighbor_offsets: [-1, 1]\nrun_name: 'a b'\ndata_dir: \"c\\td\"  # comment\n",
    b"{dataset: cifar10, dim: 64, num_heads: 2, max_seq_len: 1024, num_segments: 4}\n",
    b"dataset: aan\ndocument_pair: separate\npooling: last\n? attention_type\n: luna\n",
)


@number_of_inputs
def test_a_configuration(tmp_path, inputs):
    path = tmp_path / "config.yaml"

    def held(content: bytes) -> None:
        path.write_bytes(content)
        config = load_config(path)
        path.write_text(dump_config(config), encoding="utf-8")
        assert load_config(path) == config

    search(held, damaged(*CONFIGURATION), inputs)


OVERRIDES = (
    b"seed=1,2", b'output_dir="a,b"', b"learning_rate=1e-3", b"neighbor_offsets=[1,2]", b"run_name=a",
    b"attention_type=astro,softmax,luna", b"compile=auto", b"position_scale=null",
)


@number_of_inputs
def test_an_override(tmp_path, inputs):
    path = tmp_path / "config.yaml"
    path.write_text("dataset: listops\n")

    def held(content: bytes) -> None:
        load_runs(path, [os.fsdecode(content)])

    search(held, damaged(*OVERRIDES), inputs)


def repacked(folder: Path, content: bytes) -> bytes:
    """The archive of `last.pt` with another pickle."""
    path = folder / "repacked.pt"
    with zipfile.ZipFile(folder / "last.pt") as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return path.read_bytes()


def restored(config, path: Path) -> Callable[[bytes], None]:
    """What reads a `last.pt` of these contents as a run does that goes on."""
    model = build_model(config)
    optimizer = build_optimizers(model, config)

    def held(content: bytes) -> None:
        path.write_bytes(content)
        state = load_state(config)
        with checkpoint.fitting(path):
            model.load_state_dict(state.model)
            restore_optimizers(optimizer, state.optimizer.state)
            torch.zeros(3, dtype=torch.float64).copy_(state.running)

    return held


def damaged_files(folder: Path, names: Sequence[str]) -> st.SearchStrategy[tuple[str, bytes]]:
    """One of a folder's files with its name, damaged."""
    return st.one_of(*(
        st.tuples(st.just(name), damaged((folder / name).read_bytes())) for name in names
    ))


@number_of_inputs
def test_a_checkpoint(tmp_path, run, listops_dir, inputs):
    (tmp_path / "run").mkdir()
    held = restored(config_of(listops_dir, tmp_path), tmp_path / "run/last.pt")
    with zipfile.ZipFile(run / "last.pt") as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("data.pkl"))
        pickled = archive.read(name)
    held(repacked(run, pickled))
    search(held, st.one_of(
        damaged((run / "last.pt").read_bytes()), damaged(pickled).map(lambda p: repacked(run, p)),
    ), inputs)


@number_of_inputs
def test_exported_weights(tmp_path, run, inputs):
    names = ("model.safetensors", "config.json")
    valid = {name: (run / name).read_bytes() for name in names}

    def held(file: tuple[str, bytes]) -> None:
        for name, content in {**valid, **dict([file])}.items():
            (tmp_path / name).write_bytes(content)
        load_trained(tmp_path / "model.safetensors")

    search(held, damaged_files(run, names), inputs)


@number_of_inputs
def test_a_run_folder(tmp_path, run, listops_dir, inputs):
    folder = tmp_path / "run"
    folder.mkdir()
    names = ("metrics.jsonl", "summary.json", "config.yaml")
    valid = {name: (run / name).read_bytes() for name in names}
    config = config_of(listops_dir, tmp_path, stop_after_steps=4)

    def held(file: tuple[str, bytes]) -> None:
        for name, content in {**valid, **dict([file])}.items():
            (folder / name).write_bytes(content)
        read_metrics(folder)
        finished(config)

    search(held, damaged_files(run, names), inputs)


LINES = (b"[MAX 2 9 [MIN 4 7 ] 0 ]", b"( ( [SM 1 ) 2 ) ]", b"1", b"[MED 1 2 3 ]\r\n[MIN 1 2 ]\n\n")


@number_of_inputs
def test_a_line_to_predict(run, inputs):
    model = load_trained(run / "best.pt")

    def held(content: bytes) -> None:
        for answer in predict(model, content.splitlines(keepends=True), "input"):
            assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)

    search(held, damaged(*LINES), inputs)


NUMBERS = st.one_of(
    st.sampled_from(["0", "1", "2", "", "-1", "x", "9" * 5000, "1.5", " 1", "\x1b[2J", "\udcff"]),
    st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=8),
)


@number_of_inputs
def test_the_environment(monkeypatch, inputs):
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

    def held(variables: dict[str, str]) -> None:
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        launched = launched_processes()
        assert 0 <= launched.rank < launched.world_size

    search(held, st.dictionaries(st.sampled_from(names), NUMBERS), inputs)
    monkeypatch.undo()
