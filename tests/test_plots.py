"""Pictures: each is drawn from files as a user would, and shows what it says it shows."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import ROOT, assert_refused, run_script, tiny_batch, tiny_config
from matplotlib import colors

from attention.heads import Attention, join_heads
from model import build_model
from plots import COLORS, DASHES, MARKERS, Finished, line_style, mean_accuracy
from tables import SYSTEMS
from training.diagnostics import attention_rows

RUN = ROOT / "results/listops/rmaat"
SEGMENTS = sorted(ROOT.glob("results/reproduce/ablations/short/listops/segments_*/seed0"))
EXPRESSION = "[MAX 2 9 [MIN 4 7 ] 0 ]"


def plots(*arguments, cwd):
    return run_script("plots.py", *arguments, cwd=cwd)


@pytest.mark.parametrize("attention_type", ["astro", "linear", "softmax"])
@pytest.mark.parametrize("index", [0, 3], ids="segment={}".format)
def test_attention_rows_times_values_are_the_attention(attention_type, index):
    torch.manual_seed(0)
    model = build_model(tiny_config(attention_type=attention_type)).double()
    tokens = tiny_batch(model.config).tokens[:1, :37]  # the last segment is not whole
    seen = []
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    for layer in layers:
        layer.register_forward_hook(lambda layer, inputs, y: seen.append((layer, inputs[0], y)))
    rows = attention_rows(model, tokens, index)
    assert len(rows) == len(layers)
    for weights, (layer, x, y) in zip(rows, seen[-len(layers):], strict=True):
        *_, v = layer.project(x)
        torch.testing.assert_close(layer.to_out(join_heads(weights[None] @ v)), y)


def test_rows_of_what_does_not_read_by_weights_are_refused():
    for changes in ({"attention_type": "luna"}, {"hebbian_sigmoid": True}):
        model = build_model(tiny_config(**changes))
        with pytest.raises(ValueError, match="linear in its values"):
            attention_rows(model, tiny_batch(model.config).tokens[:1], 0)


def test_lines_differ_without_their_colours():
    styles = [line_style(number) for number in range(len(DASHES))]
    assert len({(str(s["linestyle"]), s["marker"]) for s in styles}) == len(styles)
    assert len(COLORS) == len(DASHES) == len(MARKERS) == len(SYSTEMS)
    lightness = [sum(colors.to_rgb(color)) for color in COLORS[:3]]
    assert max(lightness) < 2  # the first ones are dark enough for white paper


def test_more_seeds_on_the_same_examples_make_no_smaller_error():
    run = Finished(steps=1, test_accuracy=0.4, examples={"test": 2400})
    for runs in ([run], 3 * [run]):
        assert mean_accuracy(runs) == pytest.approx((40, 1))


@pytest.mark.parametrize("arguments", [
    ["curves", RUN],
    ["segments", *SEGMENTS],
    ["retention", RUN],
    ["attention", RUN, EXPRESSION],
    ["memory", ROOT / "results/benchmark/memory_cpu.json"],
], ids=lambda a: a[0])
def test_each_picture_is_drawn_from_results(tmp_path, arguments):
    result = plots(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / f"{arguments[0]}.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_the_factor_keeps_all_of_its_memory(tmp_path):
    for name, changes in (("with", {}), ("without", {"astro_mem": False})):
        (tmp_path / name).mkdir()
        text = "dataset: listops\n" + "".join(f"{k}: {json.dumps(v)}\n" for k, v in changes.items())
        (tmp_path / name / "config.yaml").write_text(text)
    result = plots("retention", "with", "without", "--out", "a.svg", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "T = 8, astro_mem: false" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(("arguments", "words"), [
    (["attention", RUN, "[MAX 2 x ]"], ["LINE", "'x'"]),
    (["attention", RUN, EXPRESSION, "--segment", 1], ["segment 1 of 1"]),
    (["attention", "absent", EXPRESSION], ["absent/model.safetensors"]),
    (["segments", "unfinished"], ["unfinished/summary.json"]),
    (["retention", "absent"], ["absent/config.yaml"]),
    (["memory", RUN / "summary.json"], ["summary.json", "benchmark.py memory"]),
    (["memory", "absent.json"], ["absent.json"]),
    (["attention", RUN], ["LINE"]),
], ids=lambda a: " ".join(map(str, a[:1] + a[2:])))
def test_what_cannot_be_drawn_is_told_in_one_line(tmp_path, arguments, words):
    (tmp_path / "unfinished").mkdir()
    shutil.copy(RUN / "config.yaml", tmp_path / "unfinished")
    assert_refused(plots(*arguments, cwd=tmp_path), *words)
    assert not list(tmp_path.glob("*.png"))
