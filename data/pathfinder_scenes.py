"""Draw Pathfinder scenes: two long dashed contours, short distractors and two round markers.

The question is whether both markers sit on one contour. A contour is a chain of straight paddles;
around each paddle lies a margin that only its neighbors in the chain may enter:

    tail ====== head . . tail ====== head       consecutive paddles: at most one margin apart
                                                all others: two margins apart, edge to edge

so the eye, and the tests, can follow a contour from paddle to paddle without doubt. The label is
drawn first but used last: it decides on which tips the markers lie and nothing else.

Lengths are in pixels of the final image. Points are complex numbers x + iy, y downwards, from 0 to
SIZE. Shapes: n scenes, m candidates, p paddles; a paddle is (2,): tail and head.

Source: Linsley et al. 2018 and Kim et al. 2020 (the task); Tay et al. 2021 (LRA), the values.
Deviation: the public generator leaves gaps of two margins within a contour, keeps contours apart
only on the pixel grid, omits distractors that find no room, and draws distractors brighter than
targets. Here gaps are one margin wide, so that the margins between contours can be exact and the
number of distractors always the same; and all contours are equally bright.
"""

from typing import NamedTuple

import numpy as np

from data.layout import CONTOUR_LENGTHS

SIZE = 32
PADDING = 1.0  # nothing is drawn nearer to the border
PADDLE_LENGTH = 2.0
PADDLE_THICKNESS = 0.5
PADDLE_MARGIN = 1.0
CONTINUITY = 1.0  # turns stay below 90 degrees / CONTINUITY
SEED_DISTANCE = 7.0  # between the first tips of the two targets
MARKER_RADIUS = 1.5
ANTIALIAS_SCALE = 2
SNAKE_CONTRAST, PADDLE_CONTRAST = 2.0, 0.75

# Center line to center line, so that the margins of the two paddles do not overlap.
CLEARANCE = 2 * PADDLE_MARGIN + PADDLE_THICKNESS
# Two markers never merge into one blob.
MARKER_DISTANCE = 2 * MARKER_RADIUS + PADDLE_MARGIN

# Part of the format, like the order of the draws: other values give other images for a seed.
STARTS_PER_SCENE = 16  # most pairs of long contours get stuck
# Candidates per round: few while most of the scenes still need one, many for the last ones.
TURN_TRIALS = (1, 4, 35)
DISTRACTOR_TRIALS = (16, 32, 64, 128, 256)


class Difficulty(NamedTuple):
    """One of the three published splits."""

    contour_length: int  # paddles of a target

    @property
    def distractor_length(self) -> int:
        return self.contour_length // 3

    @property
    def num_distractors(self) -> int:
        return 20 // self.distractor_length


DIFFICULTIES = {split: Difficulty(length) for split, length in CONTOUR_LENGTHS.items()}


class Scenes(NamedTuple):
    """The contours of n images, without the markers."""

    targets: np.ndarray  # (n, 2, contour length, 2) complex
    distractors: np.ndarray  # (n, number, distractor length, 2) complex

    def paddles(self) -> np.ndarray:
        """Return all paddles (n, p, 2), contour after contour."""
        contours = [group[:, i] for group in self for i in range(group.shape[1])]
        return np.concatenate(contours, axis=1)


def unit(angle: np.ndarray) -> np.ndarray:
    """Return the unit vectors of angles in radians."""
    return np.exp(1j * angle)


def squared(vector: np.ndarray) -> np.ndarray:
    """Return the squared lengths."""
    return vector.real**2 + vector.imag**2


def within(points: np.ndarray, border: float) -> np.ndarray:
    """Return whether each point is at least `border` pixels away from the edge of the image."""
    low, high = border, SIZE - border
    x, y = points.real, points.imag
    return (low <= x) & (x <= high) & (low <= y) & (y <= high)


def uniform_points(rng: np.random.Generator, border: float, count: int) -> np.ndarray:
    """Draw points at least `border` pixels away from the edge of the image."""
    x, y = rng.uniform(border, SIZE - border, (2, count))
    return x + 1j * y


