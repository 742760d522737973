"""The documents: what they point to exists, and the README's figures are those of `results/`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import ROOT

from tables import ACCURACY, SYSTEMS

README = ROOT / "README.md"
PAGES = sorted(
    page for pattern in ("*.md", "docs/*.md", "results/**/README.md")
    for page in ROOT.glob(pattern)
)


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def section(page: Path, heading: str) -> str:
    found = re.search(rf"^#+ {heading}$(.*?)(?=^#|\Z)", page.read_text(), flags=re.M | re.S)
    assert found, f"{page.name} has no section {heading}"
    return found[1]


def test_the_readme_is_read_in_five_minutes():
    assert len(README.read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{link} points to no file"
        assert not anchor or anchor in anchors(target), f"{link} points to no heading"


def test_every_document_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[^)#]+)", README.read_text()))
    assert linked == {str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md")}


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1]
    assert f'version = "{newest}"' in (ROOT / "pyproject.toml").read_text()


def test_the_rooms_exist():
    rooms = re.findall(r"`([\w/]+(?:\.\w+|/))`", section(README, "Rooms"))
    assert len(rooms) > 20
    assert [room for room in rooms if not (ROOT / room).exists()] == []


def test_every_module_and_package_has_a_line():
    rooms = section(README, "Rooms")
    modules = [path.name for path in ROOT.glob("*.py")]
    packages = [f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")]
    assert [name for name in modules + packages if f"`{name}`" not in rooms] == []


def summaries(folder: str) -> list[dict]:
    """Of the run in `results/...`, or of one in a folder per seed."""
    return [json.loads(path.read_text()) for path in (ROOT / folder).rglob("summary.json")]


def assert_measured(figure: str, runs: list[dict]) -> None:
    """`figure`: mean, and ± standard deviation where there are several seeds, in %."""
    accuracies = [100 * run["test_accuracy"] for run in runs]
    expected = [mean(accuracies), *([stdev(accuracies)] if len(runs) > 1 else [])]
    assert [float(part) for part in figure.split("±")] == pytest.approx(expected, abs=0.0501)


def test_the_longest_runs_are_those_of_results():
    """A system for which the paper has no figure has no gap either."""
    rows = re.findall(
        r"^\| [\w ]+ \| \[[^]]+\]\(([^)]+)\) \|([^|]+)\|([^|]+)\|([^|]+)\|([^|]+)\|([^|]+)\|$",
        section(README, "Results"), flags=re.M,
    )
    assert rows
    for folder, paper, ours, gap, seeds, steps in rows:
        runs = summaries(folder)
        assert_measured(ours, runs)
        assert bool(paper.strip()) == bool(gap.strip()), folder
        if paper.strip():
            measured = 100 * mean(run["test_accuracy"] for run in runs)
            assert float(gap) == pytest.approx(measured - float(paper), abs=0.0501), folder
        assert (int(seeds), {int(steps.replace(",", ""))}) == (
            len(runs), {run["steps"] for run in runs}
        ), folder


def test_the_systems_at_equal_steps_are_those_of_results():
    """Each task's figures lie in `equal/`; one with a star ran fewer steps than its column."""
    head, _, *rows = re.findall(r"^\|(.*)\|$", section(README, "Results").split("**Every")[1], re.M)
    columns = [int(re.sub(r"\D", "", cell)) for cell in head.split("|")[1:]]
    assert len(rows) == len(SYSTEMS) + 1  # RMT twice, once trained by AMRB
    for row in rows:
        for steps, cell in zip(columns, row.split("|")[1:], strict=True):
            if not cell.strip():
                continue  # not run
            figure, folder, star, paper = re.fullmatch(
                r" \[(.+)\]\((.+)\)(\\\*)?(?: / (.+))? ", cell
            ).groups()
            _, task, equal, system = folder.split("/")
            runs = summaries(folder)
            assert equal == "equal"
            assert_measured(figure, runs)
            for run in runs:
                assert run["steps"] < steps if star else run["steps"] == steps, folder
            if paper:
                assert float(paper) == ACCURACY[system][task], folder
