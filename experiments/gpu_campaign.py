"""All checks and measurements for a GPU, as a list of commands with time limits.

    python -m experiments.gpu_campaign results/gpu                  # all jobs, half an hour
    python -m experiments.gpu_campaign results/gpu --only memory    # some of them
    python -m experiments.gpu_campaign OUT --device cpu --smoke     # a small rehearsal on a CPU

The jobs run in order and write below OUT: JSON files, run folders, and a log each. OUT/jobs.json
records each job as soon as it ends. A further call skips the jobs that succeeded and repeats the
others. Trainings continue from their checkpoints.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from run.files import write_json
from run.program import Parser, UserError, print_result, run_program
from utils import versions

PROGRAM = "experiments.gpu_campaign"
ROOT = Path(__file__).parent.parent
FORMS = {  # of a training step
    "eager": "compile=false cuda_graphs=false",
    "graphs": "compile=false cuda_graphs=true",
    "compiled": "compile=true cuda_graphs=false",
    "compiled_graphs": "compile=true cuda_graphs=true",
}
MODEL_OF_A_REHEARSAL = "dim=8 ffn_dim=8 num_layers=1 batch_size=2 warmup_steps=1 eval_interval=2"


class Job(NamedTuple):
    """One command, run from OUT."""

    name: str
    limit: float  # seconds
    command: list[str]  # arguments of Python


def jobs(device: str, *, smoke: bool) -> Iterator[Job]:
    """Yield the jobs, the most informative first."""
    def script(name: str, text: str) -> list[str]:
        return [str(ROOT / name), *shlex.split(text)]

    collect = " --collect-only" if smoke else ""
    tests = f"pytest -q -m gpu {ROOT / 'tests/test_gpu.py'}{collect}"
    yield Job("tests", 300, ["-m", *tests.split()])
    small = " --seq_lens 1024 --repeats 1" if smoke else ""
    replayed = "1 0" if smoke else "15 12 8 4 0 --seq_lens 8192"
    for name, limit, table in (
        ("memory", 300, "memory"),
        ("throughput", 300, "throughput"),
        ("replay", 120, f"memory --systems 'RMAAT, AMRB' --replayed {replayed}"),
        ("scaling", 300, "scaling"),
    ):
        options = f"{table} --device {device} --json {name}_{device}.json{small}"
        yield Job(name, limit, script("benchmark.py", options))

    splits = " --train 8 --val 4 --test 4 --workers 1" if smoke else ""
    generate = f"listops --out datasets --seed 0{splits}"
    yield Job("data", 300, script("generate_lra.py", generate))
    keys = f"output_dir=runs device={device}" + (f" {MODEL_OF_A_REHEARSAL}" if smoke else "")
    train = f"--config {ROOT / 'configs/quickstart.yaml'} --resume {keys}"
    cut, steps = ("stop_after_steps=2", "max_steps=4") if smoke else ("stop_after_steps=160", "")
    yield Job("quickstart_cut", 240, script("run_train.py", f"{train} {steps} {cut}"))
    yield Job("quickstart", 240, script("run_train.py", f"{train} {steps}"))
    steps = steps or "max_steps=100 warmup_steps=20 eval_interval=100"
    for precision in ("float32", "bfloat16"):
        for form, choices in FORMS.items() if device == "cuda" else (("eager", FORMS["eager"]),):
            name = f"{form}_{precision}"
            text = f"{train} {steps} run_name={name} precision={precision} {choices}"
            yield Job(name, 180, script("run_train.py", text))
    budget = "smoke" if smoke else "full"
    accuracy = f"accuracy --tasks listops --systems rmaat rmt --budget {budget}"
    machine = f"--set device={device} data_dir=datasets"
    yield Job("accuracy", 3600, script("reproduce.py", f"{accuracy} {machine}"))


def run_job(job: Job, out: Path, limit: float) -> str:
    """Run a job from `out` with its output in a log.

    Returns:
        "done", or why it was not.
    """
    with open(out / f"{job.name}.log", "w") as log:
        try:
            status = subprocess.run(
                [sys.executable, *job.command], cwd=out, stdout=log, stderr=subprocess.STDOUT,
                timeout=limit,
            ).returncode
        except subprocess.TimeoutExpired:
            return f"not done in {limit:.0f} s"
    return "done" if status == 0 else f"exit status {status}"


def campaign(out: Path, todo: list[Job], minutes: float) -> int:
    """Run the jobs that did not succeed yet, within the time; return how many failed."""
    record_file, failed = out / "jobs.json", 0
    records: dict[str, dict[str, Any]] = {}
    if record_file.exists():
        records = json.loads(record_file.read_text())
    deadline = time.monotonic() + 60 * minutes
    for job in todo:
        left = deadline - time.monotonic()
        if records.get(job.name, {}).get("result") == "done":
            continue
        if left <= 0:
            print_result("the time is up; the same command goes on from here")
            break
        started = time.monotonic()
        result = run_job(job, out, min(job.limit, left))
        failed += result != "done"
        records[job.name] = {
            "result": result, "seconds": round(time.monotonic() - started, 1),
            "command": job.command, "versions": versions(),
        }
        write_json(record_file, records)
        print_result(f"{job.name}: {result}, see {job.name}.log")
    return failed


def command() -> int:
    """Run the campaign that the command line asks for; return 1 if a job failed."""
    parser = Parser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--only", nargs="+", metavar="JOB", help="jobs to run; default: all")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--smoke", action="store_true", help="small shapes, to rehearse it")
    arguments = parser.parse_args()
    todo = list(jobs(arguments.device, smoke=arguments.smoke))
    names = arguments.only or [job.name for job in todo]
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device; rehearse with --device cpu --smoke")
    arguments.out.mkdir(parents=True, exist_ok=True)
    todo = [job for job in todo if job.name in names]
    return int(campaign(arguments.out.resolve(), todo, arguments.minutes) > 0)


def main() -> int:
    """Run the command line; return its exit status."""
    return run_program(PROGRAM, command)


if __name__ == "__main__":
    sys.exit(main())
