"""The configuration: every file and every override is read, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT, assert_refused, refusal, run_cli

from lra_config import load_config
from run.program import one_line, shown
from sweep import load_runs

# The contents of a file, and words of the message.
FILES = {
    "a key twice": (b"dataset: listops\nseed: 1\nseed: 2\n", ["line 3", "'seed' is given twice"]),
    "a python tag": (b"dataset: !!python/object/apply:os.system [ls]", ["line 1"]),
    "an alias": (b"dataset: &a listops\nrun_name: *a\n", ["line 2", "aliases"]),
    "deep nesting": (b"dataset: " + b"[" * 3000 + b"]" * 3000, ["config.yaml"]),
    "a mapping": (b"dataset: {a: b}\nrun_name: [x]\n", ["dataset={'a': 'b'}"]),
    "a long value": (b"dataset: listops\ndim: " + b"v" * 60_000, ["dim='vvv"]),
    "an escape code": (b'dataset: "\\e[2J"\n', [r"dataset='\x1b[2J'"]),
    "UTF-16": ("dataset: listops\n".encode("utf-16"), ["not a UTF-8 text"]),
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
    ("seed=1], [2", "override"), ("seed=,", "override"), ("seed=*a", "aliases"),
    ("seed=1\nrun_name: x", "override"), ("k" * 1000 + "=1", "unknown key kkk"),
], ids=lambda text: text[:20])
def test_a_wrong_override_is_refused_in_one_line(tmp_path, override, words):
    path = written(tmp_path, b"dataset: listops\n")
    assert words in refusal(load_runs, path, [override])


def test_a_message_is_short_and_printable():
    assert one_line("a\n\tb  c") == "a b c"
    assert one_line("\x1b]0;x\x07\u202e\ud800") == r"\x1b]0;x\x07\u202e\ud800"
    long = one_line("start" + "x" * 10**6 + "end")
    assert len(long) <= 400 and long.startswith("start") and long.endswith("end")
    assert len(shown(dict.fromkeys(range(99), "x" * 99))) <= 100


@pytest.mark.parametrize(("arguments", "words"), [
    (["--nothing"], "--nothing"), (["--config"], "--config"),
    (["--config", str(ROOT)], "directory"), (["--config", "a.yaml", "--predict", ""], "--predict"),
], ids=lambda a: str(a)[:20])
def test_wrong_arguments_are_one_line(tmp_path, arguments, words):
    assert_refused(run_cli(*arguments, cwd=tmp_path), words)
