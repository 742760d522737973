"""The systems of the published tables: their components, as configuration and as model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import macro_model_reference as macro
import numpy as np
import pytest
import torch
import yaml
from cases import close, reference_logits, small_batch, small_config, small_model

import tables
import train
from dataloader import Batch
from generate_lra import generate_listops
from lra_config import load_config, make_config
from model import build_model

CONFIGS = Path(__file__).parents[2] / "configs"
TASKS = {
    # Sequence lengths of the published table's columns.
    "listops": ("listops", 2048), "text": ("imdb_lra", 4096), "retrieval": ("aan", 8192),
    "image": ("cifar10", 1024), "pathfinder": ("pathfinder32", 1024),
}


class System(NamedTuple):
    """A row of the paper's comparison."""

    attention: str
    memory: bool  # tokens passed to the next segment
    factor: bool  # retention factor on them
    segments: bool  # more than one
    amrb: bool
    sigmoid: bool = False


SYSTEMS = {
    "rmaat": System("astro", memory=True, factor=True, segments=True, amrb=True),
    "rmt": System("softmax", memory=True, factor=False, segments=True, amrb=False),
    "rlt": System("linear", memory=True, factor=False, segments=True, amrb=False),
    "at": System("astro", memory=False, factor=False, segments=False, amrb=False, sigmoid=True),
    "transformer": System("softmax", memory=False, factor=False, segments=False, amrb=False),
    "linear_transformer": System("linear", memory=False, factor=False, segments=False, amrb=False),
    "nystromformer": System("nystrom", memory=False, factor=False, segments=False, amrb=False),
    "luna": System("luna", memory=True, factor=False, segments=False, amrb=False),
}


def system_config(system: str, task: str, **changes):
    """Return a task's configuration with a system's overrides, as the tables are trained."""
    table = yaml.safe_load((CONFIGS / "tables" / f"{system}.yaml").read_text())
    values = {**table, **changes}
    if values.get("num_segments") == 1:  # of each document, if two are encoded separately
        values["num_segments"] = load_config(CONFIGS / f"{task}.yaml").num_sequences
    overrides = [f"{key}={'null' if value is None else value}" for key, value in values.items()]
    return load_config(CONFIGS / f"{task}.yaml", overrides)


def test_every_system_of_the_paper_has_a_table_and_no_other_does():
    assert {path.stem for path in (CONFIGS / "tables").glob("*.yaml")} == set(SYSTEMS)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_table_makes_its_system_of_every_task(system, task):
    config, expected = system_config(system, task), SYSTEMS[system]
    assert (config.dataset, config.max_seq_len) == TASKS[task]
    assert config.attention_type == expected.attention
    assert (config.num_memory_tokens > 0) == expected.memory
    assert config.astro_mem == expected.factor
    assert (config.num_segments > config.num_sequences) == expected.segments
    assert config.memory_replay_backprop == expected.amrb
    if expected.attention == "astro":
        assert config.hebbian_sigmoid == expected.sigmoid
        assert config.hebbian_astro and config.presynaptic_normalize
        assert config.presynaptic_alpha == 0.25


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_table_changes_the_mechanism_and_leaves_width_depth_and_budget(system):
    table = yaml.safe_load((CONFIGS / "tables" / f"{system}.yaml").read_text())
    mechanism = {
        "attention_type", "num_memory_tokens", "num_segments", "astro_mem", "hebbian_sigmoid",
        "memory_replay_backprop", "nystrom_landmarks", "nystrom_conv",
        # Keys of the neighbor initialization, and the learned positions that replace its code
        "num_hidden", "basis_init", "position_embedding", "position_init", "decay_scale",
        "hebbian_divisor", "position_lr_factor",
    }
    assert set(table) <= mechanism


def test_luna_projects_to_256_tokens_and_nystromformer_has_its_published_terms():
    assert system_config("luna", "text").num_memory_tokens == 256
    nystrom = system_config("nystromformer", "text")
    assert 64 <= nystrom.nystrom_landmarks <= 256
    assert nystrom.nystrom_conv == 35


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_main_configurations_are_those_of_the_paper(path):
    config = load_config(path)
    assert config.attention_type == "astro" and config.num_memory_tokens > 0
    assert config.astro_mem and config.memory_replay_backprop
    assert config.hebbian_astro and not config.hebbian_sigmoid and config.presynaptic_normalize
    assert config.presynaptic_alpha == 0.25 and config.num_segments in (2, 4, 8, 16)
    if config.dataset == "aan":
        assert config.num_segments == 16


