"""The paper's tables: trained and skipped cells, the printed table, and `verify`."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import (
    ENDING_SIGNALS,
    ROOT,
    run_cli,
    run_script,
    start_process,
    tiny_batch,
    wait_for,
    write_config,
)

import reproduce
from lra_config import Attention, Config, load_config, read_mapping
from model import build_model
from tables import SYSTEMS, TASKS, markdown
from train import amrb_backward, bptt_backward, train

SYSTEM_FILES = sorted((ROOT / "configs/tables").glob("*.yaml"))


def smoke_cell(system: str = "rmaat", task: str = "listops", seed: int = 0) -> reproduce.Cell:
    return reproduce.Cell("accuracy", "smoke", task, system, seed)


def full_config(table: str, task: str, system: str) -> Config:
    return reproduce.Cell(table, "full", task, system, 0).config()


def call(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, arguments)])
    return reproduce.main()


def test_every_system_has_a_file_that_describes_it():
    assert {path.stem for path in SYSTEM_FILES} == set(SYSTEMS)
    for path in SYSTEM_FILES:
        assert path.read_text().startswith("# ")


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_is_a_configuration_of_every_task(system):
    keys = set(read_mapping(ROOT / "configs/tables" / f"{system}.yaml"))
    for task in TASKS:
        config = smoke_cell(system, task).config()
        assert config.dataset == load_config(ROOT / f"configs/{task}.yaml").dataset
        assert keys <= set(config.model_fields_set)
        if config.memory_replay_backprop or config.astro_mem:
            assert system == "rmaat"
    config = smoke_cell(system).config()
    batch = tiny_batch(config, [300, 40])
    batch = batch._replace(tokens=batch.tokens[:, :300], mask=batch.mask[:, :300])
    backward = amrb_backward if config.memory_replay_backprop else bptt_backward
    model = build_model(config)
    assert backward(model, batch).loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("task", TASKS)
def test_an_ablation_changes_one_thing(task):
    def values(config: Config) -> dict:
        return config.model_dump(include=set(Config.keys("outcome")))

    base = values(full_config("ablations", task, "rmaat"))
    segment_len = {"text": 256, "retrieval": 512}.get(task)
    for name in reproduce.ablations(task):
        ours = values(full_config("ablations", task, name))
        changed = {key for key, value in ours.items() if value != base[key]}
        if name.startswith("segments"):
            changed.discard("num_hidden")  # of the neighbor initialization: m is a segment's length
        if name.startswith("segments") and segment_len:
            assert changed <= {"num_segments", "max_seq_len"}
            assert ours["max_seq_len"] // ours["num_segments"] == segment_len
        elif name == "rlt_amrb":
            rlt = values(full_config("accuracy", task, "rlt"))
            del rlt["position_embedding"], ours["position_embedding"]
            assert ours == {**rlt, "memory_replay_backprop": True}
        else:
            assert len(changed) <= 1, name


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("system", [name for name in SYSTEMS if name != "rmaat"])
def test_a_compared_system_has_the_positions_of_its_task_and_no_neighbor_initialization(
    task, system
):
    config, base = full_config("accuracy", task, system), full_config("accuracy", task, "rmaat")
    assert not config.copies_neighbors and config.num_hidden is None
    if base.position_embedding == "none":
        assert config.position_embedding == "sinusoidal"
    else:
        for key in ("position_embedding", "position_init", "position_init_scale"):
            assert getattr(config, key) == getattr(base, key)


def test_the_reported_baselines_are_those_that_reproduce_trains():
    """Pages may report runs with fewer steps; everything else is the table's configuration."""
    free = ("max_steps", "stop_after_steps", "eval_interval", "precision", "warmup_steps")
    for task, system in itertools.product(("listops", "text", "retrieval", "image"), SYSTEMS):
        ours = full_config("accuracy", task, system)
        for path in (ROOT / f"results/{task}/equal/{system}").glob("seed*/config.yaml"):
            run = load_config(path, quiet=True)
            keys = set(Config.keys("outcome")) - {*free, "seed"}
            if ours.attention_type != "astro":  # terms that other attention types do not read
                keys -= {key for key in Attention.model_fields if not key.startswith("n")}
            assert run.attention_type == ours.attention_type
            assert run.model_dump(include=keys) == ours.model_dump(include=keys), path


