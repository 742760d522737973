"""Documents: links resolve, commands parse, and accuracies equal those in `results/`."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
import re
import shlex
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import ROOT

from lra_config import make_config, parse_overrides, read_mapping

README = ROOT / "README.md"
PAGES = sorted(p for kind in ("*.md", "docs/*.md", "results/**/*.md") for p in ROOT.glob(kind))
# Pages of results keep the commands of earlier versions.
CURRENT = [page for page in PAGES if "results" not in page.parts]
LINK = re.compile(r"\[([^]]*)\]\(([^)\s]+)\)")
FIGURE = re.compile(r"(\d+\.\d+)(?: ± (\d+\.\d+))?")
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def code_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_code(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def commands() -> list[tuple[str, list[str]]]:
    """Return this repository's commands in the documents' code blocks, with arguments."""
    found = []
    for block in (block for page in CURRENT for block in code_blocks(page, "bash")):
        for line in re.split(r"\n|&&|\||;", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            programs = [w for w in words if w.endswith(".py") or w.startswith("experiments.")]
            if programs:
                found.append((programs[0], words[words.index(programs[0]) + 1 :]))
    return found


def test_the_readme_is_read_in_five_minutes():
    prose = re.sub(r"\]\([^)]*\)|<[^>]*>", "", without_code(README))
    assert len(re.findall(r"[A-Za-z][\w'-]*", prose)) <= 1_000


@by_page
def test_links_lead_somewhere(page):
    for _, link in LINK.findall(without_code(page)):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{link} points to no file"
            assert not anchor or anchor in anchors(target), f"{link} points to no heading"


def test_every_document_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[^)#]+\.md)", README.read_text()))
    assert linked == {str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md")}


def test_the_layout_names_every_module_and_package():
    page = (ROOT / "docs/extending.md").read_text()
    layout = page.split("## Layout of the code")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w/]+(?:\.\w+|/))`", layout))
    packages = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    assert {path.name for path in ROOT.glob("*.py")} | packages <= named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_commands_name_programs_and_their_flags():
    for program, arguments in commands():
        if program.startswith("experiments."):
            program = f"{program.replace('.', '/')}.py"
        source = (ROOT / program).read_text()
        given = {word.partition("=")[0] for word in arguments if word.startswith("--")}
        assert given <= set(re.findall(r"--\w+", source)) | {"--help"}, program
        command = re.match(r"\w+$", arguments[0]) if arguments else None
        assert not command or f'"{command[0]}"' in source, (program, command)


def test_commands_that_train_have_valid_keys():
    for program, arguments in commands():
        if program == "run_train.py" and "--config" in arguments:
            path = ROOT / arguments[arguments.index("--config") + 1]
            parsed = parse_overrides([word for word in arguments if re.match(r"\w+=", word)])
            for values in itertools.product(*parsed.values()):
                make_config({**read_mapping(path), **dict(zip(parsed, values, strict=True))})


def test_imports_in_the_documents_exist():
    blocks = [block for page in CURRENT for block in code_blocks(page, "python")]
    for node in (node for block in blocks for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def table_rows(page: Path) -> list[dict[str, str]]:
    """Return the rows of all tables of a page, keyed by column header."""
    rows, head = [], None
    for line in without_code(page).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not line.startswith("|") or head is None:
            head = cells if line.startswith("|") else None
        elif not set("".join(cells)) <= set("-: "):
            rows.append(dict(zip(head, cells, strict=True)))
    return rows


def linked_runs(page: Path, cell: str) -> tuple[str, list[dict]]:
    """Return the text of a cell's link, and the summaries of the linked run or its seeds."""
    text, target = (LINK.findall(cell) or [("", "nowhere")])[0]
    folder = page.parent / target
    files = [*folder.glob("summary.json"), *folder.glob("seed*/summary.json")]
    return text, [json.loads(path.read_text()) for path in files]


@by_page
def test_accuracies_are_those_of_the_linked_runs(page):
    """Linked figures, and those of the column `ours`, are mean ± standard deviation."""
    for row in table_rows(page):
        links = [linked_runs(page, cell) for cell in row.values()]
        figures = [(text, runs) for text, runs in links if runs and FIGURE.match(text)]
        runs = next((runs for text, runs in links if runs and not FIGURE.match(text)), [])
        for column, cell in row.items() if runs else ():
            if column.startswith("ours") and FIGURE.match(cell):
                figures.append((cell, runs))
            if column in ("seeds", "steps"):
                measured = {len(runs)} if column == "seeds" else {run["steps"] for run in runs}
                assert {int(cell.replace(",", ""))} == measured, row
        for figure, runs in figures:
            accuracies = [100 * run["test_accuracy"] for run in runs]
            expected = [mean(accuracies), *([stdev(accuracies)] if len(runs) > 1 else [])]
            found = [float(x) for x in FIGURE.match(figure).groups() if x]
            assert found == pytest.approx(expected, abs=0.0501), row
