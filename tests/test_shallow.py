"""Statistics without order: they find a signal, find none in noise, and cover every task."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_refused, called

from data.packing import SPLITS, PackedSplit
from experiments import shallow

SIZES = {"train": 400, "val": 200, "test": 200}


def test_logistic_regression_finds_a_linear_signal_and_nothing_in_noise() -> None:
    rng = np.random.default_rng(0)
    labels = {k: torch.from_numpy(rng.integers(3, size=n)) for k, n in SIZES.items()}
    noise = {k: rng.standard_normal((n, 5)) for k, n in SIZES.items()}
    signal = {k: noise[k] + 3.0 * np.eye(5)[labels[k]] for k in SPLITS}
    assert shallow.accuracies(signal, labels)[1] > 90
    assert shallow.accuracies(noise, labels)[1] < 45


def test_histograms_ignore_order() -> None:
    row = np.array([7, 7, 7, 200], dtype=np.uint8)
    forwards, backwards = shallow.histograms([row, row[::-1]])
    assert np.array_equal(forwards, backwards)
    assert np.square(forwards)[[7, 200]] == pytest.approx([0.75, 0.25])


@pytest.mark.parametrize("statistics", [
    shallow.first_tokens, shallow.gray_levels, shallow.byte_counts, shallow.comparisons
])
def test_statistics_have_a_row_per_example(statistics) -> None:
    rng = np.random.default_rng(0)
    splits = {
        k: PackedSplit(
            tokens=rng.integers(97, 123, size=2 * n * 8).astype(np.uint8),
            starts=8 * np.arange(2 * n).reshape(n, 2), lengths=np.full((n, 2), 8),
            labels=np.zeros(n, int), offset=1,
        )
        for k, n in (("train", 5), ("val", 3), ("test", 4))
    }
    for name, features in statistics(splits):
        assert name and [len(features[k]) for k in ("train", "val", "test")] == [5, 3, 4]
        assert len({x.shape[1] for x in features.values()}) == 1


def test_the_command_prints_a_table(listops_dir: Path, tmp_path: Path) -> None:
    arguments = ("listops", "--set", f"data_dir={listops_dir}")
    result = called(shallow.main, *arguments, cwd=tmp_path, check=True)
    header, _, row = result.stdout.strip().splitlines()
    assert header.startswith("| task | statistics |")
    assert row.startswith("| listops | the root operator |")


def test_an_unknown_task_is_one_line(tmp_path: Path) -> None:
    assert_refused(called(shallow.main, "chess", cwd=tmp_path), "chess")
