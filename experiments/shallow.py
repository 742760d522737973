"""What a task yields to statistics that know no order beyond a pair: the floor under a figure.

    python -m experiments.shallow text retrieval

A logistic regression, its penalty chosen on validation, on counts and lengths. A model below such
a row has not used its sequence.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.packing import SPLITS, PackedSplit, load_splits
from experiments.tables import markdown
from lra_config import load_config
from lra_datasets import open_dataset
from run.program import Parser, print_result, run_program

PROGRAM = "experiments.shallow"
ROOT = Path(__file__).parent.parent
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # of the sum of squared weights
NUM_PAIRS = 4096  # the most frequent pairs of bytes
WORD = re.compile(rb"[a-z']+")

Splits = Mapping[str, PackedSplit]
Arrays = dict[str, np.ndarray]  # an array (examples, features) for each split


class Score(NamedTuple):
    """Accuracies in %, at the penalty that is best on validation."""

    features: str
    val: float
    test: float


def documents(split: PackedSplit, column: int = 0) -> Iterator[np.ndarray]:
    """One document of every example, as it is packed."""
    for start, length in zip(split.starts[:, column], split.lengths[:, column], strict=True):
        yield split.tokens[start : start + length]


def histograms(rows: Iterable[np.ndarray], num_values: int = 256) -> np.ndarray:
    """Square roots of the share of each value in a row, (rows, num_values)."""
    shares = [np.bincount(x, minlength=num_values) / max(len(x), 1) for x in rows]
    return np.sqrt(np.array(shares, dtype=np.float32))


def logistic_regression(name: str, features: Arrays, labels: Arrays) -> Score:
    """Fit every penalty on the training split."""
    shift = features["train"].mean(axis=0)
    scale = features["train"].std(axis=0) + 1e-6
    x = {k: torch.from_numpy(((features[k] - shift) / scale).astype(np.float32)) for k in SPLITS}
    y = {k: torch.from_numpy(labels[k]) for k in SPLITS}
    scores = []
    weight = torch.zeros(x["train"].shape[1], int(y["train"].max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    for penalty in reversed(PENALTIES):  # each goes on from the stiffer one
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

        def loss(penalty: float = penalty) -> Tensor:
            weight.grad = bias.grad = None
            misfit = F.cross_entropy(x["train"] @ weight + bias, y["train"])
            total = misfit + penalty * weight.square().sum()
            total.backward()
            return total

        optimizer.step(loss)
        with torch.no_grad():
            val, test = (accuracy(x[k] @ weight + bias, y[k]) for k in ("val", "test"))
        scores.append(Score(name, val, test))
    return max(scores, key=lambda score: score.val)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def text(splits: Splits, labels: Arrays) -> Iterator[Score]:
    """Bytes and pairs of bytes."""
    counts = {k: histograms(documents(splits[k])) for k in SPLITS}
    yield logistic_regression("bytes", counts, labels)

    def pairs(split: PackedSplit) -> Iterator[np.ndarray]:
        for x in documents(split):
            yield 256 * x[:-1].astype(np.int64) + x[1:]

    total = sum(np.bincount(x, minlength=2**16) for x in pairs(splits["train"]))
    column = np.full(2**16, NUM_PAIRS)  # the last one is dropped: all that is rarer
    column[np.argsort(-total, kind="stable")[:NUM_PAIRS]] = np.arange(NUM_PAIRS)
    frequent = {k: (column[x] for x in pairs(splits[k])) for k in SPLITS}
    shares = {k: histograms(frequent[k], NUM_PAIRS + 1)[:, :-1] for k in SPLITS}
    yield logistic_regression(f"the {NUM_PAIRS:,} most frequent pairs of bytes", shares, labels)


def listops(splits: Splits, labels: Arrays) -> Iterator[Score]:
    """The root operator, the first token."""
    roots = {k: np.array([x[0] for x in documents(splits[k])]) for k in SPLITS}
    known = np.unique(roots["train"])
    yield logistic_regression(
        "the root operator", {k: 1.0 * (roots[k][:, None] == known) for k in SPLITS}, labels
    )


def image(splits: Splits, labels: Arrays) -> Iterator[Score]:
    """Grey levels, counted and in their places."""
    levels = {k: histograms(documents(splits[k])) for k in SPLITS}
    yield logistic_regression("grey levels", levels, labels)
    pixels = {k: np.stack(list(documents(splits[k]))).astype(np.float32) for k in SPLITS}
    yield logistic_regression("pixels", pixels, labels)


def retrieval(splits: Splits, labels: Arrays) -> Iterator[Score]:
    """What each text says, and what a comparison of the two says."""
    lengths = {k: splits[k].lengths.astype(np.float64) for k in SPLITS}
    lengths = {k: np.c_[x, np.abs(x[:, 0] - x[:, 1])] for k, x in lengths.items()}
    yield logistic_regression("lengths and their difference", lengths, labels)

    both = {k: [histograms(documents(splits[k], i)) for i in (0, 1)] for k in SPLITS}
    side_by_side = {k: np.concatenate(x, axis=1) for k, x in both.items()}
    yield logistic_regression("bytes of the two texts, side by side", side_by_side, labels)
    mean, deviation = side_by_side["train"].mean(axis=0), side_by_side["train"].std(axis=0) + 1e-6
    matched = {}
    for k, x in side_by_side.items():
        u, v = np.split((x - mean) / deviation, 2, axis=1)
        matched[k] = np.concatenate([np.abs(u - v), u * v, lengths[k]], axis=1)
    yield logistic_regression("differences and products of bytes, lengths", matched, labels)

    def words_of(split: PackedSplit, column: int) -> list[set[bytes]]:
        return [set(WORD.findall(x.tobytes().lower())) for x in documents(split, column)]

    words = {k: [words_of(splits[k], column) for column in (0, 1)] for k in SPLITS}
    frequency = Counter(word for column in words["train"] for text in column for word in text)
    num_texts = 2 * len(splits["train"])
    rarity = {word: math.log(num_texts / count) ** 2 for word, count in frequency.items()}

    def weight(text: set[bytes]) -> float:
        return sum(rarity.get(word, math.log(num_texts) ** 2) for word in text)

    cosine = {
        k: np.array([
            [weight(u & v) / math.sqrt(weight(u) * weight(v) + 1e-9)]
            for u, v in zip(*words[k], strict=True)
        ])
        for k in SPLITS
    }
    yield logistic_regression("shared words, weighted by rarity", cosine, labels)


def pathfinder(splits: Splits, labels: Arrays) -> Iterator[Score]:
    """Grey levels."""
    levels = {k: histograms(documents(splits[k])) for k in SPLITS}
    yield logistic_regression("grey levels", levels, labels)


TASKS: dict[str, Callable[[Splits, Arrays], Iterator[Score]]] = {
    "listops": listops, "text": text, "retrieval": retrieval, "image": image,
    "pathfinder": pathfinder,
}


def measure(task: str, overrides: Sequence[str] = ()) -> Iterator[Score]:
    """The scores of a task on the data that configs/<task>.yaml names."""
    splits = load_splits(open_dataset(load_config(ROOT / "configs" / f"{task}.yaml", overrides)))
    yield from TASKS[task](splits, {k: splits[k].labels for k in SPLITS})


def print_scores() -> None:
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n\n")[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"{', '.join(TASKS)}; all of them")
    parser.add_argument("--data_dir", default="datasets")
    arguments = parser.parse_args()
    if unknown := set(arguments.tasks) - set(TASKS):
        parser.error(f"no task {min(unknown)!r}; there are {', '.join(TASKS)}")
    rows = [
        [task, score.features, f"{score.val:.1f}", f"{score.test:.1f}"]
        for task in arguments.tasks or TASKS
        for score in measure(task, [f"data_dir={arguments.data_dir}"])
    ]
    print_result(markdown(["task", "read", "validation, %", "test, %"], rows, numbers=2))


def main() -> int:
    return run_program(PROGRAM, print_scores)


if __name__ == "__main__":
    sys.exit(main())
