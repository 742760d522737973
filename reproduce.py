"""The paper's accuracy tables next to ours, and a check of the committed weights.

    python reproduce.py accuracy --tasks listops     test accuracy of every system on every task
    python reproduce.py ablations --tasks listops    RMAAT with one thing changed
    python reproduce.py readouts --tasks listops     RMAAT with read-outs that need the memory
    python reproduce.py verify --set data_dir=DIR    evaluate the weights below results/

A cell of a table is a training run below `runs/reproduce/`. Its summary, configuration, metrics and
curves are kept in `results/reproduce/<table>/<budget>/<task>/<system>/seed<k>/`. A cell that exists
there is not trained again. An interrupted cell continues from its checkpoint. A failed cell is
reported and left empty. A cell is marked "(other code)" if a file of the model changed since its
commit, and "(unknown code)" if git does not know.

`benchmark.py` measures memory and throughput.
"""

from __future__ import annotations

import argparse
import functools
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lra_config import Config, load_config, read_mapping, single_values
from run.files import write_json
from run.program import Parser, UserError, end_by_exception, note, print_result, run_program
from tables import ABLATIONS, ACCURACY, SYSTEMS, TASKS, markdown, number

ROOT = Path(__file__).parent
RESULTS, RUNS = Path("results"), Path("runs")
MODEL_FILES = (
    "model.py", "recurrence.py", "readout.py", "attention", "astrocyte.py", "train.py",
    "training/gradients.py",
)
TOLERANCE = 0.1  # points of accuracy between a reported and a measured figure

# Over the task's file and the system's; the same number of steps for all systems.
BUDGETS: dict[str, dict[str, Any]] = {
    "full": {},
    # A complete schedule: about four minutes of RMAAT on ListOps on one CPU core.
    "short": {"max_steps": 300, "warmup_steps": 100, "eval_interval": 100},
    # Proves that everything runs, and nothing else.
    "smoke": {
        "max_steps": 3, "warmup_steps": 1, "eval_interval": 3, "batch_size": 8, "dim": 16,
        "num_layers": 1, "num_heads": 2, "ffn_dim": 16,
        "num_hidden": None, "basis_init": "landmarks",  # neighbors needs more features
    },
}
Variants = dict[str, tuple[str, dict[str, Any]]]  # name: description, overrides over rmaat.yaml


def ablations(task: str) -> Variants:
    """Return the variants of RMAAT with one thing changed.

    For texts, which the reader cuts to `max_seq_len`, the number of segments changes at equal
    segment length, as in the paper's experiment on Retrieval. ListOps expressions and images cannot
    be cut: there the full sequence is split into fewer or more segments.
    """
    base = load_config(ROOT / "configs" / f"{task}.yaml")
    rlt = read_mapping(ROOT / "configs" / "tables" / "rlt.yaml")
    rows: Variants = {
        "rmaat": ("RMAAT", {}),
        "no_retention": ("without the retention factor", {"astro_mem": False}),
        "bptt": ("BPTT instead of AMRB", {"memory_replay_backprop": False}),
        "no_h_astro": ("without H_astro", {"hebbian_astro": False}),
        "no_p": ("without P", {"presynaptic_normalize": False}),
        "rlt_amrb": ("RLT with AMRB", {**rlt, "memory_replay_backprop": True}),
    }
    for alpha in (0.15, 0.4, 1.0):
        rows[f"alpha_{alpha:g}"] = (f"alpha = {alpha:g}", {"presynaptic_alpha": alpha})
    for M in (0, 1, 4, 16):
        rows[f"memory_{M}"] = (f"{M} memory tokens", {"num_memory_tokens": M})
    for T in (2, 4, 8, 16):
        values = {"num_segments": T}
        if base.task.truncated:
            values["max_seq_len"] = T * base.segment_len
        S = values.get("max_seq_len", base.max_seq_len) // T
        if base.copies_neighbors and S != base.segment_len:
            values["num_hidden"] = S  # the neighbor initialization has a neuron for each token
        rows[f"segments_{T}"] = (f"{T} segments", values)
    return rows


