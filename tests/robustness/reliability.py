"""What was tried against the repository and what held, written into `results/reliability`.

    python tests/robustness/reliability.py                       everything: hours on one core
    python tests/robustness/reliability.py --parts kills --kills 100

The parts: `cases`, the tables of hostile input; `search`, damaged input, seed after seed; `kills`
and `signals`, at random moments of runs that are resumed. A part, or a seed, that is not run keeps
the figures it has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "results" / "reliability"
FIGURES = FOLDER / "reliability.json"
PARTS = ("cases", "search", "kills", "signals")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


class Listener:
    """Hands over what becomes of each test, as soon as it is known: its name, whether it held."""

    def __init__(self, tell: Callable[[str, bool], object]) -> None:
        self.tell = tell

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.failed:
            self.tell(report.nodeid, report.passed)


def run_tests(tell: Callable[[str, bool], object], *arguments: str) -> None:
    """Run pytest over this folder."""
    pytest.main([str(HERE), "-q", *arguments], plugins=[Listener(tell)])


def try_cases() -> None:
    """Tried and held cases of every file."""
    result: dict[str, bool] = {}
    run_tests(result.__setitem__)
    figures: dict[str, dict[str, int]] = {}
    for name, held in sorted(result.items()):
        row = figures.setdefault(Path(name.partition("::")[0]).stem, {"tried": 0, "held": 0})
        row["tried"] += 1
        row["held"] += held
    record("cases", figures)


def search(seed: int) -> None:
    """Every search's inputs, but those that have held at this commit already.

    One that finds something holds none. Each is recorded at once: hours can be cut short.
    """
    part = f"search with seed {seed}"
    before = figures_so_far().get(part)
    same = before is not None and before["commit"] == commit()
    held = {name: row for name, row in before["result"].items() if row["held"]} if same else {}
    result = dict(held)

    def tell(name: str, passed: bool) -> None:
        inputs = int(re.search(r"\d{4,}", name)[0])
        result[name] = {"tried": inputs, "held": inputs * passed}
        record(part, result)

    run_tests(
        tell, "-m", "fuzz", f"--hypothesis-seed={seed}", *(f"--deselect={name}" for name in held)
    )


def run_campaign(kind: str, count: int) -> dict:
    import torch
    from campaigns import kill_campaign, term_campaign

    torch.set_num_threads(1)
    campaign = {"kills": kill_campaign, "signals": term_campaign}[kind]
    with tempfile.TemporaryDirectory() as folder:
        return campaign(Path(folder), count)


def record(part: str, result: dict) -> None:
    """Put a part's figures beside those of the others, and write the page anew."""
    from run.files import write_json

    machine = f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores"
    FOLDER.mkdir(parents=True, exist_ok=True)
    figures = {
        **figures_so_far(), part: {"commit": commit(), "machine": machine, "result": result}
    }
    write_json(FIGURES, figures)
    (FOLDER / "README.md").write_text(page(figures))


def figures_so_far() -> dict:
    return json.loads(FIGURES.read_text()) if FIGURES.exists() else {}


def commit() -> str:
    """The commit that is tried, and its changes where there are some."""
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

    changes = git("diff", "HEAD", "--", ".", ":!results")
    digest = hashlib.sha256(changes.encode()).hexdigest()[:8]
    return git("rev-parse", "--short", "HEAD").strip() + f", changed ({digest})" * bool(changes)


def page(figures: dict) -> str:
    """The figures as a page in Markdown."""
    lines = [
        "# Reliability", "",
        "What was tried, and what held as [docs/reliability.md](../../docs/reliability.md)",
        "promises. Written by `python tests/robustness/reliability.py`.", "",
    ]
    for kind, title in (
        ("cases", "Cases of hostile input, faults and environments"),
        ("search", "Search by damaged input"),
    ):
        parts = sorted(part for part in figures if part.startswith(kind))
        tried, held = Counter(), Counter()
        for part in parts:
            for name, row in figures[part]["result"].items():
                tried[_plain(name)] += row["tried"]
                held[_plain(name)] += row["held"]
        if parts:
            lines += [f"## {title}", ""]
            lines += [f"{part.capitalize()}, at {_origin(figures[part])}\n" for part in parts]
            lines += ["| | tried | held |", "|---|---:|---:|"]
            lines += [f"| {name} | {tried[name]:,} | {held[name]:,} |" for name in sorted(tried)]
            lines += [f"| together | {tried.total():,} | {held.total():,} |", ""]
    for part, name in (("kills", "SIGKILL"), ("signals", "SIGTERM")):
        if part in figures:
            result = figures[part]["result"]
            lines += [f"## {name} at random moments", "", f"At {_origin(figures[part])}", ""]
            lines += ["| moment | struck |", "|---|---:|"]
            lines += [f"| {moment} | {count} |" for moment, count in result["moments"].items()]
            lines += ["", f"{result['tried']} tried, {result['held']} held."]
            if "longest_seconds" in result:
                lines += [f"The longest took {result['longest_seconds']} s to its end."]
            lines += [""]
    return "\n".join(lines)


def _plain(name: str) -> str:
    """A test's name in words: `test_file.py::test_a_case[20000-of]` is `file: a case of`."""
    file, _, case = Path(name).name.partition("::")
    words = re.sub(r"\d{4,}|\W|_", " ", case.removeprefix("test_")).split()
    return Path(file).stem.removeprefix("test_") + f": {' '.join(words)}" * bool(words)


def _origin(part: dict) -> str:
    return f"commit {part['commit']}, {part['machine']}."


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signals", type=int, default=20)
    options = parser.parse_args()
    for part in options.parts:
        if part == "cases":
            try_cases()
        elif part == "search":
            for seed in options.seeds:
                search(seed)
        else:
            record(part, run_campaign(part, getattr(options, part)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
