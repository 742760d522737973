"""Tests that need a CUDA device: `pytest -m gpu`.

`TEST_DEVICE=cpu pytest -m gpu` runs those without CUDA graphs on a CPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from conftest import finished, largest_difference, start_process, tiny_batch, tiny_config

from dataloader import Batch
from lra_config import dump_config
from model import build_model
from run.log import read_metrics
from train import amrb_backward, bptt_backward, train
from training.acceleration import GraphedBackward, compile_model

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
ATTENTIONS = ["astro", "softmax", "linear", "nystrom", "luna"]
# Relative to the full gradient's norm; products of float32 matrices do not use TF32 by default.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}
ON_CUDA = pytest.mark.skipif(DEVICE != "cuda", reason="graphs need a CUDA device")

pytestmark = pytest.mark.gpu


def on_device(batch: Batch) -> Batch:
    return Batch(*(x if x is None else x.to(DEVICE) for x in batch))


def gpu_config(**changes):
    return tiny_config(device=DEVICE, **changes)


def gradients(model, backward, batch) -> dict[str, torch.Tensor]:
    """Return the gradients of one batch, from cleared gradients and a fixed seed."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.zero_()
    torch.manual_seed(1)
    backward(model, batch, 1.0)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_alike(actual, expected, precision) -> None:
    """Assert equal gradients within a tolerance; in float32 for each tensor as well."""
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    difference = torch.cat([(actual[n] - g).flatten() for n, g in expected.items()]).norm()
    assert difference <= TOLERANCE[precision] * whole
    if precision == "float32":
        assert largest_difference(actual, expected) <= 10 * TOLERANCE[precision]


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_amrb_has_the_gradients_of_bptt(attention, precision):
    config = gpu_config(attention_type=attention, precision=precision, dropout=0.2)
    model, batch = build_model(config).to(DEVICE), on_device(tiny_batch(config, [40, 17, 9]))
    expected = gradients(model, bptt_backward, batch)
    assert_alike(gradients(model, amrb_backward, batch), expected, precision)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_the_device_computes_what_the_cpu_computes(attention):
    config = gpu_config(attention_type=attention, precision="float32", dropout=0.2)
    model, batch = build_model(config), tiny_batch(config, [40, 17, 9])
    expected = gradients(model, amrb_backward, batch)
    model.zero_grad()
    actual = gradients(model.to(DEVICE), amrb_backward, on_device(batch))
    assert_alike({name: g.cpu() for name, g in actual.items()}, expected, "float32")


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("attention", ["astro", "linear"])
def test_the_fused_response_is_the_reference(attention, precision):
    config = gpu_config(attention_type=attention, precision=precision)
    model, batch = build_model(config).to(DEVICE), on_device(tiny_batch(config, [40, 17, 9]))
    fused = gradients(model, amrb_backward, batch)
    for layer in model.layers:
        layer.attention.backend = "reference"
    assert_alike(fused, gradients(model, amrb_backward, batch), precision)


@ON_CUDA
@pytest.mark.parametrize(("attention", "precision", "compiled"), [
    *((attention, precision, False)
      for attention in ATTENTIONS for precision in ("float32", "bfloat16")),
    ("astro", "bfloat16", True),  # half a minute each, so one system represents all
])
def test_graphs_of_interleaved_shapes_have_the_eager_gradients(attention, precision, compiled):
    config = gpu_config(attention_type=attention, precision=precision, dropout=0.2)
    model = build_model(config).to(DEVICE)
    batches = []
    for segments in (4, 2, 3):
        batch, L = tiny_batch(config, [40, 17, 9], segments), segments * config.segment_len
        batches.append(on_device(Batch(batch.tokens[:, :L], batch.mask[:, :L], batch.labels)))
    expected = [gradients(model, amrb_backward, batch) for batch in batches]
    if compiled:
        assert compile_model(model, amrb_backward, batches[0])
    graphed = GraphedBackward(amrb_backward)
    for _ in range(2):
        for batch, gradient in zip(batches, expected, strict=True):
            assert_alike(gradients(model, graphed, batch), gradient, precision)
    assert graphed.enabled and len(graphed.captures) == 3


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_compiled_step_has_the_eager_gradients(precision):
    config = gpu_config(precision=precision, dropout=0.2)
    model, batch = build_model(config).to(DEVICE), on_device(tiny_batch(config, [40, 17, 9]))
    expected = gradients(model, amrb_backward, batch)
    assert compile_model(model, amrb_backward, batch)
    assert_alike(gradients(model, amrb_backward, batch), expected, precision)


@ON_CUDA
def test_a_step_that_cannot_be_captured_leaves_the_device_usable(capsys):
    def waits(model, batch, *rest):
        result = amrb_backward(model, batch, *rest)
        result.loss.item()
        return result

    config = gpu_config(precision="float32", dropout=0.2)
    model, graphed = build_model(config).to(DEVICE), GraphedBackward(waits)
    batch = on_device(tiny_batch(config, [40, 17, 9]))
    held = torch.cuda.memory_reserved()
    actual = gradients(model, graphed, batch)
    assert_alike(actual, gradients(model, amrb_backward, batch), "float32")
    assert not graphed.enabled and "cuda_graphs is off: " in capsys.readouterr().out
    torch.rand(3, device=DEVICE)
    assert torch.cuda.memory_reserved() <= held + 64 * 2**20


@pytest.mark.parametrize("changes", [
    {}, {"compile": False, "precision": "float16"}, {"compile": False, "replay_segments": "auto"},
    {"compile": False, "accumulate": 2}, {"compile": False, "precision": "float32"},
], ids=str)
def test_a_run_resumes_and_evaluates(listops_dir, tmp_path, changes):
    keys = {"data_dir": str(listops_dir), "output_dir": str(tmp_path), "dropout": 0.1, **changes}
    train(gpu_config(run_name="cut", stop_after_steps=6, **keys))
    train(gpu_config(run_name="cut", **keys), resume=True)
    summary = train(gpu_config(run_name="whole", **keys))
    assert summary.steps == 12 and 0 <= summary.test_accuracy <= 1
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / name) if "loss" in row]
        for name in ("cut", "whole")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_a_checkpoint_of_the_cpu_goes_on_here(listops_dir, tmp_path):
    keys = {"data_dir": str(listops_dir), "output_dir": str(tmp_path), "run_name": "run"}
    train(tiny_config(stop_after_steps=6, **keys))
    assert train(gpu_config(**keys), resume=True).steps == 12


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_two_processes_train_together(listops_dir, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(dump_config(gpu_config(
        data_dir=str(listops_dir), output_dir=str(tmp_path), run_name="run", batch_size=4
    )))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = finished(start_process(
        "run_train.py", "--config", path, cwd=tmp_path, launcher=launcher
    ))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "summary.json").exists()
