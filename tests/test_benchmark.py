"""The benchmark's command line: its rows, ratios and measurements."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_refused, called, gradients_of, tiny_batch, tiny_config

import benchmark
from benchmark import count_kernels
from lra_config import load_config
from model import build_model
from run.program import run_program
from train import amrb_backward, bptt_backward

KEYS = {
    "system", "seq_len", "num_segments", "batch_size", "tokens_per_second", "step_seconds",
    "peak_mib", "device", "torch",
}


SMALL = ["--seq_lens", "128", "--segment_len", "32", "--repeats", "1"]


def run_benchmark(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return called(lambda: run_program("benchmark.py", benchmark.main), *arguments, cwd=cwd)


@pytest.fixture
def rows_in_this_process(monkeypatch):
    """Measure all rows in this process, for tests that do not need the peak memory of a row."""
    monkeypatch.setattr(benchmark, "in_fresh_process", benchmark.in_this_process)


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
    assert "| RMAAT, AMRB | 128 |" in result.stdout
    assert rows[0]["peak_mib x AMRB"] == 1 and rows[1]["step_seconds x AMRB"] > 0


def test_throughput_compares_with_rmt_and_with_the_machine(tmp_path, rows_in_this_process):
    result = run_benchmark(
        "throughput", *SMALL, "--systems", "RMAAT, AMRB", "RMT", "Luna-256", "--json", "t.json",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    rmaat, rmt, _luna = rows_of(tmp_path / "t.json")
    assert rmaat["matmul_share"] > 0 and "matmul_share" not in rmt
    ratio = rmaat["tokens_per_second"] / rmt["tokens_per_second"]
    assert rmaat["tokens_per_second x RMT"] == ratio
    assert f"| {ratio:.3g} |" in result.stdout


def count_small(system: str = "RMAAT, AMRB", **keys) -> dict:
    """Count a small row: 8 segments of 64 tokens."""
    row = {"seq_len": 512, "segment_len": 64, "device": "cpu", "batch_size": 8}
    return benchmark.count_row({"system": system, **row, **keys})


def test_memory_by_the_number_of_replayed_segments(tmp_path):
    result = run_benchmark(
        "memory", *SMALL, "--count", "--replayed", "3", "2", "0", "--systems", "RMAAT, AMRB",
        "RMAAT, BPTT", "--json", "r.json", cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    rows = rows_of(tmp_path / "r.json")
    assert [row.get("replay_segments") for row in rows] == [3, 2, 0, None]
    peaks = [row["peak_mib"] for row in rows]
    assert peaks[0] < peaks[1] < peaks[2] and peaks[2] == pytest.approx(peaks[3], rel=0.05)


def test_counted_kinds_add_up():
    row = count_small()
    kinds = ("weights", "optimizer", "gradients", "activations", "replay_buffer", "temporary")
    assert sum(row[f"{kind}_mib"] for kind in kinds) == pytest.approx(row["total_mib"])
    assert row["replay_buffer_mib"] * 2**20 == 8 * 8 * 128 * 4  # T memories (B, 1, D) in float32
    assert count_small("RMAAT, BPTT")["replay_buffer_mib"] == 0
    assert row["optimizer_mib"] > 1.9 * (row["weights_mib"] - 0.1)


def test_counted_memory_grows_with_the_segments_under_bptt_alone():
    keys = {"seq_len": 1024}
    assert count_small(**keys)["peak_mib"] < 1.05 * count_small()["peak_mib"]
    bptt = [count_small("RMAAT, BPTT", **each)["activations_mib"] for each in (keys, {})]
    assert bptt[0] / bptt[1] == pytest.approx(2, rel=0.05)


def test_no_row_counts_a_square_attention_matrix():
    row = count_small("Transformer", seq_len=4096, segment_len=4096, batch_size=1)
    matrix_mib = 4 * 4 * 4096**2 / 2**20  # four heads, one layer
    assert row["total_mib"] < matrix_mib


def test_the_largest_batch_fits_and_the_next_one_does_not():
    row = {"system": "RMT", "seq_len": 256, "segment_len": 64, "device": "cpu", "batch_size": 1}
    largest = benchmark.largest_batch(row, 500)
    totals = [
        benchmark.count_row({**row, "batch_size": size})["total_mib"]
        for size in (largest, largest + 1)
    ]
    assert totals[0] <= 500 < totals[1]


def test_a_count_for_cuda_needs_no_device_and_a_measurement_does(tmp_path):
    arguments = ("memory", *SMALL, "--systems", "RMT", "--device", "cuda", "--json", "c.json")
    result = run_benchmark(*arguments, "--count", cwd=tmp_path)
    assert result.returncode == 0 and "no CUDA device" in result.stderr
    (row,) = rows_of(tmp_path / "c.json")
    assert row["device"] == "cuda" and row["peak_mib"] > 0
    assert_refused(run_benchmark(*arguments, cwd=tmp_path), "no CUDA device")


def test_a_recomputed_layer_takes_less_memory():
    expected = count_small("RMAAT, BPTT")["peak_mib"]
    assert count_small("RMAAT, BPTT", recompute="layer")["peak_mib"] < 0.6 * expected


@pytest.mark.slow
def test_counted_memory_is_what_a_process_grows_by(monkeypatch):
    """A step of 2 GiB. Each tensor has its own mapping, since glibc's heap would have holes."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    row = benchmark.validate_row({
        "system": "RMAAT, BPTT", "seq_len": 1024, "segment_len": 512, "device": "cpu",
        "batch_size": 16, "dim": 512, "num_heads": 8, "ffn_dim": 2048,
    })
    assert row["measured_mib"] == pytest.approx(row["peak_mib"], rel=0.05)


