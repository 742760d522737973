"""Peak memory and step time of the ways to train: `python benchmark.py memory --json FILE`.

Each row is measured in a process of its own, the systems in turn, `--repeats` times; a row states
medians. Peak memory is the process's high-water mark during the steps minus what it held once
model, gradients and optimizer state existed (on CUDA: allocated bytes). Ratios within one run are
what to compare; absolute times depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dataloader import Batch
from lra_config import Config, make_config
from model import build_model
from optimization import build_optimizer
from train import amrb_backward, bptt_backward
from utils import versions, write_json

WARMUP_STEPS, TIMED_STEPS = 1, 3

BASE = {
    "dataset": "listops", "dim": 128, "num_layers": 4, "num_heads": 4, "ffn_dim": 512,
    "num_memory_tokens": 1, "batch_size": 4, "precision": "float32",
}
SYSTEMS = {
    "RMAAT, AMRB": {"memory_replay_backprop": True},
    "RMAAT, BPTT": {"memory_replay_backprop": False},
}


def benchmark_config(system: str, seq_len: int, num_segments: int, device: str) -> Config:
    """The configuration of one row."""
    return make_config({
        **BASE, **SYSTEMS[system], "max_seq_len": seq_len, "num_segments": num_segments,
        "device": device,
    })


def measure(config: Config) -> dict[str, float]:
    """Step time and peak memory of training `config` on random tokens, in this process.

    Returns:
        `step_seconds`, the median of the timed steps, and `peak_mib` above the model's own state.
    """
    device = torch.device(config.device)
    torch.manual_seed(0)
    model = build_model(config).to(device)
    optimizer = build_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # creates its state
    shape = (config.batch_size, config.max_seq_len)
    batch = Batch(
        torch.randint(1, config.task.tokenizer.vocab_size, shape, device=device),
        None,
        torch.randint(config.task.num_classes, shape[:1], device=device),
    )
    backward = amrb_backward if config.memory_replay_backprop else bptt_backward

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        backward(model, batch)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    held = _reset_peak(device)
    seconds = [step() for _ in range(WARMUP_STEPS + TIMED_STEPS)][WARMUP_STEPS:]
    peak_mib = _peak_mib(device) - held
    return {"step_seconds": statistics.median(seconds), "peak_mib": peak_mib}


def _status_mib(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 2**10
    raise RuntimeError(f"/proc/self/status has no {field}; the CPU's memory is measured on Linux")


def _reset_peak(device: torch.device) -> float:
    """Start the high-water mark anew; return what is held now, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")
    return _status_mib("VmRSS")


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _status_mib("VmHWM")


def measure_in_fresh_process(row: dict[str, Any]) -> dict[str, float]:
    """`measure` in a child process."""
    child = subprocess.run(
        [sys.executable, __file__, "row", json.dumps(row)], capture_output=True, text=True
    )
    if child.returncode:
        raise RuntimeError(f"{row['system']}: {child.stderr.strip().splitlines()[-1]}")
    return json.loads(child.stdout.splitlines()[-1])


def run_memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """AMRB against BPTT on one long sequence length."""
    requests = [
        {"system": system, "seq_len": arguments.seq_len, "num_segments": arguments.num_segments,
         "device": arguments.device}
        for system in SYSTEMS
    ]
    measured: dict[str, list] = {system: [] for system in SYSTEMS}
    for _ in range(arguments.repeats):
        for request in requests:
            measured[request["system"]].append(measure_in_fresh_process(request))
    rows = []
    for request in requests:
        results = measured[request["system"]]
        medians = {
            key: statistics.median(r[key] for r in results) for key in ("step_seconds", "peak_mib")
        }
        tokens = BASE["batch_size"] * request["seq_len"]
        rows.append({
            **request, "batch_size": BASE["batch_size"], **medians,
            "tokens_per_second": tokens / medians["step_seconds"], "torch": torch.__version__,
        })
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown: each row, and its ratios to the first."""
    print("| system | tokens | segments | peak MiB | x first | step s | x first |")
    print("|---|---|---|---|---|---|---|")
    first = rows[0]
    for row in rows:
        print(
            f"| {row['system']} | {row['seq_len']} | {row['num_segments']} "
            f"| {row['peak_mib']:.0f} | {row['peak_mib'] / first['peak_mib']:.2f} "
            f"| {row['step_seconds']:.2f} | {row['step_seconds'] / first['step_seconds']:.2f} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    memory = commands.add_parser("memory", help="AMRB against BPTT")
    memory.add_argument("--seq_len", type=int, default=8192)
    memory.add_argument("--num_segments", type=int, default=16)
    memory.add_argument("--repeats", type=int, default=3)
    memory.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    memory.add_argument("--json", type=Path, help="write the rows here")
    child = commands.add_parser("row")  # one measurement, for the process itself
    child.add_argument("request", type=json.loads)
    arguments = parser.parse_args()
    if arguments.what == "row":
        print(json.dumps(measure(benchmark_config(**arguments.request))))
        return 0
    rows = run_memory(arguments)
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, {"rows": rows, "threads": torch.get_num_threads(), **versions()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
