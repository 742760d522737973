"""Checkpoints and exported weights as input: read as they were, or refused in one line."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import pickletools
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused, refusal, run_cli, run_script, tiny_config
from safetensors.torch import save_file

from data.packing import DataError
from model import build_model
from predict import load_trained, predict
from run import checkpoint
from run.log import read_metrics
from run.state import NonFiniteError, finished, load_state
from train import prepare, train
from training.optimizer import build_optimizers, restore_optimizers


@pytest.fixture(scope="module")
def cut(tmp_path_factory, listops_dir) -> Path:
    """The folder of a run that stands at step 4 of 12."""
    folder = tmp_path_factory.mktemp("cut")
    train(config_of(listops_dir, folder, stop_after_steps=4))
    return folder / "run"


def config_of(data_dir: Path, folder: Path, **changes):
    return tiny_config(
        data_dir=str(data_dir), output_dir=str(folder), run_name="run", dropout=0.1, **changes
    )


@pytest.fixture
def run(cut, tmp_path) -> Path:
    """A copy of that run's folder."""
    return Path(shutil.copytree(cut, tmp_path / "run"))


# What is in the file


def archive(data: bytes, compress: int = zipfile.ZIP_STORED, names=("archive/data.pkl",)) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as file:
        for name in names:
            file.writestr(name, data)
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()


class Call:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.parts = function, arguments

    def __reduce__(self):
        return self.parts


FILES = {
    "text": (b"hello", []),
    "nothing": (b"", []),
    "zeros": (bytes(10_000), []),
    "an old pickle": (pickle.dumps({"model": {}}), []),
    "a hostile pickle": (archive(pickle.dumps(Call(print, "owned"), 2)), ["__builtin__ print"]),
    "a late protocol": (archive(pickle.dumps(Call(print, "owned"), 4)), ["protocol 4"]),
    "a bomb": (archive(bytes(50_000_000), zipfile.ZIP_DEFLATED), ["packed as no checkpoint"]),
    "two pickles": (archive(b"N.", names=("a/data.pkl", "b/data.pkl")), ["no data.pkl"]),
    "no pickle": (archive(b"N.", names=("a/b",)), ["no data.pkl"]),
    "nothing in it": (archive(b"N."), []),
    "a list": (archive(pickle.dumps([], 2)), []),
    "a list in itself": (archive(b"]q\x00h\x00a."), []),
    "an escape code": (archive(b"c\x1b[2J\nx\n."), [r"\x1b[2J"]),
}


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path, capsys, content, words):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    line = refusal(checkpoint.read, path)
    assert line.startswith(str(path))
    for word in (*words, "name another one"):
        assert word in line, line
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/", "/proc/self/mem"])
def test_what_is_no_file_is_no_checkpoint(path):
    for suffix in ("", "/x.safetensors"):
        assert refusal(checkpoint.read, Path(path + suffix)).startswith(path)


