"""Properties of the neuron-astrocyte macro model and of the retention factors."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from astrocyte import (
    DEFAULT,
    Trajectory,
    astrocytic_coupling,
    main,
    retention_factors,
    simulate,
    simulated_increments,
)

SEGMENT_COUNTS = (1, 2, 3, 8, 16, 64, 128)

RTOL_SUM = 1e-12
RTOL_SOLVER = 1e-8  # factors at the default tolerance against a ten times finer one
RTOL_RECURSION = 1e-6  # simulated against continued increments
RTOL_TRANSIENT = 1e-3  # the first cycle starts from rest, not from the periodic state


@pytest.fixture(scope="module")
def trajectory() -> Trajectory:
    return simulate()


def cycles_of(trajectory: Trajectory, process: np.ndarray) -> list[np.ndarray]:
    """Cut the mean over the synapses into cycles, both boundaries included."""
    mean, ends = process.mean(axis=(1, 2)), trajectory.cycle_ends
    return [mean[a : b + 1] for a, b in pairwise(ends)]


def test_trajectory_shapes_agree_and_hold_the_cycle_boundaries(trajectory: Trajectory) -> None:
    steps = len(trajectory.times)
    assert trajectory.x.shape == (steps, 6)
    for state in (trajectory.s, trajectory.p_short, trajectory.p_long):
        assert state.shape == (steps, 3, 3)
        assert state.dtype == np.float64
        assert np.isfinite(state).all()
    assert (np.diff(trajectory.times) > 0).all()
    boundaries = trajectory.times[trajectory.cycle_ends]
    assert boundaries.tolist() == [t * DEFAULT.tau_cycle for t in range(DEFAULT.num_cycles + 1)]


def test_network_need_not_be_square() -> None:
    trajectory = simulate(replace(DEFAULT, num_pre=4, num_post=2, num_cycles=1))
    assert trajectory.x.shape[1:] == (6,)
    assert trajectory.p_long.shape[1:] == (2, 4)


def test_coupling_is_symmetric_and_decays_with_distance() -> None:
    coupling = astrocytic_coupling()
    np.testing.assert_array_equal(coupling, coupling.transpose(2, 3, 0, 1))
    from_corner = coupling[0, 0]
    assert from_corner[0, 0] == DEFAULT.coupling_strength
    along = [from_corner[k] for k in ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2))]
    assert (np.diff(along) < 0).all()


def test_short_term_process_rises_and_falls_in_every_cycle(trajectory: Trajectory) -> None:
    for cycle in cycles_of(trajectory, trajectory.p_short):
        # The synapses lag the input, so p^s may still fall for a moment after the onset.
        trough, peak = cycle[: len(cycle) // 10].argmin(), cycle.argmax()
        assert (np.diff(cycle[trough : peak + 1]) > 0).all()
        assert (np.diff(cycle[peak:]) < 0).all()
        assert max(cycle[0], cycle[-1]) < 0.05 * cycle[peak]


def test_long_term_process_rises_from_cycle_to_cycle_and_saturates(trajectory: Trajectory) -> None:
    ends = trajectory.p_long.mean(axis=(1, 2))[trajectory.cycle_ends]
    increments = np.diff(ends)
    assert (increments > 0).all()
    assert (np.diff(increments) < 0).all()
    r = DEFAULT.cycle_ratio
    plateau = ends[-1] + increments[-1] * r / (1 - r)
    assert 0.5 < ends[-1] / plateau < 0.75


def test_cycle_ratio_lies_between_0_8_and_0_9() -> None:
    assert 0.8 <= DEFAULT.cycle_ratio <= 0.9


def test_simulated_increments_are_geometric() -> None:
    increments = np.array(simulated_increments())
    geometric = increments[-1] * DEFAULT.cycle_ratio ** np.arange(1.0 - len(increments), 1.0)
    np.testing.assert_allclose(increments, geometric, rtol=RTOL_TRANSIENT)
    np.testing.assert_allclose(increments[1:], geometric[1:], rtol=RTOL_RECURSION)


@pytest.mark.parametrize("num_segments", SEGMENT_COUNTS)
def test_factors_are_positive_sum_to_one_and_fall(num_segments: int) -> None:
    factors = retention_factors(num_segments)
    assert factors.shape == (num_segments,)
    assert factors.dtype == torch.float64
    assert not factors.requires_grad
    assert (factors > 0).all()
    assert factors.sum().item() == pytest.approx(1, rel=RTOL_SUM)
    assert (factors.diff() < 0).all()


def test_every_factor_is_smaller_in_a_longer_sequence() -> None:
    for num_segments in range(1, 128):
        shorter, longer = retention_factors(num_segments), retention_factors(num_segments + 1)
        assert (longer[:num_segments] < shorter).all(), f"T = {num_segments}"


# Float64 underflows near T = 4452, where vectorized and scalar powers could disagree.
@pytest.mark.parametrize("num_segments", [*range(4440, 4470), 100_000])
def test_underflow_leaves_factors_finite_non_negative_and_non_increasing(num_segments: int) -> None:
    factors = retention_factors(num_segments)
    assert factors.isfinite().all()
    assert (factors >= 0).all()
    assert (factors.diff() <= 0).all()
    assert factors.sum().item() == pytest.approx(1, rel=RTOL_SUM)


@pytest.mark.parametrize("num_segments", [0, -1])
def test_fewer_than_one_segment_is_refused_in_one_line(num_segments: int) -> None:
    with pytest.raises(ValueError, match=f"num_segments={num_segments}") as refusal:
        retention_factors(num_segments)
    assert "\n" not in str(refusal.value)


def test_changing_the_returned_factors_does_not_change_later_ones() -> None:
    expected = retention_factors(8).clone()
    retention_factors(8).zero_()
    assert torch.equal(retention_factors(8), expected)


def test_a_finer_solver_tolerance_leaves_the_factors() -> None:
    finer = replace(DEFAULT, solver_rtol=DEFAULT.solver_rtol / 10)
    torch.testing.assert_close(
        retention_factors(16, finer), retention_factors(16), rtol=RTOL_SOLVER, atol=0
    )


@pytest.mark.parametrize("num_cycles", [3, 12])
def test_simulating_more_cycles_agrees_with_the_recursion(num_cycles: int) -> None:
    other = replace(DEFAULT, num_cycles=num_cycles)
    torch.testing.assert_close(
        retention_factors(64, other), retention_factors(64), rtol=RTOL_RECURSION, atol=0
    )


def test_command_prints_the_factors(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [len(row) - 3 for row in rows] == [2, 4, 8, 16]
    assert rows[2][3:] == [f"{factor:.4f}" for factor in retention_factors(8)]