def readouts(task: str) -> Variants:
    """Return the variants that read earlier segments only through the memory.

    They are compared with the mean over all tokens, which needs no memory.
    """
    rows: Variants = {"rmaat": ("mean over all tokens", {})}
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
    def folder(self) -> Path:
        """The cell's folder below `runs/` and below `results/`."""
        parts = (self.table, self.budget, self.task, self.system, f"seed{self.seed}")
        return Path("reproduce", *parts)

    @property
    def task_file(self) -> Path:
        """The configuration of the task."""
        return ROOT / "configs" / f"{self.task}.yaml"

    def overrides(self, machine: Sequence[str] = ()) -> list[str]:
        """Return `key=value` over the task's file; `machine` holds overrides such as `data_dir`."""
        system, changes = self.system, {}
        if self.table in VARIANTS:
            system, changes = "rmaat", VARIANTS[self.table](self.task)[self.system][1]
        base, run_dir = load_config(self.task_file), RUNS / self.folder
        values = {**read_mapping(ROOT / "configs" / "tables" / f"{system}.yaml"), **changes}
        if system != "rmaat" and base.position_embedding == "none":
            # The task's positions come from RMAAT's neighbor initialization; others lack it.
            values["position_embedding"] = "sinusoidal"
        if values.get("num_segments") == 1:  # of each sequence: paired documents may be two
            values["num_segments"] = base.num_sequences
        values |= {
            **BUDGETS[self.budget], **single_values(machine),
            "seed": self.seed, "output_dir": str(run_dir.parent), "run_name": run_dir.name,
        }
        return [
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in values.items()
        ]

    def command(self, machine: Sequence[str]) -> str:
        """Return the command that trains the cell, for the root of the repository."""
        file = self.task_file.relative_to(ROOT)
        arguments = ["run_train.py", "--config", str(file), *self.overrides(machine)]
        return shlex.join(["python", *arguments])

    def config(self, machine: Sequence[str] = ()) -> Config:
        """Return the validated configuration."""
        return load_config(self.task_file, self.overrides(machine))


def store(cell: Cell, machine: Sequence[str]) -> None:
    """Copy a finished run to the results; its summary comes last and marks it as complete."""
    run_dir, folder = RUNS / cell.folder, RESULTS / cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    for name in ("config.yaml", "metrics.jsonl", "curves.png"):
        if (run_dir / name).exists():
            shutil.copyfile(run_dir / name, folder / name)
    summary = json.loads((run_dir / "summary.json").read_text())
    write_json(folder / "summary.json", {**summary, "command": cell.command(machine)})


def run_cells(cells: Iterable[Cell], machine: Sequence[str], *, force: bool = False) -> int:
    """Train the cells that are not in the results, or all with `force`; return how many failed.

    Raises:
        UserError: a signal arrived; the run has saved a checkpoint.
    """
    from train import train
    from training.acceleration import reported_out_of_memory

    failed = 0
    for cell in cells:
        if is_finished(cell) and not force:
            continue
        print_result(f"training {cell.folder}")
        run_dir = RUNS / cell.folder
        if force and (run_dir / "summary.json").exists():
            shutil.rmtree(run_dir)  # an unfinished run is continued
        try:
            with reported_out_of_memory():
                train(cell.config(machine), resume=True)
            store(cell, machine)
        except (UserError, OSError) as error:
            status = getattr(error, "exit_status", 2)
            if status > 128:
                raise UserError(
                    "interrupted, checkpoint saved; the same command goes on from here",
                    exit_status=status,
                ) from None
            failed += 1
            print(f"failed {cell.folder}: {error}", file=sys.stderr, flush=True)
    return failed


def is_finished(cell: Cell) -> bool:
    """Return whether the results hold the cell."""
    return (RESULTS / cell.folder / "summary.json").exists()


@functools.cache
def code_mark(commit: str) -> str:
    """Return how a result of `commit` is marked: "", " (other code)" or " (unknown code)".

    Other code means that a file of the model has changed since that commit.
    """
    question = ["git", "diff", "--quiet", commit, "--", *MODEL_FILES]
    try:
        status = subprocess.run(question, cwd=ROOT, capture_output=True).returncode
    except OSError:  # no git
        status = 128
    return {0: "", 1: " (other code)"}.get(status, " (unknown code)")


