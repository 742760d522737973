"""How far a memory reaches, on models that carry a known share of it."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import assert_refused, called, run_cli, tiny_batch, tiny_config, write_config
from torch import Tensor, nn

from dataloader import Batch
from experiments import memory_reach
from experiments.memory_reach import score_exchanged
from model import SegmentRecurrent, build_model
from train import score


class Carrier(SegmentRecurrent):
    """A memory of two features: one is carried on, the other is the segment's last token."""

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
def test_reach_is_the_share_that_is_carried(share: float, expected: float) -> None:
    model = Carrier()
    model.share = share
    tokens = torch.tensor([[5, 5] + [5, 5] * 3, [9, 9] + [9, 9] * 3])
    reach = memory_reach.memory_reach(model, Batch(tokens, None, torch.tensor([0, 1])))
    assert reach == pytest.approx([1.0, expected, expected, expected])


def test_without_differences_between_examples_an_exchange_changes_nothing() -> None:
    config = tiny_config()
    model = build_model(config).eval()
    batch = tiny_batch(config)
    same = Batch(batch.tokens[:1].repeat(3, 1), None, batch.labels)
    assert torch.allclose(score_exchanged(model, same).logits, score(model, same).logits)
    other = score_exchanged(model, batch).logits - score(model, batch).logits
    assert other.abs().max() > 1e-6


def test_the_command_measures_a_start_and_a_finished_run(
    tmp_path: Path, listops_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_reach, "NUM_EXAMPLES", 4)
    config = write_config(tmp_path, listops_dir, max_steps=2, warmup_steps=1)
    run_cli("--config", config, cwd=tmp_path, check=True)
    arguments = (config, "runs/run", "--set", f"data_dir={listops_dir}")
    result = called(memory_reach.main, *arguments, cwd=tmp_path, check=True)
    start, trained = (line.split("|") for line in result.stdout.strip().splitlines()[2:])
    assert 0 <= float(start[3]) <= 1.5 and not start[6].strip()
    assert 0 <= float(trained[6]) <= 100 and 0 <= float(trained[7]) <= 100


@pytest.mark.parametrize("override", ["num_memory_tokens=0", "num_segments=1"])
def test_a_model_without_a_memory_is_refused(
    tmp_path: Path, listops_dir: Path, override: str
) -> None:
    config = write_config(tmp_path, listops_dir)
    result = called(memory_reach.main, config, "--set", override, cwd=tmp_path)
    assert_refused(result, "tiny.yaml", "memory")
