"""The markers of Pathfinder: cut out at their positions, and classified by networks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import called

from data.packing import SPLITS
from data.pathfinder_scenes import DIFFICULTIES, SIZE, draw_scenes, place_markers, rasterize
from experiments import markers

SIZES = {"train": 400, "val": 200, "test": 200}


@pytest.fixture
def few_scenes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markers, "EPOCHS", 1)
    monkeypatch.setattr(markers, "SCENES", {"train": 1000, "val": 200, "test": 500})


def test_headings_lead_from_the_tips_of_one_contour_or_of_two() -> None:
    rng = np.random.default_rng(0)
    targets = draw_scenes(rng, 50, DIFFICULTIES["hard"]).targets
    labels = rng.integers(2, size=len(targets))
    places = place_markers(rng, targets, labels)
    inner = places + markers.find_headings(targets, places)
    contours = targets.reshape(len(targets), 2, -1)  # paddle by paddle, tail and head
    tips, seconds = contours[:, :, [0, -1]], contours[:, :, [1, -2]]
    for scene, label in enumerate(labels):
        found = [np.argwhere(np.isclose(tips[scene], place))[0] for place in places[scene]]
        assert (found[0][0] == found[1][0]) == bool(label)
        for (contour, end), point in zip(found, inner[scene], strict=True):
            assert np.isclose(seconds[scene, contour, end], point)


def test_a_window_shows_its_marker_in_the_middle_and_black_beyond_the_edge() -> None:
    paddles = np.zeros((1, 0, 2), dtype=complex)
    places = np.array([[2.5 + 9.5j, 20.5 + 30.5j]])
    windows = markers.cut_windows(rasterize(paddles, places), places).reshape(2, 9, 9)
    assert np.array_equal(np.argwhere(windows[0] == 255).mean(axis=0), [4, 4])
    assert np.array_equal(windows[0], windows[1])  # the edge is cut off from black alone
    white = markers.cut_windows(np.full((1, SIZE, SIZE), 255, np.uint8), places).reshape(2, 9, 9)
    assert (white[0, :, 2:] == 255).all() and not white[0, :, :2].any()  # columns -2 and -1
    assert (white[1, :6] == 255).all() and not white[1, 6:].any()  # rows 32 to 34


def test_a_hidden_layer_relates_what_a_sum_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markers, "EPOCHS", 20)
    rng = np.random.default_rng(0)
    both = {k: rng.choice([-1.0, 1.0], size=(n, 2, 3)) for k, n in SIZES.items()}
    labels = {k: (both[k][:, 0, 0] * both[k][:, 1, 0] > 0).astype(int) for k in SPLITS}
    torch.manual_seed(0)
    assert markers.fit(markers.MarkerNetwork(3, 32), both, labels)[1] > 90
    assert markers.fit(markers.MarkerNetwork(3, 0), both, labels)[1] < 65


@pytest.mark.usefixtures("few_scenes")
def test_the_distance_of_the_markers_separates_contours_of_6() -> None:
    scores, _ = markers.measure(DIFFICULTIES["baseline"], None)
    assert scores["distance, in full pixels"][1] > 58


@pytest.mark.usefixtures("few_scenes")
def test_the_command_prints_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markers, "DIFFICULTIES", dict(list(DIFFICULTIES.items())[:2]))
    result = called(markers.main, cwd=tmp_path, check=True)
    header, _, *rows = result.stdout.strip().splitlines()
    assert header.startswith("| paddles | read of both markers |")
    assert [row.split("|")[1].strip() for row in rows] == 4 * ["6"] + 5 * ["9"]
    assert "after shorter contours" in rows[-1]
