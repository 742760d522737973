"""The neuron-astrocyte macro model, term by term, and its retention factors."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import macro_model_reference as macro
import numpy as np
import pytest
import torch
from cases import close, small_config, small_model

from astrocyte import (
    DEFAULT,
    State,
    astrocytic_coupling,
    derivatives,
    retention_factors,
    simulate,
)

# Odd sizes and different constants, so that no two can be confused.
ODD = replace(
    DEFAULT, num_pre=4, num_post=2, tau_n=0.3, lambda_n=1.1, tau_s=0.7, beta=1.9, tau_p_short=1.3,
    gamma_short=2.3, tau_p_long=17.0, gamma_long=0.9, coupling_strength=0.4, coupling_length=1.7,
)


def random_state(parameters, seed: int = 0) -> tuple[State, np.ndarray]:
    """Return a state and an input, with values of both signs."""
    random = np.random.default_rng(seed)
    pre, post = parameters.num_pre, parameters.num_post
    synaptic = [random.standard_normal((post, pre)) for _ in range(3)]
    return State(random.standard_normal(pre + post), *synaptic), random.standard_normal(pre + post)


@pytest.mark.parametrize("parameters", [DEFAULT, ODD], ids=["default", "odd"])
@pytest.mark.parametrize("variable", State._fields)
def test_the_right_hand_side_is_the_looped_sum_of_its_terms(parameters, variable):
    state, drive = random_state(parameters)
    terms = macro.macro_model(*state, drive, parameters)[variable]
    close(getattr(derivatives(state, drive, parameters), variable), sum(terms.values()), 1e-12)


def zero(state: State, *fields: str) -> State:
    return state._replace(**{field: 0 * getattr(state, field) for field in fields})


def without_presynaptic_activity(state: State) -> State:
    return state._replace(x=np.where(np.arange(len(state.x)) < ODD.num_pre, 0, state.x))


# For each term a change of the constants or the input that removes this term and no other.
ALONE = [
    ("x", "leak", lambda s, b, p: (s, b, replace(p, lambda_n=0.0))),
    ("x", "synaptic input", lambda s, b, p: (without_presynaptic_activity(s), b,
                                             replace(p, lambda_n=0.0))),
    ("x", "drive", lambda s, b, p: (s, 0 * b, p)),
    ("s", "leak", lambda s, b, p: (s, b, replace(p, beta=0.0))),
    ("s", "coincidence", lambda s, b, p: (zero(s, "x"), b, p)),
    ("s", "astrocyte", lambda s, b, p: (zero(s, "p_short"), b, p)),
    ("p_short", "leak", lambda s, b, p: (s, b, replace(p, gamma_short=0.0))),
    ("p_short", "coupling", lambda s, b, p: (s, b, replace(p, coupling_strength=0.0))),
    ("p_short", "synapse", lambda s, b, p: (zero(s, "s"), b, p)),
    ("p_long", "leak", lambda s, b, p: (s, b, replace(p, gamma_long=0.0))),
    ("p_long", "synapse", lambda s, b, p: (zero(s, "s"), b, p)),
]


@pytest.mark.parametrize(
    ("variable", "term", "take_away"), ALONE, ids=[f"{case[0]} {case[1]}" for case in ALONE]
)
def test_each_term_of_each_equation_is_there(variable, term, take_away):
    state, drive = random_state(ODD)
    reduced_state, reduced_drive, reduced = take_away(state, drive, ODD)
    # The leak of x is off on both sides if x itself is changed.
    full = replace(ODD, lambda_n=0.0) if term == "synaptic input" else ODD
    change = (
        getattr(derivatives(state, drive, full), variable)
        - getattr(derivatives(reduced_state, reduced_drive, reduced), variable)
    )
    expected = macro.macro_model(*state, drive, ODD)[variable][term]
    assert np.abs(expected).max() > 1e-2
    close(change, expected, 1e-12)


def test_at_rest_without_input_nothing_moves():
    rest = State(np.zeros(6), *(np.zeros((3, 3)) for _ in range(3)))
    assert not any(rate.any() for rate in derivatives(rest, np.zeros(6)))


def test_the_coupling_falls_with_the_distance_of_the_synapses():
    actual = astrocytic_coupling(ODD)
    assert actual.shape == (2, 4, 2, 4)
    for ijkl in itertools.product(range(2), range(4), range(2), range(4)):
        assert actual[ijkl] == pytest.approx(macro.coupling(*ijkl, ODD), rel=1e-12)
    assert astrocytic_coupling(DEFAULT)[0, 0, 0, 1] < astrocytic_coupling(DEFAULT)[0, 0, 0, 0]


def test_the_paper_simulates_three_by_three_neurons_over_six_cycles():
    assert (DEFAULT.num_pre, DEFAULT.num_post, DEFAULT.num_cycles) == (3, 3, 6)
    trajectory = simulate()
    assert trajectory.p_long.shape[1:] == (3, 3)
    ends = trajectory.times[trajectory.cycle_ends]
    close(ends, DEFAULT.tau_cycle * np.arange(7.0), 1e-12)


@pytest.fixture(scope="module")
def odd_run():
    """Return constants, asymmetric in time and space, that both integrations solve quickly."""
    return replace(ODD, num_cycles=2, duty_cycle=0.3, tau_cycle=6.0, input_strength=0.8)


def test_the_simulation_integrates_the_looped_equations(odd_run):
    trajectory = simulate(odd_run)
    ends = trajectory.p_long.mean(axis=(1, 2))[trajectory.cycle_ends]
    assert ends[0] == 0
    close(ends[1:], macro.integrate(odd_run, 100), 1e-5)


def test_within_a_cycle_the_input_comes_first_and_reaches_the_presynaptic_neurons(odd_run):
    trajectory = simulate(odd_run)
    middle = trajectory.cycle_ends[1] // 2  # as many samples with input as without
    assert trajectory.times[middle] == pytest.approx(0.3 * 6.0)
    held = trajectory.x[middle, :4]
    close(held, np.full(4, 0.8 / 1.1), 1e-2)  # b / lambda
    close(trajectory.x[trajectory.cycle_ends[1], :4], np.zeros(4), 1e-2)


def test_p_short_rises_and_falls_in_each_cycle_and_p_long_saturates_over_them():
    trajectory = simulate()
    ends = trajectory.cycle_ends
    p_short, p_long = (p.mean(axis=(1, 2)) for p in (trajectory.p_short, trajectory.p_long))
    for start, end in itertools.pairwise(ends):
        cycle = p_short[start : end + 1]
        assert max(cycle[0], cycle[-1]) < 0.05 * cycle.max()
    growth = np.diff(p_long[ends])
    assert (growth > 0).all() and (np.diff(growth) < 0).all()
    plateau = p_long[ends[-1]] + growth[-1] / (1 - growth[-1] / growth[-2]) - growth[-1]
    assert 0.5 < p_long[ends[-1]] / plateau < 0.75
    assert 0.8 < growth[-1] / growth[-2] < 0.9


def test_the_reference_increments_are_those_of_the_looped_equations():
    ends = macro.integrate(DEFAULT, 60)
    found = np.diff([0.0, *ends])
    close(found / found.sum(), np.array(macro.INCREMENTS) / sum(macro.INCREMENTS), 1e-6)


@pytest.mark.parametrize("T", [1, 2, 5, 6, 7, 16, 128])
def test_a_factor_is_the_share_of_its_cycle_in_the_growth_over_all(T):
    factors = retention_factors(T)
    assert factors.shape == (T,) and factors.dtype == torch.float64
    close(factors, macro.retention_factors(T), 1e-8)


@pytest.mark.parametrize("T", [1, 2, 3, 8, 32, 127])
def test_factors_are_positive_sum_to_one_fall_with_t_and_with_T(T):
    factors, longer = retention_factors(T), retention_factors(T + 1)
    assert (factors > 0).all() and not factors.requires_grad
    assert math.fsum(factors.tolist()) == pytest.approx(1, rel=1e-12)
    assert (factors.diff() < 0).all()
    assert (longer[:T] < factors).all()


def test_later_cycles_follow_the_decay_of_the_slow_process():
    """Three simulated cycles with the continuation equal twelve simulated cycles."""
    constants = replace(DEFAULT, gamma_long=0.7, tau_p_long=50.0)
    few, many = (replace(constants, num_cycles=cycles) for cycles in (3, 12))
    close(retention_factors(12, few), retention_factors(12, many), 1e-6)


@pytest.mark.parametrize("T", [1_000, 4_460, 20_000])
def test_where_saturation_underflows_factors_stay_finite_and_never_rise(T):
    factors = retention_factors(T)
    assert factors.isfinite().all() and (factors >= 0).all() and (factors.diff() <= 0).all()


def test_the_growth_is_that_of_the_mean_over_all_synapses():
    """p^l of a synapse at the border differs, as the astrocyte couples it to fewer others."""
    trajectory = simulate(replace(DEFAULT, coupling_strength=0.3))
    at_ends = trajectory.p_long[trajectory.cycle_ends]
    shares = np.diff(at_ends.mean(axis=(1, 2)))
    close(retention_factors(6, replace(DEFAULT, coupling_strength=0.3)), shares / shares.sum())


@pytest.mark.parametrize("astro_mem", [True, False])
def test_a_factor_multiplies_the_memory_that_leaves_its_segment(astro_mem):
    """It depends on the segment's index only; the read-out of the tokens has no factor."""
    config = small_config(astro_mem=astro_mem, pooling="memory")
    model = small_model(config)
    tokens = torch.randint(1, 16, (2, 4), generator=torch.Generator().manual_seed(0))
    memory = torch.randn(2, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = macro.retention_factors(3) if astro_mem else [1.0, 1.0, 1.0]
    for index, factor in enumerate(expected):
        outputs = []
        hook = model.layers[-1].register_forward_hook(lambda *call, to=outputs: to.append(call[2]))
        next_memory, readout = model.segment(tokens, memory, index)
        hook.remove()
        memory_out = outputs[0][:, :2]  # mem', before the factor
        close(next_memory, factor * memory_out)
        close(readout, memory_out.mean(dim=1))