def test_rows_of_one_process_fail_alone(monkeypatch):
    def measure(request):
        if request["system"] == "RMT":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
        return {"step_seconds": 2.0, "peak_mib": 1.0, "reserved_mib": 3.0, "kernels": 7}

    monkeypatch.setattr(benchmark, "measure", measure)
    row = {"seq_len": 128, "segment_len": 32, "device": "cuda", "batch_size": 2}
    rows = benchmark.measure_in_turn(
        [{"system": system, **row} for system in ("RMT", "RMAAT, AMRB")], 2
    )
    assert rows[0]["error"] == "CUDA out of memory. Tried to allocate 2 GiB"
    assert rows[1]["step_seconds"] == 2.0 and rows[1]["reserved_mib"] == 3.0


@pytest.mark.parametrize("option", ["--segment_len", "--seq_lens"])
def test_a_length_is_one_at_least(tmp_path, option):
    assert_refused(run_benchmark("memory", option, "0", cwd=tmp_path), option, "less than 1")


def test_a_long_sequence_in_one_segment_is_measured(monkeypatch):
    monkeypatch.setattr(benchmark, "LONG", 64)
    row = {"system": "RLT", "seq_len": 64, "segment_len": 64, "device": "cpu", "batch_size": 1}
    assert benchmark.measure(row)["step_seconds"] > 0


def test_scaling_measures_one_sequence(tmp_path, rows_in_this_process):
    result = run_benchmark(
        "scaling", *SMALL, "--seq_lens", "64", "128", "--json", "s.json", cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert {row["batch_size"] for row in rows_of(tmp_path / "s.json")} == {1}


def test_a_row_that_fails_is_named_and_the_others_stay(monkeypatch, capsys):
    def child(function, request):
        if request["system"] == "RMT":
            raise RuntimeError("killed by signal 9")
        return {"step_seconds": 2.0, "peak_mib": 1.0, "gflop": None}

    monkeypatch.setattr(benchmark, "in_fresh_process", child)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "memory", "--seq_lens", "1024"])
    assert benchmark.main() == 1
    captured = capsys.readouterr()
    assert "RMT, 1024 tokens: killed by signal 9" in captured.err
    assert captured.out.count("| 2 | 1 |") == len(benchmark.MEMORY_SYSTEMS) - 1


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


def test_views_are_no_kernels_and_many_tensors_may_share_one():
    x = torch.ones(4, 6)
    assert count_kernels(lambda: x.view(6, 4).t().unbind()) == 0
    assert count_kernels(lambda: torch._foreach_add([x, x, x], 1)) == 1
    assert count_kernels(lambda: (x + x).mul_(2)) == 2


LISTOPS = ["batch_size=2", "max_seq_len=256"]  # 8 segments of the model of config_v10.yaml


@pytest.mark.parametrize(("precision", "today"), [("float32", 2669), ("bfloat16", 3613)])
def test_a_step_launches_a_quarter_less_than_it_did(precision, today):
    """Compared with the kernels of a step at commit 06e213c, counted in the same way."""
    config = load_config(ROOT / "configs/config_v10.yaml", [*LISTOPS, f"precision={precision}"])
    model, batch = build_model(config), tiny_batch(config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert count_kernels(lambda: amrb_backward(model, batch)) <= 0.75 * today


def test_counted_operations_are_those_of_the_replay():
    """They are (4T - 1) / (3T) of BPTT's, except for operations outside the segments."""
    row = {"seq_len": 512, "segment_len": 64, "device": "cpu", "batch_size": 2}
    counted = []
    for system in ("RMAAT, AMRB", "RMAAT, BPTT"):
        config = benchmark.benchmark_config(system, **row)
        model = build_model(config)
        counted.append(
            benchmark.count_flop(model, benchmark.random_batch(config, row["seq_len"]))
        )
    T = row["seq_len"] // row["segment_len"]
    assert counted[0] / counted[1] == pytest.approx((4 * T - 1) / (3 * T), rel=0.02)
