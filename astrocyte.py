"""The neuron-astrocyte macro model and the memory retention factors it yields.

The slow astrocytic process p^l of a small network driven for a few short-term plasticity (STP)
cycles integrates from cycle to cycle and saturates. What one cycle still adds to it, as a share of
what all T cycles add, is the factor by which RMAAT scales the memory after segment t of T.

    python astrocyte.py                   # prints the factors
    python astrocyte.py --plot FILE.png   # draws the two processes and the factors

Shape letters, in this module only: A postsynaptic neurons (index i), E presynaptic neurons
(index j). Synapse (i, j) leads from neuron j to neuron i; k, l run over the same two ranges.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.special import expit
from torch import Tensor

SAMPLES_PER_PHASE = 60  # a cycle has two phases: input on, then off
TABLE_SEGMENTS = (2, 4, 8, 16)  # values of T shown by the command line

# The paper names these functions and leaves them open. All are smooth and saturate, and all but g
# vanish at 0, so that silence is the resting state; g(0) > 0 lets a synapse at rest transmit.
g = expit
phi = theta = psi = kappa = np.tanh


@dataclass(frozen=True)
class MacroModelParameters:
    """Constants of the macro model; the paper publishes none but the 3 x 3 neurons and 6 cycles.

    All others are our choice, made so that p^s rises and falls within each cycle, p^l covers about
    63 % of the way to its plateau in six cycles, and each cycle adds less to p^l than the last.
    States are dimensionless, times in seconds, so the decays are dimensionless too.

    Source: RMAAT (arXiv 2601.00426), macro model of long-term plasticity.
    """

    num_pre: int = 3  # E, presynaptic neurons; they alone receive the input
    num_post: int = 3  # A, postsynaptic neurons, driven through the synapses
    num_cycles: int = 6  # STP cycles simulated; later increments follow from `cycle_ratio`
    tau_cycle: float = 10.0  # tau_cycle, duration of one cycle, s
    duty_cycle: float = 0.5  # share of a cycle, from its start, with the input on, in (0, 1)
    input_strength: float = 1.0  # b_i(t) while on
    tau_n: float = 0.1  # tau_n, time constant of the neurons, s
    lambda_n: float = 1.0  # lambda, decay of the neurons
    tau_s: float = 0.5  # tau_s, time constant of the synapses, s
    beta: float = 2.0  # beta, decay of the synapses
    tau_p_short: float = 1.0  # tau_p^s, time constant of the fast astrocytic process (STP), s
    gamma_short: float = 2.0  # gamma^s, its decay; must outweigh the feedback through T_ijkl and s
    tau_p_long: float = 60.0  # tau_p^l, time constant of the slow astrocytic process (LTP), s
    gamma_long: float = 1.0  # gamma^l, its decay
    coupling_strength: float = 0.1  # T_ijij, coupling of a fast process to itself
    coupling_length: float = 1.0  # distance over which T_ijkl falls by e, in grid steps
    solver_rtol: float = 1e-9  # relative tolerance; the absolute one is a thousandth of it

    @property
    def cycle_ratio(self) -> float:
        """The ratio r = exp(-gamma^l tau_cycle / tau_p^l) of successive increments of p^l."""
        return math.exp(-self.gamma_long * self.tau_cycle / self.tau_p_long)


DEFAULT = MacroModelParameters()


@dataclass(frozen=True)
class Trajectory:
    """States of the macro model over time, all float64.

    Args:
        times: (steps,) s, strictly rising from 0.
        x: (steps, E + A) neurons, presynaptic ones first.
        s: (steps, A, E) synapses.
        p_short: (steps, A, E) fast astrocytic process p^s.
        p_long: (steps, A, E) slow astrocytic process p^l.
        cycle_ends: (num_cycles + 1,) indices of the times 0, tau_cycle, 2 tau_cycle, ...
    """

    times: np.ndarray
    x: np.ndarray
    s: np.ndarray
    p_short: np.ndarray
    p_long: np.ndarray
    cycle_ends: np.ndarray


def astrocytic_coupling(parameters: MacroModelParameters = DEFAULT) -> np.ndarray:
    """Couple the fast processes of two synapses the more the closer they lie.

    Returns:
        (A, E, A, E) T_ijkl = strength * exp(-distance / length), with the Euclidean distance
        between (i, j) and (k, l) on the grid of synapses.
    Source: RMAAT, macro model. The paper does not publish the form of the decay.
    """
    grid = np.indices((parameters.num_post, parameters.num_pre), dtype=float)  # (2, A, E)
    distance = np.hypot(*(grid[:, :, :, None, None] - grid[:, None, None]))  # (A, E, A, E)
    return parameters.coupling_strength * np.exp(-distance / parameters.coupling_length)


def simulate(parameters: MacroModelParameters = DEFAULT) -> Trajectory:
    """Run the network from rest through all STP cycles.

    Returns:
        Trajectory with 2 * SAMPLES_PER_PHASE steps per cycle plus the start.
    Raises:
        RuntimeError: the solver did not reach the end of a phase.
    Source: RMAAT, macro model, the four equations for x, s, p^s and p^l.
    """
    m = parameters
    E, A = m.num_pre, m.num_post
    T = astrocytic_coupling(m)  # (A, E, A, E)
    splits = np.cumsum([E + A, A * E, A * E])

    def unpack(state: np.ndarray) -> tuple[np.ndarray, ...]:
        """Split states (..., E + A + 3AE) into x (..., E + A) and s, p^s, p^l (..., A, E)."""
        x, *synaptic = np.split(state, splits, axis=-1)
        return x, *(part.reshape(*part.shape[:-1], A, E) for part in synaptic)

    def derivatives(_time: float, state: np.ndarray, b: np.ndarray) -> np.ndarray:
        x, s, p_s, p_l = unpack(state)  # (E + A,), then three times (A, E)
        x_pre, x_post = x[:E], x[E:]  # (E,), (A,)
        # No synapse ends on a presynaptic neuron: its sum over j is empty.
        received = np.concatenate([np.zeros(E), g(s) @ phi(x_pre)])  # (E + A,)

        dx = (-m.lambda_n * x + received + b) / m.tau_n  # (E + A,)
        ds = (-m.beta * s + np.outer(theta(x_post), theta(x_pre)) + psi(p_s)) / m.tau_s  # (A, E)
        dp_s = (-m.gamma_short * p_s + np.tensordot(T, psi(p_s)) + kappa(s)) / m.tau_p_short
        dp_l = (-m.gamma_long * p_l + kappa(s)) / m.tau_p_long  # (A, E)
        return np.concatenate([dx, ds.ravel(), dp_s.ravel(), dp_l.ravel()])

    input_on = np.concatenate([np.full(E, m.input_strength), np.zeros(A)])  # (E + A,)
    times, states = [np.zeros(1)], [np.zeros((1, E + A + 3 * A * E))]
    # The input jumps at the phase boundaries, so no solver step may cross one.
    for cycle in range(m.num_cycles):
        middle, end = (cycle + m.duty_cycle) * m.tau_cycle, (cycle + 1) * m.tau_cycle
        for stop, b in ((middle, input_on), (end, np.zeros(E + A))):
            samples = np.linspace(times[-1][-1], stop, SAMPLES_PER_PHASE + 1)
            solution = solve_ivp(
                derivatives, (samples[0], stop), states[-1][-1], method="LSODA", args=(b,),
                t_eval=samples, rtol=m.solver_rtol, atol=1e-3 * m.solver_rtol,
            )
            if not solution.success:
                raise RuntimeError(f"macro model not integrated to {stop} s: {solution.message}")
            times.append(samples[1:])
            states.append(solution.y.T[1:])  # (steps, states)

    cycle_ends = 2 * SAMPLES_PER_PHASE * np.arange(m.num_cycles + 1)
    return Trajectory(np.concatenate(times), *unpack(np.concatenate(states)), cycle_ends)


@lru_cache
def simulated_increments(parameters: MacroModelParameters = DEFAULT) -> tuple[float, ...]:
    """Measure dp_t, the growth of p^l (mean over the synapses) in each simulated cycle.

    Returns:
        num_cycles values, dp_t = p^l(t tau_cycle) - p^l((t - 1) tau_cycle).
    Source: RMAAT, memory retention factor.
    """
    trajectory = simulate(parameters)
    p_long = trajectory.p_long[trajectory.cycle_ends].mean(axis=(1, 2))  # (num_cycles + 1,)
    return tuple(np.diff(p_long).tolist())


def retention_factors(num_segments: int, parameters: MacroModelParameters = DEFAULT) -> Tensor:
    """Give the share dp_t / (dp_1 + ... + dp_T) by which the memory leaving segment t is scaled.

    Up to T = 128 all factors are positive, sum to 1, fall strictly with t, and each is smaller for
    a larger T. They fall like r^t (r = 0.846 by default), whatever T. Beside activations of order
    one the memory is thus below float32 rounding from t = 86 on, exactly zero in float32 from
    t = 614 and in float64 from t = 4452. From there on a segment starts from blank memory tokens
    and knows nothing of those before it; only the pooled read-out still joins them.

    Args:
        num_segments: T, at least 1.
        parameters: constants of the macro model; simulated once and cached.
    Returns:
        (T,) float64 without gradient, entry t - 1 for segment t; finite, non-negative and
        non-increasing for every T.
    Raises:
        ValueError: num_segments is below 1.
    Source: RMAAT, memory retention factor. Beyond the simulated cycles dp_{t+1} = r dp_t, which
        a first-order linear p^l obeys under a periodic drive; differences of a saturated p^l
        would be rounding noise.
    """
    if num_segments < 1:
        raise ValueError(f"num_segments={num_segments} must be at least 1")
    simulated = torch.tensor(simulated_increments(parameters), dtype=torch.float64)  # (num_cycles,)
    num_beyond = max(0, num_segments - len(simulated))
    beyond = torch.arange(1, num_beyond + 1, dtype=torch.float64)  # cycles since the last one
    increments = torch.cat([simulated, simulated[-1] * parameters.cycle_ratio**beyond])
    increments = increments[:num_segments]  # (T,)
    return increments / increments.sum()


def plot(path: str, parameters: MacroModelParameters = DEFAULT) -> None:
    """Draw the two astrocytic processes over the cycles, and the factors they yield.

    Raises:
        OSError: the file `path` cannot be written.
        ValueError: its suffix names no image format.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    trajectory = simulate(parameters)
    processes = (
        (trajectory.p_short, "Fast process, STP", r"mean $p^s_{ij}$", "tab:orange"),
        (trajectory.p_long, "Slow process, LTP", r"mean $p^l_{ij}$", "tab:blue"),
    )
    # A Figure without pyplot needs no display: its suffix picks the backend, Agg for png.
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (process, title, label, color) in zip(axes, processes, strict=False):
        for cycle in range(parameters.num_cycles):
            axis.axvspan(cycle, cycle + parameters.duty_cycle, color="0.93", linewidth=0)
        cycles, mean = trajectory.times / parameters.tau_cycle, process.mean(axis=(1, 2))
        axis.plot(cycles, mean, color=color)
        axis.set(title=title, xlabel=r"time (cycles of $\tau_{cycle}$, input on in grey)")
        axis.set(ylabel=label, xlim=(0, parameters.num_cycles), ylim=(0, None))
    ends = trajectory.cycle_ends
    axes[1].plot(cycles[ends], mean[ends], "o", color=color, clip_on=False, label="cycle ends")
    axes[1].legend(frameon=False, loc="lower right")

    shades = colormaps["viridis"](np.linspace(0.85, 0.0, len(TABLE_SEGMENTS)))
    for T, shade in zip(TABLE_SEGMENTS, shades, strict=True):
        factors = retention_factors(T, parameters)
        axes[2].plot(range(1, T + 1), factors, "o-", color=shade, markersize=4, label=f"T = {T}")
    axes[2].set(title="Memory retention factor", xlabel="segment t", ylabel="factor")
    axes[2].set(ylim=(0, None), xticks=(1, *TABLE_SEGMENTS))
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    # Without a format, matplotlib would add a suffix and write beside the path asked for.
    figure.savefig(path, dpi=200, format=Path(path).suffix[1:] or "png")


def main(arguments: list[str] | None = None) -> int:
    """Print or plot the factors; return 0 when done, 2 when the file cannot be written."""
    parser = argparse.ArgumentParser(description="Retention factors of the macro model.")
    parser.add_argument("--plot", metavar="FILE.png", help="draw a figure, print no table")
    path = parser.parse_args(arguments).plot
    if path is None:
        for T in TABLE_SEGMENTS:
            print(f"T = {T:2d} ", *(f"{factor:.4f}" for factor in retention_factors(T)))
        return 0
    try:
        plot(path)
    except (OSError, ValueError) as error:
        print(f"cannot write the plot to {path!r}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
