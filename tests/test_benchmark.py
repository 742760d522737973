"""The benchmark's command line: rows, ratios, and what it measures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import called, gradients_of, tiny_batch, tiny_config

import benchmark
from model import build_model
from train import bptt_backward

KEYS = {
    "system", "seq_len", "num_segments", "batch_size", "tokens_per_second", "step_seconds",
    "peak_mib", "device", "torch",
}


SMALL = ["--seq_lens", "128", "--segment_len", "32", "--repeats", "1"]


def run_benchmark(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return called(benchmark.main, *arguments, cwd=cwd)


@pytest.fixture
def rows_in_this_process(monkeypatch):
    """Measure without a process per row, where its peak of memory is not the point."""
    measures = {
        "row": lambda request: benchmark.measure(**request),
        "rate": benchmark.matmul_gflop_per_second,
    }
    monkeypatch.setattr(
        benchmark, "in_fresh_process", lambda what, request: measures[what](request)
    )


def rows_of(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


def test_a_row_has_a_process_and_its_peak_of_memory(tmp_path):
    result = run_benchmark(
        "memory", *SMALL, "--systems", "RMAAT, AMRB", "Transformer", "--json", "m.json",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert all(row["peak_mib"] > 0 for row in rows_of(tmp_path / "m.json"))


def test_memory_writes_a_row_per_system_and_shows_ratios(tmp_path, rows_in_this_process):
    result = run_benchmark("memory", *SMALL, "--json", "m.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "m.json")
    assert [row["system"] for row in rows] == benchmark.MEMORY_SYSTEMS
    assert all(row.keys() >= KEYS for row in rows)
    assert [row["num_segments"] for row in rows] == [4, 4, 4, 4, 1]
    assert "| RMAAT, AMRB | 128 | 4 |" in result.stdout and "| 1.00 |" in result.stdout


def test_throughput_compares_with_rmt_and_with_the_machine(tmp_path, rows_in_this_process):
    result = run_benchmark(
        "throughput", *SMALL, "--systems", "RMAAT, AMRB", "RMT", "Luna-256", "--json", "t.json",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    rmaat, rmt, _luna = rows_of(tmp_path / "t.json")
    assert rmaat["matmul_share"] > 0 and "matmul_share" not in rmt
    ratio = rmaat["tokens_per_second"] / rmt["tokens_per_second"]
    assert f"| {ratio:.2f} |" in result.stdout


def test_scaling_draws_its_plot(tmp_path, rows_in_this_process):
    result = run_benchmark(
        "scaling", *SMALL, "--seq_lens", "64", "128", "--json", "s.json", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert {row["batch_size"] for row in rows_of(tmp_path / "s.json")} == {1}
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_a_row_that_fails_is_named_and_the_others_stay(monkeypatch, capsys):
    def child(what, request):
        if request["system"] == "RMT":
            raise RuntimeError("killed by signal 9")
        return {"step_seconds": 2.0, "peak_mib": 1.0, "gflop": None}

    monkeypatch.setattr(benchmark, "in_fresh_process", child)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "memory", "--seq_lens", "1024"])
    assert benchmark.main() == 0
    captured = capsys.readouterr()
    assert "RMT, 1024 tokens: killed by signal 9" in captured.err
    assert captured.out.count("| 2.00 |") == len(benchmark.MEMORY_SYSTEMS) - 1


@pytest.mark.parametrize("length", ["700", "1000"])
def test_a_length_that_does_not_split_is_refused(tmp_path, length):
    result = run_benchmark("scaling", "--seq_lens", length, cwd=tmp_path)
    assert result.returncode == 2 and f"--seq_lens {length}" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_checkpointed_baseline_has_the_gradients_of_bptt():
    config = tiny_config(dropout=0.2)
    batch = tiny_batch(config, [40, 17, 9])
    expected, _ = gradients_of(config, bptt_backward, batch)
    actual, _ = gradients_of(config, benchmark.checkpointed_backward, batch)
    torch.testing.assert_close(actual, expected)


def test_counted_operations_are_those_of_the_replay():
    """(4T - 1) / (3T) of BPTT's, less what does not depend on the segments."""
    row = {"seq_len": 512, "segment_len": 64, "device": "cpu", "batch_size": 2}
    counted = []
    for system in ("RMAAT, AMRB", "RMAAT, BPTT"):
        config = benchmark.benchmark_config(system, **row)
        model = build_model(config)
        counted.append(
            benchmark.count_flop(model, config, benchmark.random_batch(config, row["seq_len"]))
        )
    T = row["seq_len"] // row["segment_len"]
    assert counted[0] / counted[1] == pytest.approx((4 * T - 1) / (3 * T), rel=0.02)
