"""AMRB: it has the gradients of BPTT and of the loops, and stores one segment's activations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
import torch
from cases import (
    ATTENTIONS,
    POOLINGS,
    arrays,
    close,
    small_batch,
    small_config,
    small_model,
)

from model import RMAAT
from train import amrb_backward, bptt_backward

BACKWARDS = pytest.mark.parametrize("backward", [bptt_backward, amrb_backward])


def gradients(config, backward, masks=True, seed=1, **arguments) -> dict[str, torch.Tensor]:
    model = small_model(config)
    torch.manual_seed(seed)
    batch = small_batch(config) if masks else small_batch(config, None)
    result = backward(model, batch, **arguments)
    assert not result.loss.requires_grad and not result.logits.requires_grad
    found = {name: p.grad for name, p in model.named_parameters()}
    return {**found, "loss": result.loss, "logits": result.logits}


@pytest.mark.parametrize("variant", [
    {}, {"pooling": "last"}, {"pooling": "memory"}, {"num_segments": 1},
    {"num_segments": 6, "num_memory_tokens": 1}, {"attention_type": "softmax"},
    {"attention_type": "linear"}, {"attention_type": "nystrom"},
    {"attention_type": "luna", "pooling": "memory"},
    {"dataset": "aan", "document_pair": "separate", "num_segments": 6},
], ids=str)
def test_both_gradients_are_that_of_the_mean_loss_of_the_loops(variant):
    """Compared with central differences of the loops, along a random direction per weight."""
    config = small_config(num_layers=1, **variant)
    keys, batch = config.model_dump(), small_batch(config)
    weights = arrays(small_model(config))
    results = [gradients(config, backward) for backward in (bptt_backward, amrb_backward)]
    rows = batch.tokens.numpy(), batch.mask.numpy(), batch.labels.tolist()
    loss = reference.mean_loss(weights, keys, *rows)
    assert [found["loss"].item() for found in results] == pytest.approx([loss] * 2, rel=1e-9)

    random = np.random.default_rng(0)
    step = 1e-5
    for name, value in weights.items():
        direction = random.standard_normal(value.shape)
        if name == "token_embedding.weight":
            direction[0] = 0  # padding takes no gradient, and no real token has its id
        there, back = (
            reference.mean_loss({**weights, name: value + sign * step * direction}, keys, *rows)
            for sign in (1, -1)
        )
        for found in results:
            actual = (found[name].numpy() * direction).sum()
            assert actual == pytest.approx((there - back) / (2 * step), rel=1e-5, abs=1e-7), name


CASES = [
    {"attention_type": attention, "pooling": pooling, "num_segments": T, "num_memory_tokens": M}
    for attention, pooling, T, M in itertools.product(
        ATTENTIONS, POOLINGS, [1, 2, 6], [0, 1, 3]
    )
    if M or not (pooling == "memory" or attention == "luna")
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_amrb_leaves_the_gradients_of_bptt(case):
    """With dropout and padding: the replay must draw the masks of the first pass."""
    config = small_config(dropout=0.3, **case)
    expected, actual = (gradients(config, backward) for backward in (bptt_backward, amrb_backward))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        close(actual[name], value, 1e-10)


@pytest.mark.parametrize("change", [
    {"astro_mem": False}, {"hebbian_astro": False}, {"position_embedding": "sinusoidal"},
    {"dataset": "aan", "document_pair": "separate", "num_segments": 6},
], ids=str)
def test_amrb_leaves_the_gradients_of_bptt_whatever_is_switched(change):
    config = small_config(dropout=0.3, **change)
    expected, actual = (
        gradients(config, backward, masks=False) for backward in (bptt_backward, amrb_backward)
    )
    for name, value in expected.items():
        close(actual[name], value, 1e-10)


@pytest.mark.parametrize(("num_segments", "kept"), [(1, 1), (2, 1), (6, 1), (6, 4), (2, 3)])
def test_every_segment_runs_once_without_and_once_with_gradients_but_for_the_last(
    monkeypatch, num_segments, kept
):
    """A step thus costs (4T - k) / (3T) of BPTT: 2T - k forward passes and T backward."""
    runs = []
    segment = RMAAT.segment

    def recorded(self, tokens, memory, index, *rest):
        runs.append((index, torch.is_grad_enabled()))
        return segment(self, tokens, memory, index, *rest)

    monkeypatch.setattr(RMAAT, "segment", recorded)
    gradients(small_config(num_segments=num_segments), amrb_backward, masks=False, kept=kept)
    T = num_segments
    replayed = range(T - min(kept, T))
    assert runs == [
        *((t, False) for t in replayed), *((t, True) for t in range(len(replayed), T)),
        *((t, True) for t in reversed(replayed)),
    ]


@pytest.mark.parametrize("kept", [2, 6])
def test_kept_segments_change_no_gradient(kept):
    config = small_config(num_segments=6, dropout=0.3)
    expected, actual = gradients(config, bptt_backward), gradients(config, amrb_backward, kept=kept)
    for name, value in expected.items():
        close(actual[name], value, 1e-10)


class HeldBytes:
    """Records the peak of the bytes that autograd stores for the backward pass."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def measure(self, config, backward) -> int:
        meter, model, batch = self, small_model(config), small_batch(config, None)

        class Saved:
            def __init__(self, tensor: torch.Tensor) -> None:
                self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
                meter.now += self.size
                meter.peak = max(meter.peak, meter.now)

            def __del__(self) -> None:
                meter.now -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            backward(model, batch)
        return self.peak


