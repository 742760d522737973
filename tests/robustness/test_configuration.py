"""The configuration as input: whatever a file or an override holds, it is taken or told."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
from conftest import ROOT, TINY, assert_refused, refusal, run_cli

from lra_config import load_config, make_config
from run.program import one_line, shown
from sweep import load_runs

ALIASES = "a: &a [1]\n" + "".join(
    f"{new}: &{new} [{','.join(f'*{old}' for _ in range(9))}]\n"
    for old, new in itertools.pairwise("abcdefghi")
)

# Contents of a file, and what the answer names.
FILES = {
    "a key twice": (b"dataset: listops\nseed: 1\nseed: 2\n", ["line 3", "'seed' is given twice"]),
    "octal": (b"dataset: listops\nseed: 010\n", ["seed='010'", "integer"]),
    "sexagesimal": (b"dataset: listops\nseed: 1:30\n", ["seed='1:30'"]),
    "hexadecimal": (b"dataset: listops\nseed: 0x10\n", ["seed='0x10'"]),
    "many digits": (b"dataset: listops\nseed: " + b"9" * 5000, ["seed='999", "integer"]),
    "forty digits": (b"dataset: listops\nseed: " + b"9" * 40, ["seed=an integer of 133 bits"]),
    "a huge seed": (b"dataset: listops\nseed: 18446744073709551616", ["seed=18446744073709551616"]),
    "a tag": (b"dataset: listops\nseed: !!int abc\n", ["line 2", "tags"]),
    "a python tag": (b"dataset: !!python/object/apply:os.system [ls]", ["line 1", "tags"]),
    "an alias bomb": (ALIASES.encode(), ["line 1", "anchors and aliases"]),
    "a merge": (b"<<: {seed: 1}\ndataset: listops\n", ["unknown key <<"]),
    "deep nesting": (b"dataset: " + b"[" * 3000 + b"]" * 3000, ["line 1", "nested"]),
    "deep mappings": (b"dataset: " + b"{a: " * 3000 + b"}" * 3000, ["line 1", "nested"]),
    "a list": (b"dataset: [listops]\n", ["dataset=['listops']"]),
    "a mapping": (b"dataset: {a: b}\nrun_name: [x]\n", ["dataset={'a': 'b'}"]),
    "no name": (b"? [a, b]\n: c\n", ["line 1"]),
    "a long key": (b"k" * 900 + b": 1\ndataset: listops\n", ["unknown key kkk"]),
    "a long value": (b"dataset: listops\ndim: " + b"v" * 60_000, ["dim='vvv"]),
    "megabytes": (b"# " + b"x" * 5_000_000, ["65,536 characters"]),
    "an escape code": (b'dataset: "\\e[2J"\n', [r"dataset='\x1b[2J'"]),
    "a raw escape code": (b"dataset: \x1b[2J\n", ["special characters are not allowed"]),
    "NUL in a path": (b'dataset: listops\ndata_dir: "a\\0b"\n', [r"data_dir='a\x00b'"]),
    "a line break in a path": (b'dataset: listops\noutput_dir: "a\\nb"\n', [r"output_dir='a\nb'"]),
    "a line break in a name": (b'dataset: listops\nrun_name: "a\\nb"\n', [r"run_name='a\nb'"]),
    "right to left": ('dataset: listops\nrun_name: "a\u202eb"\n'.encode(), [r"a\u202eb"]),
    "half a letter": (b'dataset: listops\ndata_dir: "\\ud800"\n', [r"\ud800"]),
    "infinity": (b"dataset: listops\nlearning_rate: 1e999\n", ["learning_rate=inf", "finite"]),
    "UTF-16": ("dataset: listops\n".encode("utf-16"), ["not a UTF-8 text"]),
    "two documents": (b"dataset: listops\n---\ndataset: imdb\n", ["line 2", "document"]),
    "lags": (b"dataset: listops\nlocal_lags: [99999999999999999999]\n", ["neighbor_offsets.0"]),
}


def written(folder: Path, content: bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES)
def test_a_hostile_file_is_refused_in_one_line(tmp_path, content, words):
    path = written(tmp_path, content)
    line = refusal(load_config, path)
    assert line.startswith(str(path))
    for word in words:
        assert word in line, line


OVERRIDES = {
    "the end of a list": ("seed='] #,'", ["seed='] #,'"]),
    "brackets": ("seed=1], [2", ["override"]),
    "nothing": ("seed=,", ["override"]),
    "an alias": ("seed=*a", ["anchors and aliases"]),
    "octal": ("seed=010", ["seed='010'"]),
    "a list of octals": ("seed=1,010", ["seed='010'"]),
    "a line break": ("seed=1\nrun_name: x", ["override"]),
    "an escape code": ("\x1b[2J=1", [r"\x1b[2J"]),
    "too many runs": ("seed=" + ",".join(map(str, range(1001))), ["1,001 runs"]),
    "a long key": ("k" * 100_000 + "=1", ["unknown key kkk"]),
    "a long value": ("dim=" + "v" * 100_000, ["override"]),
    "NUL": ('data_dir="\\0"', [r"data_dir='\x00'"]),
}


@pytest.mark.parametrize(("override", "words"), OVERRIDES.values(), ids=OVERRIDES)
def test_a_hostile_override_is_refused_in_one_line(tmp_path, override, words):
    path = written(tmp_path, b"dataset: listops\n")
    line = refusal(load_runs, path, [override])
    for word in words:
        assert word in line, line


def test_what_looks_like_a_date_is_a_name(tmp_path):
    path = written(tmp_path, b"dataset: listops\nrun_name: 2020-13-45\n")
    assert load_config(path).run_name == "2020-13-45"
    assert load_config(path, ["run_name=2020-01-01"]).run_name == "2020-01-01"


def test_the_values_of_every_kind_are_still_read(tmp_path):
    path = written(
        tmp_path,
        b"dataset: 'listops'\nseed: +7\nlearning_rate: 1e-3\nweight_decay: .5\ngrad_clip: 2.\n"
        b"wandb: off\ncompile: auto\nposition_scale: ~\nnum_hidden:\nlocal_lags: [-1, 2]\n",
    )
    config = load_config(path)
    assert (config.seed, config.learning_rate, config.weight_decay, config.grad_clip) == (
        7, 1e-3, 0.5, 2.0
    )
    assert config.wandb is False and config.num_hidden is None and config.neighbor_offsets == [-1, 2]


@pytest.mark.parametrize("values", [
    [], None, {"dataset": {}}, {1: 2}, {"dataset": "listops", "run_name": ["x"]},
    {"dataset": "listops", "seed": 10**5000}, {"dataset": "listops", "seed": "x" * 10**7},
    {"dataset": "listops", "neighbor_offsets": [10**400]}, {f"key{i}": i for i in range(10**4)},
], ids=lambda v: shown(v)[:40])
def test_a_mapping_from_anywhere_is_refused_in_one_line(values):
    assert refusal(make_config, values, "some.pt").startswith("some.pt")


def test_shared_lists_are_not_written_out():
    bomb: list = [1]
    for _ in range(60):
        bomb = [bomb] * 10
    for key in ("dim", "dataset", "neighbor_offsets"):
        refusal(make_config, {"dataset": "listops", key: bomb})


def test_a_line_is_short_and_printable_whatever_it_is_made_of():
    assert one_line("a\n\tb  c") == "a b c"
    assert one_line("\x1b]0;x\x07\u202e\ud800") == r"\x1b]0;x\x07\u202e\ud800"
    long = one_line("start" + "x" * 10**7 + "end")
    assert len(long) <= 400 and long.startswith("start") and long.endswith("end")
    assert shown("\x1b" * 10**6).isprintable()
    assert len(shown(dict.fromkeys(range(99), "x" * 99))) <= 100


# The memory that a model needs


def test_a_model_larger_than_the_memory_ends_the_command_and_leaves_nothing(tmp_path, listops_dir):
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps({**TINY, "data_dir": str(listops_dir)}))
    result = run_cli("--config", path, "ffn_dim=100000000000000", cwd=tmp_path)
    assert_refused(result, "allocate", "lower batch_size")


# Arguments


@pytest.mark.parametrize(("arguments", "words"), [
    (["--nothing"], "--nothing"),
    (["--jobs", "many"], "many"),
    (["--jobs", "many\x1b[2J\n"], r"\x1b[2J"),
    (["--config"], "--config"),
    (["--config", "x" * 5000], "xxx"),
    (["--config", str(ROOT)], "directory"),
    (["--config", "\x1b[2J.yaml"], r"\x1b[2J.yaml"),
    (["--" + "x" * 10**6], "xxx"),
], ids=lambda a: str(a)[:20])
def test_wrong_arguments_are_one_line(tmp_path, arguments, words):
    assert_refused(run_cli(*arguments, cwd=tmp_path), words)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/", "/proc/self/mem"])
def test_what_is_no_file_is_no_configuration(path):
    assert refusal(load_config, path).startswith(path)


def test_a_pipe_is_no_configuration(tmp_path):
    """It could be waited for without end, and the runs of a sweep read theirs again."""
    os.mkfifo(tmp_path / "config.yaml")
    reader, writer = os.pipe()  # as `--config <(...)` hands over
    os.write(writer, b"dataset: listops\n")
    for path in ("config.yaml", f"/dev/fd/{reader}"):
        result = run_cli("--config", path, cwd=tmp_path)
        assert_refused(result, f"{path}: is a pipe or a device", "name a YAML file")
    os.close(reader)
    os.close(writer)


def test_the_slowest_of_the_largest_configurations_is_refused(tmp_path):
    refusal(load_config, written(tmp_path, b"dataset: " + b"[a, " * 3 + b"a, " * 20_000 + b"]]]"))
