"""What a memory says: a logistic regression on the memory that leaves a segment of a finished run.

    python -m experiments.memory_probe results/listops/rmaat

The weights stay as they are, whatever they were trained to read out, so that the table tells what
is carried apart from whether a training that reads the memory alone would have found it. Asked for
are the answer and the first token of the sequence, on ListOps its root operator. A configuration
in the place of a run is probed as it starts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.packing import PackedSplit
from dataloader import evaluation_batches
from experiments.places import open_place, parse_places
from experiments.shallow import logistic_regression
from experiments.tables import markdown, number
from model import RMAAT
from run.program import print_result, run_program

PROGRAM = "experiments.memory_probe"
NUM_EXAMPLES = {"train": 10_000, "val": 2_000, "test": 5_000}  # at most


@torch.no_grad()
def collect_memories(
    model: RMAAT, split: PackedSplit, segments: Sequence[int]
) -> tuple[dict[int, np.ndarray], dict[str, np.ndarray]]:
    """The memories that leave `segments`, and what may be asked of them.

    Args:
        segments: counted from 1; where an example has ended before, its last memory.
    Returns:
        By segment (n, documents * M * D); by question (n,) integers, the rows of both alike.
    """
    memories: dict[int, list[Tensor]] = {t: [] for t in segments}
    answers, first_tokens = [], []
    for batch in evaluation_batches(split, model.config, model.memory.device):
        parts, _ = model.split(batch.tokens, batch.mask)
        left = [memory for memory, _ in model.recur(parts)]
        for t in segments:
            memory = left[min(t, len(left)) - 1]
            memories[t].append(memory.reshape(len(batch.labels), -1).float().cpu())
        answers.append(batch.labels.cpu())
        first_tokens.append(batch.tokens[:, 0].cpu())
    features = {t: torch.cat(rows).numpy() for t, rows in memories.items()}
    questions = {"answer": answers, "first token": first_tokens}
    return features, {name: torch.cat(rows).numpy() for name, rows in questions.items()}


def probe(place: Path, overrides: Sequence[str]) -> list[list[str]]:
    """The rows of the table for one model: after the first segment, half of them, and all."""
    model, splits = open_place(place, overrides)
    T = model.config.segments_per_sequence
    segments = sorted({1, max(T // 2, 1), T})
    rng = np.random.default_rng(0)
    features: dict[int, dict[str, np.ndarray]] = {t: {} for t in segments}
    questions: dict[str, dict[str, np.ndarray]] = {}
    for name, split in splits.items():
        chosen = rng.permutation(len(split))[: NUM_EXAMPLES[name]]
        memories, asked = collect_memories(model, split.take(chosen), segments)
        for t in segments:
            features[t][name] = memories[t]
        for question, values in asked.items():
            questions.setdefault(question, {})[name] = values
    rows = []
    for question, values in questions.items():
        most_frequent = np.bincount(values["train"]).argmax()
        guess = 100 * (values["test"] == most_frequent).mean()
        for t in segments:
            score = logistic_regression(question, features[t], values)
            rows.append(
                [str(place), question, str(t), *map(number, (score.val, score.test, guess))]
            )
    return rows


def print_probes() -> None:
    places, overrides = parse_places(PROGRAM, __doc__.split("\n\n")[0])
    rows = [row for place in places for row in probe(place, overrides)]
    header = [
        "model", "asked for", "memory that leaves segment", "validation, %", "test, %",
        "most frequent, test, %",
    ]
    print_result(markdown(header, rows, numbers=4))


def main() -> int:
    return run_program(PROGRAM, print_probes)


if __name__ == "__main__":
    sys.exit(main())