def collect(cells: Iterable[Cell]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return the summaries that the results hold of the cells, by (task, system)."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        summaries = found.setdefault((cell.task, cell.system), [])
        if is_finished(cell):
            summaries.append(json.loads((RESULTS / cell.folder / "summary.json").read_text()))
    return found


def mean_accuracy(summaries: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean test accuracy in %; None without runs."""
    return 100 * statistics.mean(s["test_accuracy"] for s in summaries) if summaries else None


def accuracy_text(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return mean and standard deviation of the test accuracy in %, and the mark of other code."""
    values = [100 * summary["test_accuracy"] for summary in summaries]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    marks = {code_mark(s.get("versions", {}).get("commit", "unknown")) for s in summaries}
    return number(mean_accuracy(summaries)) + spread + max(marks, default="")


def table_of(
    found: Mapping[tuple[str, str], Sequence[Mapping[str, Any]]],
    labels: Mapping[str, str], published: Mapping[str, Mapping[str, float | None]],
) -> str:
    """Return accuracy per task and row next to the paper's, and the change from RMAAT."""
    rows = []
    for (task, name), summaries in found.items():
        drawn = {summary["seed"] for summary in summaries}
        same = [x for x in found.get((task, "rmaat"), ()) if x["seed"] in drawn]
        ours, base = mean_accuracy(summaries), mean_accuracy(same)
        change = None if None in (ours, base) else ours - base
        steps = sorted({summary["steps"] for summary in summaries})
        rows.append([
            TASKS[task], labels[name], accuracy_text(summaries),
            number(published.get(name, {}).get(task)), number(change, "+.1f"),
            f"{len(summaries) or ''}", ", ".join(f"{n:,}" for n in steps),
        ])
    header = ["task", "system", "ours, %", "paper, %", "ours - our RMAAT", "seeds", "steps"]
    return markdown(header, rows)


def verify(overrides: Sequence[str]) -> int:
    """Evaluate the weights below `results/` and compare with the summaries; return mismatches.

    Weights without data in `data_dir` are reported as skipped. Nothing is generated.
    """
    from data.reader import DataError
    from predict import evaluate_splits, load_trained

    rows, mismatches = [], 0
    for path in sorted(RESULTS.rglob("model.safetensors")):
        summary = json.loads(path.with_name("summary.json").read_text())
        name = str(path.parent.relative_to(RESULTS))
        reported, examples = 100 * summary["test_accuracy"], summary["examples"]["test"]
        note(f"{name}: {examples:,} test examples")  # some take minutes
        try:
            model = load_trained(path, None, single_values(overrides))
            layout, root = model.config.task.layout, model.config.data_dir
            if layout is not None and not layout.is_present(layout.find(root)):
                raise DataError(f"no {model.config.dataset} in {root}")
            result = evaluate_splits(model, ["test"])
        except DataError as error:
            rows.append([name, f"{reported:.2f}", "", f"skipped: {error}"])
            continue
        measured, count = 100 * result["test_accuracy"], result["test_examples"]
        ok = abs(measured - reported) <= TOLERANCE and count == examples
        mismatches += not ok
        counts = "" if count == examples else f", {count:,} examples instead of {examples:,}"
        rows.append([name, f"{reported:.2f}", f"{measured:.2f}", ("yes" if ok else "NO") + counts])
    print_result(markdown(["weights", "reported, %", "measured, %", "ok"], rows))
    return mismatches


def seeds(text: str) -> list[int]:
    """Read numbers with commas between them."""
    return [int(part) for part in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        prog="reproduce.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="table", required=True)
    for table in ("accuracy", *VARIANTS):
        names = list(VARIANTS[table]("listops") if table in VARIANTS else SYSTEMS)
        command = commands.add_parser(table)
        command.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
        command.add_argument("--systems", nargs="+", choices=names, default=names)
        command.add_argument("--budget", choices=BUDGETS, default="full")
        command.add_argument("--seeds", type=seeds, default=[0], help="as in 0,1,2; default: 0")
        command.add_argument("--dry_run", action="store_true", help="print the commands only")
        command.add_argument("--tables_only", action="store_true", help="train nothing")
        command.add_argument("--force", action="store_true", help="train finished cells again")
    commands.add_parser("verify")
    for command in commands.choices.values():
        command.add_argument(
            "--set", nargs="+", default=[], dest="machine", metavar="KEY=VALUE",
            help="over every configuration, as in data_dir=DIR device=cpu",
        )
    return parser.parse_args()


def reproduce(arguments: argparse.Namespace) -> int:
    """Train the missing cells and print the table, or verify; return how many failed."""
    if arguments.table == "verify":
        return verify(arguments.machine)
    cells = [
        Cell(arguments.table, arguments.budget, task, system, seed)
        for task in arguments.tasks for system in arguments.systems for seed in arguments.seeds
    ]
    if arguments.dry_run:
        for cell in cells:
            if not is_finished(cell):
                print_result(cell.command(arguments.machine))
        return 0
    failed = 0
    if not arguments.tables_only:
        failed = run_cells(cells, arguments.machine, force=arguments.force)
    labels, published = SYSTEMS, ACCURACY
    if arguments.table in VARIANTS:
        variants = VARIANTS[arguments.table](arguments.tasks[0])
        labels, published = {name: label for name, (label, _) in variants.items()}, ABLATIONS
    command = shlex.join(["python", "reproduce.py", *sys.argv[1:]])
    print_result(f"\n{table_of(collect(cells), labels, published)}\n\n{command}")
    return failed


def main() -> int:
    """Run the command line; return its exit status."""
    end_by_exception()
    return run_program("reproduce.py", lambda: int(reproduce(parse_arguments()) > 0))


if __name__ == "__main__":
    sys.exit(main())
