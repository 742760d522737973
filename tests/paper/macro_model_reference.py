"""The neuron-astrocyte macro model written out: sums as loops, a fixed-step integration.

It shares no code with the implementation; tests pass the constants.

Source: RMAAT (arXiv 2601.00426), macro model of long-term plasticity and retention factor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

Array = np.ndarray

# dp_1 ... dp_6, from `integrate` with 1,000 steps per phase, and the ratio exp(-10 s / 60 s) by
# which each later cycle adds less.
INCREMENTS = (
    0.03192545139, 0.02704168821, 0.02289029522, 0.01937621659,
    0.01640161324, 0.01388366586,
)
CYCLE_RATIO = math.exp(-1 / 6)


def retention_factors(T: int) -> list[float]:
    """Return dp_t / (dp_1 + ... + dp_T), t = 1 ... T, with the default constants."""
    increments = list(INCREMENTS[:T])
    while len(increments) < T:
        increments.append(increments[-1] * CYCLE_RATIO)
    total = math.fsum(increments)
    return [increment / total for increment in increments]


def coupling(i: int, j: int, k: int, l: int, constants: object) -> float:  # noqa: E741, the paper's letters
    """Return T_ijkl, which falls exponentially with the distance of the synapses on their grid."""
    distance = math.sqrt((i - k) ** 2 + (j - l) ** 2)
    return constants.coupling_strength * math.exp(-distance / constants.coupling_length)


def macro_model(
    x: Sequence[float], s: Array, p_short: Array, p_long: Array, drive: Sequence[float],
    constants: object,
) -> dict[str, dict[str, Array]]:
    """Return every term of the four equations, keyed by its state and name, per second.

    Args:
        x: the presynaptic neurons, then the postsynaptic ones.
        s, p_short, p_long: (post, pre).
        drive: b, one per neuron.
        constants: the macro model's parameters.
    """
    c = constants
    post, pre = range(c.num_post), range(c.num_pre)

    def synapses(term: Callable[[int, int], float]) -> Array:
        return np.array([[term(i, j) for j in pre] for i in post])

    def neurons(term: Callable[[int], float]) -> Array:
        return np.array([term(n) for n in range(c.num_pre + c.num_post)])

    def received(n: int) -> float:
        if n < c.num_pre:
            return 0.0  # no synapse leads to a presynaptic neuron
        i = n - c.num_pre
        return sum(1 / (1 + math.exp(-s[i, j])) * math.tanh(x[j]) for j in pre)

    def coupled(i: int, j: int) -> float:
        return sum(
            coupling(i, j, *kl, c) * math.tanh(p_short[kl]) for kl in itertools.product(post, pre)
        )

    return {
        "x": {
            "leak": neurons(lambda n: -c.lambda_n * x[n] / c.tau_n),
            "synaptic input": neurons(lambda n: received(n) / c.tau_n),
            "drive": neurons(lambda n: drive[n] / c.tau_n),
        },
        "s": {
            "leak": synapses(lambda i, j: -c.beta * s[i, j] / c.tau_s),
            "coincidence": synapses(
                lambda i, j: math.tanh(x[c.num_pre + i]) * math.tanh(x[j]) / c.tau_s
            ),
            "astrocyte": synapses(lambda i, j: math.tanh(p_short[i, j]) / c.tau_s),
        },
        "p_short": {
            "leak": synapses(lambda i, j: -c.gamma_short * p_short[i, j] / c.tau_p_short),
            "coupling": synapses(lambda i, j: coupled(i, j) / c.tau_p_short),
            "synapse": synapses(lambda i, j: math.tanh(s[i, j]) / c.tau_p_short),
        },
        "p_long": {
            "leak": synapses(lambda i, j: -c.gamma_long * p_long[i, j] / c.tau_p_long),
            "synapse": synapses(lambda i, j: math.tanh(s[i, j]) / c.tau_p_long),
        },
    }


def integrate(constants: object, steps_per_phase: int) -> list[float]:
    """Return the mean of p^l over the synapses at the end of every cycle, by Runge-Kutta from rest.

    The input is on from the start of each cycle until `duty_cycle` of it.
    """
    c = constants
    silence = [0.0] * (c.num_pre + c.num_post)
    on = [c.input_strength] * c.num_pre + [0.0] * c.num_post
    zeros = np.zeros((c.num_post, c.num_pre))
    state = [np.zeros(c.num_pre + c.num_post), zeros, zeros, zeros]

    def slope(state: list[Array], drive: Sequence[float]) -> list[Array]:
        return [sum(terms.values()) for terms in macro_model(*state, drive, c).values()]

    def moved(slopes: list[Array], step: float) -> list[Array]:
        return [value + step * change for value, change in zip(state, slopes, strict=True)]

    ends = []
    for _ in range(c.num_cycles):
        for drive, share in ((on, c.duty_cycle), (silence, 1 - c.duty_cycle)):
            h = share * c.tau_cycle / steps_per_phase
            for _ in range(steps_per_phase):
                k1 = slope(state, drive)
                k2 = slope(moved(k1, h / 2), drive)
                k3 = slope(moved(k2, h / 2), drive)
                k4 = slope(moved(k3, h), drive)
                state = [
                    value + h / 6 * (a + 2 * b + 2 * d + e)
                    for value, a, b, d, e in zip(state, k1, k2, k3, k4, strict=True)
                ]
        ends.append(float(state[3].mean()))
    return ends
