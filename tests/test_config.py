"""The configuration: accepted values, refused values, and the messages."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, run_cli, tiny_batch, tiny_config

from lra_config import Config, ConfigError, dump_config, load_config, make_config, read_mapping
from model import build_model
from train import amrb_backward
from training.optimizer import build_optimizers

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_only_the_dataset_is_required(tmp_path):
    config = load_config(write(tmp_path, "dataset: listops\n"))
    assert (config.max_seq_len, config.num_segments, config.segment_len) == (2048, 8, 256)
    assert config.run_name == "listops_astro_seed0"


def test_overrides_come_after_the_file_and_the_last_one_wins(tmp_path):
    path = write(tmp_path, "dataset: listops\nseed: 1\nlearning_rate: 1e-3\n")
    config = load_config(path, ["seed=2", "seed=3", "astro_mem=false", "learning_rate=5e-4"])
    assert (config.seed, config.astro_mem, config.learning_rate) == (3, False, 5e-4)


def test_a_dumped_configuration_loads_back_equal(tmp_path):
    config = tiny_config(learning_rate=3e-5, hebbian_divisor=1e-7, run_name="1e3")
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(("override", "words"), [
    ("num_segment=4", ["unknown key num_segment", "did you mean num_segments?"]),
    ("zzz=4", ["unknown key zzz"]),
    ("dim=sixteen", ["dim='sixteen'", "integer"]),
    ("dim=16.5", ["dim=16.5", "integer"]),
    ("wandb=1", ["wandb=1", "boolean"]),
    ("dropout=1.0", ["dropout=1.0", "less than 1"]),
    ("num_segments=0", ["num_segments=0", "greater than or equal to 1"]),
    ("learning_rate=-1", ["learning_rate=-1", "greater than 0"]),
    ("learning_rate=.nan", ["learning_rate=nan", "finite"]),
    ("attention_type=astra", ["attention_type='astra'", "'astro', 'softmax'"]),
    ("dataset=listop", ["dataset='listop'", "'listops'"]),
    ("num_segments=7", ["max_seq_len=40", "num_segments=7", "max_seq_len=42"]),
    ("num_heads=3", ["num_heads=3", "dim=16"]),
    ("dim=null", ["dim=None"]),
    ("warmup_steps=13", ["warmup_steps=13", "max_steps=12"]),
    ("nystrom_conv=4", ["nystrom_conv=4", "odd"]),
    ("run_name=../x", ["run_name='../x'"]),
    ("seed", ["override 'seed'", "key=value"]),
    ("seed=[1", ["override 'seed=[1'"]),
])
def test_every_mistake_is_one_line_that_names_the_key(tmp_path, override, words):
    path = write(tmp_path, dump_config(make_config(TINY)))
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_impossible_combinations_are_refused():
    with pytest.raises(ConfigError, match="num_memory_tokens=0"):
        tiny_config(pooling="memory", num_memory_tokens=0)
    with pytest.raises(ConfigError, match="num_memory_tokens=0"):
        tiny_config(attention_type="luna", num_memory_tokens=0)
    with pytest.raises(ConfigError, match="dim=15 is odd"):
        tiny_config(dim=15, num_heads=3, position_embedding="sinusoidal")
    with pytest.raises(ConfigError, match="position_embedding=none"):
        tiny_config(position_init="sinusoidal", position_embedding="none")
    with pytest.raises(ConfigError, match="token_embedding=ordinal needs ordered ids"):
        tiny_config(token_embedding="ordinal")
    with pytest.raises(ConfigError, match="pooling=intensity weighs pixels"):
        tiny_config(pooling="intensity")
    with pytest.raises(ConfigError, match="needs the rows and columns of an image"):
        tiny_config(position_init="sinusoidal_2d")
    with pytest.raises(ConfigError, match="dim=2 leaves 2"):
        tiny_config(position_init="sinusoidal_2d", dataset="cifar10", dim=2, num_heads=1)
    with pytest.raises(ConfigError, match="needs the pixels of an image"):
        tiny_config(token_mixer="conv3x3")
    with pytest.raises(ConfigError, match="cuts the 32 rows"):
        tiny_config(token_mixer="conv3x3", dataset="cifar10", max_seq_len=1024, num_segments=64)
    with pytest.raises(ConfigError, match="chooses contours of pathfinder32"):
        tiny_config(pathfinder_split="baseline")
    pathfinder = {"dataset": "pathfinder32", "max_seq_len": 1024}
    for curriculum, words in [
        ({"baseline": 1, "hard": 2}, "start at step 0"),
        ({"baseline": 0, "intermediate": 2}, "end with hard"),
        ({"baseline": 0, "intermediate": 2, "hard": 2}, "rise"),
    ]:
        with pytest.raises(ConfigError, match=words):
            tiny_config(**pathfinder, pathfinder_split=curriculum)
    with pytest.raises(ConfigError, match="bucket_by_length"):
        tiny_config(readout_norm="batch", bucket_by_length=True)
    with pytest.raises(ConfigError, match="num_hidden=8 belongs to attention_type"):
        tiny_config(num_hidden=8, attention_type="softmax")
    local = {"basis_init": "neighbors", "position_embedding": "none"}
    with pytest.raises(ConfigError, match="use learned or none"):
        tiny_config(**{**local, "position_embedding": "sinusoidal"})
    with pytest.raises(ConfigError, match="num_hidden=3"):
        tiny_config(**local, max_seq_len=64, num_segments=2, num_hidden=3)
    with pytest.raises(ConfigError, match="names no neighbor"):
        tiny_config(**local, max_seq_len=64, num_segments=2, num_hidden=32, neighbor_offsets=[])
    with pytest.raises(ConfigError, match="by 17 features"):
        tiny_config(**local, max_seq_len=128, num_segments=2, num_hidden=64)
    assert tiny_config(
        **local, max_seq_len=128, num_segments=2, num_hidden=64, neighbor_code_digits=3
    ).position_code_digits == [4, 4, 4]
    with pytest.raises(ConfigError, match="batch_size=1"):
        tiny_config(readout_norm="batch", batch_size=1)


def test_two_documents_fill_full_segments_or_share_one():
    pair = {"dataset": "aan", "max_seq_len": 64}
    assert tiny_config(**pair, num_segments=1).segment_len == 64
    for change in ({"num_segments": 1, "document_pair": "separate"},
                   {"num_segments": 3, "max_seq_len": 63}):
        with pytest.raises(ConfigError, match="multiple of 2"):
            tiny_config(**{**pair, **change})


@pytest.mark.parametrize(("content", "words"), [
    (None, "No such file"),
    (b"", "no `key: value` lines"),
    (b"- 1\n- 2\n", "no `key: value` lines"),
    (b"dataset: [listops\n", "line 2"),
    (b"dataset: \xff\xfe\n", "not a UTF-8 text"),
    (b"1: 2\ndataset: listops\n", "no `key: value` lines"),
    (b"dataset: listops\nseed: 1\nseed: 2\n", "line 3: 'seed' is given twice"),
    (b"dataset: &a listops\nrun_name: *a\n", "line 2: aliases are not read"),
    (b"seed: 1\n", "dataset is missing"),
])
def test_unreadable_files_are_named(tmp_path, content, words):
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)) as caught:
        load_config(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [
    ["dim=17"],
    ["device=cuda"],
    ["nothing=1"],
    ["batch_size=1000"],
], ids=str)
def test_the_command_line_answers_a_mistake_with_status_2_and_one_line(
    tmp_path, listops_dir, arguments
):
    path = write(tmp_path, dump_config(make_config({**TINY, "data_dir": str(listops_dir)})))
    result = run_cli("--config", str(path), *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert arguments[0].split("=")[0] in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_missing_file_is_answered_with_status_2_and_one_line(tmp_path):
    result = run_cli("--config", "absent.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1 and "absent.yaml" in result.stderr


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_configuration_builds_and_overfits_one_batch(path):
    config = load_config(path, ["device=cpu", "dropout=0", "batch_size=4"])
    torch.manual_seed(0)
    model = build_model(config)
    optimizers = build_optimizers(model, config).values()
    # Two segments: quick, and the memory matters.
    lengths = [2 * config.segment_len, config.segment_len + 5, 30, 7]
    batch = tiny_batch(config, [min(n, config.max_seq_len) for n in lengths])
    width = max(lengths)
    batch = batch._replace(
        tokens=batch.tokens[:, :width], mask=batch.mask[:, :width],
        labels=torch.arange(4) % config.task.num_classes,  # not all equal
    )
    losses = []
    for _ in range(25):
        model.zero_grad()
        losses.append(float(amrb_backward(model, batch).loss))
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_keys_of_earlier_versions_are_read_under_their_new_names(tmp_path, capsys):
    old = "dataset: cifar10\nposition_basis: localised\nlocal_lags: [-1]\nhebbian_scale: 8.0\n"
    old += "pooling: bright\nposition_scale: 0.5\nposition_grid: true\non_nonfinite: stop\n"
    config = load_config(write(tmp_path, old))
    assert (config.basis_init, config.neighbor_offsets, config.hebbian_divisor) == (
        "landmarks", [-1], 8.0
    )
    assert (config.pooling, config.position_init) == ("intensity", "sinusoidal_2d")
    assert "hebbian_scale is now hebbian_divisor=8.0" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="on_nonfinite was retired"):
        load_config(write(tmp_path, "dataset: listops\non_nonfinite: skip\n"))
    with pytest.raises(ConfigError, match="hebbian_scale is the old name of hebbian_divisor"):
        load_config(write(tmp_path, "dataset: listops\nhebbian_scale: 1.0\nhebbian_divisor: 1.0"))


def test_the_configuration_of_every_stored_result_loads():
    stored = list((ROOT / "results").rglob("config.yaml"))
    assert stored
    for path in stored:
        load_config(path)


def test_every_key_belongs_to_one_group_and_to_the_main_configuration():
    grouped = [key for group in Config.groups for key in group.model_fields]
    assert sorted(grouped) == sorted(Config.model_fields)
    assert set(read_mapping(ROOT / "configs" / "config_v10.yaml")) == set(grouped)


def test_the_configuration_page_is_current():
    """`python docs/generate_configuration.py > docs/configuration.md` updates it."""
    page = runpy.run_path(str(ROOT / "docs/generate_configuration.py"))["page"]()
    assert (ROOT / "docs/configuration.md").read_text() == page + "\n"
