"""Checkpoints, exported weights, logs and summaries are read, or refused in one line."""

from __future__ import annotations

import copy
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from conftest import refusal, tiny_config

from data.packing import DataError
from predict import load_trained
from run import checkpoint
from run.checkpoint import finished, load_state
from run.log import read_metrics
from train import train


def config_of(data_dir: Path, folder: Path, **changes):
    return tiny_config(
        data_dir=str(data_dir), output_dir=str(folder), run_name="run", dropout=0.1, **changes
    )


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, listops_dir) -> Path:
    """Return the folder of a run that was stopped at step 4 of 12."""
    folder = tmp_path_factory.mktemp("stopped")
    train(config_of(listops_dir, folder, stop_after_steps=4))
    return folder / "run"


@pytest.fixture
def run(stopped, tmp_path) -> Path:
    """Return a copy of that run's folder."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def changed(state: dict, key: str, value: object) -> dict:
    """Return `state` with the entry at a dotted path replaced; `...` removes it."""
    state = copy.deepcopy(state)
    inner, *rest = state, *key.split(".")
    *path, last = (int(part) if part.isdigit() else part for part in rest)
    for part in path:
        inner = inner[part]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return state


class Call:
    """An object whose pickle calls a function when it is read."""

    def __reduce__(self):
        return print, ("owned",)


FILES = {"text": b"hello", "nothing": b"", "an old pickle": pickle.dumps({"model": {}})}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / "last.pt").write_bytes(content)
    line = refusal(checkpoint.read, tmp_path / "last.pt")
    assert line.startswith(str(tmp_path / "last.pt")) and "name another one" in line


def test_no_code_of_a_checkpoint_is_run(tmp_path, capsys):
    torch.save({"model": {}, "config": Call()}, tmp_path / "last.pt")
    assert "more than tensors" in refusal(checkpoint.read, tmp_path / "last.pt")
    assert capsys.readouterr().out == ""


def test_a_truncated_checkpoint_is_refused(run):
    path = run / "last.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    assert str(path) in refusal(checkpoint.read, path)


NAN = torch.tensor(float("nan"))
STATES = {
    "no model": ("model", ...), "a number for a weight": ("model.memory", 1.0),
    "a weight that is NaN": ("model.memory", NAN), "another dataset": ("config.dataset", "x"),
    "a vocabulary of numbers": ("vocabulary", [1, 2]), "no optimizer": ("optimizer", ...),
    "a step below 0": ("progress.step", -1), "a step after the end": ("progress.step", 13),
}


@pytest.mark.parametrize(("key", "value"), STATES.values(), ids=STATES)
def test_a_state_of_another_structure_is_refused(run, listops_dir, key, value):
    path = run / "last.pt"
    torch.save(changed(torch.load(path), key, value), path)
    assert str(path) in refusal(load_state, config_of(listops_dir, run.parent))


SHAPES = {
    "another weight": ("model.memory", torch.zeros(7)),
    "a weight too few": ("model.memory", ...),
    "a weight too many": ("model.x", torch.zeros(1)),
    "a moment of another shape": ("optimizer.adamw.state.0.exp_avg", torch.zeros(3)),
    "sums of another shape": ("running", torch.zeros(9)),
}


@pytest.mark.parametrize(("key", "value"), SHAPES.values(), ids=SHAPES)
def test_the_state_of_another_model_is_refused_and_the_run_is_unchanged(
    run, listops_dir, key, value
):
    path = run / "last.pt"
    torch.save(changed(torch.load(path), key, value), path)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    line = refusal(train, config_of(listops_dir, run.parent), True)
    assert "another model's" in line and str(path) in line
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_a_checkpoint_of_an_earlier_version_resumes_to_the_same_end(run, listops_dir, tmp_path):
    """It holds keys under their old names."""
    train(config_of(listops_dir, tmp_path / "full"))
    state = torch.load(run / "last.pt")
    config = state["config"]
    config |= {"hebbian_scale": config.pop("hebbian_divisor"), "max_minutes": None,
               "position_basis": "localised", "on_nonfinite": "stop"}
    del config["basis_init"], state["precision"], state["data"]
    del state["progress"]["validation_due"]
    state["progress"]["skipped_steps"] = 0
    torch.save({**state, "optimizer": state["optimizer"]["adamw"]}, run / "last.pt")
    assert train(config_of(listops_dir, run.parent), resume=True).steps == 12
    weights, full = (
        checkpoint.load(folder / "last.pt")["model"] for folder in (run, tmp_path / "full/run")
    )
    assert all(torch.equal(weights[name], full[name]) for name in full)


def test_a_run_does_not_resume_on_other_data(run, listops_dir, tmp_path):
    copied = Path(shutil.copytree(listops_dir, tmp_path / "copied"))
    path = copied / "lra_release/listops-1000/basic_train.tsv"
    rows = path.read_text().splitlines()
    rows[1], rows[2] = rows[2], rows[1]
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match="was trained on"):
        train(config_of(copied, run.parent), resume=True)


# Exported weights


@pytest.mark.parametrize("content", [
    b"{", b'{"dataset": "\xff"}', b'{"dataset": "listops", "color": 1}',
])
def test_a_damaged_configuration_of_exported_weights_is_refused(run, content):
    (run / "config.json").write_bytes(content)
    line = refusal(load_trained, run / "model.safetensors")
    assert "config.json" in line or "model.safetensors" in line


@pytest.mark.parametrize("change", [
    lambda data: b"", lambda data: b"\xff" * 8 + data[8:], lambda data: data[:-100],
], ids=["empty", "a huge header", "the end missing"])
def test_damaged_exported_weights_are_refused(run, change):
    path = run / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    assert str(path) in refusal(load_trained, path)


# The log and the summary


@pytest.mark.parametrize("row", [
    b"hello", b'{"loss": 1.0}', b'{"step": 1, "loss": "x"}', b"\xff\xfe",
])
def test_a_damaged_row_of_the_log_is_named(run, listops_dir, row):
    path = run / "metrics.jsonl"
    path.write_bytes(b'{"step": 2, "loss": 1.0}\n' + row + b'\n{"step": 4, "loss": 1.0}\n')
    assert f"{path} row 2" in refusal(read_metrics, run)
    refusal(train, config_of(listops_dir, run.parent), True)


def test_the_last_row_of_a_log_may_be_cut_short(run):
    path = run / "metrics.jsonl"
    rows = read_metrics(run)
    path.write_bytes(path.read_bytes()[:-5])
    assert read_metrics(run) == rows[:-1]


@pytest.mark.parametrize("content", [b"hello", b'{"steps": "many"}', b""])
def test_a_damaged_summary_means_that_the_run_is_not_finished(run, listops_dir, content):
    (run / "summary.json").write_bytes(content)
    assert finished(config_of(listops_dir, run.parent)) is None
