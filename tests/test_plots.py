"""Figures: drawn from files by command, current with the results, and never the end of a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script, tiny_batch, tiny_config

import plots
from attention.heads import Attention, join_heads
from model import build_model
from training.diagnostics import attention_rows

RUN = ROOT / "results/listops/rmaat"
EXPRESSION = "[MAX 2 9 [MIN 4 7 ] 0 ]"


def draw(*arguments, cwd):
    return run_script("plots.py", *arguments, cwd=cwd)


@pytest.mark.parametrize("attention_type", ["astro", "linear", "softmax"])
@pytest.mark.parametrize("index", [0, 3], ids="segment={}".format)
def test_attention_rows_times_values_are_the_attention(attention_type, index):
    torch.manual_seed(0)
    model = build_model(tiny_config(attention_type=attention_type)).double()
    tokens = tiny_batch(model.config).tokens[:1, :37]  # the last segment is not full
    seen = []
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, y: seen.append((layer, inputs[0], y)))
    rows = attention_rows(model, tokens, index)
    assert len(rows) == len(layers)
    for weights, (layer, x, y) in zip(rows, seen[-len(layers):], strict=True):
        *_, v = layer.project(x)
        torch.testing.assert_close(layer.to_out(join_heads(weights[None] @ v)), y)


def test_attention_that_does_not_read_by_weights_is_refused():
    for changes in ({"attention_type": "luna"}, {"hebbian_sigmoid": True}):
        model = build_model(tiny_config(**changes))
        with pytest.raises(ValueError, match="linear in its values"):
            attention_rows(model, tiny_batch(model.config).tokens[:1], 0)


def write_run(folder, values, **changes):
    folder.mkdir(parents=True)
    rows = "".join(json.dumps({"step": step, "loss": value}) + "\n" for step, value in values)
    (folder / "metrics.jsonl").write_text(rows)
    config = {"dataset": "listops", **changes}
    (folder / "config.yaml").write_text(json.dumps(config))
    return folder


def test_runs_that_differ_by_their_seed_share_a_band(tmp_path):
    folders = [write_run(tmp_path / str(seed), [(1, seed), (3, seed + 4)], seed=seed)
               for seed in range(3)]
    folders.append(write_run(tmp_path / "rmt", [(1, 9)], attention_type="softmax"))
    assert plots.labeled_runs(folders) == {"RMAAT": folders[:3], "RMT": folders[3:]}
    rows = [[{"step": 1, "loss": s}, {"step": 3, "loss": s + 4}] for s in range(3)]
    rows[2].insert(1, {"step": 2, "loss": 4})
    steps, mean, low, high = plots.mean_and_range(rows, "loss", 1)
    assert [x.tolist() for x in (steps, mean, low, high)] == [[1, 3], [1, 5], [0, 4], [2, 6]]


def test_runs_of_one_system_are_labeled_by_their_paths(tmp_path):
    folders = [write_run(tmp_path / str(dim), [(1, 1)], dim=dim) for dim in (8, 16)]
    assert list(plots.labeled_runs(folders)) == ["RMAAT, 8", "RMAAT, 16"]


def test_two_validations_are_points_without_a_line(tmp_path):
    rows = "".join(json.dumps({"step": s, "loss": 1, "val_accuracy": 0.5}) + "\n" for s in (1, 9))
    run = write_run(tmp_path / "run", [])
    (run / "metrics.jsonl").write_text(rows)
    accuracy, constant = plots.curves_figure([run]).axes[1].lines
    assert (accuracy.get_linestyle(), accuracy.get_marker()) == ("None", "o")
    assert constant.get_label() == "majority class"


def test_a_single_seed_is_hollow_and_a_mean_has_a_bar(tmp_path):
    runs = {}
    for system, accuracies in (("rmaat", (0.3, 0.5)), ("rmt", (0.4,))):
        runs[system] = [write_run(tmp_path / f"{system}{seed}", []) for seed in accuracies]
        for folder, accuracy in zip(runs[system], accuracies, strict=True):
            summary = {"test_accuracy": accuracy, "steps": 5}
            (folder / "summary.json").write_text(json.dumps(summary))
    mean, single = plots.accuracy_figure({"listops": runs}).axes[0].containers
    assert mean.lines[0].get_markerfacecolor() != "white" and mean.has_yerr
    assert single.lines[0].get_markerfacecolor() == "white" and not single.has_yerr
    (bar,) = mean.lines[2][0].get_segments()
    assert bar[:, 1].tolist() == pytest.approx([40 - 200**0.5, 40 + 200**0.5])


@pytest.mark.parametrize("arguments", [
    ["curves", RUN],
    ["attention", RUN, EXPRESSION],
    ["memory", ROOT / "results/benchmark/memory_cpu.json"],
    ["scaling", ROOT / "results/benchmark/scaling_cpu.json"],
    ["astrocyte"],
], ids=lambda a: a[0])
def test_each_figure_is_drawn_from_results(tmp_path, arguments):
    result = draw(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / f"{arguments[0]}.png").read_bytes().startswith(b"\x89PNG")


def test_no_committed_figure_is_older_than_its_data():
    assert plots.stale_figures() == [], "run `python plots.py all`"


def test_curves_that_cannot_be_drawn_are_one_line_of_the_log(tmp_path, capsys):
    plots.write_curves(tmp_path / "absent")
    (line,) = capsys.readouterr().out.splitlines()
    assert "curves.png: not drawn" in line


@pytest.mark.parametrize(("arguments", "words"), [
    (["attention", RUN, "[MAX 2 x ]"], ["TEXT", "'x'"]),
    (["attention", "absent", EXPRESSION], ["absent/model.safetensors"]),
    (["memory", RUN / "summary.json"], ["summary.json", "benchmark.py memory"]),
    (["scaling", "absent.json"], ["absent.json"]),
], ids=lambda a: " ".join(map(str, a[:1] + a[2:])))
def test_a_figure_that_cannot_be_drawn_is_one_line(tmp_path, arguments, words):
    result = draw(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    error = result.stderr.splitlines()[-1]
    assert all(word in error for word in words), error
    assert not list(tmp_path.glob("*.png"))


def test_a_backend_that_a_notebook_left_behind_does_not_prevent_a_figure(tmp_path):
    shutil.copy(RUN / "metrics.jsonl", tmp_path)
    shutil.copy(RUN / "config.yaml", tmp_path)
    program = f"import plots; plots.write_curves({str(tmp_path)!r})"
    backend = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, **backend})
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
