"""Precision, compilation, CUDA graphs, runs that turn sick, and what one can see of them."""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch
from conftest import assert_refused, run_cli, tiny_batch, tiny_config

import train as train_module
from lra_config import dump_config
from model import build_model
from run import checkpoint
from run.log import read_metrics
from run.program import UserError
from train import amrb_backward, bptt_backward, train
from training import acceleration
from training.acceleration import (
    Manner,
    choose_manner,
    compile_model,
    uses_cuda_graphs,
)
from training.diagnostics import inspect_model

CPU = torch.device("cpu")
COMPILED_TOLERANCE = 1e-4


def run_config(tmp_path, listops_dir, **changes):
    return tiny_config(
        data_dir=str(listops_dir), output_dir=str(tmp_path), run_name="run", **changes
    )


def gradients(config, device="cpu", *, prepare=None, backward=amrb_backward):
    """Gradients of one batch, from equal weights and an equal seed."""
    torch.manual_seed(0)
    model = build_model(config).to(device)
    batch = tiny_batch(config, [40, 17, 9])
    batch = type(batch)(*(x.to(device) for x in batch))
    if prepare is not None:
        backward = prepare(model, batch) or backward
    torch.manual_seed(1)
    backward(model, batch, 1.0)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal_gradients(actual, expected, tolerance):
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= tolerance * whole, name


LONG = {"max_seq_len": 2048, "batch_size": 32, "max_steps": 100_000}


@pytest.mark.parametrize(("changes", "instructions", "begun", "precision", "compiled"), [
    ({}, True, None, "float32", False),
    (LONG, True, None, "bfloat16", False),
    (LONG, False, None, "float32", False),
    ({**LONG, "compile": True}, True, None, "bfloat16", True),
    ({**LONG, "stop_after_steps": 10}, True, None, "bfloat16", False),  # as it goes on
    (LONG, True, "float32", "float32", False),
    (LONG, True, "bfloat16", "bfloat16", False),
    (LONG, True, "auto", "float32", False),
    ({"compile": True}, True, None, "float32", True),
    ({**LONG, "precision": "float32"}, True, None, "float32", False),
    ({"precision": "bfloat16"}, True, None, "bfloat16", False),
    ({"precision": "bfloat16"}, False, None, "bfloat16", False),
], ids=str)
def test_auto_on_a_cpu_is_fast_where_that_pays(
    monkeypatch, changes, instructions, begun, precision, compiled
):
    monkeypatch.setattr(acceleration, "bfloat16_instructions", lambda: instructions)
    config = tiny_config(**changes)
    manner = choose_manner(config, CPU, 100_000, begun)
    assert (manner.precision, manner.compile) == (precision, compiled)
    emulated = precision == "bfloat16" and not instructions
    assert bool(manner.why) == (config.precision == "auto" or emulated) and "\n" not in manner.why
    assert not uses_cuda_graphs(config, CPU)


def test_cuda_compiles_unless_told_otherwise():
    cuda = torch.device("cuda")
    assert choose_manner(tiny_config(), cuda, 1) == Manner("auto", True)
    assert choose_manner(tiny_config(compile=False), cuda, 1) == Manner("auto", False)


def test_graphs_that_cannot_work_say_so_in_one_line(capsys):
    assert not uses_cuda_graphs(tiny_config(cuda_graphs=True), CPU)
    assert capsys.readouterr().out == "cuda_graphs is off: it needs a CUDA device\n"


def test_a_compiler_that_fails_leaves_the_run_eager(listops_dir, tmp_path, monkeypatch, capsys):
    def broken(function, **_):
        def call(*arguments):
            raise RuntimeError("no working C++ compiler\nand a long story")
        return call

    monkeypatch.setattr(acceleration.torch, "compile", broken)
    train(run_config(tmp_path, listops_dir, compile=True, max_steps=3))
    assert "compile is off: no working C++ compiler\n" in capsys.readouterr().out


def test_a_compiler_that_computes_something_else_is_not_used(monkeypatch, capsys):
    def wrong(function, **_):
        def call(*arguments):
            memory, readout = function(*arguments)
            return memory, 2 * readout
        return call

    monkeypatch.setattr(acceleration.torch, "compile", wrong)
    config = tiny_config()
    model, batch = build_model(config), tiny_batch(config)
    eager = model.encode
    assert not compile_model(model, amrb_backward, batch) and model.encode == eager
    assert "compile is off: its gradients differ from eager ones" in capsys.readouterr().out


