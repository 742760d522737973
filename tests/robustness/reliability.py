"""What was tried against the repository and what held, written into `results/reliability`.

    python tests/robustness/reliability.py                       everything: hours on one core
    python tests/robustness/reliability.py --parts kills --kills 100

The parts: `cases`, the tables of hostile input; `search`, damaged input, seed after seed; `kills`
and `signals`, at random moments of runs that are resumed. A part, or a seed, that is not run keeps
the figures it has.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "results" / "reliability"
PARTS = ("cases", "search", "kills", "signals")
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


def tests(*arguments: str) -> list[tuple[str, str, bool]]:
    """Run pytest over this folder; file, name and whether it passed, of each test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        subprocess.run(
            [sys.executable, "-m", "pytest", str(HERE), "-q", f"--junitxml={report}", *arguments],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
        )
        cases = ElementTree.parse(report).getroot().iter("testcase")
        return [
            (case.get("classname").rpartition(".")[2].removeprefix("test_"), case.get("name"),
             case.find("failure") is None and case.find("error") is None)
            for case in cases
        ]


def try_cases() -> dict[str, dict[str, int]]:
    """Tried and held cases of every file."""
    tried, held = Counter(), Counter()
    for file, _, passed in tests():
        tried[file] += 1
        held[file] += passed
    return {file: {"tried": tried[file], "held": held[file]} for file in sorted(tried)}


def search_inputs(seed: int) -> dict[str, dict[str, int]]:
    """Tried and held inputs of every search; one that finds something holds none."""
    result = {}
    for file, name, passed in tests("-m", "fuzz", f"--hypothesis-seed={seed}"):
        inputs = int(re.search(r"\d{4,}", name)[0])
        search = re.sub(r"[\[-]?\d{4,}|[\[\]]", " ", name.removeprefix("test_"))
        key = f"{file}: {' '.join(search.replace('_', ' ').split())}"
        result[key] = {"tried": inputs, "held": inputs * passed}
    return dict(sorted(result.items()))


def run_campaign(kind: str, count: int) -> dict:
    import torch
    from campaigns import kill_campaign, term_campaign

    torch.set_num_threads(1)
    campaign = {"kills": kill_campaign, "signals": term_campaign}[kind]
    with tempfile.TemporaryDirectory() as folder:
        return campaign(Path(folder), count)


def record(part: str, result: dict) -> None:
    """Put a part's figures beside those of the others, and write the page anew."""
    commit = _git("rev-parse", "--short", "HEAD")
    if _git("status", "--porcelain", "--", ".", ":!results"):
        commit += ", changed"
    machine = f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores"
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / "reliability.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    figures[part] = {"commit": commit, "machine": machine, "result": result}
    path.write_text(json.dumps(figures, indent=2) + "\n")
    (FOLDER / "README.md").write_text(page(figures))


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


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
                tried[name] += row["tried"]
                held[name] += row["held"]
        if parts:
            lines += [f"## {title}", ""]
            lines += [f"- {part}: {_origin(figures[part])}" for part in parts]
            lines += ["", "| | tried | held |", "|---|---:|---:|"]
            lines += [f"| {name} | {tried[name]:,} | {held[name]:,} |" for name in tried]
            lines += [f"| together | {tried.total():,} | {held.total():,} |", ""]
    for part, name in (("kills", "SIGKILL"), ("signals", "SIGTERM")):
        if part in figures:
            result = figures[part]["result"]
            lines += [f"## {name} at random moments", "", _origin(figures[part]), ""]
            lines += ["| moment | struck |", "|---|---:|"]
            lines += [f"| {moment} | {count} |" for moment, count in result["moments"].items()]
            lines += ["", f"{result['tried']} tried, {result['held']} held."]
            if "longest_seconds" in result:
                lines += [f"The longest took {result['longest_seconds']} s to its end."]
            lines += [""]
    return "\n".join(lines)


def _origin(part: dict) -> str:
    return f"Commit {part['commit']}, {part['machine']}."


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
            record(part, try_cases())
        elif part == "search":
            for seed in options.seeds:
                record(f"search with seed {seed}", search_inputs(seed))
        else:
            record(part, run_campaign(part, getattr(options, part)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
