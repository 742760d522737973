"""Device, precision and compilation of a run, non-finite values, and logged internals."""

from __future__ import annotations

import math
import os

import pytest
import torch
from conftest import (
    assert_refused,
    gradients_of,
    largest_difference,
    run_cli,
    tiny_batch,
    tiny_config,
    write_config,
)

import train as train_module
from model import build_model
from run import checkpoint
from run.log import read_metrics
from run.program import UserError
from train import amrb_backward, bptt_backward, train
from training import acceleration
from training.acceleration import ExecutionPlan, compile_model, plan_execution
from training.diagnostics import inspect_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
COMPILED_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}
LONG = {"max_seq_len": 2048, "batch_size": 32, "max_steps": 100_000}


def run_config(tmp_path, listops_dir, **changes):
    return tiny_config(
        data_dir=str(listops_dir), output_dir=str(tmp_path), run_name="run", **changes
    )


def logged_losses(folder) -> list[float]:
    return [row["loss"] for row in read_metrics(folder) if "loss" in row]


def test_the_tests_that_ask_for_no_gpu_see_none():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


@pytest.mark.parametrize(("changes", "instructions", "begun", "precision"), [
    ({}, True, None, "float32"),
    (LONG, True, None, "bfloat16"),
    (LONG, False, None, "float32"),
    ({**LONG, "stop_after_steps": 10}, True, None, "bfloat16"),  # as in the run to resume
    (LONG, True, "float32", "float32"),
    (LONG, True, "bfloat16", "bfloat16"),
    (LONG, True, "auto", "float32"),
    ({**LONG, "precision": "float32"}, True, None, "float32"),
    ({"precision": "bfloat16"}, True, None, "bfloat16"),
], ids=str)
def test_long_runs_on_a_cpu_use_bfloat16_where_it_has_instructions(
    monkeypatch, changes, instructions, begun, precision
):
    monkeypatch.setattr(acceleration, "bfloat16_instructions", lambda: instructions)
    config = tiny_config(**changes)
    plan = plan_execution(config, CPU, 100_000, begun)
    assert plan[:3] == (precision, False, False)
    assert bool(plan.reason) == (config.precision == "auto")


def test_a_run_says_that_its_cpu_emulates_bfloat16(monkeypatch, listops_dir, tmp_path, capsys):
    monkeypatch.setattr(acceleration, "bfloat16_instructions", lambda: False)
    train(run_config(tmp_path, listops_dir, precision="bfloat16", max_steps=3))
    line = "bfloat16, eager: emulated on this CPU, several times slower than float32\n"
    assert line in capsys.readouterr().out


def test_cuda_compiles_and_captures_unless_a_key_says_otherwise(capsys):
    assert plan_execution(tiny_config(precision="bfloat16"), CUDA, 1) == ExecutionPlan(
        "bfloat16", True, True
    )
    off = tiny_config(precision="float32", compile=False, cuda_graphs=False)
    assert plan_execution(off, CUDA, 1) == ExecutionPlan("float32", False, False)
    assert capsys.readouterr().out == ""
    assert not plan_execution(tiny_config(precision="float16"), CUDA, 1).cuda_graphs
    plan_execution(tiny_config(precision="float16", cuda_graphs=True), CUDA, 1)
    plan_execution(tiny_config(cuda_graphs=True), CPU, 1)
    assert capsys.readouterr().out.splitlines() == [
        "cuda_graphs is off: float16 scales its gradients from step to step",
        "cuda_graphs is off: it needs a CUDA device",
    ]


@pytest.fixture
def compiler(monkeypatch):
    """Replace `torch.compile` by a function of the test, which receives the original first."""
    original = torch.compile

    def use(double):
        monkeypatch.setattr(
            acceleration.torch, "compile", lambda f, **options: double(original, f, **options)
        )

    return use


def test_a_compiler_that_fails_leaves_the_run_eager(listops_dir, tmp_path, compiler, capsys):
    def broken(_, function, **options):
        def call(*arguments):
            raise RuntimeError("no working C++ compiler\nand a long story")
        return call

    compiler(broken)
    train(run_config(tmp_path, listops_dir, compile=True, max_steps=3))
    assert "compile is off: no working C++ compiler\n" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_compiled_form_serves_all_segments_and_steps(compiler, precision):
    forms = []

    def count(graph, inputs):
        forms.append(graph)
        return graph

    compiler(lambda original, f, **options: original(f, backend=count, **options))
    config = tiny_config(dropout=0.1, precision=precision, readout_norm="batch")
    model, batch = build_model(config), tiny_batch(config, [40, 17, 9])
    model.fixed_shapes = True  # as in a run that compiles
    before = [buffer.clone() for buffer in model.buffers()]
    assert compile_model(model, amrb_backward, batch)
    assert all(map(torch.equal, model.buffers(), before))
    assert 1 <= len(forms) <= 2  # without and with gradients
    compiled = len(forms)
    for segments in (3, 2, 1):
        L = segments * config.segment_len
        amrb_backward(model, type(batch)(batch.tokens[:, :L], batch.mask[:, :L], batch.labels))
    assert len(forms) == compiled