def test_the_tests_that_ask_for_no_gpu_see_none():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_one_compiled_form_serves_all_segments(monkeypatch):
    forms = []

    def count(graph, inputs):
        forms.append(graph)
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(
        acceleration.torch, "compile", lambda f, **options: compile_(f, backend=count, **options)
    )
    config = tiny_config(dropout=0.1)
    torch.manual_seed(0)
    model = build_model(config)
    model.fixed_shapes = True  # as a run that compiles sets it
    batch = tiny_batch(config, [40, 17, 9])
    compile_model(model, amrb_backward, batch)
    assert 1 <= len(forms) <= 2  # without and with gradients
    before = len(forms)
    for segments in (3, 2, 1):
        L = segments * config.segment_len
        amrb_backward(model, type(batch)(batch.tokens[:, :L], batch.mask[:, :L], batch.labels))
    assert len(forms) == before


def test_the_trial_step_of_compilation_leaves_the_running_statistics(monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(
        acceleration.torch, "compile", lambda f, **options: compile_(f, backend="eager", **options)
    )
    config = tiny_config(readout_norm="batch")
    model = build_model(config)
    before = [buffer.clone() for buffer in model.buffers()]
    compile_model(model, amrb_backward, tiny_batch(config))
    for buffer, kept in zip(model.buffers(), before, strict=True):
        assert buffer.equal(kept)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_compiled_segment_has_the_eager_gradients(dropout):
    config = tiny_config(dropout=dropout)

    def prepare(model, batch):
        eager = model.encode
        compile_model(model, amrb_backward, batch)
        assert model.encode is not eager

    assert_equal_gradients(
        gradients(config, prepare=prepare), gradients(config, backward=bptt_backward),
        COMPILED_TOLERANCE,
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_trains_and_resumes(listops_dir, tmp_path, precision):
    config = run_config(tmp_path, listops_dir, precision=precision, stop_after_steps=8)
    train(config)
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert all(t.dtype == torch.float32 for t in state["model"].values())
    assert bool(state["scaler"]) == (precision == "float16")
    summary = train(run_config(tmp_path, listops_dir, precision=precision), resume=True)
    assert summary.steps == 12
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert all(math.isfinite(loss) for loss in losses)


def test_a_non_finite_loss_stops_the_run_and_names_the_remedy(listops_dir, tmp_path, monkeypatch):
    calls = itertools.count(1)

    def backward(model, batch, scale):
        scale = math.inf if next(calls) == 7 else scale
        result = amrb_backward(model, batch, scale)
        return result._replace(loss=result.loss * scale)

    monkeypatch.setattr(train_module, "amrb_backward", backward)
    with pytest.raises(UserError) as caught:
        train(run_config(tmp_path, listops_dir, warmup_steps=0))
    message = str(caught.value)
    assert "step 7" in message and "learning rate" in message
    assert str(tmp_path / "run" / "last.pt") in message
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert state["progress"]["step"] == 4
    assert all(t.isfinite().all() for t in state["model"].values())


def test_a_learning_rate_beyond_all_reason_ends_with_one_line(listops_dir, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(run_config(
        tmp_path, listops_dir, learning_rate=1e30, lr_schedule="constant", warmup_steps=0,
        grad_clip=0.0, weight_decay=0.0,
    )))
    result = run_cli("--config", str(path), cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "learning rate 1e+30" in result.stderr and "learning_rate" in result.stderr


def test_logits_that_overflow_float16_are_an_error_wherever_they_are_read(listops_dir, tmp_path):
    train(run_config(tmp_path, listops_dir, max_steps=3))
    best = tmp_path / "run" / "best.pt"
    state = torch.load(best)
    state["model"]["layers.0.expand.weight"].fill_(1e5)  # fits into float32 alone
    torch.save(state, best)
    command = ("--checkpoint", best)
    run_cli(*command, "--eval_only", "precision=float32", cwd=tmp_path, check=True)
    for action in (["--eval_only"], ["--predict", "-"]):
        result = run_cli(
            *command, *action, "precision=float16", cwd=tmp_path, stdin="[MAX 1 2 ]\n"
        )
        assert_refused(result, "not finite", "set precision=float32")
        assert result.stdout == ""


def test_internals_are_logged_on_request(listops_dir, tmp_path):
    config = run_config(tmp_path, listops_dir, log_internals=True)
    train(config)
    rows = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    for row in rows:
        assert row["gradient_norm"] > 0 and row["calcium_min"] > 0
        assert 0 < row["attention_spread/1"] < 1
        assert row["memory_norm/1"] > row["memory_norm/2"]  # the retention factors fall


def test_the_least_calcium_is_that_of_real_rows():
    config = tiny_config(max_seq_len=40, num_segments=1, num_memory_tokens=0)
    model = build_model(config)
    batch = tiny_batch(config, [40, 17, 9])
    other = batch.tokens.where(batch.mask, 3)
    found = inspect_model(model, batch)
    assert found == inspect_model(model, batch._replace(tokens=other))
    assert set(found) == {"calcium_min", "attention_spread/1", "attention_spread/2"}
    assert model.training
