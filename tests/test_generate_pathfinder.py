"""Properties of the generated Pathfinder data.

The labels are checked independently: the markers are found in the image, and the contours are
followed through paddles that have no contour number.
"""

import functools
import json
from pathlib import Path

import numpy as np
import PIL
import pytest
from PIL import Image
from scipy import ndimage
from scipy.spatial.distance import cdist
from scipy.stats import ks_2samp, mannwhitneyu

import generate_lra
from data import pathfinder_scenes as pathfinder
from data.generation import FORMAT_VERSION
from data.pathfinder import generate_pathfinder

# Two means of one distribution differ by more than this many standard errors about once in
# 16 000 comparisons; the seeds are fixed, so a pass stays a pass.
MAX_STANDARD_ERRORS = 4.0
NUM_IMAGES = 1_020  # one full batch and a part of a chunk
HARD = pathfinder.DIFFICULTIES["hard"]
FOLDERS = {
    "baseline": "curv_baseline",
    "intermediate": "curv_contour_length_9",
    "hard": "curv_contour_length_14",
}


def files_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in files_under(folder)}


def read_images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read images (n, 32, 32) and labels (n,) the way the official loaders do."""
    images, labels = [], []
    for batch in range(len(list((folder / "metadata").iterdir()))):
        for row in (folder / "metadata" / f"{batch}.npy").read_text().splitlines():
            fields = row.split(" ")
            with Image.open(folder / fields[0] / fields[1]) as image:
                images.append(np.asarray(image))
            labels.append(int(fields[3]))
    return np.stack(images), np.array(labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pathfinder")
    return generate_pathfinder(out, seed=3, images=NUM_IMAGES, workers=1)


@pytest.fixture(scope="module")
def images_and_labels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    return read_images(folder)


@functools.cache
def scenes_of(split: str, n: int = 60) -> pathfinder.Scenes:
    return pathfinder.draw_scenes(np.random.default_rng(5), n, pathfinder.DIFFICULTIES[split])


@functools.cache
def drawn_problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paddles (n, p, 2) in random order, images (n, 32, 32) and labels (n,)."""
    n = 300
    rng = np.random.default_rng(6)
    scenes = pathfinder.draw_scenes(rng, n, HARD)
    labels = rng.integers(2, size=n)
    markers = pathfinder.place_markers(rng, scenes.targets, labels)
    paddles = rng.permuted(scenes.paddles().view("c16, c16")[..., 0], axis=1)
    paddles = paddles.view(complex).reshape(n, -1, 2)
    return paddles, pathfinder.rasterize(paddles, markers), labels


def find_markers(image: np.ndarray) -> list[complex]:
    """Return the centers of the two brightest 3 x 3 blobs."""
    mean = ndimage.uniform_filter(image.astype(float), 3, mode="constant")
    centers = []
    for _ in range(2):
        row, column = np.unravel_index(mean.argmax(), mean.shape)
        assert mean[row, column] > 140  # no crossing of paddles is as bright as a disk
        around = image[row - 1 : row + 2, column - 1 : column + 2].astype(float)
        dy, dx = ndimage.center_of_mass(around)
        centers.append(complex(column + dx - 0.5, row + dy - 0.5))
        mean[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3] = 0
    return centers


def reaches(paddles: np.ndarray, start: complex, goal: complex) -> bool:
    """Follow paddles (p, 2) from the marker at `start`, from end to end over gaps of one margin."""
    by_start = np.abs(paddles - start).min(axis=1).argmin()
    by_goal = np.abs(paddles - goal).min(axis=1).argmin()
    reached, frontier = {by_start}, [by_start]
    while frontier:
        here = paddles[frontier.pop()]
        gaps = np.abs(paddles[:, :, None] - here).min(axis=(1, 2))
        near = set(np.flatnonzero(gaps <= pathfinder.PADDLE_MARGIN + 1e-9)) - reached
        reached |= near
        frontier.extend(near)
    return by_goal in reached


