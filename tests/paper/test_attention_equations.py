"""Astromorphic attention: each term equals hand-computed numbers, and all equal the loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import reference
import torch
from cases import arrays, close, shaken, small_config, small_model

from attention import AstromorphicAttention

# Hand-worked case: one head of m = 2 neurons, two rows.
#     phi(Q) = [1 2; 3 1]    phi(K) = [1 1; 15 80]    V = [1 0; 0 2]
#     m H_neuron = phi(K)^T V = [1 30; 1 160]         sum_t phi(k_t) = [16 81]
#     g = [2 3] with alpha = 1/4                      C = phi(Q) g^T = [8; 9]
#     phi(Q) (m H_neuron) = [3 350; 4 250]
Q, K, V = [[0.0, 1.0], [2.0, 0.0]], [[0.0, 0.0], [14.0, 79.0]], [[1.0, 0.0], [0.0, 2.0]]
PHI_R = [[1.0, 2.0], [3.0, 4.0]]
BY_HAND = {"dim": 2, "num_heads": 1, "num_memory_tokens": 0, "max_seq_len": 2, "num_segments": 1}


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


BACKENDS = pytest.mark.parametrize("backend", ["reference", "fused"])


def hand_worked(backend, queries=Q, keys=K, **changes) -> AstromorphicAttention:
    """The weights of the case above for x = the identity, where Q = W_Q and so on."""
    attention = AstromorphicAttention(
        small_config(**BY_HAND, attention_backend=backend, **changes)
    ).double()
    with torch.no_grad():
        attention.to_qkv.weight.copy_(torch.cat([
            torch.tensor(w, dtype=torch.float64).T for w in (queries, keys, V)
        ]))
        attention.to_out.weight.copy_(torch.eye(2))
        attention.to_out.bias.zero_()
    return attention


def read(attention, positions=None, mask=None) -> torch.Tensor:
    """Return the responses of the two rows, (2, 2)."""
    x = torch.eye(2, dtype=torch.float64)[None]
    mask = None if mask is None else torch.tensor([mask])
    positions = None if positions is None else torch.tensor([positions]).double()
    return attention(x, mask, positions)[0]


@BACKENDS
@pytest.mark.parametrize(("changes", "expected"), [
    ({}, [[1.5 / 8, 175 / 8], [2 / 9, 125 / 9]]),
    ({"presynaptic_alpha": 1.0}, [[1.5 / 178, 175 / 178], [2 / 129, 125 / 129]]),
    ({"presynaptic_alpha": 0.5}, [[1.5 / 22, 175 / 22], [2 / 21, 125 / 21]]),
    ({"hebbian_divisor": 4.0}, [[0.75 / 8, 87.5 / 8], [1 / 9, 62.5 / 9]]),
    ({"presynaptic_normalize": False}, [[1.5, 175], [2, 125]]),
    ({"hebbian_sigmoid": True}, [
        [3 * s(0.5) / 8, (s(15) + 2 * s(80)) / 8], [4 * s(0.5) / 9, (3 * s(15) + s(80)) / 9],
    ]),
], ids=str)
def test_each_term_of_the_neuronal_response_is_what_it_is_by_hand(backend, changes, expected):
    close(read(hand_worked(backend, **changes)), expected, 1e-12)


@BACKENDS
@pytest.mark.parametrize(("changes", "expected"), [
    # m (H_neuron + H_astro) = [1 30; 1 160] + [1 6; 2 8]; g and C do not depend on R.
    ({}, [[4 / 8, 186 / 8], [4.5 / 9, 138 / 9]]),
    ({"hebbian_sigmoid": True}, [
        [(s(1) + 2 * s(1.5)) / 8, (s(18) + 2 * s(84)) / 8],
        [(3 * s(1) + s(1.5)) / 9, (3 * s(18) + s(84)) / 9],
    ]),
], ids=str)
def test_the_astrocytic_weight_is_added_to_the_neuronal_one(backend, changes, expected):
    close(read(hand_worked(backend, **changes), PHI_R), expected, 1e-12)


@BACKENDS
def test_a_padded_row_is_no_key_in_either_weight_nor_in_the_calcium(backend):
    # The first row alone: m H = (phi(k_1) + phi(r_1))^T v_1 = [2 0; 3 0], g = [1 1], C = [3; 4].
    actual = read(hand_worked(backend), PHI_R, [True, False])
    close(actual, [[(2 + 2 * 3) / 2 / 3, 0], [(3 * 2 + 3) / 2 / 4, 0]], 1e-12)


@BACKENDS
@pytest.mark.parametrize("sigmoid", [False, True])
def test_where_no_calcium_flows_the_gain_is_zero_and_so_is_its_gradient(backend, sigmoid):
    attention = shaken(AstromorphicAttention(small_config(
        hebbian_sigmoid=sigmoid, attention_backend=backend
    )))
    with torch.no_grad():
        attention.to_out.bias.zero_()
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 6, [False] * 6])
    y = attention(x, mask, attention.positions())
    assert not y[1].any() and y[0].any()
    y.sum().backward()
    assert not x.grad[1].any() and x.grad[0].any()
    assert all(p.grad.isfinite().all() for p in attention.parameters())


@BACKENDS
def test_a_silent_neuron_adds_no_calcium_and_no_infinite_slope(backend):
    # phi(-1000) is 0 in double precision: m H = [0 0; 1 160], g = [0 3], C = [6; 3].
    attention = hand_worked(backend, keys=[[-1000.0, 0.0], [-1000.0, 79.0]])
    response = read(attention)
    close(response, [[1 / 6, 160 / 6], [0.5 / 3, 80 / 3]], 1e-12)
    response.sum().backward()
    assert attention.to_qkv.weight.grad.isfinite().all()


@BACKENDS
def test_calcium_below_one_amplifies(backend):
    # sum_t phi(k_t) = [1/16 1/256], g = [1/2 1/4], phi(Q) = [1 1/2; 1 1], C = [5/8; 3/4];
    # m H = phi(K)^T V = [1/32 1/16; 1/512 1/256].
    keys = [[-math.log(32), -math.log(512)]] * 2
    attention = hand_worked(backend, queries=[[0.0, -math.log(2)], [0.0, 0.0]], keys=keys)
    first, second = 1 / 32 + 1 / 1024, 1 / 32 + 1 / 512
    expected = [[first / 2 / 0.625, first / 0.625], [second / 2 / 0.75, second / 0.75]]
    close(read(attention), expected, 1e-12)


@BACKENDS
def test_a_row_that_no_neuron_hears_reads_by_the_proportions_of_its_phi(backend):
    # phi(q_1) = e^-1000 [1 1/2] is 0 in double precision, but for the factor that P undoes:
    # C = 7/2, phi(q_1) (m H) = [3/2 110].
    attention = hand_worked(backend, queries=[[-1000.0, -1000.0 - math.log(2)], [2.0, 0.0]])
    response = read(attention)
    close(response, [[0.75 / 3.5, 55 / 3.5], [2 / 9, 125 / 9]], 1e-12)
    response.sum().backward()
    assert attention.to_qkv.weight.grad.isfinite().all()


@BACKENDS
@pytest.mark.parametrize(("x", "phi"), [
    (-30.0, math.exp(-30)), (-1.0, math.exp(-1)), (0.0, 1.0), (0.5, 1.5), (3.0, 4.0),
])
def test_phi_is_elu_plus_one(backend, x, phi):
    """With P off, divisor 1 and key and value phi(0) = 1, the response to a query is its phi."""
    config = small_config(
        **BY_HAND | {"dim": 1, "max_seq_len": 1}, hebbian_astro=False, hebbian_divisor=1.0,
        presynaptic_normalize=False, attention_backend=backend,
    )
    attention = AstromorphicAttention(config).double()
    with torch.no_grad():
        attention.to_qkv.weight.copy_(torch.tensor([[x], [0.0], [1.0]]))
        attention.to_out.weight.fill_(1)
        attention.to_out.bias.zero_()
    response = attention(torch.ones(1, 1, 1, dtype=torch.float64), None)
    np.testing.assert_allclose(response.item(), phi, rtol=1e-12)


VARIANTS = [
    {"hebbian_astro": astro, "hebbian_sigmoid": sigmoid, "presynaptic_normalize": normalize}
    for astro, sigmoid, normalize in itertools.product([True, False], repeat=3)
] + [
    {"hebbian_divisor": 3.0, "presynaptic_alpha": 0.4}, {"presynaptic_alpha": 1.0},
    {"num_hidden": 3}, {"num_hidden": 7, "hebbian_sigmoid": True}, {"decay_scale": 0.0},
    {"num_heads": 1}, {"num_heads": 4}, {"num_memory_tokens": 0},
]


@BACKENDS
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_attention_and_its_gradient_are_those_of_the_loops(backend, variant, padded):
    """The gradient is checked by central differences along a random direction per weight."""
    config = small_config(**variant, attention_backend=backend)
    keys = config.model_dump()
    attention = shaken(AstromorphicAttention(config))
    n = config.num_memory_tokens + 4
    torch.manual_seed(2)
    x = torch.randn(2, n, config.dim, dtype=torch.float64, requires_grad=True)
    real = [[True] * n, [True, False, True, True, False, False][:n] if padded else [True] * n]
    cotangent = torch.randn(2, n, config.dim, dtype=torch.float64)

    def written_out(values: dict[str, np.ndarray]) -> np.ndarray:
        weights = {"attention." + name: value for name, value in values.items()}
        return np.stack([
            reference.attend(weights, "", keys, rows, seen)
            for rows, seen in zip(values["x"], real, strict=True)
        ])

    positions = attention.positions() if config.hebbian_astro else None
    y = attention(x, torch.tensor(real) if padded else None, positions)
    values = {**arrays(attention), "x": x.detach().numpy()}
    close(y, written_out(values))

    (y * cotangent).sum().backward()
    gradients = {**{name: p.grad for name, p in attention.named_parameters()}, "x": x.grad}
    random = np.random.default_rng(0)
    step = 1e-5
    for name, value in values.items():
        direction = random.standard_normal(value.shape)
        there, back = (
            (written_out({**values, name: value + sign * step * direction})
             * cotangent.numpy()).sum()
            for sign in (1, -1)
        )
        expected = (there - back) / (2 * step)
        actual = (gradients[name].numpy() * direction).sum()
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-6), name


def test_each_layer_and_head_has_its_own_basis():
    """A change of one head's B in one layer changes only the positions of that head and layer."""
    model = small_model(small_config(num_layers=3))
    before = model.positions()
    with torch.no_grad():
        model.layers[1].attention.position_basis[1] += 0.1
    changed = (model.positions() != before).flatten(2).any(dim=2)
    assert changed.tolist() == [[False, False], [False, True], [False, False]]


def test_attention_adds_no_residual_and_queries_keys_and_values_have_no_bias():
    attention = shaken(AstromorphicAttention(small_config()))
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        attention.to_out.weight.zero_()
    close(attention(x, None, attention.positions())[0], attention.to_out.bias.expand(6, 8))
    assert attention.to_qkv.bias is None
