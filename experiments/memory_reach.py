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
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from data.packing import PackedSplit, load_splits
from dataloader import Batch, collate, evaluation_batches
from experiments.tables import markdown, number
from lra_config import load_config, single_values
from lra_datasets import open_dataset
from model import RMAAT, SegmentRecurrent, build_model
from predict import load_trained, tokenizer_of
from run.program import Parser, run_program
from run.terminal import print_result
from run.text import UserError
from train import StepResult, evaluate
from training.acceleration import resolve_device
from utils import seed_everything

PROGRAM = "experiments.memory_reach"
NUM_EXAMPLES = 64  # the longest, from which the reach is taken


class ReachError(UserError):
    """A model or data in which no memory is handed on."""


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


def open_place(place: Path, overrides: Sequence[str]) -> tuple[RMAAT, Mapping[str, PackedSplit]]:
    """The model of a finished run's folder, or the start of a configuration's, and its data.

    Raises:
        ReachError: `place` has no memory that is handed on.
    """
    if place.is_dir():
        model = load_trained(place / "model.safetensors", None, single_values(overrides))
    else:
        config = load_config(place, overrides)
        seed_everything(config.seed)
        model = build_model(config).to(resolve_device(config)).eval()
    config = model.config
    if config.num_segments == config.num_sequences or not config.num_memory_tokens:
        raise ReachError(f"{place}: hands no memory on; name a model of several segments")
    reader = open_dataset(config)
    if place.is_dir():
        reader.tokenizer = tokenizer_of(model)
    return model, load_splits(reader)


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
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="PLACE",
        help="the folder of a finished run, or a YAML file",
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    rows = [measure(place, arguments.overrides) for place in arguments.places]
    header = [
        "model", "retention factor", "1 segment later", "2", "4", "test, %",
        "test with another's memory, %",
    ]
    print_result(markdown(header, rows, numbers=5))


def main() -> int:
    return run_program(PROGRAM, print_reaches)


if __name__ == "__main__":
    sys.exit(main())