def test_labels_agree_with_paddles_followed_from_marker_to_marker() -> None:
    paddles, images, labels = drawn_problem()
    answers = [reaches(p, *find_markers(i)) for p, i in zip(paddles, images, strict=True)]
    assert answers == list(labels == 1)


@pytest.mark.parametrize(
    ("split", "length", "distractor_length", "num_distractors"),
    [("baseline", 6, 2, 10), ("intermediate", 9, 3, 6), ("hard", 14, 4, 5)],
)
def test_every_scene_has_all_its_contours(
    split: str, length: int, distractor_length: int, num_distractors: int
) -> None:
    scenes = scenes_of(split)
    assert scenes.targets.shape == (60, 2, length, 2)
    assert scenes.distractors.shape == (60, num_distractors, distractor_length, 2)
    lengths = np.abs(scenes.paddles()[..., 1] - scenes.paddles()[..., 0])
    np.testing.assert_allclose(lengths, 2)
    seeds = scenes.targets[:, :, 0, 0]
    np.testing.assert_allclose(np.abs(seeds[:, 0] - seeds[:, 1]), 7)


@pytest.mark.parametrize("split", FOLDERS)
def test_only_neighbors_in_a_contour_come_within_the_margin(split: str) -> None:
    scenes = scenes_of(split)
    contours = [group[:, i] for group in scenes for i in range(group.shape[1])]
    owner = np.concatenate([np.full(c.shape[1], i) for i, c in enumerate(contours)])
    place = np.concatenate([np.arange(c.shape[1]) for c in contours])
    apart = (owner[:, None] != owner) | (np.abs(place[:, None] - place) > 1)
    share = np.linspace(0, 1, 21)
    p = len(owner)
    for paddles in scenes.paddles():
        dots = paddles[:, :1] + (paddles[:, 1:] - paddles[:, :1]) * share  # (p, 21)
        dots = np.stack([dots.real.ravel(), dots.imag.ravel()], axis=1)
        distance = cdist(dots, dots).reshape(p, 21, p, 21).min(axis=(1, 3))
        # Edge to edge: the margins of both, 1 pixel each.
        assert distance[apart].min() - pathfinder.PADDLE_THICKNESS >= 2 - 1e-9


@pytest.mark.parametrize("split", FOLDERS)
def test_contours_are_smooth(split: str) -> None:
    for contours in scenes_of(split):
        gap = np.abs(contours[:, :, 1:, 0] - contours[:, :, :-1, 1])
        assert np.sqrt(0.5) - 1e-9 <= gap.min() and gap.max() <= 1 + 1e-9
        along = contours[..., 1] - contours[..., 0]
        turn = np.abs(np.angle(along[:, :, 1:] / along[:, :, :-1]))
        assert turn.max() < np.pi / 2
        # The mean of |a| under cos(a) ** 2 is 0.47 rad; crowding can only bend contours further.
        assert 0.4 < turn.mean() < 0.65


def test_turns_follow_the_squared_cosine() -> None:
    n = 20_000
    start = np.zeros(n)
    paddles = pathfinder.paddles_at(start, start)
    _, turned = pathfinder.continue_contours(np.random.default_rng(0), paddles, start)
    # sin(a) has density proportional to sqrt(1 - sin(a) ** 2): variance 1 / 4, kurtosis 2.
    sines = np.sin(turned)
    assert abs(sines.mean()) < MAX_STANDARD_ERRORS * 0.5 / np.sqrt(n)
    assert abs((sines**2).mean() - 1 / 4) < MAX_STANDARD_ERRORS * 0.25 / np.sqrt(n)


@pytest.mark.parametrize("split", FOLDERS)
def test_everything_is_inside_the_padding(split: str) -> None:
    scenes = scenes_of(split)
    border = pathfinder.PADDING + pathfinder.PADDLE_THICKNESS / 2
    ends = scenes.paddles()
    for coordinate in (ends.real, ends.imag):
        assert border <= coordinate.min() and coordinate.max() <= 32 - border
    for label in (0, 1):
        markers = pathfinder.place_markers(
            np.random.default_rng(0), scenes.targets, np.full(60, label)
        )
        images = pathfinder.rasterize(scenes.paddles(), markers)
        inner = images[:, 1:-1, 1:-1]
        assert images.sum() == inner.sum()