def paddles_at(tail: np.ndarray, heading: np.ndarray) -> np.ndarray:
    """Return the paddles (m, 2) that start at `tail` (m,) and point along `heading` (m,)."""
    return np.stack([tail, tail + PADDLE_LENGTH * unit(heading)], axis=1)


def continue_contours(
    rng: np.random.Generator, last: np.ndarray, heading: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the next paddle of m contours, wherever it may fall.

    Args:
        last: (m, 2) the present last paddles.
        heading: (m,) their directions, radians.
    Returns:
        The paddles (m, 2) and their directions (m,). The contour bends half a margin after the old
        head, by an angle a of density proportional to cos(CONTINUITY * a) ** 2.
    """
    # The abscissa of a uniform point in the unit disk is the sine of such an angle.
    radius, angle = np.sqrt(rng.random(len(last))), rng.uniform(0, 2 * np.pi, len(last))
    turned = heading + np.arcsin(radius * np.cos(angle)) / CONTINUITY
    tail = last[:, 1] + PADDLE_MARGIN / 2 * (unit(heading) + unit(turned))
    return paddles_at(tail, turned), turned


def inside(paddles: np.ndarray) -> np.ndarray:
    """Return, for paddles (m, 2), whether each keeps off the padding, (m,) bool."""
    ends_within = within(paddles, PADDING + PADDLE_THICKNESS / 2)
    return ends_within[:, 0] & ends_within[:, 1]


def squared_distance(point: np.ndarray, paddle: np.ndarray) -> np.ndarray:
    """Return the squared distances (m,) from points (m,) to the nearest points of paddles."""
    tail, along = paddle[:, 0], paddle[:, 1] - paddle[:, 0]
    share = ((point - tail) * along.conj()).real / PADDLE_LENGTH**2
    return squared(point - tail - share.clip(0, 1) * along)


def clear(candidates: np.ndarray, placed: np.ndarray, scene: np.ndarray) -> np.ndarray:
    """Return which candidates keep CLEARANCE to every paddle of their scene.

    Args:
        candidates: (m, 2).
        placed: (n, p, 2).
        scene: (m,) the scene of each candidate, an index into `placed`.
    Returns:
        (m,) bool.
    """
    middle, placed_middle = candidates.sum(axis=1) / 2, placed.sum(axis=2) / 2
    between = squared(middle[:, None] - placed_middle[scene])  # (m, p)
    # Middles decide almost every pair, and all that cross, since CLEARANCE exceeds PADDLE_LENGTH.
    kept = (between >= CLEARANCE**2).all(axis=1)
    i, j = np.nonzero(kept[:, None] & (between < (CLEARANCE + PADDLE_LENGTH) ** 2))
    ours, theirs = candidates[i], placed[scene[i], j]
    # Segments that do not cross are nearest at an end of one of them.
    for one, other in ((ours, theirs), (theirs, ours)):
        for end in (one[:, 0], one[:, 1]):
            kept[i[squared_distance(end, other) < CLEARANCE**2]] = False
    return kept


def markers_fit(targets: np.ndarray) -> np.ndarray:
    """Return for which target pairs (n, 2, length, 2) any marker placement fits, (n,) bool.

    All placements are tested, not only the one that the label will ask for; otherwise the classes
    would differ in more than the markers.
    """
    first, last = targets[:, :, 0, 0], targets[:, :, -1, 1]  # each (n, 2)
    tips = np.concatenate([first, last], axis=1)
    apart = squared(first[:, :, None] - last[:, None, :]) >= MARKER_DISTANCE**2  # (n, 2, 2)
    return within(tips, PADDING + MARKER_RADIUS).all(axis=1) & apart.all(axis=(1, 2))


def draw_targets(rng: np.random.Generator, num_starts: int, length: int) -> np.ndarray:
    """Grow pairs of targets, giving up on each pair that gets stuck.

    Args:
        rng: source of every draw.
        num_starts: pairs to begin.
        length: paddles per contour.
    Returns:
        (n, 2, length, 2) the n <= num_starts pairs that reached their length.
    """
    # From there, the second contour is inside for every direction from the first.
    first = uniform_points(rng, 2 * SEED_DISTANCE, num_starts)
    second = first + SEED_DISTANCE * unit(rng.uniform(0, 2 * np.pi, num_starts))
    heading = rng.uniform(0, 2 * np.pi, (num_starts, 2))
    # The contours take turns, so paddle i of contour c is placed[:, 2 * i + c].
    placed = np.stack([paddles_at(first, heading[:, 0]), paddles_at(second, heading[:, 1])], axis=1)
    kept = clear(placed[:, 1], placed[:, :1], np.arange(num_starts))
    placed, heading = placed[kept], heading[kept]

    for step in range(2, 2 * length):
        contour = step % 2
        last = placed[:, step - 2]
        obstacles = np.delete(placed, step - 2, axis=1)
        grown = np.empty_like(last)
        stuck = np.arange(len(placed))
        for trials in TURN_TRIALS:
            scene = np.repeat(stuck, trials)
            paddle, turned = continue_contours(rng, last[scene], heading[scene, contour])
            fits = inside(paddle)
            fits[fits] = clear(paddle[fits], obstacles, scene[fits])
            winners, first_fit = np.unique(scene[fits], return_index=True)
            grown[winners] = paddle[fits][first_fit]
            heading[winners, contour] = turned[fits][first_fit]
            stuck = np.setdiff1d(stuck, winners, assume_unique=True)
        placed = np.delete(np.concatenate([placed, grown[:, None]], axis=1), stuck, axis=0)
        heading = np.delete(heading, stuck, axis=0)
    return placed.reshape(-1, length, 2, 2).swapaxes(1, 2)


def draw_distractor(
    rng: np.random.Generator, placed: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one more contour per scene.

    Args:
        rng: source of every draw.
        placed: (n, p, 2) paddles that the contours must keep clear of.
        length: paddles per contour.
    Returns:
        The contours (n, length, 2) and whether each scene had room for one, (n,) bool.
    """
    n = len(placed)
    contours, found = np.empty((n, length, 2), dtype=complex), np.zeros(n, dtype=bool)
    for trials in DISTRACTOR_TRIALS:
        # Full contours are drawn blindly and dropped at the first paddle that does not fit.
        scene = np.repeat(np.flatnonzero(~found), trials)
        heading = rng.uniform(0, 2 * np.pi, len(scene))
        paddle = paddles_at(uniform_points(rng, PADDING, len(scene)), heading)
        chain = np.empty((len(scene), 0, 2), dtype=complex)
        for step in range(length):
            if step:
                paddle, heading = continue_contours(rng, chain[:, -1], heading)
            fits = inside(paddle)
            fits[fits] = clear(paddle[fits], placed, scene[fits])
            fits[fits] = clear(paddle[fits], chain[:, :-1], np.flatnonzero(fits))
            chain = np.concatenate([chain, paddle[:, None]], axis=1)[fits]
            scene, heading = scene[fits], heading[fits]
        winners, first_fit = np.unique(scene, return_index=True)
        contours[winners] = chain[first_fit]
        found[winners] = True
    return contours, found


def draw_scenes(rng: np.random.Generator, n: int, difficulty: Difficulty) -> Scenes:
    """Draw n independent scenes, each with its full number of contours."""
    parts = []
    missing = n
    while missing:
        targets = draw_targets(rng, STARTS_PER_SCENE * missing, difficulty.contour_length)
        targets = targets[markers_fit(targets)][:missing]
        no_distractors = np.empty((len(targets), 0, difficulty.distractor_length, 2))
        scenes = Scenes(targets, no_distractors)
        for _ in range(difficulty.num_distractors):
            contour, found = draw_distractor(rng, scenes.paddles(), difficulty.distractor_length)
            distractors = np.concatenate([scenes.distractors, contour[:, None]], axis=1)
            scenes = Scenes(scenes.targets[found], distractors[found])
        parts.append(scenes)
        missing -= len(scenes.targets)
    return Scenes(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def place_markers(rng: np.random.Generator, targets: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the marker centers (n, 2): a first tip, and a last tip of the contour asked for.

    Args:
        rng: draws which contour gives the first tip.
        targets: (n, 2, length, 2).
        labels: (n,) 1 puts both markers on one contour, 0 one on each.
    """
    scene = np.arange(len(targets))
    first = rng.integers(2, size=len(targets))
    last = np.where(labels == 1, first, 1 - first)
    return np.stack([targets[scene, first, 0, 0], targets[scene, last, -1, 1]], axis=1)


def coverage(capsules: np.ndarray, radius: float, scale: int) -> np.ndarray:
    """Draw line segments with round ends on a grid finer than the image.

    Args:
        capsules: (n, p, 2) end points; equal ends give a disk. At most PADDLE_LENGTH long.
        radius: half the thickness.
        scale: cells per pixel.
    Returns:
        (n, SIZE * scale, SIZE * scale) share of each cell that is covered, approximately.
    """
    n = len(capsules)
    capsules = capsules * scale  # from here on, lengths are in cells
    middle, half = capsules.sum(axis=2) / 2, (capsules[:, :, 1] - capsules[:, :, 0]) / 2
    half_length = np.abs(half)
    direction = (half / np.maximum(half_length, 1e-12))[:, :, None, None]
    half_length = half_length[:, :, None, None]

    # Each capsule is drawn in a window that holds it wherever its middle lies within a cell.
    reach = int(np.ceil((PADDLE_LENGTH / 2 + radius) * scale)) + 1
    window = np.arange(-reach, reach + 1)
    columns = np.floor(middle.real).astype(np.int64)[:, :, None, None] + window
    rows = np.floor(middle.imag).astype(np.int64)[:, :, None, None] + window[:, None]
    dx = columns + 0.5 - middle.real[:, :, None, None]  # (n, p, 1, window)
    dy = rows + 0.5 - middle.imag[:, :, None, None]  # (n, p, window, 1)
    along = np.clip(dx * direction.real + dy * direction.imag, -half_length, half_length)
    distance = np.hypot(dx - along * direction.real, dy - along * direction.imag)
    share = np.clip(radius * scale + 0.5 - distance, 0, 1)  # (n, p, window, window)

    # A frame as wide as a window spares the case of windows that leave the image.
    frame = reach + 1
    width = SIZE * scale + 2 * frame
    canvas = np.zeros(n * width * width)
    scene = np.arange(n)[:, None, None, None]
    index = (scene * width + rows + frame) * width + columns + frame
    np.maximum.at(canvas, index.ravel(), share.ravel())
    return canvas.reshape(n, width, width)[:, frame:-frame, frame:-frame]


def rasterize(paddles: np.ndarray, markers: np.ndarray) -> np.ndarray:
    """Draw images.

    Args:
        paddles: (n, p, 2).
        markers: (n, 2) centers.
    Returns:
        (n, SIZE, SIZE) uint8, black background, white markers. The scale of gray is the same for
        all images, so the brightness of one part says nothing about another.
    """
    disks = np.stack([markers, markers], axis=2)
    # The round ends count towards the length, so that the gaps keep theirs.
    middle = paddles.mean(axis=2, keepdims=True)
    inner = middle + (paddles - middle) * (1 - PADDLE_THICKNESS / PADDLE_LENGTH)
    lines = coverage(inner, PADDLE_THICKNESS / 2, ANTIALIAS_SCALE)
    lines = SNAKE_CONTRAST * PADDLE_CONTRAST * _shrink(lines)
    image = np.maximum(lines, _shrink(coverage(disks, MARKER_RADIUS, ANTIALIAS_SCALE)))
    return np.rint(255 * np.minimum(image, 1)).astype(np.uint8)


def _shrink(fine: np.ndarray) -> np.ndarray:
    shape = (len(fine), SIZE, ANTIALIAS_SCALE, SIZE, ANTIALIAS_SCALE)
    return fine.reshape(shape).mean(axis=(2, 4))


def draw_images(
    rng: np.random.Generator, n: int, difficulty: Difficulty
) -> tuple[np.ndarray, np.ndarray]:
    """Return n images (n, SIZE, SIZE) uint8 and their labels (n,), half of them 1 if n is even."""
    labels = rng.permutation(np.arange(n) % 2)
    scenes = draw_scenes(rng, n, difficulty)
    return rasterize(scenes.paddles(), place_markers(rng, scenes.targets, labels)), labels
