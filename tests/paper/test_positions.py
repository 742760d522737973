"""Relative positions R = B^T B P B^T, their initialization, and position embeddings."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
from cases import arrays, close, shaken, small_batch, small_config, small_model

from attention import AstromorphicAttention
from model import RMAAT
from train import amrb_backward, bptt_backward


def attention_over(n: int, m: int, decay_scale: float, heads: int = 1) -> AstromorphicAttention:
    """Build attention over one memory token and n - 1 others, with heads of m neurons."""
    torch.manual_seed(0)
    attention = AstromorphicAttention(small_config(
        max_seq_len=n - 1, num_segments=1, num_memory_tokens=1, num_heads=heads, dim=m * heads,
        decay_scale=decay_scale, basis_init="random",
    ))
    return shaken(attention)


@pytest.mark.parametrize(("basis", "expected"), [
    # Decay ln 2, so that P = [1 1/2; 1/2 1]. One neuron: D = B P B^T = 7, R = B^T D.
    ([[1.0, 2.0]], [[7], [14]]),
    # Two: B P = [2 5/2; 1/2 1], D = [7 5/2; 5/2 1].
    ([[1.0, 2.0], [0.0, 1.0]], [[7, 2.5], [16.5, 6]]),
])
def test_relative_positions_are_what_they_are_by_hand(basis, expected):
    attention = attention_over(2, len(basis), math.log(2))
    with torch.no_grad():
        attention.position_basis.copy_(torch.tensor([basis]))
    close(attention.positions()[0], np.array(expected) + 1.0, 1e-12)  # phi of a positive number


@pytest.mark.parametrize("decay_scale", [0.0, 0.02, 1.0, 40.0])
@pytest.mark.parametrize("n", [2, 3, 128, 129, 300])
def test_positions_are_phi_of_the_dense_matrices(n, decay_scale):
    """The lengths n lie below, at and above the chunks of the recurrence."""
    attention = attention_over(n, 3, decay_scale, heads=2)
    expected = [
        reference.phi(reference.relative_positions(basis, decay_scale))
        for basis in arrays(attention)["position_basis"]
    ]
    close(attention.positions(), np.stack(expected))


@pytest.mark.parametrize(("n", "decay_scale"), [(5, 0.3), (300, 0.05)])
def test_the_gradient_of_the_basis_is_that_of_the_dense_matrices(n, decay_scale):
    attention = attention_over(n, 3, decay_scale)
    basis = arrays(attention)["position_basis"][0]
    random = np.random.default_rng(0)
    cotangent, direction = random.standard_normal((n, 3)), random.standard_normal(basis.shape)

    def objective(step: float) -> float:
        R = reference.relative_positions(basis + step * direction, decay_scale)
        return (reference.phi(R) * cotangent).sum()

    (attention.positions()[0] * torch.from_numpy(cotangent)).sum().backward()
    actual = (attention.position_basis.grad[0].numpy() * direction).sum()
    expected = (objective(1e-6) - objective(-1e-6)) / 2e-6
    assert actual == pytest.approx(expected, rel=1e-5)


def test_very_long_segments_stay_finite():
    assert attention_over(50_000, 2, 1.0).positions().isfinite().all()


def test_the_decay_falls_with_the_distance():
    """With neurons that read one row each, D holds the kernel itself."""
    attention = attention_over(4, 4, 0.7)
    with torch.no_grad():
        attention.position_basis.copy_(torch.eye(4))
    kernel = attention.positions()[0] - 1
    close(kernel, reference.position_kernel(4, 0.7))
    assert (kernel[0].diff() < 0).all()


def test_landmark_neurons_are_initialized_as_one_bump_each_after_the_memory_rows():
    """Centers grow geometrically from the first token to the last; widths follow the gaps."""
    torch.manual_seed(0)
    M, S, m = 3, 64, 8
    config = small_config(
        num_memory_tokens=M, max_seq_len=S, num_segments=1, dim=2 * m, basis_init="landmarks"
    )
    basis = AstromorphicAttention(config).position_basis.detach().double()
    centers = [S ** (j / (m - 1)) - 1 for j in range(m + 1)]
    rows = torch.arange(-M, S)
    for j in range(m):
        width = max(0.7 * (centers[j + 1] - centers[j]), 0.7)
        bump = 1.5 / width**0.5 * torch.exp(-0.5 * ((rows - centers[j]) / width) ** 2)
        assert (basis[0, j] - bump).abs().max() < 5 * 0.02  # noise
    assert basis.argmax(dim=2)[:, 0].tolist() == [M, M]
    # Odd heads read each of the first tokens, then the centers of even heads.
    stepwise = basis.argmax(dim=2)[1, :4].tolist()
    assert stepwise == [M + round(max(j, centers[j])) for j in range(4)]


@pytest.mark.parametrize("backward", [bptt_backward, amrb_backward])
def test_the_positions_are_computed_once_per_pass_and_not_per_sample(monkeypatch, backward):
    shapes = []
    positions = RMAAT.positions

    def counted(self):
        shapes.append(positions(self).shape)
        return positions(self)

    monkeypatch.setattr(RMAAT, "positions", counted)
    config = small_config(num_layers=3)
    backward(small_model(config), small_batch(config, masks=None))
    assert shapes == [(3, 2, 2 + 4, 4)]  # layers, heads, M + S, m


@pytest.mark.parametrize(("changes", "present"), [
    ({}, True), ({"hebbian_astro": False}, False), ({"attention_type": "softmax"}, False),
], ids=str)
def test_only_the_astrocytic_weight_has_positions(changes, present):
    assert (small_model(small_config(**changes)).positions() is not None) == present


@pytest.mark.parametrize("kind", ["learned", "sinusoidal", "none"])
def test_tokens_are_embedded_by_their_position_in_the_full_sequence(kind):
    """Checks the input of the first layer, segment by segment; memory rows have no position."""
    config = small_config(position_embedding=kind)
    model, seen = small_model(config), []
    model.layers[0].register_forward_hook(lambda _layer, inputs, _y: seen.append(inputs[0]))
    tokens = small_batch(config, masks=None).tokens
    model(tokens)

    weights, keys = arrays(model), config.model_dump()
    assert len(seen) == 3
    for t, rows in enumerate(seen):
        for i in range(4):
            at = 4 * t + i
            x = weights["token_embedding.weight"][tokens[:, at]]
            x = x + reference.position_embedding(weights, keys, at)
            close(rows[:, 2 + i], reference.layer_norm(x, weights, "embedding_norm"))
    close(seen[0][:, :2], model.memory.expand(3, 2, 8))
    assert hasattr(model, "position_table") == (kind == "learned")
    if kind == "learned":
        assert model.position_table.shape == (config.max_seq_len, config.dim)


def test_sinusoidal_embeddings_are_exact_at_very_large_positions():
    """Compared with angles in integer arithmetic at a position beyond a million."""
    config = small_config(
        position_embedding="sinusoidal", max_seq_len=4 * 300_000, num_segments=300_000, dim=2,
        num_heads=1,
    )
    model = small_model(config)
    with torch.no_grad():
        model.token_embedding.weight.zero_()
    seen = []
    model.embedding_norm.register_forward_hook(lambda _norm, inputs, _y: seen.append(inputs[0]))
    model.segment(torch.ones(1, 4, dtype=torch.long), model.initial_memory(1), 299_999)
    expected = [[math.sin(at), math.cos(at)] for at in range(4 * 299_999, 4 * 300_000)]
    close(seen[0][0], expected)
