"""What the two markers of a Pathfinder image tell, and how far it can be read off the pixels.

    python -m experiments.markers

For contours of 6, 9 and 14 paddles, a network that is given both markers: exactly as the generator
drew them, or as the pixels around their known places; there also one network that learns from all
three, the shorter contours first. A model that has to find the markers itself faces a harder task.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.packing import SPLITS
from data.pathfinder_scenes import (
    DIFFICULTIES,
    SIZE,
    Difficulty,
    draw_scenes,
    place_markers,
    rasterize,
)
from experiments.shallow import Arrays, Score, accuracy, logistic_regression
from experiments.tables import markdown
from run.program import Parser, print_result, run_program

PROGRAM = "experiments.markers"
SCENES = {"train": 28_000, "val": 2_000, "test": 4_000}
EPOCHS = 6
CHUNK = 1_000  # scenes drawn at a time
REACH = 4  # pixels that a window extends from the marker's own
WINDOW = 2 * REACH + 1


class Markers(NamedTuple):
    """The two markers of n scenes; places and headings are (x, y) in pixels."""

    places: np.ndarray  # (n, 2, 2)
    headings: np.ndarray  # (n, 2, 2), along the paddle that a marker ends
    windows: np.ndarray  # (n, 2, WINDOW^2) grey levels around a marker
    labels: np.ndarray  # (n,)


def draw_markers(rng: np.random.Generator, n: int, difficulty: Difficulty) -> Markers:
    """Draw n whole scenes and look at their markers."""
    chunks = []
    for start in range(0, n, CHUNK):
        scenes = draw_scenes(rng, min(CHUNK, n - start), difficulty)
        labels = rng.integers(2, size=len(scenes.targets))
        places = place_markers(rng, scenes.targets, labels)
        windows = cut_windows(rasterize(scenes.paddles(), places), places)
        headings = find_headings(scenes.targets, places)
        chunks.append(Markers(_xy(places), _xy(headings), windows, labels))
    return Markers(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))


def _xy(points: np.ndarray) -> np.ndarray:
    return np.stack([points.real, points.imag], axis=-1)


def find_headings(targets: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The paddles (n, 2) that lead away from the markers at `places` (n, 2), one at either end."""
    scene = np.arange(len(targets))
    first = (targets[:, 0, 0, 0] != places[:, 0]).astype(int)
    last = (targets[:, 0, -1, 1] != places[:, 1]).astype(int)
    inner = np.stack([targets[scene, first, 0, 1], targets[scene, last, -1, 0]], axis=1)
    return inner - places


def cut_windows(images: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The pixels of images (n, SIZE, SIZE) around places (n, 2), black beyond the edge."""
    padded = np.pad(images, ((0, 0), (REACH, REACH), (REACH, REACH)))
    offset = np.arange(WINDOW)
    rows = places.imag.astype(int)[:, :, None, None] + offset[:, None]
    columns = places.real.astype(int)[:, :, None, None] + offset
    windows = padded[np.arange(len(images))[:, None, None, None], rows, columns]
    return windows.reshape(*places.shape, -1)


class MarkerNetwork(nn.Module):
    """A learned vector for each marker, their sum, a batch norm, a head with `hidden` neurons."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.vector = nn.Sequential(
            nn.Linear(features, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 64)
        )
        last = [nn.Linear(64, hidden), nn.GELU()] if hidden else []
        self.head = nn.Sequential(
            nn.BatchNorm1d(64, affine=False), *last, nn.Linear(hidden or 64, 2)
        )

    def forward(self, markers: Tensor) -> Tensor:
        """Classify markers (B, 2, features) as logits (B, 2)."""
        return self.head(self.vector(markers).sum(dim=1))


def fit(
    network: MarkerNetwork, name: str, markers: Arrays, labels: Arrays, epochs: int = EPOCHS
) -> Score:
    """Train the network on markers (n, 2, features) and score it."""
    flat = markers["train"].reshape(-1, markers["train"].shape[-1])
    mean, deviation = flat.mean(axis=0), flat.std(axis=0) + 1e-6
    x = {k: torch.from_numpy((v - mean) / deviation).float() for k, v in markers.items()}
    y = {k: torch.from_numpy(v) for k, v in labels.items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(y["train"])).split(32):
            loss = F.cross_entropy(network(x["train"][rows]), y["train"][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        val, test = (accuracy(network(x[k]), y[k]) for k in ("val", "test"))
    return Score(name, val, test)


def measure(
    difficulty: Difficulty, epochs: int = EPOCHS, network: MarkerNetwork | None = None
) -> tuple[list[Score], MarkerNetwork]:
    """The scores of one of LRA's three splits.

    Args:
        network: what the call for shorter contours returned, to go on learning here.
    Returns:
        The scores, and the network of the last of them.
    """
    rng = np.random.default_rng(0)
    drawn = {k: draw_markers(rng, n, difficulty) for k, n in SCENES.items()}
    labels = {k: x.labels for k, x in drawn.items()}
    torch.manual_seed(0)

    pixels = np.arange(2 * SIZE)
    apart = {k: np.hypot(*np.diff(x.places, axis=1)[:, 0].T).astype(int) for k, x in drawn.items()}
    distance = {k: 1.0 * (apart[k][:, None] == pixels) for k in SPLITS}
    exact = {k: np.concatenate([x.places, x.headings], axis=2) for k, x in drawn.items()}
    seen = {k: np.concatenate([x.places, x.windows], axis=2) for k, x in drawn.items()}
    around = f"places and the {WINDOW} x {WINDOW} pixels around"
    fresh = MarkerNetwork(2 + WINDOW**2, 128)
    scores = [
        logistic_regression("the distance of the markers, in whole pixels", distance, labels),
        fit(MarkerNetwork(4, 0), "places and headings, added up", exact, labels, epochs),
        fit(MarkerNetwork(4, 128), "places and headings, related", exact, labels, epochs),
        fit(fresh, f"{around}, related", seen, labels, epochs),
    ]
    if network is None:
        return scores, fresh
    scores.append(fit(network, f"{around}, after shorter contours", seen, labels, epochs))
    return scores, network


def print_scores() -> None:
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n\n")[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error(f"--epochs {arguments.epochs} trains nothing; give 1 or more")
    rows: list[list[str]] = []
    network = None
    for difficulty in DIFFICULTIES.values():
        scores, network = measure(difficulty, arguments.epochs, network)
        for name, *accuracies in scores:
            paddles = str(difficulty.contour_length)
            rows.append([paddles, name, *(f"{value:.1f}" for value in accuracies)])
    header = ["paddles", "read of both markers", "validation, %", "test, %"]
    print_result(markdown(header, rows, numbers=2))


def main() -> int:
    return run_program(PROGRAM, print_scores)


if __name__ == "__main__":
    sys.exit(main())
