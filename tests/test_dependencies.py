"""Imported packages are pinned, pinned packages are locked, and the two locks agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

from conftest import ROOT

import utils

PACKAGE_OF = {"PIL": "pillow", "yaml": "pyyaml"}  # where the two names differ
PIN = re.compile(r"([\w.-]+)==([^\s;\\]+)")


def pins(name: str) -> set[tuple[str, str]]:
    """Return the packages and versions of a requirements file."""
    found = set()
    for line in (ROOT / name).read_text().splitlines():
        if match := PIN.match(line):
            package, version = match.groups()
            found.add((re.sub(r"[-_.]+", "-", package).lower(), version))
    return found


def imported() -> set[str]:
    """Return the top-level names of all imported third-party modules."""
    names = set()
    sources = [
        path for folder in (".", *(p.parent.name for p in ROOT.glob("*/__init__.py")), "examples")
        for path in (ROOT / folder).glob("*.py")
    ]
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    ours = {path.stem for path in sources} | {path.parent.name for path in sources}
    return names - ours - set(sys.stdlib_module_names)


def test_every_import_is_pinned():
    direct = {name for name, _ in pins("requirements.txt")}
    assert {PACKAGE_OF.get(name, name).replace("_", "-") for name in imported()} <= direct


def test_requirements_are_among_the_constraints():
    assert pins("requirements.txt") <= pins("constraints.txt")


def test_the_lock_holds_the_constraints_each_with_a_hash():
    assert pins("requirements.lock") == pins("constraints.txt")
    entries = re.split(r"\n(?=\w)", (ROOT / "requirements.lock").read_text())
    unhashed = [entry for entry in entries if PIN.match(entry) and "--hash=sha256:" not in entry]
    assert unhashed == []


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert f'version = "{newest[1]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_recorded_commit_is_that_of_this_repository_or_none(tmp_path, monkeypatch):
    """A copy of the code inside another repository records none."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "other"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "copy/utils.py"))
    assert utils.versions()["commit"] == "unknown"
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    assert utils.versions()["commit"] != "unknown"
