"""CUDA graphs simulated on a CPU, and the restrictions on a captured step."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from conftest import tiny_batch, tiny_config
from tape import StrictStep, Tape, fake_cuda_graphs

import train as train_module
from dataloader import Batch
from model import build_model
from run.log import read_metrics
from train import amrb_backward, bptt_backward, train
from training.acceleration import BudgetedReplay, GraphedBackward, plan_execution
from training.gradients import score

__all__ = ["fake_cuda_graphs"]  # a fixture

ATTENTIONS = ["astro", "softmax", "linear", "nystrom", "luna"]


def fixed_model(config):
    """Build a model with the fixed shapes that a graph needs."""
    model = build_model(config)
    model.fixed_shapes = True
    return model


def clear(model) -> None:
    """Set gradients to zero, in the tensors that graphs write to."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.zero_()


def gradients(model, backward, batch, seed=3) -> torch.Tensor:
    """Return the gradients of one more call."""
    clear(model)
    torch.manual_seed(seed)
    backward(model, batch, 1.0)
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("backward", [amrb_backward, bptt_backward])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_replayed_step_has_the_eager_gradients_of_another_batch(
    fake_cuda_graphs, attention, precision, backward
):
    config = tiny_config(attention_type=attention, precision=precision, dropout=0.2)
    model = fixed_model(config)
    graphed = GraphedBackward(backward)
    gradients(model, graphed, tiny_batch(config, [40, 17, 9]))
    other = tiny_batch(config, [33, 40, 12], seed=1)
    actual, expected = gradients(model, graphed, other), gradients(model, backward, other)
    assert graphed.enabled and len(graphed.captures) == 1
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
    again = gradients(model, graphed, other, seed=4)
    assert (again - actual).norm() > 1e-3 * expected.norm()  # other masks


def test_forms_share_a_pool_and_a_stream_and_take_turns(fake_cuda_graphs):
    config = tiny_config(dropout=0.2)
    model, graphed = fixed_model(config), GraphedBackward(amrb_backward)
    batches = []
    for seed, (segments, padded) in enumerate(itertools.product((4, 2), (True, False))):
        batch, L = tiny_batch(config, [40, 17, 9], seed), segments * config.segment_len
        mask = batch.mask[:, :L] if padded else None
        batches.append(Batch(batch.tokens[:, :L], mask, batch.labels))
    for batch in [*batches, *reversed(batches)]:
        actual = gradients(model, graphed, batch)
        expected = gradients(model, amrb_backward, batch)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert len(graphed.captures) == 4 and fake_cuda_graphs.streams() == 1
    assert len({id(capture.graph.pool()) for capture in graphed.captures.values()}) == 1


def test_gradients_of_several_batches_add_up_and_the_capture_leaves_none(fake_cuda_graphs):
    config = tiny_config(dropout=0.2, readout_norm="batch")
    model, graphed = fixed_model(config), GraphedBackward(amrb_backward)
    first, second = tiny_batch(config), tiny_batch(config, seed=1)
    results, start = [], copy.deepcopy(model.state_dict())
    for backward in (amrb_backward, graphed):
        model.load_state_dict(start)
        clear(model)
        torch.manual_seed(5)
        for batch in (first, second):
            backward(model, batch, 0.5)
        statistics = [buffer.clone() for buffer in model.head.buffers()]
        results.append([*(p.grad.clone() for p in model.parameters()), *statistics])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def run_losses(listops_dir, tmp_path, name, **changes) -> list[float]:
    train(tiny_config(
        data_dir=str(listops_dir), output_dir=str(tmp_path), run_name=name, dropout=0.1, **changes
    ))
    return [
        row.get("loss", row.get("val_loss")) for row in read_metrics(tmp_path / name)
    ]


@pytest.fixture
def graphs_on(monkeypatch, fake_cuda_graphs):
    """Let runs use graphs; return the list to which every new graph is added."""
    made = []

    def make(step):
        made.append(GraphedBackward(step))
        return made[-1]

    monkeypatch.setattr(
        train_module, "plan_execution",
        lambda *arguments: plan_execution(*arguments)._replace(cuda_graphs=True),
    )
    monkeypatch.setattr(train_module, "GraphedBackward", make)
    return made


