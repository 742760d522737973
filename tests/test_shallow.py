"""What statistics alone score: a signal is found, noise is not, and the command prints a table."""

from pathlib import Path

import numpy as np
import pytest
from conftest import assert_refused, called

from data.packing import SPLITS
from data.pathfinder_scenes import draw_targets, markers_fit
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


def test_marker_features_are_the_tips_of_one_contour_or_of_two() -> None:
    rng = np.random.default_rng(0)
    targets = draw_targets(rng, 512, 14)
    targets = targets[markers_fit(targets)]
    labels = rng.integers(2, size=len(targets))
    features = shallow.marker_features(rng, targets, labels)
    places = features[..., 0] + 1j * features[..., 1]
    inner = places + features[..., 2] + 1j * features[..., 3]
    contours = targets.reshape(len(targets), 2, -1)  # paddle by paddle, tail and head
    tips, seconds = contours[:, :, [0, -1]], contours[:, :, [1, -2]]
    for scene, label in enumerate(labels):
        found = [np.argwhere(np.isclose(tips[scene], place))[0] for place in places[scene]]
        assert (found[0][0] == found[1][0]) == bool(label)
        for (contour, end), point in zip(found, inner[scene], strict=True):
            assert np.isclose(seconds[scene, contour, end], point)


def test_marker_network_relates_what_a_sum_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shallow, "MARKER_EPOCHS", 20)
    rng = np.random.default_rng(0)
    markers = {k: rng.choice([-1.0, 1.0], size=(n, 2, 4)) for k, n in SIZES.items()}
    labels = {k: (x[:, 0, 0] * x[:, 1, 0] > 0).astype(int) for k, x in markers.items()}
    assert shallow.marker_network("related", markers, labels, 32).test > 90


def test_the_distance_of_the_markers_tells_short_contours_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shallow, "SCENES", {"train": 2000, "val": 500, "test": 1000})
    distance = next(shallow.two_markers(6))
    assert "6" in distance.features
    assert distance.test > 60


def test_the_command_prints_a_table(listops_dir: Path, tmp_path: Path) -> None:
    arguments = ("listops", "--data_dir", listops_dir)
    result = called(shallow.main, *arguments, cwd=tmp_path, check=True)
    header, _, row = result.stdout.strip().splitlines()
    assert header.startswith("| task | read |")
    assert row.startswith("| listops | the root operator |")


def test_an_unknown_task_is_told_in_one_line(tmp_path: Path) -> None:
    assert_refused(called(shallow.main, "chess", cwd=tmp_path), "chess", "listops")