def test_label_moves_one_marker_and_nothing_else() -> None:
    targets = scenes_of("hard").targets
    apart, together = (
        pathfinder.place_markers(np.random.default_rng(2), targets, np.full(60, label))
        for label in (0, 1)
    )
    np.testing.assert_array_equal(apart[:, 0], together[:, 0])
    tips = targets[:, :, [0, -1], [0, 1]]  # (n, contour, first/last)
    for markers, label in ((apart, 0), (together, 1)):
        contour = [np.argwhere(tips[i] == m)[0, 0] for i in range(60) for m in markers[i]]
        first, last = np.reshape(contour, (60, 2)).T
        np.testing.assert_array_equal(first == last, np.full(60, label == 1))
        assert 0.2 < first.mean() < 0.8


def test_paddle_and_marker_have_their_size() -> None:
    """Painted areas, in square pixels, equal those of a line with round ends and of a disk."""
    rng = np.random.default_rng(0)
    n = 200
    tail = pathfinder.uniform_points(rng, 8, n)
    paddle = pathfinder.paddles_at(tail, rng.uniform(0, 2 * np.pi, n))
    line = pathfinder.coverage(paddle[:, None], 0.25, 2).sum(axis=(1, 2)) / 4
    assert abs(line.mean() - (2 * 0.5 + np.pi * 0.25**2)) < 0.1  # antialiasing blurs the ends
    disk = pathfinder.coverage(tail[:, None, None].repeat(2, axis=2), 1.5, 2).sum(axis=(1, 2)) / 4
    assert abs(disk.mean() - np.pi * 1.5**2) < 0.1
    cells = np.arange(64) / 2 + 0.25
    painted = pathfinder.coverage(paddle[:, None], 0.25, 2)
    middle = (painted.sum(axis=1) @ cells + 1j * (painted.sum(axis=2) @ cells)) / (4 * line)
    np.testing.assert_allclose(middle, paddle.mean(axis=1), atol=0.1)


@pytest.mark.parametrize(
    "statistic",
    [
        pytest.param(lambda image: image.mean(), id="brightness"),
        pytest.param(lambda image: (image > 0).sum(), id="lit pixels"),
        pytest.param(lambda image: (image == 255).sum(), id="white pixels"),
        pytest.param(lambda image: image.astype(float).std(), id="contrast"),
        pytest.param(lambda image: image[8:24, 8:24].mean(), id="brightness of the middle"),
        pytest.param(lambda image: image[:16].mean(), id="brightness of the upper half"),
        pytest.param(lambda image: np.abs(np.diff(image.astype(float))).mean(), id="edges"),
    ],
)
def test_no_simple_statistic_tells_the_label(statistic, images_and_labels) -> None:
    images, labels = images_and_labels
    values = np.array([statistic(image) for image in images], dtype=float)
    negative, positive = values[labels == 0], values[labels == 1]
    error = np.sqrt(negative.var() / len(negative) + positive.var() / len(positive))
    assert abs(positive.mean() - negative.mean()) < MAX_STANDARD_ERRORS * error
    assert ks_2samp(negative, positive).pvalue > 1e-4


def test_distance_of_the_markers_hardly_tells_the_label() -> None:
    """The two distributions cannot be equal; SEED_DISTANCE between seeds makes them nearly so."""
    rng = np.random.default_rng(8)
    targets = pathfinder.draw_targets(rng, 12_000, HARD.contour_length)
    targets = targets[pathfinder.markers_fit(targets)]
    distances = []
    for label in (0, 1):
        markers = pathfinder.place_markers(rng, targets, np.full(len(targets), label))
        distances.append(np.abs(markers[:, 0] - markers[:, 1]))
        assert distances[-1].min() >= pathfinder.MARKER_DISTANCE
    area = mannwhitneyu(*distances).statistic / len(targets) ** 2  # 0.5 is chance
    assert len(targets) > 400 and abs(area - 0.5) < 0.06
    # The best threshold on the distance is right in 0.5 + statistic / 2 of the cases.
    assert ks_2samp(*distances).statistic < 0.12


