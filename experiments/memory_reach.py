"""How far a memory reaches: what is left of a difference between memories, segments later.

    python -m experiments.memory_reach results/listops/rmaat configs/text.yaml
    python -m experiments.memory_reach configs/listops.yaml --set astro_mem=false

The folder of a finished run is measured as it was trained, a configuration as it starts, both on
the test split. Before one segment the examples of a batch exchange their memories, and go on with
tokens of their own. The reach k segments later is the distance between the memories with and
without that exchange over the distance between the memories of the two examples: 1 where all is
carried on, 0 where every segment writes its memory anew.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from dataloader import Batch, collate, evaluation_batches
from experiments.places import open_place, parse_places
from experiments.tables import markdown, number
from model import SegmentRecurrent
from run.program import print_result, run_program
from train import StepResult, evaluate

PROGRAM = "experiments.memory_reach"
NUM_EXAMPLES = 64  # the longest, from which the reach is taken


@torch.no_grad()
def memory_reach(model: SegmentRecurrent, batch: Batch) -> list[float]:
    """The reach after 0, 1, ... more segments, averaged over where the exchange takes place.

    The first figure is 1: of the exchange itself, before any segment has read it. Only segments in
    which every example has a real token are run.

    Args:
        batch: at least two examples.
    """
    segments, _ = model.split(batch.tokens, batch.mask)
    segments = [x for x in segments if x.mask is None or x.mask.any(dim=1).all()]
    memories = [memory for memory, _ in model.recur(segments)]  # that leave segment 1, 2, ...
    reaches: list[list[float]] = [[] for _ in memories]
    for t in range(1, len(segments)):
        exchanged = memories[t - 1].roll(1, dims=0)
        passed = [memory for memory, _ in model.recur(segments[t:], first=t, memory=exchanged)]
        for k, (ours, memory) in enumerate(
            zip([exchanged, *passed], memories[t - 1 :], strict=True)
        ):
            changed, apart = ours - memory, memory.roll(1, dims=0) - memory
            reaches[k].append(float(changed.norm() / apart.norm()))
    return [sum(values) / len(values) for values in reaches if values]


@torch.no_grad()
def score_exchanged(model: SegmentRecurrent, batch: Batch) -> StepResult:
    """`train.score` where every segment receives the memory of another example."""
    segments, mask = model.split(batch.tokens, batch.mask)
    memory, readouts = model.initial_memory(len(segments[0].tokens)), []
    for t in range(len(segments)):
        exchanged = memory.roll(1, dims=0)
        memory, readout = next(model.recur(segments[t : t + 1], first=t, memory=exchanged))
        readouts.append(readout)
    logits = model.head(model.combine(readouts, mask))
    return StepResult(F.cross_entropy(logits, batch.labels), logits)


def measure(place: Path, overrides: Sequence[str]) -> list[str]:
    """A row of the table."""
    model, splits = open_place(place, overrides)
    config, device, test = model.config, model.memory.device, splits["test"]
    longest = np.argsort(-test.lengths.min(axis=1), kind="stable")[:NUM_EXAMPLES]
    reach = memory_reach(model, collate(test, longest, config, device))
    accuracies = []
    if place.is_dir():
        for how in ({}, {"score": score_exchanged}):
            metrics = evaluate(model, evaluation_batches(test, config, device), **how)
            accuracies.append(100 * metrics.accuracy)
    later = [reach[k] if k < len(reach) else None for k in (1, 2, 4)]
    return [
        str(place), "on" if config.astro_mem else "off", *(number(x, ".3f") for x in later),
        *(number(x) for x in accuracies or (None, None)),
    ]


def print_reaches() -> None:
    places, overrides = parse_places(PROGRAM, __doc__.split("\n\n")[0])
    rows = [measure(place, overrides) for place in places]
    header = [
        "model", "retention factor", "1 segment later", "2", "4", "test, %",
        "test with another's memory, %",
    ]
    print_result(markdown(header, rows, numbers=5))


def main() -> int:
    return run_program(PROGRAM, print_reaches)


if __name__ == "__main__":
    sys.exit(main())