@pytest.mark.parametrize(("path", "pipe"), [
    ("last.pt", "last.pt"), ("model.safetensors", "model.safetensors"),
    ("model.safetensors", "config.json"),
])
def test_a_pipe_is_not_waited_for(tmp_path, path, pipe):
    save_file({"memory": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / pipe).unlink(missing_ok=True)
    os.mkfifo(tmp_path / pipe)
    line = refusal(checkpoint.read, tmp_path / path)
    assert line.startswith(str(tmp_path / pipe)) and "is a pipe or a device" in line


def test_a_tensor_that_is_called_is_told_without_a_word_of_torch(cut, tmp_path, recwarn):
    with zipfile.ZipFile(cut / "last.pt") as old, zipfile.ZipFile(tmp_path / "x.pt", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("data.pkl"):
                calls = [at for opcode, _, at in pickletools.genops(content)
                         if opcode.name == "REDUCE"]
                content = content[: calls[-1] + 1] + b")R" + content[calls[-1] + 1 :]
            new.writestr(name, content)
    refusal(checkpoint.read, tmp_path / "x.pt")
    assert not recwarn.list


def test_a_tensor_larger_than_the_file_is_refused_before_it_is_there(tmp_path, cut):
    state = checkpoint.load(cut / "last.pt")
    one = torch.zeros(1)
    for hostile in (one.expand(10**12), one.expand(10**6, 10**6), one.to_sparse(),
                    torch.zeros(1, dtype=torch.complex64)):
        torch.save({**state, "model": {"memory": hostile}}, tmp_path / "last.pt")
        refusal(checkpoint.read, tmp_path / "last.pt")
    # Many names of one storage: each fits, together they are larger than the file.
    shared = torch.zeros(10**5)
    torch.save({**state, "model": {str(i): shared for i in range(99)}}, tmp_path / "last.pt")
    assert "larger than the file" in refusal(checkpoint.read, tmp_path / "last.pt")


def changed(state: dict, key: str, value: object) -> dict:
    """`state` with the entry at a dotted path replaced; `...` removes it."""
    state = copy.deepcopy(state)
    place, *rest = key.split(".")
    inner = state
    while rest:
        inner, place = inner[int(place) if place.isdigit() else place], rest.pop(0)
    place = int(place) if place.isdigit() else place
    if value is ...:
        del inner[place]
    else:
        inner[place] = value
    return state


NAN, BIG = torch.tensor(float("nan")), 10**5000
STATES = {
    "no model": ("model", ...), "a list for a model": ("model", []),
    "a number for a weight": ("model.memory", 1.0), "a weight that is NaN": ("model.memory", NAN),
    "no config": ("config", ...), "another dataset": ("config.dataset", ["listops"]),
    "a key of no name": ("config", {1: 2}), "a huge seed": ("config.seed", BIG),
    "an unknown key": ("config.\x1b[2J", 1),
    "a vocabulary of numbers": ("vocabulary", [1, 2]), "a text": ("vocabulary", "words"),
    "too many words": ("vocabulary", ["x"] * 20_001),
    "no optimizer": ("optimizer", ...), "an optimizer of nothing": ("optimizer", {}),
    "a list for an optimizer": ("optimizer", []), "a text for a state": ("optimizer.state", "x"),
    "a moment of numbers": ("optimizer.state.0.exp_avg", 1.0),
    "a moment that is NaN": ("optimizer.state.0.exp_avg", NAN),
    "no progress": ("progress", ...), "progress of nothing": ("progress", None),
    "progress of something else": ("progress.colour", "red"),
    "a step that is a text": ("progress.step", "4"), "a step below 0": ("progress.step", -1),
    "a step beyond the end": ("progress.step", 13), "a huge step": ("progress.step", BIG),
    "an accuracy above 1": ("progress.best_val_accuracy", 2.0),
    "seconds that are NaN": ("progress.seconds", float("nan")),
    "no number of processes": ("processes", None), "no processes": ("processes", 0),
    "a scaler of texts": ("scaler", {"scale": "x"}), "a list of sums": ("running", [1, 2, 3]),
    "a number for data": ("data", 1),
}


@pytest.mark.parametrize(("key", "value"), STATES.values(), ids=STATES)
def test_a_checkpoint_of_another_shape_is_refused_when_a_run_would_go_on(
    run, listops_dir, key, value
):
    path = run / "last.pt"
    torch.save(changed(torch.load(path), key, value), path)
    before = path.read_bytes()
    line = refusal(load_state, config_of(listops_dir, run.parent))
    assert str(path) in line
    assert path.read_bytes() == before


FITS = {
    "another weight": ("model.memory", torch.zeros(7)),
    "a weight too few": ("model.memory", ...),
    "a weight too many": ("model.x", torch.zeros(1)),
    "a moment of another shape": ("optimizer.state.0.exp_avg", torch.zeros(3)),
    "a moment too few": ("optimizer.state.0.step", ...),
    "a step of another shape": ("optimizer.state.0.step", torch.zeros(4)),
    "a parameter too many": ("optimizer.state", {99: {}}),
    "sums of another shape": ("running", torch.zeros(9)),
}


@pytest.mark.parametrize(("key", "value"), FITS.values(), ids=FITS)
def test_what_fits_another_model_is_refused_and_the_run_stays(run, listops_dir, key, value):
    path = run / "last.pt"
    torch.save(changed(torch.load(path), key, value), path)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    line = refusal(train, config_of(listops_dir, run.parent), True)
    assert "another model's" in line and str(path) in line
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_the_groups_of_a_saved_optimizer_are_not_taken_over(run, listops_dir):
    path = run / "last.pt"
    state = torch.load(path)
    for group in state["optimizer"]["param_groups"]:
        group.update(lr="fast", betas=None, weight_decay=1e9, factor=-1)
    torch.save(state, path)
    config = config_of(listops_dir, run.parent)
    trainer = prepare(config, resume=True)
    expected = build_optimizers(trainer.model, config)["adamw"].state_dict()["param_groups"]
    assert trainer.optimizers["adamw"].state_dict()["param_groups"] == expected


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(run, listops_dir):
    path = run / "last.pt"
    state = changed(torch.load(path), "data", ...)
    torch.save(changed(state, "progress.validation_due", ...), path)
    assert train(config_of(listops_dir, run.parent), resume=True).steps == 12


def test_what_is_restored_no_longer_depends_on_the_file(cut, listops_dir, tmp_path):
    path = Path(shutil.copy(cut / "last.pt", tmp_path / "last.pt"))
    model = build_model(tiny_config(dropout=0.1))
    optimizer = build_optimizers(model, model.config)
    state = checkpoint.load(path)
    restore_optimizers(optimizer, state["optimizer"]["state"])
    expected = state["optimizer"]["state"][0]["exp_avg"].clone()
    optimizer.state_dict()["state"][0]["exp_avg"].add_(1)
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], expected)


