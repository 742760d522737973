"""What statistics alone score: a signal is found, noise is not, and the command prints a table."""

from pathlib import Path

import numpy as np
import pytest
from conftest import assert_refused, called

from data.packing import SPLITS
from experiments import shallow

SIZES = {"train": 400, "val": 200, "test": 200}


def _labels(rng: np.random.Generator, classes: int) -> shallow.Arrays:
    return {k: rng.integers(classes, size=n) for k, n in SIZES.items()}


def test_logistic_regression_finds_a_linear_signal_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(0)
    labels = _labels(rng, 3)
    noise = {k: rng.standard_normal((n, 5)) for k, n in SIZES.items()}
    signal = {k: noise[k] + 3.0 * np.eye(5)[labels[k]] for k in SPLITS}
    assert shallow.logistic_regression("signal", signal, labels).test > 90
    assert shallow.logistic_regression("noise", noise, labels).test < 45


def test_histograms_know_no_order() -> None:
    row = np.array([7, 7, 7, 200], dtype=np.uint8)
    forwards, backwards = shallow.histograms([row, row[::-1]])
    assert np.array_equal(forwards, backwards)
    assert np.square(forwards)[[7, 200]] == pytest.approx([0.75, 0.25])


def test_the_command_prints_a_table(listops_dir: Path, tmp_path: Path) -> None:
    arguments = ("listops", "--data_dir", listops_dir)
    result = called(shallow.main, *arguments, cwd=tmp_path, check=True)
    header, _, row = result.stdout.strip().splitlines()
    assert header.startswith("| task | read |")
    assert row.startswith("| listops | the root operator |")


def test_an_unknown_task_is_told_in_one_line(tmp_path: Path) -> None:
    assert_refused(called(shallow.main, "chess", cwd=tmp_path), "chess", "listops")
