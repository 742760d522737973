"""The configuration: whatever a file or an override holds, it is read or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT, assert_refused, refusal, run_cli

from lra_config import load_config, make_config
from run.program import one_line, shown
from sweep import load_runs

# The contents of a file, and words of the message.
FILES = {
    "a key twice": (b"dataset: listops\nseed: 1\nseed: 2\n", ["line 3", "'seed' is given twice"]),
    "a tag": (b"dataset: listops\nseed: !!int abc\n", ["config.yaml"]),
    "a python tag": (b"dataset: !!python/object/apply:os.system [ls]", ["line 1"]),
    "an alias": (b"dataset: &a listops\nrun_name: *a\n", ["line 2", "aliases"]),
    "deep nesting": (b"dataset: " + b"[" * 3000 + b"]" * 3000, ["config.yaml"]),
    "a list": (b"dataset: [listops]\n", ["dataset=['listops']"]),
    "a mapping": (b"dataset: {a: b}\nrun_name: [x]\n", ["dataset={'a': 'b'}"]),
    "a key that is a list": (b"? [a, b]\n: c\n", ["config.yaml"]),
    "a long key": (b"k" * 900 + b": 1\ndataset: listops\n", ["unknown key kkk"]),
    "a long value": (b"dataset: listops\ndim: " + b"v" * 60_000, ["dim='vvv"]),
    "an escape code": (b'dataset: "\\e[2J"\n', [r"dataset='\x1b[2J'"]),
    "a line break in a name": (b'dataset: listops\nrun_name: "a\\nb"\n', [r"run_name='a\nb'"]),
    "infinity": (b"dataset: listops\nlearning_rate: 1e999\n", ["learning_rate=inf", "finite"]),
    "UTF-16": ("dataset: listops\n".encode("utf-16"), ["not a UTF-8 text"]),
    "two documents": (b"dataset: listops\n---\ndataset: imdb\n", ["line 2", "document"]),
    "not a mapping": (b"listops\n", ["key: value"]),
}


def written(folder: Path, content: bytes) -> Path:
    path = folder / "config.yaml"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, content, words):
    path = written(tmp_path, content)
    line = refusal(load_config, path)
    assert line.startswith(str(path))
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(("override", "words"), [
    ("seed='] #,'", "seed='] #,'"), ("seed=1], [2", "override"), ("seed=,", "override"),
    ("seed=*a", "aliases"), ("seed=1\nrun_name: x", "override"), ("\x1b[2J=1", r"\x1b[2J"),
    ("k" * 100_000 + "=1", "unknown key kkk"),
], ids=lambda text: text[:20])
def test_a_wrong_override_is_refused_in_one_line(tmp_path, override, words):
    path = written(tmp_path, b"dataset: listops\n")
    assert words in refusal(load_runs, path, [override])


@pytest.mark.parametrize("values", [
    {"dataset": {}}, {"dataset": "listops", "run_name": ["x"]},
    {"dataset": "listops", "seed": "x" * 10**6}, {f"key{i}": i for i in range(10**4)},
], ids=lambda v: str(v)[:40])
def test_a_mapping_of_a_checkpoint_is_refused_in_one_line(values):
    assert refusal(make_config, values, "some.pt").startswith("some.pt")


def test_a_message_is_short_and_printable():
    assert one_line("a\n\tb  c") == "a b c"
    assert one_line("\x1b]0;x\x07\u202e\ud800") == r"\x1b]0;x\x07\u202e\ud800"
    long = one_line("start" + "x" * 10**6 + "end")
    assert len(long) <= 400 and long.startswith("start") and long.endswith("end")
    assert len(shown(dict.fromkeys(range(99), "x" * 99))) <= 100


@pytest.mark.parametrize(("arguments", "words"), [
    (["--nothing"], "--nothing"), (["--jobs\x1b[2J\n"], r"\x1b[2J"),
    (["--config"], "--config"), (["--config", "x" * 5000], "xxx"),
    (["--config", str(ROOT)], "directory"), (["--config", "a.yaml", "--predict", ""], "--predict"),
], ids=lambda a: str(a)[:20])
def test_wrong_arguments_are_one_line(tmp_path, arguments, words):
    assert_refused(run_cli(*arguments, cwd=tmp_path), words)
