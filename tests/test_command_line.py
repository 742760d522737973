"""What one does around a training: sweeps, logs, evaluation and prediction with its weights."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import termios
from collections import defaultdict
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    assert_refused,
    called,
    finished,
    run_cli,
    run_script,
    start_process,
    tiny_config,
    write_config,
)

import predict
import run_train
from data.listops import generate_listops
from data.packing import load_splits
from lra_config import ConfigError, make_config
from lra_datasets import open_dataset
from model import RMAAT, build_model
from run import checkpoint
from run.program import run_program
from sweep import load_runs

CHANCE = 0.17  # the share of ListOps' most frequent answer


@pytest.fixture(scope="module")
def trained(tmp_path_factory, listops_dir) -> Path:
    """A folder with `tiny.yaml` and the finished run `runs/run`."""
    folder = tmp_path_factory.mktemp("trained")
    path = write_config(folder, listops_dir)
    result = finished(start_process("run_train.py", "--config", path, cwd=folder))
    assert result.returncode == 0, result.stderr
    (folder / "stdout").write_text(result.stdout)
    (folder / "stderr").write_text(result.stderr)
    return folder


# Logs


def test_a_redirected_log_holds_what_is_expected_the_evaluations_and_the_result_alone(trained):
    choice, *lines = (trained / "stdout").read_text().splitlines()
    assert choice.startswith("float32, eager: ")
    assert lines[0] == "listops (generated): train 200, val 20, test 20"
    evaluations = [line.split(":")[0] for line in lines if "val_loss" in line]
    assert evaluations == ["step 5", "step 10", "step 12"]
    assert lines[-1].startswith("test_acc")
    assert len(lines) == 4 + 3 + 1 + 1  # expected cost, evaluations, files, result
    assert (trained / "stderr").read_text() == ""


def test_a_terminal_shows_loss_accuracy_speed_and_time_left(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 24, 160, 0, 0))  # rows, columns
    process = start_process(
        "run_train.py", "--config", path, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=slave
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(master)
    assert process.wait(timeout=60) == 0
    bar = r"12/12 \[\d\d:\d\d<\d\d:\d\d.*accuracy=\d.*loss=\d.*tokens_s=\d"
    assert re.search(bar, shown.decode()), shown


def test_wandb_is_not_imported_unless_asked_for(tmp_path, listops_dir, monkeypatch):
    path = write_config(tmp_path, listops_dir, stop_after_steps=1)
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import fails
    assert "wandb" not in run_cli("--config", path, cwd=tmp_path, check=True).stdout
    result = run_cli("--config", path, "run_name=b", "wandb=true", cwd=tmp_path, check=True)
    assert "wandb is off, the run goes on: import of wandb" in result.stdout


def test_wandb_offline_leaves_a_run_to_be_sent_later(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir, wandb=True)
    offline = {"WANDB_MODE": "offline"}
    result = finished(start_process("run_train.py", "--config", path, cwd=tmp_path, env=offline))
    assert result.returncode == 0, result.stderr
    assert "wandb" not in result.stdout + result.stderr
    run_id = (tmp_path / "runs/run/wandb_id").read_text()
    (record,) = (tmp_path / "runs/run/wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb")
    content = record.read_bytes()
    for key in (b"val_accuracy", b"tokens_per_second", b"test_accuracy", b"batch_size"):
        assert key in content, key


def test_a_resumed_offline_wandb_run_receives_the_history(tmp_path, listops_dir, monkeypatch):
    wandb = MagicMock()
    wandb.init.return_value.id, wandb.init.return_value.dir = "id", "wandb/offline-run-2/files"
    wandb.init.return_value.offline = True
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    path = write_config(tmp_path, listops_dir, wandb=True, stop_after_steps=4)
    run_cli("--config", path, cwd=tmp_path, check=True)
    wandb.init.return_value.log.reset_mock()
    result = run_cli(
        "--config", path, "--resume", "stop_after_steps=6", cwd=tmp_path, check=True
    )
    steps = [call.kwargs["step"] for call in wandb.init.return_value.log.call_args_list]
    assert steps[:3] == [2, 4, 4] and steps[-1] == 6
    assert "wandb/offline-run-2 holds the full history; sync this folder alone" in result.stdout


def test_an_unreachable_wandb_does_not_end_the_training(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir, wandb=True)
    # Nothing listens on the discard port: the client is left to its retries, for a short time.
    variables = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    program = tmp_path / "impatient.py"
    program.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport run.log\n"
        "run.log.WANDB_TIMEOUT = 2.0\n"
        f"runpy.run_path({str(ROOT / 'run_train.py')!r}, run_name='__main__')\n"
    )
    result = finished(start_process(program, "--config", path, cwd=tmp_path, env=variables))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("wandb is off, the run goes on: ") == 1
    assert result.stderr == ""
    assert (tmp_path / "runs/run/summary.json").exists()


@pytest.mark.parametrize("failing", ["log", "finish", "summary"])
def test_a_wandb_that_fails_later_is_told_once(tmp_path, listops_dir, monkeypatch, failing):
    wandb = MagicMock()
    wandb.init.return_value.id = "id"
    method = getattr(wandb.init.return_value, failing)
    method.side_effect = method.update.side_effect = ConnectionError("gone")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    path = write_config(tmp_path, listops_dir, wandb=True)
    result = run_cli("--config", path, cwd=tmp_path, check=True)
    assert result.stdout.count("wandb is off, the run goes on: gone") == 1


def run_plots(*arguments: object) -> subprocess.CompletedProcess:
    return run_script("plots.py", "curves", *arguments, cwd=ROOT)


def test_curves_of_several_runs_one_of_them_without_a_validation(tmp_path, trained):
    young = tmp_path / "young" / "run"
    young.mkdir(parents=True)
    (young / "metrics.jsonl").write_text('{"step": 2, "loss": 2.0}\n{"step": 4, "lo')
    out = tmp_path / "both.svg"
    result = run_plots(trained / "runs/run", young, "--out", out)
    assert (result.returncode, result.stderr) == (0, "")
    # A system's name, or the path where there is no configuration.
    picture = out.read_text()
    assert "young/run" in picture and ">RMAAT<" in picture
    assert str(tmp_path) not in picture


def test_what_cannot_be_plotted_is_said_in_one_line(tmp_path, trained):
    (tmp_path / "metrics.jsonl").write_text("")
    run = trained / "runs/run"
    assert_refused(run_plots(tmp_path, "--out", tmp_path / "a.png"), str(tmp_path), "no row yet")
    assert_refused(run_plots(tmp_path / "absent"), "absent")
    assert_refused(run_plots(run, "--out", tmp_path / "a.xyz"), "a.xyz", "suffix")
    assert_refused(run_plots(run, "--out", tmp_path / "no" / "a.png"), "No such file")
    assert not list(tmp_path.glob("a.*"))


# Sweeps


def sweep_names(tmp_path, listops_dir, *overrides: str, **changes) -> list[str]:
    path = tmp_path / "sweep.yaml"
    values = {**TINY, "data_dir": str(listops_dir), **changes}
    path.write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items()))
    return [config.run_name for config in load_runs(path, overrides)[0]]


def test_each_run_of_a_sweep_has_a_folder_named_by_what_varies(tmp_path, listops_dir):
    def names(*overrides: str, **changes) -> list[str]:
        return sweep_names(tmp_path, listops_dir, *overrides, **changes)

    assert names("seed=0,1", run_name="a") == ["a_seed0", "a_seed1"]
    assert names("seed=0,1") == ["listops_astro_seed0", "listops_astro_seed1"]
    assert names("seed=0,1", "dim=8,16") == [
        "listops_astro_seed0_dim8", "listops_astro_seed0_dim16",
        "listops_astro_seed1_dim8", "listops_astro_seed1_dim16",
    ]
    assert names("attention_type=astro,softmax", run_name="a") == [
        "a_attention_typeastro", "a_attention_typesoftmax",
    ]
    assert names("run_name=a,b") == ["a", "b"]
    assert names("learning_rate=1e-3,2e-3", "astro_mem=true,false", run_name="a")[1:3] == [
        "a_learning_rate0.001_astro_memfalse", "a_learning_rate0.002_astro_memtrue",
    ]
    assert names("seed=3", run_name="a") == ["a"]


def test_a_sweep_that_cannot_work_is_refused_before_it_starts(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir)
    with pytest.raises(ConfigError, match="num_heads=3"):
        load_runs(path, ["seed=0,1", "num_heads=2,3"])
    with pytest.raises(ConfigError, match="share runs/run_seed1"):
        load_runs(path, ["seed=1,1"])
    assert_refused(
        run_cli("--config", path, "seed=0,1", "--eval_only", cwd=tmp_path), "seed=0,1"
    )


def test_a_sweep_is_resumed_and_ends_in_a_table(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir)
    # The first run is finished, the second was cut, the third has not begun.
    command = ["--config", path]
    run_cli(*command, "run_name=run_seed0", "seed=0", cwd=tmp_path, check=True)
    cut = ["run_name=run_seed1", "seed=1", "stop_after_steps=4"]
    run_cli(*command, *cut, cwd=tmp_path, check=True)
    finished = tmp_path / "runs/run_seed0/summary.json"
    before = finished.stat().st_mtime_ns, finished.read_bytes()

    assert_refused(run_cli(*command, "seed=0,1,2", cwd=tmp_path), "run_seed0", "--resume")
    result = run_cli(*command, "seed=0,1,2", "--resume", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (finished.stat().st_mtime_ns, finished.read_bytes()) == before
    first, second, third = (
        json.loads((tmp_path / f"runs/run_seed{seed}/summary.json").read_text())
        for seed in range(3)
    )
    assert [s["steps"] for s in (first, second, third)] == [12, 12, 12]
    assert "run_seed1/last.pt" not in result.stdout and "run_seed2/last.pt" in result.stdout
    rows = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert rows[3].startswith("| run_seed1 | 1 | ")
    tests = [100 * s["test_accuracy"] for s in (first, second, third)]
    expected = f"| 3 | {statistics.mean(tests):.2f} ± {statistics.stdev(tests):.2f} | "
    assert rows[-1].startswith(expected)


def test_a_failing_run_ends_the_sweep(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/run_seed1").write_text("in the way")
    result = run_cli("--config", path, "seed=0,1,2", cwd=tmp_path)
    assert_refused(result, "runs/run_seed1")
    assert (tmp_path / "runs/run_seed0/summary.json").exists()
    assert not (tmp_path / "runs/run_seed2").exists()


# Evaluation, prediction, exported weights


@pytest.mark.parametrize("arguments", [
    ["--config", "tiny.yaml"],
    ["--checkpoint", "runs/run/best.pt"],
    ["--checkpoint", "runs/run/model.safetensors"],
], ids=lambda a: a[-1])
def test_evaluation_finds_what_the_training_reported(trained, arguments):
    if arguments[1].endswith(".safetensors"):  # it leaves out where this machine's data are
        config = (trained / "tiny.yaml").read_text()
        arguments = [*arguments, re.search(r"data_dir: (.*)", config)[0].replace(": ", "=")]
    result = run_cli("--eval_only", *arguments, cwd=trained)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split("_")[0] for line in lines[:2]] == ["val", "test"]
    numbers = json.loads(lines[-1])
    summary = json.loads((trained / "runs/run/summary.json").read_text())
    assert numbers["val_accuracy"] == summary["best_val_accuracy"]
    assert numbers["test_accuracy"] == summary["test_accuracy"]
    assert numbers["test_loss"] == pytest.approx(summary["test_loss"], abs=1e-6)
    assert numbers["val_examples"] == 20


@pytest.mark.parametrize(("arguments", "words"), [
    (["--eval_only"], ["--checkpoint is missing"]),
    ([], ["--config is missing"]),
    (["--checkpoint", "runs/run/best.pt"], ["--eval_only or --predict"]),
    (["--eval_only", "--checkpoint", "absent.pt"], ["absent.pt"]),
    (["--eval_only", "--checkpoint", "tiny.yaml"], ["tiny.yaml"]),
    (["--eval_only", "--checkpoint", "lonely/model.safetensors"], ["lonely/config.json"]),
    (["--eval_only", "--checkpoint", "runs/run/best.pt", "dim=32"], ["dim=32", "dim=16"]),
    (["--eval_only", "--checkpoint", "runs/run/best.pt", "seed=1"], ["seed=1", "seed=0"]),
    (["--eval_only", "--config", "tiny.yaml", "--checkpoint", "runs/run/best.pt", "pooling=last"],
     ["pooling='last'", "pooling='mean'"]),
    (["--eval_only", "--config", "tiny.yaml", "run_name=none"], ["runs/none/best.pt"]),
    (["--predict", "absent.txt", "--checkpoint", "runs/run/best.pt"], ["absent.txt"]),
], ids=lambda a: " ".join(a[-2:]) or "nothing")
def test_a_mistake_around_checkpoints_is_one_line(trained, arguments, words):
    lonely = trained / "lonely"
    lonely.mkdir(exist_ok=True)
    weights = (trained / "runs/run/model.safetensors").read_bytes()
    (lonely / "model.safetensors").write_bytes(weights)
    assert_refused(run_cli(*arguments, cwd=trained), *words)


def listops_rows(data_dir: Path, part: str) -> list[tuple[str, int]]:
    path = data_dir / f"lra_release/listops-1000/basic_{part}.tsv"
    rows = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    return [(source, int(target)) for source, target in rows]


def test_predictions_are_those_of_the_evaluation_in_the_order_of_the_input(trained, listops_dir):
    rows = listops_rows(listops_dir, "test")
    text = "".join(f"{source}\n" for source, _ in rows)
    (trained / "input.txt").write_text(text.replace("\n", "\r\n"))
    command = ["--checkpoint", "runs/run/model.safetensors", "--predict"]
    result = run_cli(*command, "input.txt", cwd=trained)
    assert result.returncode == 0, result.stderr
    predictions = [json.loads(line) for line in result.stdout.splitlines()]
    summary = json.loads((trained / "runs/run/summary.json").read_text())
    classes = [p["class"] for p in predictions]
    right = sum(c == target for c, (_, target) in zip(classes, rows, strict=True))
    assert right / len(rows) == summary["test_accuracy"]
    for p in predictions:
        assert sum(p["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert max(range(10), key=p["probabilities"].__getitem__) == p["class"]
    # From standard input, backwards and in batches of another size: the same, backwards.
    backwards = "\n".join(reversed(text.splitlines()))
    again = run_cli(*command, "-", "batch_size=3", cwd=trained, stdin=backwards)
    assert again.returncode == 0, again.stderr
    for line, p in zip(again.stdout.splitlines(), reversed(predictions), strict=True):
        assert json.loads(line)["probabilities"] == pytest.approx(p["probabilities"], abs=1e-5)


def test_slices_of_the_summary_are_shares_of_the_predictions(trained, listops_dir):
    rows = listops_rows(listops_dir, "test")
    result = run_cli(
        "--checkpoint", "runs/run/best.pt", "--predict", "-", cwd=trained,
        stdin="".join(f"{source}\n" for source, _ in rows),
    )
    found = [json.loads(line)["class"] for line in result.stdout.splitlines()]
    expected = defaultdict(lambda: defaultdict(list))
    for (source, target), answer in zip(rows, found, strict=True):
        words = source.replace("(", "").replace(")", "").split()
        quarter = next(end for end in (10, 20, 30, 40) if len(words) <= end)
        for kind, group in (
            ("label", str(target)), ("length", f"{quarter - 9} to {quarter}"),
            ("root", words[0][1:]),
        ):
            expected[kind][group].append(answer == target)
    summary = json.loads((trained / "runs/run/summary.json").read_text())
    assert summary["test_slices"] == {
        kind: {
            group: {"accuracy": pytest.approx(statistics.mean(right)), "examples": len(right)}
            for group, right in groups.items()
        }
        for kind, groups in expected.items()
    }


@pytest.mark.parametrize(("line", "words"), [
    ("[MAX 1 two ]", ["unknown token 'two'"]),
    ("", ["empty"]),
    ("1 " * 41, ["41 tokens", "40"]),
    ("[MAX 1 2 ]\t2", ["2 tab-separated columns"]),
], ids=["token", "empty", "long", "columns"])
def test_a_bad_line_is_named_by_its_row(trained, line, words):
    result = run_cli(
        "--checkpoint", "runs/run/best.pt", "--predict", "-", cwd=trained,
        stdin=f"[MAX 1 2 ]\n{line}\n",
    )
    assert_refused(result, "standard input row 2", *words)


@pytest.mark.parametrize(("dataset", "good", "bad"), [
    ("imdb_lra", b"caf\xe9\t!", [(b"", "empty"), (b"a" * 4097, "4097")]),
    ("aan", b"one\ttwo", [(b"one", "1 tab-separated"), (b"one\t", "empty")]),
    ("cifar10", b"0 255 " * 512, [(b"0 256", "256"), (b"1 2", "2 gray values"), (b"x", "'x'")]),
])
def test_each_kind_of_input_is_encoded_as_its_reader_does(dataset, good, bad):
    config = make_config({"dataset": dataset})
    tokenizer = config.task.tokenizer()
    documents = predict.encode_line(good, config, tokenizer)
    assert len(documents) == config.task.num_documents
    if dataset == "cifar10":
        assert documents[0].tolist() == [0, 255] * 512
    else:
        assert b"\t".join(d.tobytes() for d in documents) == good
    for line, words in bad:
        with pytest.raises(ValueError, match=words):
            predict.encode_line(line, config, tokenizer)


def write_reviews(data_dir: Path, praise: str, blame: str) -> None:
    for part in ("train", "test"):
        for label, word in (("pos", praise), ("neg", blame)):
            folder = data_dir / "aclImdb" / part / label
            folder.mkdir(parents=True)
            for number in range(20):
                (folder / f"{number}_1.txt").write_text(f"This was {word} {number}")


@pytest.mark.parametrize("name", ["best.pt", "model.safetensors"])
def test_a_model_of_words_brings_its_vocabulary(tmp_path, name):
    """Its predictions do not depend on data that have changed since, or are gone."""
    write_reviews(tmp_path / "datasets", "splendid", "dreadful")
    path = tmp_path / "words.yaml"
    path.write_text(
        "dataset: imdb\nmax_seq_len: 16\nrun_name: run\ndim: 16\nffn_dim: 16\nnum_layers: 1\n"
        "batch_size: 8\nmax_steps: 60\nwarmup_steps: 0\nlearning_rate: 1e-2\ndevice: cpu\n"
    )
    run_cli("--config", path, cwd=tmp_path, check=True)
    (tmp_path / "datasets").rename(tmp_path / "gone")
    trained_on = RMAAT.from_pretrained(tmp_path / "runs/run")
    assert {"splendid", "dreadful"} < set(trained_on.vocabulary)
    command = ["--checkpoint", f"runs/run/{name}"]
    text = "Splendid, splendid!\nIt was dreadful.\n"
    result = run_cli(*command, "--predict", "-", cwd=tmp_path, stdin=text)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line)["class"] for line in result.stdout.splitlines()] == [1, 0]
    # Other reviews, other ids: only with the checkpoint's own vocabulary are they read right.
    write_reviews(tmp_path / "datasets", "splendid", "dreadful and long and dull")
    result = run_cli(*command, "--eval_only", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["test_accuracy"] == 1.0
    start = [f"initial_checkpoint=runs/run/{name}", "run_name=second"]
    assert_refused(run_cli("--config", path, *start, cwd=tmp_path), name, "vocabulary")


@pytest.mark.parametrize("vocabulary", [None, ["good", "bad"]])
def test_saved_weights_come_back_equal(tmp_path, vocabulary):
    config = tiny_config(dropout=0.3, hebbian_divisor=3.0)
    if vocabulary:
        config = make_config({"dataset": "imdb", "dim": 16, "data_dir": "elsewhere"})
    model = build_model(config, vocabulary)
    model.save_pretrained(tmp_path)
    again = RMAAT.from_pretrained(tmp_path)
    assert not again.training and again.vocabulary == vocabulary
    assert again.config == config.model_copy(update={"device": "auto", "data_dir": "datasets"})
    expected = model.state_dict()
    assert all(torch.equal(expected[name], t) for name, t in again.state_dict().items())
    assert "elsewhere" not in (tmp_path / "config.json").read_text()


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    build_model(tiny_config(num_layers=1)).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_layers": 2}))
    with pytest.raises((RuntimeError, checkpoint.CheckpointError), match=r"layers\.1"):
        RMAAT.from_pretrained(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.safetensors.*another model"):
        predict.load_trained(tmp_path / "model.safetensors")


def test_the_committed_weights_solve_fresh_listops(tmp_path):
    generate_listops(tmp_path, seed=99, train=10, val=10, test=200, workers=1)
    model = RMAAT.from_pretrained(ROOT / "results/listops/rmaat")
    rows = listops_rows(tmp_path, "test")
    lines = [source.encode() for source, _ in rows]
    predictions = predict.predict(model, lines, "test")
    right = sum(p["class"] == target for p, (_, target) in zip(predictions, rows, strict=True))
    assert right / len(rows) > CHANCE + 0.1


# A full disk, for which a limit on the size of files stands in


def limited(size: int, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    """`run_train.py` where no file can grow past `size` bytes."""
    return finished(start_process(
        "run_train.py", *arguments, cwd=cwd,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    ))


def test_a_full_disk_loses_the_new_checkpoint_and_keeps_the_old_one(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir)
    run_cli("--config", path, "stop_after_steps=4", cwd=tmp_path, check=True)
    last = tmp_path / "runs/run/last.pt"
    before = last.read_bytes()
    result = limited(20_000, "--config", path, "--resume", cwd=tmp_path)
    assert_refused(result, "File too large", "previous checkpoint is kept")
    assert last.read_bytes() == before
    assert not list(last.parent.glob("*.part"))
    assert run_cli("--config", path, "--resume", cwd=tmp_path).returncode == 0


def test_a_full_disk_leaves_no_half_packed_split(tmp_path):
    generate_listops(
        tmp_path, seed=0, train=300, val=20, test=20, workers=1, min_length=9, max_length=41
    )
    path = write_config(tmp_path, tmp_path)
    config = tiny_config(data_dir=str(tmp_path))
    num_tokens = int(load_splits(open_dataset(config))["train"].lengths.sum())
    shutil.rmtree(tmp_path / ".cache")
    for size in (3_000, num_tokens):  # too little for the tokens, and for a header before them
        result = limited(size, "--config", path, cwd=tmp_path)
        assert_refused(result, "packed train split was not written", "free some space")
        assert not list((tmp_path / ".cache").iterdir())
    assert len(load_splits(open_dataset(config))["train"]) == 300


def test_a_gpu_without_memory_left_ends_the_run_with_one_line(tmp_path, listops_dir, monkeypatch):
    def exhaust(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"
        )

    monkeypatch.setattr(run_train, "print_training", exhaust)
    path = write_config(tmp_path, listops_dir)
    result = called(
        lambda: run_program("run_train.py", run_train.command), "--config", path, cwd=tmp_path
    )
    assert_refused(result, "Tried to allocate 2.00 GiB; lower batch_size")