@pytest.mark.parametrize(("dataset", "tokens", "segments", "classes"), [
    ("listops", 2048, 8, 10), ("imdb_lra", 4096, 8, 2), ("aan", 8192, 16, 2),
    ("cifar10", 1024, 4, 10), ("pathfinder32", 1024, 4, 2), ("imdb", 512, 2, 2),
    ("imdb_long", 6 * 256, 6, 2),
])
def test_a_data_set_alone_is_rmaat_at_the_length_of_its_task(dataset, tokens, segments, classes):
    config = make_config({"dataset": dataset})
    assert (config.max_seq_len, config.num_segments) == (tokens, segments)
    assert config.task.num_classes == classes
    assert config.attention_type == "astro" and config.astro_mem
    assert config.memory_replay_backprop and config.num_memory_tokens == 1
    assert config.hebbian_astro and config.hebbian_divisor is None
    assert not config.hebbian_sigmoid and config.presynaptic_normalize
    assert config.presynaptic_alpha == 0.25


@pytest.mark.parametrize(("system", "average"), [
    ("transformer", 54.4), ("nystromformer", 59.0), ("luna", 61.3), ("rlt", 58.3), ("rmt", 63.6),
    ("rmaat", 68.0),
])
def test_published_accuracies_have_the_published_averages(system, average):
    accuracies = tables.ACCURACY[system]
    assert set(accuracies) == set(TASKS)
    assert round(sum(accuracies.values()) / len(TASKS), 1) == average


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_model_of_a_system_has_its_parts(system):
    expected = SYSTEMS[system]
    config = system_config(
        system, "image", dim=8, num_heads=2, ffn_dim=8, num_hidden=None, basis_init="landmarks"
    )
    model, T = build_model(config), config.num_segments
    assert (T > 1) == expected.segments
    assert (len(model.memory) > 0) == expected.memory and model.memory.requires_grad
    factors = macro.retention_factors(T) if expected.factor else [1.0] * T
    close(model.retention_factors, factors, 1e-8)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_forward_pass_of_a_system_is_that_of_the_loops(system):
    table = yaml.safe_load((CONFIGS / "tables" / f"{system}.yaml").read_text())
    memory = 3 if system == "luna" else small_config().num_memory_tokens
    table["num_memory_tokens"] = min(table.get("num_memory_tokens", memory), memory)
    model = small_model(small_config(**table))
    batch = small_batch(model.config)
    close(model(batch.tokens, batch.mask), reference_logits(model, batch.tokens, batch.mask))


@pytest.mark.parametrize("replay", [True, False])
def test_a_run_trains_with_amrb_or_with_bptt_as_its_key_says(replay, tmp_path, monkeypatch):
    generate_listops(
        tmp_path, seed=0, train=24, val=8, test=8, workers=1, min_length=9, max_length=41
    )
    called = set()
    for name in ("amrb_backward", "bptt_backward"):
        backward = getattr(train, name)

        def recorded(*arguments, name=name, backward=backward, **keywords):
            called.add(name)
            return backward(*arguments, **keywords)

        monkeypatch.setattr(train, name, recorded)
    train.train(small_config(
        max_seq_len=40, num_segments=4, batch_size=8, max_steps=2, warmup_steps=1,
        eval_interval=2, memory_replay_backprop=replay, data_dir=str(tmp_path),
        output_dir=str(tmp_path / "runs"), run_name="run",
    ))
    assert called == {"amrb_backward" if replay else "bptt_backward"}


def test_loss_and_accuracy_count_every_example_once():
    """Batches differ in size; the accuracy is a fraction, the loss is in nats."""
    model = small_model(small_config())
    batch = small_batch(model.config)
    batches = [Batch(*(part[rows] for part in batch)) for rows in (slice(4), slice(4, 5))]
    scores = reference_logits(model, batch.tokens, batch.mask).numpy()
    losses = [
        math.log(np.exp(row).sum()) - row[label]
        for row, label in zip(scores, batch.labels.tolist(), strict=True)
    ]
    correct = [row.argmax() == label for row, label in
               zip(scores, batch.labels.tolist(), strict=True)]
    metrics = train.evaluate(model, batches)
    assert metrics.loss == pytest.approx(sum(losses) / 5)
    assert metrics.accuracy == sum(correct) / 5
    batch = batch._replace(labels=torch.from_numpy(scores.argmax(axis=1)))
    assert train.evaluate(model, [batch]).accuracy == 1


def test_nystrom_with_a_landmark_per_row_is_softmax_attention():
    """F A^+ B is then A A^+ A = A, after the iteration has converged."""
    nystrom = small_config(
        attention_type="nystrom", nystrom_landmarks=16, nystrom_conv=0
    )
    approximate, exact = small_model(nystrom), small_model(small_config(attention_type="softmax"))
    with torch.no_grad():
        for layer in approximate.layers:
            layer.attention.to_qkv.weight.mul_(3)  # A is then far from singular
            layer.attention.iterations = 30
    exact.load_state_dict(approximate.state_dict())
    batch = small_batch(nystrom)
    close(approximate(batch.tokens, batch.mask), exact(batch.tokens, batch.mask), 1e-5)
