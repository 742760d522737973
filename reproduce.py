"""The published tables, ours beside theirs: `python reproduce.py accuracy --tasks listops`.

    accuracy     test accuracy of every system on every task
    ablations    RMAAT with one thing changed
    readouts     RMAAT with read-outs that need the memory
    memory       peak memory of a training step, measured by benchmark.py
    throughput   training tokens per second, measured by benchmark.py

A cell of the first three is a run of `run_train.py` below `runs/reproduce/`; its summary, resolved
configuration, metrics and curves are kept in
`results/reproduce/<table>/<budget>/<task>/<system>/seed<k>/`. What any folder below `results/`
already holds is not run again, whatever its name: a run is recognised by its configuration. A run
that was interrupted goes on from its checkpoint. A failed cell is reported and left empty.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tables as published
from experiments.tables import Measured, ablation_table, accuracy_table, ratio_table
from lra_config import Config, ConfigError, UserError, dump_config, load_config, read_mapping
from run.files import atomic_write, write_json
from run.program import Parser, caught_signals, run_program

ROOT = Path(__file__).parent
RESULTS, RUNS = Path("results"), Path("runs")
TRAINED, MEASURED = ("accuracy", "ablations", "readouts"), ("memory", "throughput")

# Over the task's file and the system's; the same number of steps for all systems.
BUDGETS: dict[str, dict[str, Any]] = {
    "full": {},
    # A whole schedule of its own: about four minutes of RMAAT on ListOps on one CPU core.
    "short": {"max_steps": 300, "warmup_steps": 100, "eval_interval": 100},
    # Proves the path and no more.
    "smoke": {
        "max_steps": 3, "warmup_steps": 1, "eval_interval": 3, "batch_size": 8, "dim": 16,
        "num_layers": 1, "num_heads": 2, "ffn_dim": 16,
        "num_hidden": None, "basis_init": "landmarks",  # a local start needs more features
    },
}
REPEATS = {"full": 3, "short": 1, "smoke": 1}  # of each measurement


def ablations(task: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """RMAAT with one thing changed: name to (what it is, overrides over `rmaat.yaml`).

    The number of segments changes at equal segment length where documents are texts, which the
    reader cuts to `max_seq_len` (the paper's experiment on Retrieval). ListOps expressions and
    images cannot be cut: there the whole sequence is split into fewer or more segments.
    """
    base = load_config(ROOT / "configs" / f"{task}.yaml")
    rows = {
        "rmaat": ("RMAAT", {}),
        "no_retention": ("without the retention factor", {"astro_mem": False}),
        "bptt": ("BPTT in the place of AMRB", {"memory_replay_backprop": False}),
        "no_h_astro": ("without H_astro", {"hebbian_astro": False}),
        "no_p": ("without P", {"presynaptic_normalize": False}),
        "rlt_amrb": ("RLT with AMRB", {
            **read_mapping(ROOT / "configs" / "tables" / "rlt.yaml"), "memory_replay_backprop": True
        }),
    }
    for alpha in (0.15, 0.25, 0.4, 1.0):
        rows[f"alpha_{alpha:g}"] = (f"alpha = {alpha:g}", {"presynaptic_alpha": alpha})
    for M in (0, 1, 4, 16):
        rows[f"memory_{M}"] = (f"{M} memory tokens", {"num_memory_tokens": M})
    for T in (2, 4, 8, 16):
        values = {"num_segments": T}
        if base.task.truncated:
            values["max_seq_len"] = T * base.segment_len
        S = values.get("max_seq_len", base.max_seq_len) // T
        if base.copies_neighbors and S != base.segment_len:
            values["num_hidden"] = S  # the local start has a neuron for each token
        rows[f"segments_{T}"] = (f"{T} segments of {S}", values)
    return rows


def readouts(task: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """RMAAT with read-outs that hold what earlier segments said only if the memory carried it.

    As `ablations`; the mean over all tokens, which needs no memory, is the row they compare with.
    """
    rows = {"rmaat": ("mean over all tokens", {})}
    for pooling, what in {"last": "the last segment", "memory": "the memory tokens"}.items():
        for M in (0, 1, 4, 16):
            values = {"pooling": pooling, "num_memory_tokens": M}
            name, label = f"{pooling}_{M}", f"{what}, {M} memory tokens"
            if M or pooling == "last":
                rows[name] = (label, values)
            if M:
                rows[f"{name}_no_retention"] = (
                    f"{label}, without the retention factor", {**values, "astro_mem": False}
                )
    return rows


VARIANTS = {"ablations": ablations, "readouts": readouts}


@dataclass(frozen=True)
class Cell:
    """One training run of a table."""

    table: str
    budget: str
    task: str
    system: str  # or the variant of RMAAT
    seed: int

    @property
    def place(self) -> Path:
        folder = Path("reproduce", self.table, self.budget, self.task, self.system)
        return folder / f"seed{self.seed}"

    @property
    def task_file(self) -> Path:
        return ROOT / "configs" / f"{self.task}.yaml"

    def overrides(self, machine: Mapping[str, str]) -> list[str]:
        """`key=value` over the task's file; `machine` holds `data_dir` and `device`, if given."""
        system, changes = self.system, {}
        if self.table in VARIANTS:
            system, changes = "rmaat", VARIANTS[self.table](self.task)[self.system][1]
        run_dir = RUNS / self.place
        values = {
            **read_mapping(ROOT / "configs" / "tables" / f"{system}.yaml"),
            **changes, **BUDGETS[self.budget], **machine,
            "seed": self.seed, "output_dir": str(run_dir.parent), "run_name": run_dir.name,
        }
        if values.get("num_segments") == 1:  # of each sequence: a pair's documents may be two
            values["num_segments"] = load_config(self.task_file).num_sequences
        return [
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in values.items()
        ]

    def command(self, machine: Mapping[str, str]) -> list[str]:
        """Arguments for Python, with paths relative to the current folder."""
        return [
            os.path.relpath(ROOT / "run_train.py"), "--config", os.path.relpath(self.task_file),
            *self.overrides(machine),
        ]

    def config(self) -> Config:
        return load_config(self.task_file, self.overrides({}))


def outcome_key(config: Config) -> str:
    """What decides a run's outcome; equal for runs that are repetitions of each other."""
    values = config.model_dump(include=set(Config.keys("outcome")))
    return json.dumps({**values, "last_step": config.last_step}, sort_keys=True)


def finished_runs() -> dict[str, Path]:
    """The folders of all finished runs below `results/`, by `outcome_key`."""
    runs = {}
    for summary in sorted(RESULTS.rglob("summary.json")):
        try:
            config = load_config(summary.with_name("config.yaml"))
        except ConfigError:
            continue  # of a version with other keys: it cannot be compared
        runs.setdefault(outcome_key(config), summary.parent)
    return runs


def run_logged(arguments: Sequence[str], log: Path) -> str | None:
    """Run Python with its output in `log`, handing signals on so that the child can save and end.

    Returns:
        None, or in one line why it failed.
    Raises:
        UserError: a signal arrived.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as handle:
        # In a session of its own: a terminal's signal would reach it besides the one handed on, and
        # a second one ends it without a checkpoint.
        child = subprocess.Popen(
            [sys.executable, *arguments], stdout=handle, stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with caught_signals(child.send_signal) as received:
            status = child.wait()
    if received:
        name = signal.Signals(received[0]).name
        raise UserError(
            f"{name}; the same command goes on from here", exit_status=128 + received[0]
        )
    if status == 0:
        return None
    lines = log.read_text(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"exit status {status}, {last} (log: {log})"


def train_cell(cell: Cell, machine: Mapping[str, str]) -> str | None:
    """Train a cell, going on from its checkpoint if it has one, and keep what it leaves.

    Returns:
        None, or in one line why it failed.
    """
    run_dir = RUNS / cell.place
    command = cell.command(machine)
    error = run_logged([*command, "--resume"], run_dir.with_suffix(".log"))
    if error is None:
        store(cell, run_dir, command)
    return error


def store(cell: Cell, run_dir: Path, command: Sequence[str]) -> None:
    """Copy a finished run to the results; its summary comes last and says that it is whole."""
    folder = RESULTS / cell.place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    for name in ("metrics.jsonl", "curves.png"):
        shutil.copyfile(run_dir / name, folder / name)
    # A resumed run keeps the file of its start, which may have meant to end earlier.
    with atomic_write(folder / "config.yaml", "w") as handle:
        handle.write(dump_config(load_config(run_dir / "config.yaml", ["stop_after_steps=null"])))
    summary = json.loads((run_dir / "summary.json").read_text())
    # As a user would type it: the run itself may have been resumed.
    write_json(
        folder / "summary.json", {**summary, "command": shlex.join(["python", *command])}
    )


def run_cells(cells: Iterable[Cell], machine: Mapping[str, str], *, dry_run: bool) -> int:
    """Train the cells that are not in the results; return how many failed."""
    done, failed = finished_runs(), 0
    for cell in cells:
        try:
            key = outcome_key(cell.config())
            if key in done:
                continue
            done[key] = RESULTS / cell.place  # tried once, whether or not it succeeds
            if dry_run:
                print(shlex.join(["python", *cell.command(machine)]))
                continue
            print(f"training {cell.place}", flush=True)
            error = train_cell(cell, machine)
        except (ConfigError, OSError) as mistake:
            error = str(mistake)
        if error is not None:
            failed += 1
            print(f"failed {cell.place}: {error}", file=sys.stderr, flush=True)
    return failed


def benchmark_file(table: str, budget: str, device: str) -> Path:
    folder = Path("benchmark") if budget == "full" else Path("reproduce", table, budget)
    return RESULTS / folder / f"{table}_{device}.json"


def run_benchmark(
    table: str, budget: str, device: str, systems: Sequence[str], *, dry_run: bool
) -> int:
    """Measure a table that is not whole in the results; return 1 if that failed.

    Raises:
        ConfigError: systems are named, and the results hold a table already.
    """
    path = benchmark_file(table, budget, device)
    command = [
        os.path.relpath(ROOT / "benchmark.py"), table, "--device", device, "--json", str(path),
        "--repeats", str(REPEATS[budget]), *(["--systems", *systems] if systems else []),
        *(["--seq_lens", "1024"] if budget == "smoke" else []),
    ]
    if path.exists():
        if systems:
            raise ConfigError(f"--systems {systems[0]}: {path} is there; remove it to measure anew")
        if not any("error" in row for row in measured_rows(path)):
            return 0
    if dry_run:
        print(shlex.join(["python", *command]))
        return 0
    print(f"measuring {path}", flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    error = run_logged(command, RUNS / path.relative_to(RESULTS).with_suffix(".log"))
    if error is not None:
        print(f"failed {path}: {error}", file=sys.stderr, flush=True)
    return int(error is not None)


def measured_rows(path: Path) -> list[dict[str, Any]]:
    """What `benchmark.py` wrote; nothing where it did not."""
    content = json.loads(path.read_text()) if path.exists() else []
    return content["rows"] if isinstance(content, dict) else content


def collect(cells: Iterable[Cell]) -> dict[tuple[str, str], Measured]:
    """What the results hold of the cells, by (task, system)."""
    done = finished_runs()
    found: dict[tuple[str, str], Measured] = {}
    for cell in cells:
        measured = found.setdefault((cell.task, cell.system), Measured([]))
        try:
            folder = done.get(outcome_key(cell.config()))
        except ConfigError:
            continue  # reported when it was to be trained
        if folder is not None:
            measured.summaries.append(json.loads((folder / "summary.json").read_text()))
    return found


def measured_table(table: str, budget: str, device: str, tasks: Iterable[str]) -> str:
    """The table of `memory` or `throughput` from what the results hold."""
    rows = measured_rows(benchmark_file(table, budget, device))
    lengths = {t: load_config(ROOT / "configs" / f"{t}.yaml").max_seq_len for t in tasks}
    if table == "memory":
        return ratio_table(
            rows, lengths, value="peak_mib", unit="MiB", figures=published.PEAK_GB,
            figures_unit="GB", reference=published.AMRB,
        )
    return ratio_table(
        rows, lengths, value="tokens_per_second", unit="tokens/s", figures=published.THROUGHPUT,
        figures_unit=None, reference=published.SYSTEMS["rmt"],
    )


CAPTIONS = {
    "accuracy": "Test accuracy. The paper publishes neither model sizes nor numbers of steps.",
    "ablations": "Test accuracy of RMAAT with one thing changed.",
    "readouts": "Test accuracy of RMAAT by what the head reads.",
    "memory": "Peak memory of a training step. Only ratios compare: the paper's model size, batch "
              "and device are not ours.",
    "throughput": "Training speed. Only ratios compare.",
}


def chosen(option: str, wanted: Sequence[str] | None, allowed: Iterable[str]) -> list[str]:
    """The values of a list option, given apart or with commas; all of them if none is given.

    Raises:
        ConfigError: a value that is not allowed.
    """
    allowed = list(allowed)
    names = [name for item in wanted or allowed for name in item.split(",") if name]
    if not names:
        raise ConfigError(f"{option} names nothing: choose from {', '.join(allowed)}")
    for name in names:
        if name not in allowed:
            raise ConfigError(f"{option} {name}: choose from {', '.join(allowed)}")
    return names


def parse_seeds(text: str) -> list[int]:
    if not all(part.isascii() and part.isdigit() for part in text.split(",")):
        raise ConfigError(f"--seeds {text}: give numbers with commas between them, as in 0,1,2")
    return [int(part) for part in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="reproduce.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", choices=[*TRAINED, *MEASURED])
    parser.add_argument("--tasks", nargs="+", help=f"default: {' '.join(published.TASKS)}")
    parser.add_argument(
        "--systems", nargs="+", help="files of configs/tables/; of ablations and readouts the "
        "variants; of memory and throughput the systems of benchmark.py; default: all",
    )
    parser.add_argument("--budget", choices=list(BUDGETS), default="full")
    parser.add_argument("--seeds", default="0", help="as in 0,1,2; default: 0")
    parser.add_argument("--device", choices=["cpu", "cuda"],
                        help="default: what is there for training, cpu for measuring")
    parser.add_argument("--data_dir", help="default: that of the configurations")
    parser.add_argument("--dry_run", action="store_true", help="print the commands, run nothing")
    parser.add_argument("--tables_only", action="store_true", help="print what is there")
    return parser.parse_args()


def reproduce(arguments: argparse.Namespace) -> int:
    """Fill the cells and print the table; return how many failed."""
    table, budget = arguments.table, arguments.budget
    tasks = chosen("--tasks", arguments.tasks, published.TASKS)
    failed = 0
    if table in MEASURED:
        device = arguments.device or "cpu"
        systems = arguments.systems or []
        if not arguments.tables_only:
            failed = run_benchmark(table, budget, device, systems, dry_run=arguments.dry_run)
        text = measured_table(table, budget, device, tasks)
    else:
        names = VARIANTS[table](tasks[0]) if table in VARIANTS else published.SYSTEMS
        systems = chosen("--systems", arguments.systems, names)
        seeds = parse_seeds(arguments.seeds)
        cells = [
            Cell(table, budget, task, system, seed)
            for task in tasks for system in systems for seed in seeds
        ]
        machine = {key: value for key in ("data_dir", "device")
                   if (value := getattr(arguments, key)) is not None}
        if not arguments.tables_only:
            failed = run_cells(cells, machine, dry_run=arguments.dry_run)
        found = collect(cells)
        if table in VARIANTS:
            labels = {
                (t, name): label for t in tasks for name, (label, _) in VARIANTS[table](t).items()
            }
            text = ablation_table(found, labels)
        else:
            text = accuracy_table(found)
    if not arguments.dry_run:
        options = [word for word in sys.argv[1:] if word != "--tables_only"]
        command = shlex.join(["python", "reproduce.py", *options])
        print(f"\n{CAPTIONS[table]}\n\n{text}\n\n{command}")
    return failed


def main() -> int:
    return run_program("reproduce.py", lambda: int(reproduce(parse_arguments()) > 0))


if __name__ == "__main__":
    sys.exit(main())
