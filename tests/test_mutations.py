"""The list of mutations and the tool that applies them; a command runs all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PAPER = Path(__file__).parent / "paper"


@pytest.fixture
def mutations(monkeypatch):
    monkeypatch.syspath_prepend(str(PAPER))
    import mutations

    return mutations


def mutation(mutations, old: str, new: str):
    return mutations.Mutation(
        "trial", "attention/equations.py", old, new, "a trial", "test_attention_equations.py"
    )


def test_every_mutation_still_finds_its_line():
    checked = subprocess.run(
        [sys.executable, str(PAPER / "mutations.py"), "--check"], capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert int(checked.stdout.split()[0]) >= 40


@pytest.mark.parametrize("old", ["no such line", "Tensor"])
def test_a_mutation_whose_line_is_gone_or_ambiguous_is_refused(mutations, monkeypatch, capsys, old):
    monkeypatch.setattr(mutations, "MUTATIONS", [mutation(mutations, old, "other")])
    assert mutations.main(["--check"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("trial: its old text occurs") and message.count("\n") == 1


def test_an_unknown_name_is_refused(mutations, capsys):
    assert mutations.main(["--only", "absent"]) == 2
    assert capsys.readouterr().err == "absent: no mutation has this name\n"


@pytest.mark.slow
def test_a_mutation_of_an_equation_is_found_and_a_neutral_one_survives(
    mutations, monkeypatch, capsys
):
    old = "torch.where(x >= 0, x + 1,"
    for new, status in ((old.replace("x + 1", "1 + x"), 1), (old.replace("x + 1", "x + 2"), 0)):
        monkeypatch.setattr(mutations, "MUTATIONS", [mutation(mutations, old, new)])
        assert mutations.main([]) == status
        assert f"1 mutations, {status} survivors" in capsys.readouterr().out