# Other data behind the same names


def test_a_run_does_not_go_on_over_other_data(run, listops_dir, tmp_path):
    copied = Path(shutil.copytree(listops_dir, tmp_path / "copied"))
    shutil.rmtree(copied / ".cache")
    config = config_of(copied, run.parent)
    prepare(config, resume=True)  # the same data elsewhere, packed anew
    path = copied / "lra_release/listops-1000/basic_train.tsv"
    rows = path.read_text().splitlines()
    rows[1], rows[2] = rows[2], rows[1]
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError) as caught:
        train(config, resume=True)
    assert str(copied) in str(caught.value) and "was trained on" in str(caught.value)


# Evaluation and prediction


EXPORTS = {
    "no JSON": b"{", "a list": b"[]", "deep": b"[" * 10**5, "NaN": b'{"dataset": NaN}',
    "a number": b"1", "nothing": b"", "not UTF-8": b'{"dataset": "\xff"}',
    "an unknown key": b'{"dataset": "listops", "\\u001b[2J": 1}',
    "a vocabulary of numbers": b'{"dataset": "listops", "vocabulary": [1]}',
    "huge": b'{"dataset": "listops", "dim": 1000000000000, "num_heads": 1}',
    "larger than its weights": b'{"dataset": "listops", "dim": 4096, "num_heads": 1}',
    "endless layers": b'{"dataset": "listops", "num_layers": 100000}',
    "megabytes": b" " * (64 * 2**20 + 1),
}


@pytest.mark.parametrize("content", EXPORTS.values(), ids=EXPORTS)
def test_a_hostile_configuration_beside_weights_is_refused(run, content):
    (run / "config.json").write_bytes(content)
    line = refusal(load_trained, run / "model.safetensors")
    assert "config.json" in line or "model.safetensors" in line


HEADERS = {
    "cut": lambda data: data[:100], "nothing": lambda data: b"",
    "a huge header": lambda data: b"\xff" * 8 + data[8:],
    "a tensor beyond the end": lambda data: data[:-100],
    "no header": lambda data: (2).to_bytes(8, "little") + b"{}",
    "garbage": lambda data: data[:8] + b"\x00" * 50 + data[58:],
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS)
def test_damaged_exported_weights_are_refused(run, change):
    path = run / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    assert str(path) in refusal(load_trained, path)


def test_weights_that_are_not_finite_predict_nothing(run):
    state = torch.load(run / "best.pt")
    state["model"]["head.weight"][0, 0] = float("nan")
    torch.save(state, run / "best.pt")
    result = run_cli(
        "--checkpoint", run / "best.pt", "--predict", "-", cwd=run, stdin="[MAX 1 2 ]\n"
    )
    assert_refused(result, "best.pt", "head.weight is not finite")
    assert result.stdout == ""


