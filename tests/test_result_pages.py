"""Pages of `results/`: the figures in their tables equal those of the linked runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import ROOT

from sweep import load_runs
from tables import ABLATIONS, ACCURACY, SYSTEMS, TASKS

PAGES = sorted((ROOT / "results").rglob("*.md"))
LINK = re.compile(r"\[[^]]*\]\(([^)#]+)\)")
ROUNDING = 0.0501  # a figure has one decimal; the pages round 18.55 to 18.6 and 17.85 to 17.8
# The columns that are checked: the key of `summary.json` and the factor from it to the page's unit.
COLUMNS = {
    "parameters": ("parameters", 1),
    "steps": ("steps", 1),
    "process peak, seed 0, MiB": ("peak_memory_mib", 1),
    "validation, %": ("best_val_accuracy", 100),
    "validation, seed 0, %": ("best_val_accuracy", 100),
    "test, %": ("test_accuracy", 100),
    "test, seed 0, %": ("test_accuracy", 100),
    "test, three seeds, %": ("test_accuracy", 100),
}


def tables(page: Path) -> list[list[dict[str, str]]]:
    """Return the tables of a page, as rows that map column headers to cells."""
    blocks = re.findall(r"(?:^\|.*\n)+", page.read_text(), flags=re.M)
    found = []
    for block in blocks:
        lines = [line.split("|")[1:-1] for line in block.splitlines()]
        heads, _, *rows = [[cell.strip() for cell in cells] for cells in lines]
        found.append([dict(zip(heads, row, strict=True)) for row in rows])
    return found


def linked_runs(page: Path, cell: str) -> list[dict]:
    """Return the summaries of the runs in the folders that a cell links to, by seed."""
    folders = [page.parent / path for path in LINK.findall(cell)]
    found = [json.loads(path.read_text()) for x in folders for path in x.rglob("summary.json")]
    return sorted(found, key=lambda run: run["seed"])


def assert_states(cell: str, values: list[float], where: str) -> None:
    """Assert that a cell holds the mean, mean ± standard deviation, or one figure per seed."""
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", cell)  # 1,308 is one figure
    figures = [float(x) for x in re.findall(r"\d+(?:\.\d+)?", plain)]
    if "±" in cell:
        expected = [mean(values), stdev(values)]
    else:
        expected = values if len(figures) > 1 else [mean(values)]
    tolerance = ROUNDING if "." in cell else 0.501
    assert figures == pytest.approx(expected, abs=tolerance), where


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_state_what_the_runs_measured(page):
    for table in tables(page):
        for row in table:
            runs = linked_runs(page, next(iter(row.values())))
            for column in COLUMNS.keys() & row.keys() if runs else ():
                cell = row[column]
                if not cell or re.search(r"[a-z]", cell):
                    continue  # empty, or a text
                key, factor = COLUMNS[column]
                chosen = [run for run in runs if "seed 0" not in column or run["seed"] == 0]
                if key in ("parameters", "steps"):
                    assert {int(cell.replace(",", ""))} == {run[key] for run in runs}, row
                else:
                    assert_states(cell, [factor * run[key] for run in chosen], f"{column}: {row}")
            if runs and "seeds" in row and row["seeds"].isdecimal():
                assert int(row["seeds"]) == len(runs), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_linked_figures_are_test_accuracies(page):
    for table in tables(page):
        for row in table:
            for cell in [*row.values()][1:]:
                if figure := re.fullmatch(r"\[([\d.]+)\]\(([^)]+)\)", cell):
                    runs = linked_runs(page, cell)
                    assert_states(figure[1], [100 * run["test_accuracy"] for run in runs], str(row))


@pytest.mark.parametrize("task", TASKS)
def test_published_figures_are_those_of_the_paper(task):
    """Those of the Linear Transformer are marked as figures of the Long Range Arena release."""
    keys = {name: key for key, name in SYSTEMS.items()}
    for table in tables(ROOT / "results" / task / "README.md"):
        for row in table:
            system = re.match(r"\[([^],]+)", next(iter(row.values())))
            cell = row.get("published, %") or row.get("published on AAN, %")
            if not system or not cell:
                continue
            name = system[1]
            assert ("(LRA)" in cell) == (name == "Linear Transformer"), row
            if name.isdecimal():
                expected = ABLATIONS[f"segments_{name}"][task]
            else:
                expected = ACCURACY[keys.get(name, "rmaat")][task]
            assert float(cell.removesuffix(" (LRA)")) == expected, row


def test_tables_are_narrow_and_mark_means_of_several_seeds():
    """A mean of several seeds has its standard deviation next to it."""
    for page in PAGES:
        for row in (row for table in tables(page) for row in table):
            runs = linked_runs(page, next(iter(row.values())))
            cell = row.get("test, %", "")
            assert len(row) <= 7, (page, row)
            if len(runs) > 1 and cell:
                assert "±" in cell or len(cell.split(",")) == len(runs), (page, row)


def test_scores_of_statistics_are_those_that_were_measured():
    scores = json.loads((ROOT / "results/statistics.json").read_text())["scores"]
    measured = [f"{x[f'{split}_percent']:.1f}" for x in scores for split in ("validation", "test")]
    stated = next(table for table in tables(ROOT / "results/README.md") if "input" in table[0])
    assert [row[x] for row in stated for x in ("validation, %", "test, %")] == measured


def test_commands_name_valid_configurations():
    commands = [
        line.split("#")[0].split()[2:]
        for page in PAGES
        for line in page.read_text().splitlines()
        if line.startswith("python run_train.py --config")
    ]
    assert len(commands) > 10
    for _, path, *arguments in commands:
        load_runs(ROOT / path, [each for each in arguments if not each.startswith("--")])