@pytest.mark.parametrize("changes", [
    {"accumulate": 2, "bucket_by_length": True}, {"replay_segments": 1},
    {"memory_replay_backprop": False}, {"precision": "bfloat16"}, {"readout_norm": "batch"},
], ids=str)
def test_a_run_by_graphs_is_the_eager_run(listops_dir, tmp_path, graphs_on, monkeypatch, changes):
    graphed = run_losses(listops_dir, tmp_path, "graphed", **changes)
    (backward,) = graphs_on
    assert backward.enabled and backward.captures
    with monkeypatch.context() as patch:
        # The same batches: graphs pad to full segments.
        patch.setattr(GraphedBackward, "_try_capture", lambda *_: None)
        eager = run_losses(listops_dir, tmp_path, "eager", **changes)
    assert graphed == pytest.approx(eager, rel=1e-3 if "precision" in changes else 1e-5)


def test_a_step_that_cannot_be_captured_leaves_the_run_eager_and_the_pool_free(
    listops_dir, tmp_path, graphs_on, monkeypatch, capsys
):
    def waits(model, batch, *rest):
        result = amrb_backward(model, batch, *rest)
        result.loss.item()
        return result

    monkeypatch.setattr(train_module, "amrb_backward", waits)
    losses = run_losses(listops_dir, tmp_path, "run")
    said = capsys.readouterr().out
    assert said.count("cuda_graphs is off: operation not permitted when stream is capturing\n") == 1
    (backward,) = graphs_on
    assert not backward.enabled and not backward.captures
    assert all(loss > 0 for loss in losses)


def test_a_replay_that_computes_something_else_is_not_used(fake_cuda_graphs, monkeypatch, capsys):
    replay = Tape.replay

    def wrong(self):
        replay(self)
        for _, _, _, result in self.calls[-3:]:
            for tensor in [result] if isinstance(result, torch.Tensor) else result or ():
                tensor.add_(1)

    monkeypatch.setattr(Tape, "replay", wrong)
    config = tiny_config()
    model, graphed = fixed_model(config), GraphedBackward(amrb_backward)
    batch = tiny_batch(config)
    actual = gradients(model, graphed, batch)
    torch.testing.assert_close(actual, gradients(model, amrb_backward, batch))
    assert not graphed.enabled
    assert "cuda_graphs is off: its gradients differ from eager ones" in capsys.readouterr().out


def test_a_capture_without_memory_is_repeated_with_more_replays(fake_cuda_graphs, capsys):
    def backward(model, batch, scale, seed, kept):
        if kept > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return amrb_backward(model, batch, scale, seed, kept)

    config = tiny_config(replay_segments=0)
    model, batch = fixed_model(config), tiny_batch(config)
    graphed = GraphedBackward(backward)
    actual = gradients(model, BudgetedReplay(graphed, config), batch)
    torch.testing.assert_close(actual, gradients(model, amrb_backward, batch))
    assert graphed.enabled and len(graphed.captures) == 1
    assert "2 from now on" in capsys.readouterr().out


@pytest.fixture
def meta_is_a_device(monkeypatch):
    """Treat `meta` as a device: it has no data to read, and rejects tensors of the host."""
    autocast = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda device_type, *args, **kwargs:
        contextlib.nullcontext() if device_type == "meta" else autocast(
            device_type, *args, **kwargs
        )
    )


# Padded steps of all configurations and systems: test_fake_cuda.py.
@pytest.mark.parametrize("changes", [
    {"attention_type": "astro", "pooling": "last"}, {"attention_type": "softmax"},
    {"attention_type": "linear", "pooling": "memory"}, {"attention_type": "luna"},
    {"attention_type": "nystrom", "pooling": "last"},
    {"position_embedding": "none", "presynaptic_normalize": False},
], ids=lambda changes: "-".join(map(str, changes.values())))
def test_a_step_waits_for_nothing_draws_nothing_and_stays_on_its_device(meta_is_a_device, changes):
    config = tiny_config(dropout=0.2, num_segments=2, **changes)
    model = fixed_model(config).to("meta")
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    for lengths in (None, [40, 17, 9]):
        batch = Batch(*(x if x is None else x.to("meta") for x in tiny_batch(config, lengths)))
        with StrictStep("meta"):
            amrb_backward(model.train(), batch, 0.5, seed)
            amrb_backward(model, batch, 0.5, seed, 2)
            bptt_backward(model, batch, 0.5, seed)
            with torch.no_grad():
                score(model.eval(), batch)
