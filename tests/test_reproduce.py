"""The published tables: what is trained, what is skipped, what the tables say."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import sys

import pytest
from conftest import ENDING_SIGNALS, ROOT, run_script, start_process, tiny_batch, wait_for

import reproduce
import tables as published
from experiments.tables import Measured, accuracy_table, average, markdown, ratio_table
from lra_config import Config, load_config, read_mapping
from model import build_model
from train import amrb_backward, bptt_backward, train

SYSTEM_FILES = sorted((ROOT / "configs/tables").glob("*.yaml"))


def smoke_cell(system: str = "rmaat", task: str = "listops", seed: int = 0) -> reproduce.Cell:
    return reproduce.Cell("accuracy", "smoke", task, system, seed)


def test_every_system_has_its_file_and_the_file_says_what_it_is():
    assert {path.stem for path in SYSTEM_FILES} == set(published.SYSTEMS)
    for path in SYSTEM_FILES:
        assert path.read_text().startswith("# ")


@pytest.mark.parametrize("system", published.SYSTEMS)
def test_every_system_is_a_configuration_of_every_task(system):
    keys = set(read_mapping(ROOT / "configs/tables" / f"{system}.yaml"))
    for task in published.TASKS:
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


@pytest.mark.parametrize("task", published.TASKS)
def test_an_ablation_changes_one_thing(task):
    def values(variant: str) -> dict:
        config = reproduce.Cell("ablations", "full", task, variant, 0).config()
        return json.loads(reproduce.outcome_key(config))

    base = values("rmaat")
    segment_len = {"text": 256, "retrieval": 512}.get(task)
    for name in reproduce.ablations(task):
        changed = {key for key, value in values(name).items() if value != base[key]}
        if name.startswith("segments"):
            changed.discard("num_hidden")  # of the local start: as many as a segment has tokens
        if name.startswith("segments") and task in ("text", "retrieval"):
            assert changed <= {"num_segments", "max_seq_len"}
            assert values(name)["max_seq_len"] // values(name)["num_segments"] == segment_len
        elif name == "rlt_amrb":
            rlt = json.loads(
                reproduce.outcome_key(reproduce.Cell("accuracy", "full", task, "rlt", 0).config())
            )
            assert values(name) == {**rlt, "memory_replay_backprop": True}
        else:
            assert len(changed) <= 1, name


@pytest.mark.parametrize("task", published.TASKS)
def test_at_keeps_nothing_of_the_local_start(task):
    config = reproduce.Cell("accuracy", "full", task, "at", 0).config()
    for key in ("num_hidden", "hebbian_divisor", "decay_scale", "position_basis", "position_scale",
                "position_lr_factor"):
        assert getattr(config, key) == Config.model_fields[key].default, key


def test_the_read_outs_cross_tokens_and_factor():
    rows = {name: reproduce.Cell("readouts", "full", "listops", name, 0).config()
            for name in reproduce.readouts("listops")}
    found = {(c.pooling, c.num_memory_tokens, c.astro_mem) for c in rows.values()}
    crossed = itertools.product(("last", "memory"), (1, 4, 16), (True, False))
    assert found == {("mean", 4, True), ("last", 0, True), *crossed} and len(rows) == len(found)


def test_cells_are_trained_kept_and_not_trained_again(tmp_path, listops_dir):
    arguments = [
        "accuracy", "--tasks", "text", "listops", "--systems", "rmt", "--budget", "smoke",
        "--data_dir", str(listops_dir),
    ]
    first = run_script("reproduce.py", *arguments, cwd=tmp_path)
    # The data of Text are not there: its cell is reported, that of ListOps goes on.
    assert first.returncode == 1
    (error,) = first.stderr.splitlines()
    assert "accuracy/smoke/text/rmt/seed0" in error and "aclImdb" in error
    folder = tmp_path / "results/reproduce/accuracy/smoke/listops/rmt/seed0"
    names = {"summary.json", "config.yaml", "metrics.jsonl", "curves.png"}
    assert {path.name for path in folder.iterdir()} == names
    summary = json.loads((folder / "summary.json").read_text())
    assert f"| RMT | {100 * summary['test_accuracy']:.1f} | 37.4 |" in first.stdout
    # The command can be typed as it stands, and makes this run.
    python, script, option, file, *overrides = shlex.split(summary["command"])
    assert (python, option) == ("python", "--config") and (tmp_path / script).exists()
    assert load_config(tmp_path / file, overrides) == load_config(folder / "config.yaml")
    assert "| Text 4K | RMT |  | 65.0 |  |" in first.stdout

    again = run_script("reproduce.py", *arguments, cwd=tmp_path)
    assert "training reproduce/accuracy/smoke/listops" not in again.stdout
    assert again.stdout.splitlines()[-6:] == first.stdout.splitlines()[-6:]


def test_an_interrupted_cell_goes_on_from_its_checkpoint(tmp_path, listops_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cell, machine = smoke_cell(), {"data_dir": str(listops_dir)}
    overrides = cell.overrides(machine)
    train(load_config(cell.task_file, [*overrides, "stop_after_steps=1"]))
    assert reproduce.run_cells([cell], machine, dry_run=False) == 0
    folder = reproduce.RESULTS / cell.place
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").open()]
    assert steps[0] == 1 and steps[-1] == 3  # the first line is the first start's
    assert load_config(folder / "config.yaml").stop_after_steps is None
    assert "--resume" not in json.loads((folder / "summary.json").read_text())["command"]

    # A run is recognised wherever it lies, another seed is another run.
    shutil.move(folder, reproduce.RESULTS / "elsewhere")
    other = smoke_cell(seed=1)
    found = reproduce.collect([cell, other])
    assert len(found["listops", "rmaat"].summaries) == 1


@ENDING_SIGNALS
def test_a_signal_is_handed_on_and_the_run_saved(tmp_path, listops_dir, send, number):
    place = "reproduce/accuracy/short/listops/rmaat/seed0"
    process = start_process(
        "reproduce.py", "accuracy", "--tasks", "listops", "--systems", "rmaat", "--budget", "short",
        "--data_dir", listops_dir, cwd=tmp_path, start_new_session=True,
    )
    wait_for(process, (tmp_path / "runs" / place / "metrics.jsonl").exists)
    send(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert len(errors.splitlines()) == 1 and "goes on from here" in errors
    assert (tmp_path / "runs" / place / "last.pt").exists()
    assert not (tmp_path / "results" / place).exists()


def test_a_dry_run_prints_each_missing_run_once_and_does_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "ablations", "--tasks", "listops",
                                      "--budget", "smoke", "--dry_run"])
    assert reproduce.main() == 0
    lines = capsys.readouterr().out.splitlines()
    # alpha = 0.25, 4 memory tokens and 8 segments are RMAAT itself.
    assert len(lines) == len(reproduce.ablations("listops")) - 3
    assert len(set(lines)) == len(lines)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("arguments", "words"), [
    (["accuracy", "--tasks", "listop"], ["--tasks listop", "listops, text"]),
    (["accuracy", "--systems", "rmtt"], ["--systems rmtt", "rmt, rmaat"]),
    (["accuracy", "--tasks", ","], ["--tasks names nothing"]),
    (["ablations", "--systems", "alpha_9"], ["--systems alpha_9", "alpha_0.25"]),
    (["accuracy", "--seeds", "0-2"], ["--seeds 0-2", "0,1,2"]),
])
def test_a_mistake_is_one_line_and_status_2(monkeypatch, capsys, arguments, words):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    assert reproduce.main() == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert all(word in error for word in words)


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def summaries(*accuracies: float) -> Measured:
    return Measured([{"test_accuracy": a, "steps": 10} for a in accuracies])


def test_a_cell_that_was_not_run_stays_empty_and_enters_no_mean():
    found = {(task, system): summaries() for task in published.TASKS for system in ("rmt", "rmaat")}
    found["listops", "rmaat"] = summaries(0.379, 0.399)
    for task in published.TASKS:
        found[task, "rmt"] = summaries(0.5)
    rows = {(row[0], row[1]): row[2:] for row in rows_of(accuracy_table(found))}
    assert rows["ListOps 2K", "RMAAT"] == ["38.9 ± 1.4", "38.9", "+0.0", "2", "10"]
    assert rows["Text 4K", "RMAAT"] == ["", "65.9", "", "", ""]
    assert rows["average", "RMAAT"][:3] == ["", "68.0", ""]
    assert rows["average", "RMT"][:3] == ["50.0", "63.6", "-13.6"]
    assert average([1.0, None]) is None
    assert markdown(["a"], [[""]]).splitlines() == ["| a |", "| --- |", "|  |"]


def test_ratios_are_taken_at_the_same_length_and_number_of_segments():
    measured = [
        {"system": system, "seq_len": length, "num_segments": T, "peak_mib": peak}
        for system, length, T, peak in [
            ("A", 1024, 4, 10.0), ("A", 8192, 16, 20.0), ("A", 8192, 4, 50.0),
            ("B", 8192, 4, 100.0), ("C", 8192, 1, 60.0),
        ]
    ]
    figures = {"A": {"x": 2.0, "y": None}, "B": {"x": 3.0, "y": 4.0}}
    table = ratio_table(
        measured, {"listops": 8192, "image": 1024}, value="peak_mib", unit="MiB", reference="A",
        figures={k: {"listops": v["x"], "image": v["y"]} for k, v in figures.items()},
        figures_unit="GB",
    )
    rows = {tuple(row[:4]): row[4:] for row in rows_of(table)}
    assert rows["ListOps 2K", "B", "8,192", "4"] == ["100", "2.00", "3", "1.50", "+0.50"]
    assert rows["ListOps 2K", "C", "8,192", "1"] == ["60", "3.00", "", "", ""]
    assert rows["Image 1K", "A", "1,024", "4"] == ["10", "1.00", "", "", ""]
    assert rows["Image 1K", "B", "1,024", ""] == ["", "", "4", "", ""]


@pytest.mark.parametrize("wrapped", [True, False])
def test_measured_tables_read_what_the_benchmark_wrote(tmp_path, monkeypatch, capsys, wrapped):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"system": system, "seq_len": 8192, "num_segments": 16, "tokens_per_second": speed}
        for system, speed in (("RMT", 1000.0), ("RMAAT, AMRB", 1600.0))
    ]
    path = reproduce.benchmark_file("throughput", "short", "cpu")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"rows": rows} if wrapped else rows))
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "throughput", "--budget", "short"])
    assert reproduce.main() == 0  # measures nothing: the file is there
    out = capsys.readouterr().out
    assert "| Retrieval 8K | RMAAT, AMRB | 8,192 | 16 | 1,600 | 1.60 | 1.73 | -0.13 |" in out
    assert "| Text 4K | RMAAT, AMRB | 4,096 |  |  |  | 1.50 |  |" in out