def test_an_answer_that_is_not_finite_is_an_error(run):
    model = load_trained(run / "best.pt")
    model.head.weight.data.fill_(3e38)
    with pytest.raises(NonFiniteError, match="input"):
        list(predict(model, [b"[MAX 1 2 ]"], "input"))


def test_an_endless_line_of_input_is_not_read_to_its_end(run):
    (run / "input").write_bytes(b"1 " * (9 * 2**20))
    result = run_cli("--checkpoint", run / "best.pt", "--predict", "input", cwd=run)
    assert_refused(result, "input row 1", "bytes; cut the line")


@pytest.mark.parametrize("line", [b"\x00", b"\xff\xfe", b"9" * 5000, b"\x1b[2J", b"[MAX " * 5000])
def test_a_hostile_line_of_input_is_named_by_its_row(run, line):
    model = load_trained(run / "best.pt")
    assert "input row 2" in refusal(list, predict(model, [b"[MAX 1 2 ]", line], "input"))


# The log and the summary of a run


LOGS = {
    "no JSON": b"hello", "a list": b"[1]", "no step": b'{"loss": 1.0}',
    "a step below 0": b'{"step": -1}', "a step that is a text": b'{"step": "1"}',
    "a loss that is a text": b'{"step": 1, "loss": "\x1b[2J"}', "not UTF-8": b"\xff\xfe",
    "deep": b"[" * 50_000, "a huge number": b'{"step": ' + b"9" * 5000 + b"}",
    "an escape code": b'{"\\u001b[2J": "x"}', "a long line": b" " * 10**6,
}


@pytest.mark.parametrize("row", LOGS.values(), ids=LOGS)
def test_garbage_in_a_log_is_named_by_its_row(run, listops_dir, row):
    path = run / "metrics.jsonl"
    path.write_bytes(b'{"step": 2, "loss": 1.0}\n' + row + b'\n{"step": 4, "loss": 1.0}\n')
    before = path.read_bytes()
    assert f"{path} row 2" in refusal(read_metrics, run)
    refusal(train, config_of(listops_dir, run.parent), True)
    assert path.read_bytes() == before


def test_a_last_line_cut_short_is_left_out(run):
    path = run / "metrics.jsonl"
    rows = read_metrics(run)
    path.write_bytes(path.read_bytes()[:-5])
    assert read_metrics(run) == rows[:-1]


def test_a_log_that_is_a_pipe_is_not_waited_for(run):
    path = run / "metrics.jsonl"
    path.unlink()
    os.mkfifo(path)
    result = run_script("plots.py", run, "--out", "picture.png", cwd=run)
    assert_refused(result, f"{path}: is a pipe or a device")


@pytest.mark.parametrize("what", ["curves", "segments", "retention"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "config.yaml"])
def test_a_picture_of_garbage_is_refused(run, tmp_path, what, name):
    needed = {"curves": ["metrics.jsonl"], "segments": ["summary.json", "config.yaml"],
              "retention": ["config.yaml"]}
    summary = {"steps": 1, "test_accuracy": 0.5, "examples": {"test": 9}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / name).write_bytes(b"\x1b[2J\n{}\n")
    result = run_script("plots.py", what, run, "--out", "picture.png", cwd=tmp_path)
    if name in needed[what]:
        assert_refused(result, str(run / name))
        assert not (tmp_path / "picture.png").exists()
    else:
        assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("content", [
    b"hello", b"[]", b"\xff", b"[" * 10**5, b'{"steps": "many"}', b"1" * 10**4, b"",
])
def test_a_summary_of_garbage_is_none(run, listops_dir, content):
    (run / "summary.json").write_bytes(content)
    assert finished(config_of(listops_dir, run.parent)) is None


def test_a_loss_that_is_not_finite_is_null_in_the_log(tmp_path, listops_dir):
    trainer = prepare(config_of(listops_dir, tmp_path), resume=False)
    trainer.log.write(3, val_loss=float("nan"), val_accuracy=np.float64(0.5))
    (row,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(row, parse_constant=pytest.fail) == {
        "step": 3, "val_loss": None, "val_accuracy": 0.5
    }
