"""The reach of a memory, and the information in it.

    python -m experiments.memory reach results/listops/rmaat configs/text.yaml
    python -m experiments.memory probe results/listops/rmaat --set device=cpu

Sources are folders of finished runs, and configuration files, whose models are measured at
initialization.

`reach`: before one segment the examples of a batch exchange their memories, and continue with their
own tokens. The reach k segments later is the distance between the memories with and without that
exchange, over the distance between the memories of the two examples. It is 1 if everything is
retained, and 0 if every segment writes its memory anew.

`probe`: a logistic regression on the memory that leaves a segment, for the answer and for the first
token of the sequence (on ListOps the root operator). The weights of the model stay fixed.
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
from experiments.shallow import accuracies
from lra_config import load_config, single_values
from lra_datasets import open_dataset
from model import RMAAT, SegmentRecurrent, build_model
from predict import load_trained, tokenizer_of
from run.program import Parser, UserError, print_result, run_program
from tables import markdown, number
from train import StepResult, evaluate
from training.acceleration import resolve_device
from utils import seed_everything

PROGRAM = "experiments.memory"
NUM_LONGEST = 64  # examples that measure the reach
NUM_EXAMPLES = {"train": 10_000, "val": 2_000, "test": 5_000}  # at most, of the probe


def open_model(source: Path, overrides: Sequence[str]) -> tuple[RMAAT, Mapping[str, PackedSplit]]:
    """Return a trained model, or that of a configuration at initialization, and its data.

    Raises:
        UserError: the model hands no memory on.
    """
    if source.is_dir():
        model = load_trained(source / "model.safetensors", None, single_values(overrides))
    else:
        config = load_config(source, overrides)
        seed_everything(config.seed)
        model = build_model(config).to(resolve_device(config)).eval()
    config = model.config
    if config.num_segments == config.num_sequences or not config.num_memory_tokens:
        raise UserError(f"{source}: hands no memory on; name a model of several segments")
    reader = open_dataset(config)
    if source.is_dir():
        reader.tokenizer = tokenizer_of(model)
    return model, load_splits(reader)


@torch.no_grad()
def memory_reach(model: SegmentRecurrent, batch: Batch) -> list[float]:
    """Return the reach after 0, 1, ... more segments, averaged over the exchanges.

    The first value is 1: the exchange itself. Only segments in which every example has a real token
    are run.

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
        pairs = zip([exchanged, *passed], memories[t - 1 :], strict=True)
        for k, (ours, memory) in enumerate(pairs):
            changed, apart = ours - memory, memory.roll(1, dims=0) - memory
            reaches[k].append(float(changed.norm() / apart.norm()))
    return [sum(values) / len(values) for values in reaches if values]


@torch.no_grad()
def score_exchanged(model: SegmentRecurrent, batch: Batch) -> StepResult:
    """Score a batch whose segments each receive the memory of another example."""
    segments, mask = model.split(batch.tokens, batch.mask)
    memory, readouts = model.initial_memory(len(segments[0].tokens)), []
    for t in range(len(segments)):
        exchanged = memory.roll(1, dims=0)
        memory, readout = next(model.recur(segments[t : t + 1], first=t, memory=exchanged))
        readouts.append(readout)
    logits = model.head(model.combine(readouts, mask))
    return StepResult(F.cross_entropy(logits, batch.labels), logits)


def reach_rows(source: Path, overrides: Sequence[str]) -> list[list[str]]:
    """Return the row of one model: reach after 1, 2 and 4 segments, and accuracy in %."""
    model, splits = open_model(source, overrides)
    config, device, test = model.config, model.memory.device, splits["test"]
    longest = np.argsort(-test.lengths.min(axis=1), kind="stable")[:NUM_LONGEST]
    reach = memory_reach(model, collate(test, longest, config, device))
    scores: list[float | None] = [None, None]
    if source.is_dir():
        scores = [
            100 * evaluate(model, evaluation_batches(test, config, device), **how).accuracy
            for how in ({}, {"score": score_exchanged})
        ]
    later = [reach[k] if k < len(reach) else None for k in (1, 2, 4)]
    return [[
        str(source), "on" if config.astro_mem else "off", *(number(x, ".3f") for x in later),
        *map(number, scores),
    ]]


@torch.no_grad()
def collect_memories(
    model: RMAAT, split: PackedSplit, segments: Sequence[int]
) -> tuple[dict[int, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the memories that leave `segments`, and the answers to the questions.

    Args:
        segments: counted from 1; the last memory of examples that ended before.
    Returns:
        By segment (n, documents * M * D); by question (n,) integers, with equal rows.
    """
    memories: dict[int, list[torch.Tensor]] = {t: [] for t in segments}
    answers: dict[str, list[torch.Tensor]] = {"answer": [], "first token": []}
    for batch in evaluation_batches(split, model.config, model.memory.device):
        parts, _ = model.split(batch.tokens, batch.mask)
        left = [memory for memory, _ in model.recur(parts)]
        for t in segments:
            memory = left[min(t, len(left)) - 1]
            memories[t].append(memory.reshape(len(batch.labels), -1).float().cpu())
        answers["answer"].append(batch.labels.cpu())
        answers["first token"].append(batch.tokens[:, 0].cpu().long())
    return (
        {t: torch.cat(rows) for t, rows in memories.items()},
        {name: torch.cat(rows) for name, rows in answers.items()},
    )


def probe_rows(source: Path, overrides: Sequence[str]) -> list[list[str]]:
    """Return the rows of one model: after the first segment, half of them, and all."""
    model, splits = open_model(source, overrides)
    T = model.config.segments_per_sequence
    segments = sorted({1, max(T // 2, 1), T})
    rng = np.random.default_rng(0)
    collected = {
        name: collect_memories(
            model, split.take(rng.permutation(len(split))[: NUM_EXAMPLES[name]]), segments
        )
        for name, split in splits.items()
    }
    rows = []
    for question in ("answer", "first token"):
        answers = {name: asked[question] for name, (_, asked) in collected.items()}
        majority = answers["train"].mode().values
        guess = 100 * float((answers["test"] == majority).double().mean())
        for t in segments:
            features = {name: kept[t].numpy() for name, (kept, _) in collected.items()}
            val, test = accuracies(features, answers)
            rows.append([str(source), question, str(t), *map(number, (val, test, guess))])
    return rows


TABLES = {
    "reach": (reach_rows, ["model", "retention factor", "1 segment later", "2", "4", "test, %",
                           "test with another's memory, %"], 5),
    "probe": (probe_rows, ["model", "question", "memory that leaves segment", "validation, %",
                           "test, %", "majority class, test, %"], 4),
}


def command() -> None:
    """Print a table for the models that the command line names."""
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=TABLES)
    parser.add_argument("sources", nargs="+", type=Path, metavar="RUN|FILE")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    measure, header, numbers = TABLES[arguments.what]
    rows = [row for source in arguments.sources for row in measure(source, arguments.overrides)]
    print_result(markdown(header, rows, numbers=numbers))


def main() -> int:
    """Run the command line; return its exit status."""
    return run_program(PROGRAM, command)


if __name__ == "__main__":
    sys.exit(main())