def test_activations_are_those_of_one_segment_whatever_their_number():
    def peak(backward, T: int) -> int:
        config = small_config(
            max_seq_len=32 * T, num_segments=T, num_memory_tokens=1, position_embedding="none"
        )
        return HeldBytes().measure(config, backward)

    assert peak(amrb_backward, 16) < 1.2 * peak(amrb_backward, 2)
    assert peak(bptt_backward, 16) > 6 * peak(bptt_backward, 2)


def test_the_replay_starts_from_the_memories_of_the_first_pass(monkeypatch):
    """The buffer holds mem_1 ... mem_T with the factor applied; none is computed again."""
    entered = {False: {}, True: {}}
    segment = RMAAT.segment

    def recorded(self, tokens, memory, index, *rest):
        entered[torch.is_grad_enabled()][index] = memory.detach().clone()
        return segment(self, tokens, memory, index, *rest)

    config = small_config(num_segments=4)
    monkeypatch.setattr(RMAAT, "segment", recorded)
    gradients(config, amrb_backward)
    assert all(torch.equal(entered[True][t], entered[False][t]) for t in range(3))
    close(entered[False][0], small_model(config).initial_memory(5))
    assert not torch.equal(entered[False][1], entered[False][2])


@BACKWARDS
def test_gradients_are_added_and_scaled(backward):
    config = small_config()
    model, batch = small_model(config), small_batch(config)
    backward(model, batch)
    once = [p.grad.clone() for p in model.parameters()]
    result = backward(model, batch, scale=0.5)
    for parameter, gradient in zip(model.parameters(), once, strict=True):
        close(parameter.grad, 1.5 * gradient)
    close(result.loss, torch.nn.functional.cross_entropy(result.logits, batch.labels))


@BACKWARDS
def test_two_steps_drop_different_things_and_a_seed_repeats_them(backward):
    config = small_config(dropout=0.3)
    first, again, other = (gradients(config, backward, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first["logits"], again["logits"])
    assert not torch.equal(first["logits"], other["logits"])


@BACKWARDS
def test_both_backends_give_the_same_gradients(backward):
    reference, fused = (
        gradients(small_config(dropout=0.3, attention_backend=backend), backward)
        for backend in ("reference", "fused")
    )
    for name, value in reference.items():
        close(fused[name], value, 1e-10)