def test_the_read_outs_cross_tokens_and_factor():
    rows = [full_config("readouts", "listops", name) for name in reproduce.readouts("listops")]
    M = full_config("accuracy", "listops", "rmaat").num_memory_tokens
    found = {(c.pooling, c.num_memory_tokens, c.astro_mem) for c in rows}
    crossed = itertools.product(("last", "memory"), (1, 4, 16), (True, False))
    assert found == {("mean", M, True), ("last", 0, True), *crossed} and len(rows) == len(found)


def test_cells_are_trained_kept_and_not_trained_again(tmp_path, listops_dir):
    arguments = [
        "accuracy", "--tasks", "text", "listops", "--systems", "rmt", "--budget", "smoke",
        "--set", f"data_dir={listops_dir}",
    ]
    first = run_script("reproduce.py", *arguments, cwd=tmp_path)
    # The data of Text are missing: its cell is reported as such, and that of ListOps is trained.
    assert first.returncode == 1
    (error,) = first.stderr.splitlines()
    assert "accuracy/smoke/text/rmt/seed0" in error and "aclImdb" in error
    folder = tmp_path / "results/reproduce/accuracy/smoke/listops/rmt/seed0"
    names = {"summary.json", "config.yaml", "metrics.jsonl", "curves.png"}
    assert {path.name for path in folder.iterdir()} == names
    summary = json.loads((folder / "summary.json").read_text())
    assert f"| RMT | {100 * summary['test_accuracy']:.1f}" in first.stdout
    assert "| Text 4K | RMT |  | 65.0 |  |" in first.stdout
    # The stored command repeats this run.
    python, script, option, file, *overrides = shlex.split(summary["command"])
    assert (python, script, option) == ("python", "run_train.py", "--config")
    assert load_config(ROOT / file, overrides) == load_config(folder / "config.yaml")

    again = run_script("reproduce.py", *arguments, cwd=tmp_path)
    assert "training reproduce/accuracy/smoke/listops" not in again.stdout
    forced = run_script("reproduce.py", *arguments, "--force", cwd=tmp_path)
    assert "training reproduce/accuracy/smoke/listops" in forced.stdout
    trained_again = json.loads((folder / "summary.json").read_text())
    assert trained_again["test_accuracy"] == summary["test_accuracy"]


