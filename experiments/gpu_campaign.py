"""Everything a GPU is to show, in one call that can be repeated.

    python -m experiments.gpu_campaign OUT                  # all stages, ten minutes on one GPU
    python -m experiments.gpu_campaign OUT --stage memory   # one of them
    python -m experiments.gpu_campaign OUT --stage train    # accuracy at full budgets, call by call
    python -m experiments.gpu_campaign OUT --device cpu --smoke   # the same on a CPU, in small

OUT/rows.jsonl receives each row as soon as it is measured, failures included; a further call goes
on where the last one ended and does what failed again. OUT/tables.md is written at every end. The
stage `train`, which stands alone, keeps its cells, finished or not, in OUT/runs.tar.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tables as published
from experiments.tables import markdown, ratio_table
from run.files import atomic_write
from run.program import run_program

ROOT = Path(__file__).parent.parent
TASKS = ("listops", "image", "text", "retrieval")
MODES = {
    "eager": {}, "graphs": {"cuda_graphs": True}, "compiled": {"compile": True},
    "compiled, graphs": {"compile": True, "cuda_graphs": True},
}
CHECKPOINT_LIMIT = 16 * 2**20  # bytes of OUT/runs.tar


class Job(NamedTuple):
    """One row to be."""

    stage: str
    name: str  # unique inside its stage
    limit: float  # seconds
    request: list[Any] | None = None  # for `benchmark.py serve`
    command: list[str] | None = None  # else: a program, whose end of output is the row


class Measurer:
    """A `benchmark.py serve` that is started anew after a request that hangs or kills it."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def ask(self, request: list[Any], limit: float) -> dict[str, Any]:
        """The answer, or `{"error": why}`."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "benchmark.py"), "serve"], cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )
        with contextlib.suppress(BrokenPipeError):  # it has ended: the answer below says so
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        deadline = time.monotonic() + limit
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([self.process.stdout], [], [], left)[0]:
                break
            line = self.process.stdout.readline()
            if not line:
                status = self.process.wait()
                self.process = None
                return {"error": f"the process ended with status {status}"}
            if line.startswith("{"):  # and not what a library prints
                return json.loads(line)
        self.close()
        return {"error": f"not done in {limit:.0f} s"}

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def run_command(command: list[str], limit: float) -> dict[str, Any]:
    """The last lines of a program's output, or `{"error": why}`."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, text=True, timeout=limit, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done in {limit:.0f} s"}
    lines = done.stdout.strip().splitlines()[-8:]
    if done.returncode:
        return {"error": f"status {done.returncode}: " + " | ".join(lines)}
    return {"answer": {"output": lines}}