@pytest.mark.slow
@pytest.mark.parametrize("precision", COMPILED_TOLERANCE)
def test_a_compiled_segment_has_the_eager_gradients(precision):
    config = tiny_config(dropout=0.3, precision=precision)
    batch = tiny_batch(config, [40, 17, 9])

    def compiled(model, batch):
        state = torch.get_rng_state()
        assert compile_model(model, amrb_backward, batch)
        torch.set_rng_state(state)
        return amrb_backward(model, batch)

    actual, _ = gradients_of(config, compiled, batch, torch.float32)
    expected, _ = gradients_of(config, bptt_backward, batch, torch.float32)
    assert largest_difference(actual, expected) <= 10 * COMPILED_TOLERANCE[precision]


@pytest.mark.slow
def test_a_compiled_convolution_has_finite_gradients_in_bfloat16():
    """torch 2.13 miscompiles them for vectors of 512 bits."""
    config = tiny_config(
        dataset="cifar10", max_seq_len=1_024, num_segments=2, dim=64, num_heads=4, num_layers=1,
        token_mixer="conv3x3", precision="bfloat16",
    )
    model, batch = build_model(config), tiny_batch(config)
    assert compile_model(model, amrb_backward, batch)
    amrb_backward(model, batch)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_trains_and_resumes(listops_dir, tmp_path, precision):
    train(run_config(tmp_path, listops_dir, precision=precision, stop_after_steps=8))
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert all(t.dtype == torch.float32 for t in state["model"].values())
    assert bool(state["scaler"]) == (precision == "float16")
    summary = train(run_config(tmp_path, listops_dir, precision=precision), resume=True)
    assert summary.steps == 12
    assert all(map(math.isfinite, logged_losses(tmp_path / "run")))


def test_a_non_finite_loss_stops_the_run_before_it_reaches_the_weights(
    listops_dir, tmp_path, monkeypatch
):
    calls = []

    def infinite_in_step_7(model, batch, scale, *rest):
        calls.append(batch)
        result = amrb_backward(model, batch, math.inf if len(calls) == 7 else scale, *rest)
        return result._replace(loss=result.loss * (math.inf if len(calls) == 7 else 1))

    monkeypatch.setattr(train_module, "amrb_backward", infinite_in_step_7)
    with pytest.raises(UserError) as caught:
        train(run_config(tmp_path, listops_dir, warmup_steps=0))
    last = tmp_path / "run" / "last.pt"
    for words in ("step 7", "learning rate", str(last)):
        assert words in str(caught.value)
    state = checkpoint.load(last)
    assert state["progress"]["step"] == 4
    assert all(t.isfinite().all() for t in state["model"].values())


def test_a_diverging_run_ends_with_one_line(listops_dir, tmp_path):
    path = write_config(
        tmp_path, listops_dir, learning_rate=1e30, lr_schedule="constant", warmup_steps=0,
        grad_clip=0.0, weight_decay=0.0,
    )
    assert_refused(run_cli("--config", path, cwd=tmp_path), "learning rate 1e+30", "learning_rate")


def test_logits_that_overflow_float16_are_an_error(listops_dir, tmp_path):
    train(run_config(tmp_path, listops_dir, max_steps=3))
    best = tmp_path / "run" / "best.pt"
    state = torch.load(best)
    state["model"]["layers.0.expand.weight"].fill_(1e5)  # representable in float32 only
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
    train(run_config(tmp_path, listops_dir, log_internals=True))
    for row in read_metrics(tmp_path / "run"):
        if "loss" in row:
            assert row["gradient_norm"] > 0 and row["calcium_min"] > 0
            assert 0 < row["attention_spread/1"] < 1
            assert row["memory_norm/1"] > row["memory_norm/2"]  # the retention factors fall


def test_the_least_calcium_is_that_of_real_rows():
    config = tiny_config(max_seq_len=40, num_segments=1, num_memory_tokens=0)
    model, batch = build_model(config), tiny_batch(config, [40, 17, 9])
    found = inspect_model(model, batch)
    assert found == inspect_model(model, batch._replace(tokens=batch.tokens.where(batch.mask, 3)))
    assert set(found) == {"calcium_min", "attention_spread/1", "attention_spread/2"}
    assert model.training
