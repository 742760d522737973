"""Make one-line changes to the mathematics and check that a test of this folder fails for each.

    python tests/paper/mutations.py                   # all changes of mutation_list.py
    python tests/paper/mutations.py --only NAME ...   # these
    python tests/paper/mutations.py --jobs 2          # so many at a time
    python tests/paper/mutations.py --check           # only that each old text occurs once

Every change is made in a copy of the tree of its own, and `pytest -x` runs there: the file of tests
that should notice it, then, if it does not, all others. Exit status 0: every change was noticed; 1:
some survived, or broke the program where it should have changed its result; 2: the list or the
command is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mutation_list import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
TESTS = Path("tests", "paper")
TIMEOUT = 900  # seconds: a change that makes a loop endless is noticed as well
NOTICED, SURVIVED = 1, 0  # exit statuses of pytest: a test failed, none did

# Every copy is tested by a fresh process that has the libraries loaded, and nothing of the project.
PROCESSES = multiprocessing.get_context("forkserver")
LIBRARIES = ["pytest", "torch", "scipy.integrate", "pydantic", "huggingface_hub", "PIL.Image"]


class Outcome(NamedTuple):
    status: int  # of pytest
    seconds: float
    first: str  # what failed first, or the last line of the output


def find_mistakes(mutations: Sequence[Mutation]) -> list[str]:
    """Return the mistakes in the list, one line each: missing or ambiguous text, repeated names."""
    mistakes = []
    names = [mutation.name for mutation in mutations]
    mistakes += [f"{name}: two mutations have this name" for name in sorted(set(names))
                 if names.count(name) > 1]
    for mutation in mutations:
        path = ROOT / mutation.file
        count = path.read_text(encoding="utf-8").count(mutation.old) if path.exists() else 0
        if count != 1:
            mistakes.append(
                f"{mutation.name}: its old text occurs {count} times in {mutation.file}, not once; "
                "bring mutation_list.py up to date"
            )
        if mutation.old == mutation.new:
            mistakes.append(f"{mutation.name}: changes nothing")
        if not (ROOT / TESTS / mutation.test).exists():
            mistakes.append(f"{mutation.name}: {TESTS / mutation.test} does not exist")
    return mistakes


def copy_tree(target: Path) -> None:
    """Copy the files that the tests of the paper need: modules, packages, configurations, tests."""
    for path in ROOT.iterdir():
        if path.is_dir():
            if path.name == "configs" or (path / "__init__.py").exists():
                shutil.copytree(
                    path, target / path.name, ignore=shutil.ignore_patterns("__pycache__")
                )
        elif path.suffix in (".py", ".toml", ".bib"):
            shutil.copy(path, target)
    shutil.copytree(
        ROOT / TESTS, target / TESTS, ignore=shutil.ignore_patterns("__pycache__")
    )


def run_pytest(folder: str, files: Sequence[str]) -> None:
    """Test the copy in `folder` in a process of its own, which exits with the status of pytest."""
    import pytest

    os.chdir(folder)
    sys.dont_write_bytecode = True
    sys.path[:] = [entry for entry in sys.path if Path(entry) != ROOT / TESTS]
    with (
        open("output", "w", encoding="utf-8") as output,
        contextlib.redirect_stdout(output), contextlib.redirect_stderr(output),
    ):
        status = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *files])
    sys.exit(int(status))


def run_tests(mutation: Mutation | None) -> Outcome:
    """Run the tests in a copy that `mutation` was made to; None leaves it unchanged."""
    start = time.monotonic()
    stages = [sorted(str(path.relative_to(ROOT)) for path in (ROOT / TESTS).glob("test_*.py"))]
    if mutation is not None:
        first = str(TESTS / mutation.test)
        stages = [[first], [file for file in stages[0] if file != first]]
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        copy_tree(Path(folder))
        if mutation is not None:
            path = Path(folder, mutation.file)
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        for files in stages:
            process = PROCESSES.Process(target=run_pytest, args=(folder, files))
            process.start()
            process.join(TIMEOUT)
            if process.exitcode is None:
                process.kill()
                process.join()
                return Outcome(NOTICED, time.monotonic() - start, "no end")
            if process.exitcode != SURVIVED:
                break
        output = Path(folder, "output").read_text(encoding="utf-8", errors="replace")
    failed = re.search(r"^(?:FAILED|ERROR) tests/paper/(\S+)", output, re.MULTILINE)
    last = (output.strip() or "no output").splitlines()[-1]
    return Outcome(process.exitcode, time.monotonic() - start, failed[1] if failed else last)


def report(mutation: Mutation, outcome: Outcome) -> str:
    """Print one line, and a second one if the mutation needs a closer look."""
    verdict = {NOTICED: "noticed", SURVIVED: "SURVIVED"}.get(outcome.status, "BROKEN")
    line = f"{verdict:9}{outcome.seconds:5.1f} s  {mutation.name}: "
    if verdict == "noticed":
        return line + outcome.first.partition("[")[0]
    return (
        f"{line}{mutation.breaks}; {outcome.first}\n"
        f"    {mutation.file}: {mutation.old!r} -> {mutation.new!r}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutations")
    parser.add_argument("--jobs", type=int, default=1, help="copies tested at a time")
    parser.add_argument("--check", action="store_true", help="only check the list")
    options = parser.parse_args(arguments)

    mistakes = find_mistakes(MUTATIONS)
    unknown = set(options.only or ()) - {mutation.name for mutation in MUTATIONS}
    mistakes += [f"{name}: no mutation has this name" for name in sorted(unknown)]
    if mistakes:
        print("\n".join(mistakes), file=sys.stderr)
        return 2
    if options.check:
        print(f"{len(MUTATIONS)} mutations, each old text occurs once")
        return 0

    chosen = [m for m in MUTATIONS if options.only is None or m.name in options.only]
    start = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    PROCESSES.set_forkserver_preload(LIBRARIES)
    unchanged = run_tests(None)
    if unchanged.status != SURVIVED:
        print(f"the tests fail without a mutation: {unchanged.first}", file=sys.stderr)
        return 2
    unnoticed = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutation, outcome in zip(chosen, pool.map(run_tests, chosen), strict=True):
            print(report(mutation, outcome), flush=True)
            unnoticed += outcome.status != NOTICED
    minutes = (time.monotonic() - start) / 60
    print(f"{len(chosen)} mutations, {unnoticed} survivors, {minutes:.1f} minutes")
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main())
