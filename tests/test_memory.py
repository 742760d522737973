"""The reach of models that retain a known share of their memory, and the probe."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused, called, run_cli, tiny_batch, tiny_config, write_config
from torch import Tensor, nn

from data.packing import PackedSplit, load_splits
from dataloader import Batch, collate
from experiments import memory
from lra_config import load_config
from lra_datasets import open_dataset
from model import SegmentRecurrent, build_model
from training.gradients import score


class Carrier(SegmentRecurrent):
    """A memory of two features: one is retained, the other is the segment's last token."""

    segment_len, max_seq_len = 2, 8
    head = nn.Identity()

    def initial_memory(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 1, 2)

    def segment(
        self, tokens: Tensor, memory: Tensor, index: int, mask: Tensor | None = None,
        positions: Tensor | None = None, seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        fresh = tokens.float()
        carried = memory[:, 0, 0] if index else fresh[:, 0]
        memory = torch.stack([carried, self.share * fresh[:, 1]], dim=1)[:, None]
        return memory, memory[:, 0]

    def combine(self, readouts: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
        return readouts[-1]


@pytest.mark.parametrize(("share", "expected"), [(0.0, 1.0), (1.0, 0.5**0.5)])
def test_reach_is_the_retained_share(share: float, expected: float) -> None:
    model = Carrier()
    model.share = share
    tokens = torch.tensor([[5, 5] + [5, 5] * 3, [9, 9] + [9, 9] * 3])
    reach = memory.memory_reach(model, Batch(tokens, None, torch.tensor([0, 1])))
    assert reach == pytest.approx([1.0, expected, expected, expected])


def test_without_differences_between_examples_an_exchange_changes_nothing() -> None:
    config = tiny_config()
    model = build_model(config).eval()
    batch = tiny_batch(config)
    same = Batch(batch.tokens[:1].repeat(3, 1), None, batch.labels)
    exchanged = memory.score_exchanged(model, same).logits
    assert torch.allclose(exchanged, score(model, same).logits)
    other = memory.score_exchanged(model, batch).logits - score(model, batch).logits
    assert other.abs().max() > 1e-6


def test_memories_and_answers_are_of_the_same_examples(tmp_path: Path, listops_dir: Path) -> None:
    config = load_config(write_config(tmp_path, listops_dir))
    model = build_model(config).eval()
    split = load_splits(open_dataset(config))["train"].take(np.arange(7))
    last = config.num_segments
    memories, asked = memory.collect_memories(model, split, [1, last])
    assert len(memories[1]) == len(memories[last]) == 7
    found = []
    for row in range(7):
        batch = collate(split, np.array([row]), config, torch.device("cpu"))
        with torch.no_grad():
            left = [memory for memory, _ in model.recur(model.split(batch.tokens, batch.mask)[0])]
        same = [
            torch.isclose(memories[t], memory.flatten(), atol=1e-5).all(dim=1)
            for t, memory in ((1, left[0]), (last, left[-1]))
        ]
        (index,) = (same[0] & same[1]).nonzero()
        assert asked["answer"][index] == batch.labels
        assert asked["first token"][index] == batch.tokens[0, 0]
        found.append(int(index))
    assert sorted(found) == list(range(7))


def test_the_first_document_of_a_separate_pair_is_probed() -> None:
    config = tiny_config(dataset="aan", document_pair="separate", max_seq_len=64)
    tokens = np.arange(10, 10 + 3 * 8, dtype=np.uint8)
    starts = np.arange(6).reshape(3, 2) * 4
    split = PackedSplit(tokens, starts, np.full((3, 2), 4), np.array([0, 1, 1]), offset=1)
    memories, asked = memory.collect_memories(build_model(config).eval(), split, [1])
    assert len(memories[1]) == 3
    assert asked["first token"].tolist() == [11, 19, 27] and asked["answer"].tolist() == [0, 1, 1]


def test_the_command_measures_an_initialization_and_a_finished_run(
    tmp_path: Path, listops_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "NUM_LONGEST", 4)
    monkeypatch.setattr(memory, "NUM_EXAMPLES", {"train": 12, "val": 5, "test": 5})
    config = write_config(tmp_path, listops_dir, max_steps=2, warmup_steps=1, num_segments=4)
    run_cli("--config", config, cwd=tmp_path, check=True)
    arguments = (config, "runs/run", "--set", f"data_dir={listops_dir}")

    def table(what: str) -> list[list[str]]:
        result = called(memory.main, what, *arguments, cwd=tmp_path, check=True)
        lines = result.stdout.strip().splitlines()[2:]
        return [[x.strip() for x in line.split("|")[1:-1]] for line in lines]

    start, trained = table("reach")
    assert 0 <= float(start[2]) <= 1.5 and not start[5]
    assert 0 <= float(trained[5]) <= 100 and 0 <= float(trained[6]) <= 100
    rows = table("probe")
    questions = [(name, t) for name in ("answer", "first token") for t in ("1", "2", "4")]
    assert [(row[1], row[2]) for row in rows] == 2 * questions
    assert all(0 <= float(value) <= 100 for row in rows for value in row[3:])


@pytest.mark.parametrize("override", ["num_memory_tokens=0", "num_segments=1"])
def test_a_model_without_a_memory_is_refused(
    tmp_path: Path, listops_dir: Path, override: str
) -> None:
    config = write_config(tmp_path, listops_dir)
    result = called(memory.main, "reach", config, "--set", override, cwd=tmp_path)
    assert_refused(result, "tiny.yaml", "memory")
