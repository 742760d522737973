"""Accuracy from inside: which examples a model gets right."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from data.tasks import PADDING_ID, ListOpsTokenizer
from dataloader import Batch
from lra_config import Config
from run.processes import ALONE, Processes

LENGTH_RANGES = 4  # of equal width, up to max_seq_len
DEEPEST = 10  # ListOps; a greater mean depth counts as this one
OPERATORS = [token for token in ListOpsTokenizer.tokens if token.startswith("[")]
FIRST_OPERATOR = PADDING_ID + 1
CLOSING = FIRST_OPERATOR + len(OPERATORS)


class Share(TypedDict):
    """Of one slice of a split."""

    accuracy: float  # fraction
    examples: int


class Slices:
    """Counts correct answers by label, by length, and for ListOps by root operator and depth.

    A length is the number of real tokens of all documents of an example, in quarters of
    `max_seq_len`; images have none, as they are all alike. The root is the outermost operator. The
    depth is the number of operators around a token, averaged over the tokens and rounded: nearly
    every expression of 500 tokens has the greatest depth somewhere.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.width = -(-config.max_seq_len // LENGTH_RANGES)
        self.names = {"label": [str(label) for label in range(config.task.num_classes)]}
        if not config.task.is_image:
            self.names["length"] = [
                f"{i * self.width + 1} to {min((i + 1) * self.width, config.max_seq_len)}"
                for i in range(LENGTH_RANGES)
            ]
        if config.task.tokenizer is ListOpsTokenizer:
            self.names["root"] = [operator.removeprefix("[") for operator in OPERATORS]
            self.names["depth"] = [str(depth) for depth in range(DEEPEST + 1)]
        self.counts = {  # (groups, 2): correct, all
            name: torch.zeros(len(groups), 2, dtype=torch.float64, device=device)
            for name, groups in self.names.items()
        }

    def add(self, batch: Batch, correct: Tensor) -> None:
        """Count a batch; `correct` is (B,) bool."""
        ones = torch.stack([correct, torch.ones_like(correct)], dim=1).double()
        for name, counts in self.counts.items():
            group = getattr(self, f"_{name}")(batch)  # (B,) int64; outside of the names: no slice
            inside = (group >= 0) & (group < len(counts))
            counts.index_add_(0, group.where(inside, 0), ones * inside[:, None])

    def shares(self, processes: Processes = ALONE) -> dict[str, dict[str, Share]]:
        """Kind of slice, then slice, to its accuracy; slices without an example are left out."""
        return {
            name: {
                group: Share(accuracy=correct / examples, examples=int(examples))
                for group, (correct, examples) in zip(
                    self.names[name], processes.sum(counts.clone()).tolist(), strict=True
                )
                if examples
            }
            for name, counts in self.counts.items()
        }

    def _label(self, batch: Batch) -> Tensor:
        return batch.labels

    def _length(self, batch: Batch) -> Tensor:
        return ((batch.tokens != PADDING_ID).sum(dim=1) - 1) // self.width

    def _root(self, batch: Batch) -> Tensor:
        first = batch.tokens[:, 0]
        return torch.where(first < CLOSING, first - FIRST_OPERATOR, -1)

    def _depth(self, batch: Batch) -> Tensor:
        tokens = batch.tokens
        opens = (tokens >= FIRST_OPERATOR) & (tokens < CLOSING)
        # An operator and its bracket stand inside of what is around them, not of themselves.
        around = (opens.long() - (tokens == CLOSING).long()).cumsum(dim=1) - opens.long()
        real = tokens != PADDING_ID
        mean = (around * real).sum(dim=1) / real.sum(dim=1)
        return mean.round().long().clamp(0, DEEPEST)


def slices_text(shares: dict[str, dict[str, Share]]) -> str:
    """One line per kind: `root: MIN 71.7 % of 498, MAX ...`."""
    return "\n".join(
        f"{name}: " + ", ".join(
            f"{group} {100 * share['accuracy']:.1f} % of {share['examples']}"
            for group, share in groups.items()
        )
        for name, groups in shares.items()
    )
