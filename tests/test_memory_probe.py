"""What a memory says: every example's memory stands beside its own answer and first token."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused, called, run_cli, tiny_config, write_config

from data.packing import PackedSplit, load_splits
from dataloader import collate
from experiments import memory_probe
from lra_config import load_config
from lra_datasets import open_dataset
from model import build_model


def test_memories_and_questions_are_of_the_same_examples(
    tmp_path: Path, listops_dir: Path
) -> None:
    config = load_config(write_config(tmp_path, listops_dir))
    model = build_model(config).eval()
    split = load_splits(open_dataset(config))["train"].take(np.arange(7))
    last = config.num_segments
    memories, asked = memory_probe.collect_memories(model, split, [1, last])
    assert len(memories[1]) == len(memories[last]) == 7
    found = []
    for row in range(7):
        batch = collate(split, np.array([row]), config, torch.device("cpu"))
        with torch.no_grad():
            left = [memory for memory, _ in model.recur(model.split(batch.tokens, batch.mask)[0])]
        expected = [left[0].flatten().numpy(), left[-1].flatten().numpy()]
        same = [np.isclose(memories[1], expected[0], atol=1e-5).all(axis=1),
                np.isclose(memories[last], expected[1], atol=1e-5).all(axis=1)]
        (index,) = np.flatnonzero(same[0] & same[1])
        assert asked["answer"][index] == batch.labels
        assert asked["first token"][index] == batch.tokens[0, 0]
        found.append(index)
    assert sorted(found) == list(range(7))


def test_of_a_pair_encoded_apart_the_first_document_is_asked_for() -> None:
    config = tiny_config(dataset="aan", document_pair="separate", max_seq_len=64)
    tokens = np.arange(10, 10 + 3 * 8, dtype=np.uint8)
    starts = np.arange(6).reshape(3, 2) * 4
    split = PackedSplit(tokens, starts, np.full((3, 2), 4), np.array([0, 1, 1]), offset=1)
    memories, asked = memory_probe.collect_memories(build_model(config).eval(), split, [1])
    assert len(memories[1]) == 3
    assert asked["first token"].tolist() == [11, 19, 27] and asked["answer"].tolist() == [0, 1, 1]


def test_the_command_probes_a_start_and_a_finished_run(
    tmp_path: Path, listops_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_probe, "NUM_EXAMPLES", {"train": 12, "val": 5, "test": 5})
    config = write_config(tmp_path, listops_dir, max_steps=2, warmup_steps=1, num_segments=4)
    run_cli("--config", config, cwd=tmp_path, check=True)
    arguments = (config, "runs/run", "--set", f"data_dir={listops_dir}")
    result = called(memory_probe.main, *arguments, cwd=tmp_path, check=True)
    rows = [[x.strip() for x in line.split("|")[1:-1]] for line in result.stdout.splitlines()[2:]]
    questions = [(name, t) for name in ("answer", "first token") for t in ("1", "2", "4")]
    assert [(row[1], row[2]) for row in rows] == 2 * questions
    assert all(0 <= float(value) <= 100 for row in rows for value in row[3:])


def test_a_model_without_a_memory_is_refused(tmp_path: Path, listops_dir: Path) -> None:
    config = write_config(tmp_path, listops_dir)
    result = called(memory_probe.main, config, "--set", "num_memory_tokens=0", cwd=tmp_path)
    assert_refused(result, "tiny.yaml", "memory")
