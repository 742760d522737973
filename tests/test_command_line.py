"""The command line around a training: sweeps, logs, evaluation and prediction with its weights."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import statistics
import sys
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
    start_process,
    tiny_config,
    write_config,
)

import predict
import run_train
from data.listops import generate_listops
from lra_config import ConfigError, make_config
from model import RMAAT, build_model
from run import checkpoint
from run.program import run_program
from sweep import load_runs
from train import train

CHANCE = 0.17  # majority-class accuracy of ListOps


# Logs


def test_a_redirected_log_holds_cost_evaluations_and_result_only(trained):
    choice, *lines = (trained / "stdout").read_text().splitlines()
    assert choice.startswith("float32, eager: ")
    assert lines[0] == "listops (generated): train 200, val 20, test 20"
    evaluations = [line.split(":")[0] for line in lines if "val_loss" in line]
    assert evaluations == ["step 5", "step 10", "step 12"]
    assert lines[-1].startswith("test_acc")
    assert len(lines) == 4 + 3 + 1 + 1  # expected cost, evaluations, files, result
    assert (trained / "stderr").read_text() == ""


def test_a_terminal_shows_loss_accuracy_speed_and_time_left(tmp_path, listops_dir):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    config = tiny_config(data_dir=str(listops_dir), output_dir=str(tmp_path), max_steps=4)
    with contextlib.redirect_stderr(Terminal()) as shown:
        train(config)
    bar = r"4/4 \[\d\d:\d\d<\d\d:\d\d.*accuracy=\d.*loss=\d.*tokens_s=\d"
    assert re.search(bar, shown.getvalue()), shown.getvalue()


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


@pytest.fixture
def wandb(monkeypatch) -> MagicMock:
    """Replace the client by one that accepts everything."""
    client = MagicMock()
    client.init.return_value.id, client.init.return_value.dir = "id", "wandb/offline-run-2/files"
    client.init.return_value.offline = True
    monkeypatch.setitem(sys.modules, "wandb", client)
    return client


def test_a_resumed_offline_wandb_run_receives_the_history(tmp_path, listops_dir, wandb):
    path = write_config(tmp_path, listops_dir, wandb=True, stop_after_steps=4)
    run_cli("--config", path, cwd=tmp_path, check=True)
    wandb.init.return_value.log.reset_mock()
    result = run_cli(
        "--config", path, "--resume", "stop_after_steps=6", cwd=tmp_path, check=True
    )
    steps = [call.kwargs["step"] for call in wandb.init.return_value.log.call_args_list]
    assert steps[:3] == [2, 4, 4] and steps[-1] == 6
    assert "wandb/offline-run-2 holds the full history; sync this folder alone" in result.stdout


@pytest.mark.parametrize("failing", ["init", "log", "finish", "summary"])
def test_a_wandb_that_fails_is_reported_once_and_the_run_goes_on(
    tmp_path, listops_dir, wandb, failing
):
    method = wandb.init if failing == "init" else getattr(wandb.init.return_value, failing)
    method.side_effect = method.update.side_effect = ConnectionError("gone")
    path = write_config(tmp_path, listops_dir, wandb=True, max_steps=4)
    result = run_cli("--config", path, cwd=tmp_path, check=True)
    assert result.stdout.count("wandb is off, the run goes on: gone") == 1


# Sweeps


def test_each_run_of_a_sweep_has_a_folder_named_by_what_varies(tmp_path):
    def names(*overrides: str, **changes) -> list[str]:
        path = tmp_path / "sweep.yaml"
        path.write_text(json.dumps({**TINY, **changes}))
        return [config.run_name for config in load_runs(path, overrides)[0]]

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


@pytest.mark.parametrize("key", ["hebbian_scale", "hebbian_divisor"])
def test_an_override_replaces_a_key_that_the_file_names_by_its_old_name(tmp_path, key):
    path = tmp_path / "old.yaml"
    path.write_text(json.dumps({**TINY, "hebbian_scale": 8.0}))
    assert load_runs(path, [f"{key}=2"])[0][0].hebbian_divisor == 2


def test_a_sweep_that_cannot_work_is_refused_before_it_starts(tmp_path, listops_dir):
    path = write_config(tmp_path, listops_dir)
    with pytest.raises(ConfigError, match="num_heads=3"):
        load_runs(path, ["seed=0,1", "num_heads=2,3"])
    with pytest.raises(ConfigError, match="share runs/run_seed1"):
        load_runs(path, ["seed=1,1"])
    assert_refused(
        run_cli("--config", path, "seed=0,1", "--eval_only", cwd=tmp_path), "seed has 2 values"
    )
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/run_seed0").write_text("in the way")
    assert_refused(run_cli("--config", path, "seed=0,1", cwd=tmp_path), "runs/run_seed0")
    assert not (tmp_path / "runs/run_seed1").exists()


def test_a_sweep_is_resumed_and_ends_in_a_table(tmp_path, listops_dir, trained):
    path = write_config(tmp_path, listops_dir, dropout=0.1, bucket_by_length=True)
    # The first run is finished, the second was interrupted, the third has not started.
    command = ["--config", path]
    shutil.copytree(trained / "runs/run", tmp_path / "runs/run_seed0")
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


# Evaluation, prediction, exported weights


@pytest.mark.parametrize("arguments", [
    ["--config", "tiny.yaml"],
    ["--checkpoint", "runs/run/best.pt"],
    ["--checkpoint", "runs/run/model.safetensors"],
], ids=lambda a: a[-1])
def test_evaluation_finds_what_the_training_reported(trained, arguments):
    if arguments[1].endswith(".safetensors"):  # without this machine's data folder
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
    # The same lines in reverse, from standard input and in other batches: reversed predictions.
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


def test_a_model_of_words_brings_its_vocabulary(tmp_path):
    """Its predictions stay the same after the data have changed or were removed."""
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
    text = "Splendid, splendid!\nIt was dreadful.\n"
    weights = ("runs/run/best.pt", "runs/run/model.safetensors")
    for name in weights:
        result = run_cli("--checkpoint", name, "--predict", "-", cwd=tmp_path, stdin=text)
        assert result.returncode == 0, result.stderr
        assert [json.loads(line)["class"] for line in result.stdout.splitlines()] == [1, 0]
    # Other reviews give words other ids: only the checkpoint's vocabulary is correct.
    write_reviews(tmp_path / "datasets", "splendid", "dreadful and long and dull")
    result = run_cli("--checkpoint", weights[0], "--eval_only", cwd=tmp_path, check=True)
    assert json.loads(result.stdout.splitlines()[-1])["test_accuracy"] == 1.0
    start = [f"initial_checkpoint={weights[1]}", "run_name=second"]
    assert_refused(run_cli("--config", path, *start, cwd=tmp_path), weights[1], "vocabulary")


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
