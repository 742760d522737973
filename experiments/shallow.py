"""Accuracy of statistics that ignore the order of tokens: a lower bound for every model.

    python -m experiments.shallow text retrieval --set data_dir=DIR

A logistic regression on counts and lengths, its penalty chosen on validation. A model below such a
row has not used its sequence. A task is the name of a file in configs/.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.packing import SPLITS, PackedSplit, load_splits
from lra_config import load_config
from lra_datasets import open_dataset
from run.program import Parser, print_result, run_program
from tables import TASKS, markdown

PROGRAM = "experiments.shallow"
CONFIGS = Path(__file__).parent.parent / "configs"
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3)  # of the sum of squared weights
NUM_PAIRS = 4096  # the most frequent pairs of bytes
WORD = re.compile(rb"[a-z']+")

Splits = Mapping[str, PackedSplit]
Features = Iterator[tuple[str, dict[str, np.ndarray]]]  # name; by split (examples, features)


def documents(split: PackedSplit, column: int = 0) -> Iterator[np.ndarray]:
    """Yield the tokens of one document of every example."""
    for start, length in zip(split.starts[:, column], split.lengths[:, column], strict=True):
        yield split.tokens[start : start + length]


def histograms(rows: Iterable[np.ndarray], num_values: int = 256) -> np.ndarray:
    """Return square roots of the share of each value in a row, (rows, num_values)."""
    shares = [np.bincount(x, minlength=num_values) / max(len(x), 1) for x in rows]
    return np.sqrt(np.array(shares, dtype=np.float32))


def accuracies(features: Mapping[str, np.ndarray], labels: Mapping[str, Tensor]) -> list[float]:
    """Return validation and test accuracy in % of the penalty that is best on validation."""
    shift, scale = features["train"].mean(axis=0), features["train"].std(axis=0) + 1e-6
    x = {k: torch.from_numpy(((features[k] - shift) / scale).astype(np.float32)) for k in SPLITS}
    weight = torch.zeros(x["train"].shape[1], int(labels["train"].max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    scores = []
    for penalty in PENALTIES:  # each starts from the one before
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

        def loss(penalty: float = penalty) -> Tensor:
            weight.grad = bias.grad = None
            misfit = F.cross_entropy(x["train"] @ weight + bias, labels["train"])
            total = misfit + penalty * weight.square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        predicted = {k: (x[k] @ weight + bias).argmax(dim=1) for k in ("val", "test")}
        scores.append([100 * (p == labels[k]).double().mean().item() for k, p in predicted.items()])
    return max(scores)


def first_tokens(splits: Splits) -> Features:
    """Yield the first token, on ListOps the root operator."""
    first = {k: np.array([x[0] for x in documents(splits[k])]) for k in SPLITS}
    known = np.unique(first["train"])
    yield "the root operator", {k: 1.0 * (first[k][:, None] == known) for k in SPLITS}


def gray_levels(splits: Splits) -> Features:
    """Yield the gray levels of images, counted and by pixel."""
    yield "gray levels", {k: histograms(documents(splits[k])) for k in SPLITS}
    yield "pixels", {k: np.stack(list(documents(splits[k]))).astype(np.float32) for k in SPLITS}


def byte_counts(splits: Splits) -> Features:
    """Yield counts of bytes and of pairs of bytes."""
    yield "bytes", {k: histograms(documents(splits[k])) for k in SPLITS}

    def pairs(split: PackedSplit) -> Iterator[np.ndarray]:
        for x in documents(split):
            yield 256 * x[:-1].astype(np.int64) + x[1:]

    total = sum(np.bincount(x, minlength=2**16) for x in pairs(splits["train"]))
    column = np.full(2**16, NUM_PAIRS)  # the last column is dropped: all rarer pairs
    column[np.argsort(-total, kind="stable")[:NUM_PAIRS]] = np.arange(NUM_PAIRS)
    yield f"the {NUM_PAIRS:,} most frequent pairs of bytes", {
        k: histograms((column[x] for x in pairs(splits[k])), NUM_PAIRS + 1)[:, :-1] for k in SPLITS
    }


def comparisons(splits: Splits) -> Features:
    """Yield statistics of two texts, and of their comparison."""
    lengths = {k: splits[k].lengths.astype(np.float64) for k in SPLITS}
    lengths = {k: np.c_[x, np.abs(x[:, 0] - x[:, 1])] for k, x in lengths.items()}
    yield "lengths and their difference", lengths
    both = {
        k: np.concatenate([histograms(documents(splits[k], i)) for i in (0, 1)], axis=1)
        for k in SPLITS
    }
    yield "bytes of the two texts, side by side", both
    mean, deviation = both["train"].mean(axis=0), both["train"].std(axis=0) + 1e-6
    matched = {}
    for k, x in both.items():
        u, v = np.split((x - mean) / deviation, 2, axis=1)
        matched[k] = np.concatenate([np.abs(u - v), u * v, lengths[k]], axis=1)
    yield "differences and products of bytes, lengths", matched

    words = {
        k: [[set(WORD.findall(x.tobytes().lower())) for x in documents(splits[k], column)]
            for column in (0, 1)]
        for k in SPLITS
    }
    frequency = Counter(word for column in words["train"] for text in column for word in text)
    num_texts = 2 * len(splits["train"])

    def weight(text: set[bytes]) -> float:
        return sum(math.log(num_texts / frequency.get(word, 1)) ** 2 for word in text)

    yield "shared words, weighted by rarity", {
        k: np.array([
            [weight(u & v) / math.sqrt(weight(u) * weight(v) + 1e-9)]
            for u, v in zip(*words[k], strict=True)
        ])
        for k in SPLITS
    }


def measure(name: str, overrides: Sequence[str]) -> Iterator[list[str]]:
    """Yield the table rows of the task that configs/<name>.yaml describes."""
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    splits = load_splits(open_dataset(config))
    labels = {k: torch.from_numpy(splits[k].labels) for k in SPLITS}
    if config.task.num_documents > 1:
        features = comparisons
    elif config.task.is_image:
        features = gray_levels
    else:
        features = first_tokens if config.task.tab_separated else byte_counts
    for label, values in features(splits):
        yield [name, label, *(f"{value:.1f}" for value in accuracies(values, labels))]


def command() -> None:
    """Print the table of the tasks that the command line names."""
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n\n")[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="a file in configs/; all of them")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    rows = [
        row for task in arguments.tasks or TASKS for row in measure(task, arguments.overrides)
    ]
    print_result(markdown(["task", "statistics", "validation, %", "test, %"], rows, numbers=2))


def main() -> int:
    """Run the command line; return its exit status."""
    return run_program(PROGRAM, command)


if __name__ == "__main__":
    sys.exit(main())
