"""AMRB has the gradients of BPTT under every switch, precision and frozen parameter."""

from __future__ import annotations

import contextlib
import functools
import itertools

import pytest
import torch
from conftest import ROOT, gradients_of, largest_difference, tiny_batch, tiny_config

from lra_config import read_mapping
from model import RMAAT, AstromorphicAttention, build_model
from train import amrb_backward, bptt_backward

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
LENGTHS = [48, 3, 30, 0]
SYSTEMS = ROOT / "configs/tables"


def worst_difference(config, dtype, batch, kept: int = 1) -> float:
    """Return the `largest_difference` between the gradients of AMRB and BPTT."""
    expected, bptt = gradients_of(config, bptt_backward, batch, dtype)
    amrb_keeping = functools.partial(amrb_backward, kept=kept)
    actual, amrb = gradients_of(config, amrb_keeping, batch, dtype)
    torch.testing.assert_close(amrb.logits, bptt.logits)
    torch.testing.assert_close(amrb.loss, bptt.loss)
    return largest_difference(actual, expected)


@pytest.mark.parametrize("pooling", ["mean", "last", "memory"])
@pytest.mark.parametrize("attention", ["astro", "softmax", "linear", "nystrom", "luna"])
def test_gradients_do_not_depend_on_the_replayed_segments(attention, pooling):
    config = tiny_config(
        max_seq_len=48, attention_type=attention, pooling=pooling, dropout=0.3
    )
    for kept, lengths in itertools.product((2, 3, 4, 9), (LENGTHS, None, [20, 7])):
        batch = tiny_batch(config, lengths)
        if lengths == [20, 7]:  # ends inside the second segment
            batch = batch._replace(tokens=batch.tokens[:, :20], mask=batch.mask[:, :20])
        assert worst_difference(config, torch.float64, batch, kept) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("backward", [bptt_backward, amrb_backward])
@pytest.mark.parametrize("system", [path.stem for path in sorted(SYSTEMS.glob("*.yaml"))])
def test_a_recomputed_layer_has_the_same_gradients(system, backward, precision):
    keys = read_mapping(SYSTEMS / f"{system}.yaml")
    for dropout in (0.0, 0.3):
        found = []
        for recompute in ("none", "layer"):
            config = tiny_config(
                **{**keys, "dropout": dropout, "precision": precision, "recompute": recompute}
            )
            batch = tiny_batch(config, [40, 17, 9])
            found.append(gradients_of(config, backward, batch, torch.float32)[0])
        for name, gradient in found[0].items():
            assert torch.equal(found[1][name], gradient), name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("attention", ["astro", "softmax", "linear", "nystrom", "luna"])
def test_amrb_gradients_equal_bptt_in_float32(attention, dropout):
    config = tiny_config(max_seq_len=48, attention_type=attention, num_segments=8, dropout=dropout)
    batch = tiny_batch(config, LENGTHS)
    assert worst_difference(config, torch.float32, batch) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("switch", [
    {"hebbian_astro": False}, {"hebbian_sigmoid": True}, {"presynaptic_normalize": False},
    {"astro_mem": False}, {"position_embedding": "sinusoidal"}, {"position_embedding": "none"},
    {"readout_norm": "batch", "classifier_dim": 7}, {"num_hidden": 5},
    {"basis_init": "neighbors", "num_hidden": 12},
    {"dataset": "cifar10", "pooling": "intensity", "position_init": "sinusoidal_2d"},
], ids=str)
def test_amrb_gradients_equal_bptt_under_every_switch(switch):
    config = tiny_config(max_seq_len=48, dropout=0.1, **switch)
    batch = tiny_batch(config, LENGTHS)
    assert worst_difference(config, torch.float64, batch) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("outer", [False, True], ids=["precision key", "autocast around the call"])
@pytest.mark.parametrize("read_out", [
    {}, {"pooling": "last"}, {"pooling": "memory"}, {"pooling": "intensity", "dataset": "cifar10"},
], ids=str)
def test_amrb_reaches_every_weight_under_autocast(read_out, outer):
    config = tiny_config(precision="auto" if outer else "bfloat16", **read_out)
    batch = tiny_batch(config, [40, 17, 9])

    def autocast():
        return torch.autocast("cpu", torch.bfloat16) if outer else contextlib.nullcontext()

    results = []
    for backward in (bptt_backward, amrb_backward):
        with autocast():
            results.append(gradients_of(config, backward, batch, torch.float32)[0])
    for name, expected in results[0].items():
        actual = results[1][name]
        assert (actual - expected).norm() <= 0.05 * expected.norm() + 1e-4, name


class FixedFirstMemory(RMAAT):
    """A model whose first memory is zeros, not a parameter."""

    def initial_memory(self, batch_size):
        return self.retention_factors.new_zeros(batch_size, *self.memory.shape)


def freeze_all_but(model, *trained: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))


UNTRAINED = {
    "first memory of zeros": lambda model: None,
    "frozen memory": lambda model: model.memory.requires_grad_(False),
    "frozen position basis": lambda model: freeze_all_but(model, "head", "memory", "token"),
    "head alone": lambda model: freeze_all_but(model, "head"),
}


@pytest.mark.parametrize("pooling", ["mean", "last", "memory"])
@pytest.mark.parametrize("kind", UNTRAINED)
def test_amrb_equals_bptt_with_frozen_parameters(kind, pooling):
    config = tiny_config(dropout=0.2, pooling=pooling)
    batch = tiny_batch(config, [40, 17, 9])
    found = []
    for backward in (bptt_backward, amrb_backward):
        torch.manual_seed(0)
        model = (FixedFirstMemory if kind == "first memory of zeros" else RMAAT)(config).double()
        UNTRAINED[kind](model)
        torch.manual_seed(1)
        backward(model, batch)
        found.append({name: p.grad for name, p in model.named_parameters()})
    bptt, amrb = found
    for name, gradient in bptt.items():
        assert (amrb[name] is None) == (gradient is None), name
        assert gradient is None or torch.equal(amrb[name], gradient), name


def test_with_another_seed_in_the_replay_dropout_breaks_it(monkeypatch):
    config = tiny_config(dropout=0.3)
    batch = tiny_batch(config)
    assert worst_difference(config, torch.float64, batch) <= TOLERANCE[torch.float64]
    segment = RMAAT.segment
    monkeypatch.setattr(RMAAT, "segment", lambda self, *args: segment(self, *args[:-1], None))
    assert worst_difference(config, torch.float64, batch) > 1e-3


def test_both_leave_the_same_random_state():
    config = tiny_config(dropout=0.3)
    states = []
    for backward in (bptt_backward, amrb_backward):
        gradients_of(config, backward, tiny_batch(config))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("backward", [bptt_backward, amrb_backward])
def test_the_position_term_is_computed_once_per_step_and_layer(monkeypatch, backward):
    calls = []
    original = AstromorphicAttention.positions
    monkeypatch.setattr(
        AstromorphicAttention, "positions", lambda self: calls.append(1) or original(self)
    )
    config = tiny_config(num_layers=3, num_segments=8)
    backward(build_model(config), tiny_batch(config))
    assert len(calls) == 3