def test_layout_and_metadata_are_the_official_ones(folder: Path) -> None:
    assert folder.parts[-3:] == ("lra_release", "pathfinder32", "curv_contour_length_14")
    assert sorted(path.name for path in folder.iterdir()) == ["GENERATED.json", "imgs", "metadata"]
    seen = []
    for batch, count in enumerate([1_000, NUM_IMAGES - 1_000]):
        rows = (folder / "metadata" / f"{batch}.npy").read_text().splitlines()
        assert len(rows) == count
        for number, row in enumerate(rows):
            label = row.split(" ")[3]
            expected = f"imgs/{batch} sample_{number}.png {number} {label} 1.0 14 4 2 0.5 1 1"
            assert row == expected and label in "01"
            seen.append(folder / f"imgs/{batch}" / f"sample_{number}.png")
    assert sorted(seen) == files_under(folder / "imgs")
    with Image.open(seen[-1]) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", (32, 32))


@pytest.mark.parametrize("split", ["baseline", "intermediate"])
def test_other_splits_have_their_own_folder_and_parameters(split: str, tmp_path: Path) -> None:
    folder = generate_pathfinder(tmp_path, seed=0, split=split, images=7, workers=1)
    assert folder == tmp_path / "lra_release" / "pathfinder32" / FOLDERS[split]
    _, labels = read_images(folder)
    assert sorted(labels) == [0, 0, 0, 0, 1, 1, 1]
    parameters = json.loads((folder / "GENERATED.json").read_text())["parameters"]
    difficulty = pathfinder.DIFFICULTIES[split]
    assert parameters["contour_length"] == difficulty.contour_length
    assert parameters["num_distractors"] == difficulty.num_distractors


def test_labels_are_balanced_and_images_differ(images_and_labels) -> None:
    images, labels = images_and_labels
    assert len(images) == NUM_IMAGES and labels.sum() == NUM_IMAGES // 2
    assert 0.4 < (labels[1:] == labels[:-1]).mean() < 0.6
    assert len({image.tobytes() for image in images}) == NUM_IMAGES


def test_bytes_depend_on_the_seed_and_not_on_the_workers(folder: Path, tmp_path: Path) -> None:
    two = generate_pathfinder(tmp_path, seed=3, images=NUM_IMAGES, workers=2)
    assert contents(two) == contents(folder)
    other = generate_pathfinder(tmp_path / "other", seed=4, images=1, workers=1)
    name = "imgs/0/sample_0.png"
    assert (other / name).read_bytes() != (folder / name).read_bytes()


def test_record_describes_the_files(folder: Path) -> None:
    record = json.loads((folder / "GENERATED.json").read_text())
    assert record["task"] == "pathfinder32"
    assert (record["seed"], record["split"]) == (3, "hard")
    assert record["counts"] == {"images": NUM_IMAGES, "label_0": 510, "label_1": 510}
    assert record["format_version"] == FORMAT_VERSION
    assert (record["numpy"], record["pillow"]) == (np.__version__, PIL.__version__)


def test_function_refuses_an_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split=easy is none of baseline, intermediate, hard"):
        generate_pathfinder(tmp_path, seed=0, split="easy")
    assert not list(tmp_path.iterdir())


def test_the_command_writes_what_the_function_writes(tmp_path: Path) -> None:
    expected = generate_pathfinder(tmp_path / "a", seed=1, split="baseline", images=6, workers=1)
    arguments = ["--out", str(tmp_path / "b"), "--seed", "1", "--images", "6", "--workers", "1"]
    assert generate_lra.main(["pathfinder32", *arguments, "--split", "baseline"]) == 0
    assert contents(tmp_path / "b" / expected.relative_to(tmp_path / "a")) == contents(expected)