def jobs(device: str, out: Path, *, smoke: bool) -> Iterator[Job]:
    """All rows, the most telling first."""
    python = sys.executable
    yield Job("machine", "machine", 60, command=[python, "-m", __spec__.name, "--machine", device])
    pytest = [python, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    yield Job(
        "tests", "pytest -m gpu", 200, command=[*pytest, "--collect-only"] if smoke else pytest
    )
    small: dict[str, Any] = {}
    if smoke:
        small = {"max_seq_len": 64, "num_segments": 4, "batch_size": 2, "document_pair": "joint"}
    modes = {m: keys for m, keys in MODES.items() if device == "cuda" or m == "eager"}
    for task in TASKS[:1] if smoke else TASKS:
        for precision in ("bfloat16", "float32"):
            for mode, keys in modes.items():
                if "compile" in keys and precision == "float32" and task != "listops":
                    continue  # half a minute each, for what bfloat16 has shown
                request = {"file": task, "device": device, "precision": precision, **keys, **small}
                yield Job("shapes", f"{task}, {precision}, {mode}", 120, ["task", request])

    S = 32 if smoke else 512
    lengths = [64] if smoke else [1024, 2048, 4096, 8192]
    row = {"segment_len": S, "device": device, "batch_size": 1 if smoke else 4}
    for length in lengths:
        for system in (published.AMRB, published.BPTT, f"{published.BPTT}, checkpointed", "RMT",
                       "Transformer"):
            request = {"system": system, "seq_len": length, **row}
            yield Job("memory", f"{system}, {length}", 60, ["row", request])
    T = lengths[-1] // S
    for replayed in (1, 0) if smoke else (T - 1, 3 * T // 4, T // 2, T // 4, 0):
        request = {"system": published.AMRB, "seq_len": lengths[-1], **row}
        yield Job("replay", str(replayed), 60, ["row", {**request, "replay_segments": replayed}])
    yield Job(
        "quickstart", "killed and resumed", 240,
        command=[python, "-m", __spec__.name, "--quickstart", device, str(out),
                 *(["--smoke"] if smoke else [])],
    )
    systems = ["RLT", "AT", "Linear Transformer", "Nystromformer", "Luna-256",
               f"{published.AMRB}, bfloat16", f"{published.AMRB}, bfloat16, compiled"]
    for system in systems[:2] if smoke else systems:
        request = {"system": system, "seq_len": lengths[-1], **row}
        yield Job("throughput", f"{system}, {lengths[-1]}", 120, ["row", request])
    for batch in (2,) if smoke else (32, 64, 128, 256):
        request = {"file": "listops", "device": device, **modes.get("graphs", {}), **small}
        yield Job("batch", str(batch), 120, ["task", {**request, "batch_size": batch}])
    for length in (64,) if smoke else [2**k for k in range(10, 21)]:
        request = {"system": published.AMRB, "seq_len": length, **row, "batch_size": 1}
        yield Job("scaling", str(length), 120, ["row", request])


class Rows:
    """OUT/rows.jsonl: a line per attempt, the last one of a job counts."""

    def __init__(self, out: Path) -> None:
        self.path = out / "rows.jsonl"
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with contextlib.suppress(ValueError):  # of the last line, which a kill cut short
                row = json.loads(line)
                self.rows[row["stage"], row["name"]] = row

    def is_done(self, job: Job) -> bool:
        return "answer" in self.rows.get((job.stage, job.name), {})

    def add(self, job: Job, reply: dict[str, Any], seconds: float) -> None:
        row = {"stage": job.stage, "name": job.name, "request": job.request,
               "seconds": round(seconds, 1), **reply}
        self.rows[job.stage, job.name] = row
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(row) + "\n")

    def of(self, stage: str) -> list[dict[str, Any]]:
        return [row for row in self.rows.values() if row["stage"] == stage]


def campaign(
    out: Path, device: str, stages: list[str] | None, minutes: float, *, smoke: bool
) -> int:
    """Do what is not done yet, as far as the time goes; return how many rows failed."""
    rows, measurer, failed = Rows(out), Measurer(), 0
    deadline = time.monotonic() + 60 * minutes
    try:
        for job in jobs(device, out, smoke=smoke):
            left = deadline - time.monotonic()
            if (stages and job.stage not in stages) or rows.is_done(job):
                continue
            if left <= 0:
                print("time is up; call again to go on")
                break
            started = time.monotonic()
            limit = min(job.limit, left)
            if job.request is not None:
                reply = measurer.ask(job.request, limit)
            else:
                measurer.close()  # its device's memory is the program's
                reply = run_command(job.command, limit)
            rows.add(job, reply, time.monotonic() - started)
            failed += "error" in reply
            print(f"{job.stage}: {job.name}: {reply.get('error', 'done')}", flush=True)
    finally:
        measurer.close()
        with atomic_write(out / "tables.md", "w") as handle:
            handle.write(tables(rows))
    return failed


def tables(rows: Rows) -> str:
    """What was measured, as Markdown; failures are named below."""

    def figure(row: dict[str, Any], key: str, text: Callable[[float], str]) -> str:
        value = row.get("answer", {}).get(key)
        return "" if value is None else text(value)

    def table(stage: str, first: str) -> str:
        return markdown(
            [first, "step, ms", "peak, MiB", "reserved, MiB", "kernels, eager", "compilation, s"],
            [[
                row["name"], figure(row, "step_seconds", lambda s: f"{1e3 * s:.3f}"),
                figure(row, "peak_mib", lambda x: f"{x:,.0f}"),
                figure(row, "reserved_mib", lambda x: f"{x:,.0f}"),
                figure(row, "kernels", lambda x: f"{x:,}"),
                figure(row, "compile_seconds", lambda s: f"{s:.0f}"),
            ] for row in rows.of(stage)],
        )

    parts = ["# Measured on a GPU\n\n" if any(
        (row["request"] or [0, {}])[1].get("device") == "cuda" for row in rows.rows.values()
    ) else "# Rehearsal on a CPU: these are no results\n\n"]
    for stage in ("machine", "tests", "quickstart"):
        for row in rows.of(stage):
            lines = row.get("answer", {}).get("output", [])
            parts.append(f"{row['name']}:\n\n```\n" + "\n".join(lines) + "\n```\n\n")
    for stage, title, first in (
        ("shapes", "A step of each task's configuration", "task, precision, form"),
        ("batch", "ListOps by the size of the batch", "batch"),
        ("replay", "Memory for time, by the segments that are replayed", "replayed"),
        ("throughput", "Further systems", "system, tokens"),
        ("scaling", "One sequence, ever longer", "tokens"),
    ):
        if rows.of(stage):
            parts.append(f"## {title}\n\n{table(stage, first)}\n\n")
    measured = [
        {**row["request"][1], **row["answer"],
         "num_segments": max(row["request"][1]["seq_len"] // row["request"][1]["segment_len"], 1)}
        for row in rows.of("memory") if "answer" in row
    ]
    if measured:
        lengths = {"listops": 2048, "text": 4096, "retrieval": 8192, "image": 1024}
        parts.append("## Peak memory beside the published figures\n\n" + ratio_table(
            measured, lengths, value="peak_mib", unit="MiB", figures=published.PEAK_GB,
            figures_unit="GB", reference=published.AMRB,
        ) + "\n\n")
    failures = [row for row in rows.rows.values() if "error" in row]
    if failures:
        parts.append("## Not measured\n\n")
        parts += [f"- {row['stage']}, {row['name']}: {row['error']}\n" for row in failures]
    return "".join(parts)


def describe_machine(device: str) -> None:
    """Print versions, the rate of copies and of matrix products."""
    import torch

    from utils import hardware, versions

    at = torch.device(device)
    print(hardware(at), json.dumps(versions()))

    def best(function: Callable[[], object]) -> float:
        seconds = []
        for _ in range(6):  # the first one prepares
            started = time.perf_counter()
            function()
            if at.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    n = 8192 if device == "cuda" else 512
    x = torch.zeros(n, n, device=at)
    y = torch.empty_like(x)
    print(f"copy {2 * x.numel() * 4 / best(lambda: y.copy_(x)) / 1e9:,.0f} GB/s")
    for dtype in (torch.float32, torch.bfloat16):
        a = x.to(dtype)
        rate = 2 * n**3 / best(lambda a=a: a @ a) / 1e12
        print(f"matrix products {dtype}: {rate:,.2f} TFLOP/s")


def killed_and_resumed(device: str, out: Path, *, smoke: bool) -> None:
    """Train the quickstart with automatic settings, kill it once, resume it; print its curve."""
    folder = out / "quickstart_run"
    keys = [f"output_dir={out}", "run_name=quickstart_run", f"device={device}"]
    if smoke:
        data = out / "data"
        subprocess.run(
            [sys.executable, str(ROOT / "generate_lra.py"), "listops", "--out", str(data),
             "--seed", "0", "--train", "8", "--val", "4", "--test", "4", "--workers", "1"],
            cwd=ROOT, check=True, stdout=subprocess.DEVNULL,
        )
        keys += [f"data_dir={data}", "max_steps=4", "warmup_steps=1", "eval_interval=2",
                 "log_interval=1", "checkpoint_interval=1", "batch_size=2", "dim=8", "ffn_dim=8",
                 "num_layers=1"]
    config = str(ROOT / "configs" / "quickstart.yaml")
    command = [sys.executable, str(ROOT / "run_train.py"), "--config", config, *keys, "--resume"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while first.poll() is None and not (folder / "best.pt").exists():
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    first.wait()
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    print(f"first call ended with {first.returncode}, --resume with {done.returncode}")
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "val_accuracy" in row:
            loss, accuracy = row["val_loss"], row["val_accuracy"]
            print(f"step {row['step']}: val_loss {loss:.4f}  val_acc {accuracy:.4f}")
    print((done.stdout.strip().splitlines() or [done.stderr.strip()])[-1])
    if done.returncode:
        sys.exit(1)
    shutil.rmtree(folder)
    shutil.rmtree(out / "data", ignore_errors=True)


def train_cells(out: Path, device: str, minutes: float, *, smoke: bool) -> int:
    """Go on with the cells of the accuracy table until the time is up."""
    archive, cells = out / "runs.tar", ROOT / "runs" / "reproduce"
    if archive.exists():
        with tarfile.open(archive) as tar:
            absent = [m for m in tar.getmembers() if not (ROOT / m.name).exists()]
            tar.extractall(ROOT, absent, filter="data")
    command = [
        sys.executable, str(ROOT / "reproduce.py"), "accuracy",
        "--budget", "smoke" if smoke else "full", "--device", device,
    ]
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        status = process.wait(timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        process.terminate()  # it hands the signal on, and the run saves and leaves
        status = process.wait(timeout=120)
    kept = [path for path in sorted(cells.rglob("*")) if path.name in
            ("last.pt", "best.pt", "metrics.jsonl", "config.yaml")]
    kept += [path for path in sorted((ROOT / "results" / "reproduce").rglob("*")) if path.is_file()]
    with atomic_write(archive) as handle, tarfile.open(fileobj=handle, mode="w") as tar:
        for path in kept:
            tar.add(path, path.relative_to(ROOT))
    if archive.stat().st_size > CHECKPOINT_LIMIT:
        print(f"{archive} exceeds {CHECKPOINT_LIMIT // 2**20} MiB; remove finished runs from "
              f"{cells}")
    return status


STAGES = ("machine", "tests", "shapes", "memory", "replay", "quickstart", "throughput", "batch",
          "scaling")


def main() -> int:
    if sys.argv[1:2] == ["--machine"]:
        describe_machine(sys.argv[2])
        return 0
    if sys.argv[1:2] == ["--quickstart"]:
        killed_and_resumed(sys.argv[2], Path(sys.argv[3]), smoke="--smoke" in sys.argv)
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the rows and tables")
    parser.add_argument("--stage", action="append", choices=[*STAGES, "train"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--smoke", action="store_true", help="small shapes, to rehearse it")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and subprocess.run(
        [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    ).returncode:
        print("gpu_campaign: torch sees no CUDA device; rehearse with --device cpu --smoke",
              file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    out = arguments.out.resolve()
    if "train" in (arguments.stage or ()):
        if len(arguments.stage) > 1:
            parser.error("--stage train stands alone; call it apart from the others")
        return train_cells(out, arguments.device, arguments.minutes, smoke=arguments.smoke)
    failed = campaign(
        out, arguments.device, arguments.stage, arguments.minutes, smoke=arguments.smoke
    )
    print(f"{out / 'tables.md'}; {failed} rows failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(run_program("gpu_campaign", main))
