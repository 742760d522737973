"""The neuron-astrocyte macro model and the memory retention factors it yields.

The slow astrocytic process p^l of a small network driven for a few short-term plasticity (STP)
cycles integrates from cycle to cycle and saturates. The increment of cycle t, as a share of the sum
over T cycles, is the factor by which RMAAT scales the memory after segment t of T.

    python astrocyte.py          # prints the factors
    python plots.py astrocyte    # draws the two processes and the factors

Synapse (i, j) leads from presynaptic neuron j to postsynaptic neuron i; (k, l) is another one. The
paper's symbols and their names here (its attention has a g, a phi, an m and a T of its own):

    tau_n   dx_i/dt    = -lambda x_i + sum_j g(s_ij) phi(x_j) + b_i(t)
    tau_s   ds_ij/dt   = -beta s_ij + theta(x_i) theta(x_j) + psi(p^s_ij)
    tau_p^s dp^s_ij/dt = -gamma^s p^s_ij + sum_kl T_ijkl psi(p^s_kl) + kappa(s_ij)
    tau_p^l dp^l_ij/dt = -gamma^l p^l_ij + kappa(s_ij)

    x, s, p^s, p^l    State.x, .s, .p_short, .p_long        b                 drive
    g                 efficacy                              T_ijkl            astrocytic_coupling
    phi               firing_rate                           all constants     MacroModelParameters

In shapes, `pre` and `post` are the numbers of presynaptic and postsynaptic neurons.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.special import expit
from torch import Tensor

from run.program import Parser, print_result, run_program

SAMPLES_PER_PHASE = 60  # a cycle has two phases: input on, then off
TABLE_SEGMENTS = (2, 4, 8, 16)  # values of T shown by the command line

# The paper does not publish these functions. All are smooth and saturate, and all but the efficacy
# are 0 at 0, so that silence is the resting state; a synapse at rest must transmit.
efficacy = expit
firing_rate = theta = psi = kappa = np.tanh


@dataclass(frozen=True)
class MacroModelParameters:
    """Constants of the macro model; the paper publishes none but the 3 x 3 neurons and 6 cycles.

    All others are our choice. With them p^s rises and falls within each cycle. p^l covers about
    63 % of the way to its plateau in six cycles, and each cycle adds less to p^l than the last.
    States are dimensionless, times in seconds, so the decays are dimensionless too.

    Source: RMAAT (arXiv 2601.00426), macro model of long-term plasticity.
    """

    num_pre: int = 3  # presynaptic neurons; they alone receive the input
    num_post: int = 3  # postsynaptic neurons, driven through the synapses
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
        """Return r = exp(-gamma^l tau_cycle / tau_p^l), the ratio of successive increments."""
        return math.exp(-self.gamma_long * self.tau_cycle / self.tau_p_long)


DEFAULT = MacroModelParameters()


class State(NamedTuple):
    """The state of the macro model at one time, or, with leading dimensions, at several."""

    x: np.ndarray  # (..., pre + post) neurons, presynaptic ones first
    s: np.ndarray  # (..., post, pre) synapses
    p_short: np.ndarray  # (..., post, pre) fast astrocytic process p^s
    p_long: np.ndarray  # (..., post, pre) slow astrocytic process p^l

    def pack(self) -> np.ndarray:
        """Return one vector of pre + post + 3 * post * pre numbers, as a solver needs it."""
        return np.concatenate([part.ravel() for part in self])

    @classmethod
    def unpack(cls, vectors: np.ndarray, parameters: MacroModelParameters) -> State:
        """Return the state of `pack`ed vectors (..., pre + post + 3 * post * pre)."""
        pre, post = parameters.num_pre, parameters.num_post
        splits = np.cumsum([pre + post, post * pre, post * pre])
        x, *synaptic = np.split(vectors, splits, axis=-1)
        return cls(x, *(part.reshape(*part.shape[:-1], post, pre) for part in synaptic))


class Trajectory(NamedTuple):
    """States of the macro model over time, all float64."""

    times: np.ndarray  # (steps,) s, strictly rising from 0
    x: np.ndarray  # (steps, pre + post) neurons, presynaptic ones first
    s: np.ndarray  # (steps, post, pre) synapses
    p_short: np.ndarray  # (steps, post, pre) fast astrocytic process p^s
    p_long: np.ndarray  # (steps, post, pre) slow astrocytic process p^l
    cycle_ends: np.ndarray  # (num_cycles + 1,) indices of the times 0, tau_cycle, 2 tau_cycle, ...


@lru_cache
def astrocytic_coupling(parameters: MacroModelParameters = DEFAULT) -> np.ndarray:
    """Return the coupling of the fast processes of two synapses, which falls with their distance.

    Returns:
        (post, pre, post, pre), read-only: T_ijkl = strength * exp(-distance / length), with the
        Euclidean distance between (i, j) and (k, l) on the grid of synapses.
    Source: RMAAT, macro model. The paper does not publish the form of the decay.
    """
    grid = np.indices((parameters.num_post, parameters.num_pre), dtype=float)  # (2, post, pre)
    distance = np.hypot(*(grid[:, :, :, None, None] - grid[:, None, None]))
    coupling = parameters.coupling_strength * np.exp(-distance / parameters.coupling_length)
    coupling.flags.writeable = False
    return coupling


def derivatives(
    state: State, drive: np.ndarray, parameters: MacroModelParameters = DEFAULT
) -> State:
    """Return the right-hand sides of the four equations above, per second.

    Args:
        state: at one time.
        drive: b, the input of each neuron, (pre + post,).
        parameters: constants of the macro model.
    Returns:
        dx/dt, ds/dt, dp^s/dt and dp^l/dt, shaped like `state`.
    Source: RMAAT, macro model, the four equations for x, s, p^s and p^l.
    """
    pre = parameters.num_pre
    x, s, p_short, p_long = state
    x_pre, x_post = x[:pre], x[pre:]
    # No synapse ends on a presynaptic neuron: its sum over j is empty.
    received = np.concatenate([np.zeros(pre), efficacy(s) @ firing_rate(x_pre)])  # (pre + post,)
    coincidence = np.outer(theta(x_post), theta(x_pre))  # (post, pre)
    spread = np.tensordot(astrocytic_coupling(parameters), psi(p_short))  # (post, pre)
    return State(
        x=(-parameters.lambda_n * x + received + drive) / parameters.tau_n,
        s=(-parameters.beta * s + coincidence + psi(p_short)) / parameters.tau_s,
        p_short=(-parameters.gamma_short * p_short + spread + kappa(s)) / parameters.tau_p_short,
        p_long=(-parameters.gamma_long * p_long + kappa(s)) / parameters.tau_p_long,
    )


def simulate(parameters: MacroModelParameters = DEFAULT) -> Trajectory:
    """Run the network from rest through all STP cycles.

    Returns:
        Trajectory with 2 * SAMPLES_PER_PHASE steps per cycle plus the start.
    Raises:
        RuntimeError: the solver did not reach the end of a phase.
    """
    pre, post, tau_cycle = parameters.num_pre, parameters.num_post, parameters.tau_cycle

    def right_hand_side(_time: float, vector: np.ndarray, drive: np.ndarray) -> np.ndarray:
        return derivatives(State.unpack(vector, parameters), drive, parameters).pack()

    silence = np.zeros(pre + post)
    input_on = np.concatenate([np.full(pre, parameters.input_strength), np.zeros(post)])
    times, vectors = [np.zeros(1)], [np.zeros((1, pre + post + 3 * post * pre))]
    # The input jumps at the phase boundaries, so no solver step may cross one.
    for cycle in range(parameters.num_cycles):
        middle, end = (cycle + parameters.duty_cycle) * tau_cycle, (cycle + 1) * tau_cycle
        for stop, drive in ((middle, input_on), (end, silence)):
            samples = np.linspace(times[-1][-1], stop, SAMPLES_PER_PHASE + 1)
            solution = solve_ivp(
                right_hand_side, (samples[0], stop), vectors[-1][-1], method="LSODA",
                args=(drive,), t_eval=samples, rtol=parameters.solver_rtol,
                atol=1e-3 * parameters.solver_rtol,
            )
            if not solution.success:
                raise RuntimeError(f"macro model not integrated to {stop} s: {solution.message}")
            times.append(samples[1:])
            vectors.append(solution.y.T[1:])  # (steps, states)

    cycle_ends = 2 * SAMPLES_PER_PHASE * np.arange(parameters.num_cycles + 1)
    states = State.unpack(np.concatenate(vectors), parameters)
    return Trajectory(np.concatenate(times), *states, cycle_ends)


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
    """Return the shares dp_t / (dp_1 + ... + dp_T) by which the memory leaving segment t is scaled.

    Up to T = 128 all factors are positive, sum to 1, fall strictly with t, and each is smaller for
    a larger T. They fall like r^t (r = 0.846 by default) for every T. Next to activations of order
    one the memory is below float32 rounding from t = 86 on, exactly zero in float32 from t = 614
    and in float64 from t = 4452. From there on no information passes from segment to segment.

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


def main(arguments: list[str] | None = None) -> int:
    """Print the factors; return the exit status."""
    def command() -> None:
        parser = Parser(prog="astrocyte.py", description="Retention factors of the macro model.")
        parser.parse_args(arguments)
        for T in TABLE_SEGMENTS:
            factors = " ".join(f"{factor:.4f}" for factor in retention_factors(T))
            print_result(f"T = {T:2d}  {factors}")

    return run_program("astrocyte.py", command)


if __name__ == "__main__":
    sys.exit(main())