@ENDING_SIGNALS
def test_an_interrupted_cell_is_saved(tmp_path, listops_dir, send, number):
    folder = "reproduce/accuracy/short/listops/rmaat/seed0"
    process = start_process(
        "reproduce.py", "accuracy", "--tasks", "listops", "--systems", "rmaat", "--budget", "short",
        "--set", f"data_dir={listops_dir}", cwd=tmp_path, start_new_session=True,
    )
    log = tmp_path / "runs" / folder / "metrics.jsonl"
    wait_for(process, log.exists)
    send(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert len(errors.splitlines()) == 1 and "goes on from here" in errors
    assert (tmp_path / "runs" / folder / "last.pt").exists()
    assert not (tmp_path / "results" / folder).exists()


def test_a_cell_continues_from_its_checkpoint(tmp_path, listops_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell, machine = smoke_cell(), [f"data_dir={listops_dir}"]
    train(load_config(cell.task_file, [*cell.overrides(machine), "stop_after_steps=1"]))
    assert reproduce.run_cells([cell], machine) == 0
    rows = (reproduce.RESULTS / cell.folder / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows]
    assert steps[0] == 1 and steps[-1] == 3  # the first line is that of the first start


def test_a_dry_run_prints_each_missing_run_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["ablations", "--tasks", "listops", "--budget", "smoke", "--dry_run"]
    assert call(monkeypatch, *arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(set(lines)) == len(lines) == len(reproduce.ablations("listops"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "words"), [
    (["accuracy", "--tasks", "listop"], ["--tasks", "'listop'", "text"]),
    (["accuracy", "--systems", "rmtt"], ["--systems", "'rmtt'", "rmaat"]),
    (["ablations", "--systems", "alpha_9"], ["--systems", "alpha_9", "alpha_0.15"]),
    (["accuracy", "--seeds", "0-2"], ["--seeds", "0-2"]),
])
def test_a_mistake_is_one_line_and_status_2(tmp_path, arguments, words):
    result = run_script("reproduce.py", *arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert all(word in result.stderr for word in words)


def test_a_cell_that_was_not_run_stays_empty(monkeypatch):
    monkeypatch.setattr(reproduce, "code_mark", lambda commit: "")
    runs = [{"test_accuracy": a, "steps": 10, "seed": k} for k, a in enumerate((0.379, 0.399))]
    rmt = [{**runs[0], "test_accuracy": 0.369}]
    found = {("listops", "rmaat"): runs, ("listops", "rmt"): rmt, ("text", "rmaat"): []}
    table = reproduce.table_of(found, SYSTEMS, reproduce.ACCURACY).splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert rows == [
        ["ListOps 2K", "RMAAT", "38.9 ± 1.4", "38.9", "+0.0", "2", "10"],
        ["ListOps 2K", "RMT", "36.9", "37.4", "-1.0", "1", "10"],  # from RMAAT's seed 0
        ["Text 4K", "RMAAT", "", "65.9", "", "", ""],
    ]
    assert markdown(["a"], [[""]]).splitlines() == ["| a |", "| --- |", "|  |"]


def test_results_of_other_code_are_marked(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    commits = []
    for name in ("model.py", "README.md", "train.py"):
        (tmp_path / name).write_text("1")
        git("add", name)
        git("commit", "-qm", name)
        commits.append(git("rev-parse", "--short", "HEAD"))
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "code_mark", reproduce.code_mark.__wrapped__)  # no cache
    assert reproduce.code_mark(commits[2]) == ""
    assert [reproduce.code_mark(c) for c in commits[:2]] == 2 * [" (other code)"]
    assert reproduce.code_mark("unknown") == " (unknown code)"
    runs = [{"test_accuracy": 0.5}, {"test_accuracy": 0.5, "versions": {"commit": commits[2]}}]
    assert reproduce.accuracy_text(runs) == "50.0 ± 0.0 (unknown code)"
    monkeypatch.setattr(reproduce, "ROOT", tmp_path / "..")  # outside a repository
    assert reproduce.code_mark(commits[2]) == " (unknown code)"


def test_verify_compares_committed_weights_with_their_summaries(
    tmp_path, listops_dir, monkeypatch, capsys
):
    config = write_config(tmp_path, listops_dir, max_steps=2, warmup_steps=1)
    run_cli("--config", config, cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "results/listops/rmaat"
    shutil.copytree(tmp_path / "runs/run", folder)
    shutil.rmtree(tmp_path / "runs")
    overrides = ["verify", "--set", f"data_dir={listops_dir}"]
    assert call(monkeypatch, *overrides) == 0
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert row.startswith("| listops/rmaat | ") and row.endswith("| yes |")

    summary = json.loads((folder / "summary.json").read_text())
    summary["test_accuracy"] += 0.002
    (folder / "summary.json").write_text(json.dumps(summary))
    assert call(monkeypatch, *overrides) == 1
    assert "| NO |" in capsys.readouterr().out

    assert call(monkeypatch, "verify", "--set", "data_dir=absent") == 0
    assert "skipped: no listops in absent" in capsys.readouterr().out
    assert not (tmp_path / "absent").exists()
