"""Accuracy on Pathfinder from the two markers of an image alone.

    python -m experiments.markers

A network reads both markers, for contours of 6, 9 and 14 paddles: the exact positions and headings,
or the pixels around the known positions. One more network learns from all three, shorter contours
first. A model that has to find the markers itself has a harder task.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.packing import SPLITS
from data.pathfinder_scenes import (
    DIFFICULTIES,
    Difficulty,
    draw_scenes,
    place_markers,
    rasterize,
)
from run.program import Parser, print_result, run_program
from tables import markdown

PROGRAM = "experiments.markers"
SCENES = {"train": 28_000, "val": 2_000, "test": 4_000}
EPOCHS = 6
CHUNK = 1_000  # scenes drawn at a time
REACH = 4  # pixels that a window extends from the marker's own
WINDOW = 2 * REACH + 1

Arrays = Mapping[str, np.ndarray]  # by split


class Markers(NamedTuple):
    """The two markers of n scenes; positions and headings are (x, y) in pixels."""

    positions: np.ndarray  # (n, 2, 2)
    headings: np.ndarray  # (n, 2, 2), along the paddle that a marker ends
    windows: np.ndarray  # (n, 2, WINDOW^2) gray levels around a marker
    labels: np.ndarray  # (n,)


def draw_markers(rng: np.random.Generator, n: int, difficulty: Difficulty) -> Markers:
    """Draw n complete scenes and return their markers."""
    chunks = []
    for start in range(0, n, CHUNK):
        scenes = draw_scenes(rng, min(CHUNK, n - start), difficulty)
        labels = rng.integers(2, size=len(scenes.targets))
        tips = place_markers(rng, scenes.targets, labels)
        windows = cut_windows(rasterize(scenes.paddles(), tips), tips)
        headings = find_headings(scenes.targets, tips)
        chunks.append(Markers(_xy(tips), _xy(headings), windows, labels))
    return Markers(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))


def _xy(points: np.ndarray) -> np.ndarray:
    return np.stack([points.real, points.imag], axis=-1)


def find_headings(targets: np.ndarray, tips: np.ndarray) -> np.ndarray:
    """Return the paddles (n, 2) that lead away from the markers at `tips` (n, 2)."""
    scene = np.arange(len(targets))
    first = (targets[:, 0, 0, 0] != tips[:, 0]).astype(int)
    last = (targets[:, 0, -1, 1] != tips[:, 1]).astype(int)
    inner = np.stack([targets[scene, first, 0, 1], targets[scene, last, -1, 0]], axis=1)
    return inner - tips


def cut_windows(images: np.ndarray, tips: np.ndarray) -> np.ndarray:
    """Return the pixels of images (n, SIZE, SIZE) around tips (n, 2), black beyond the edge."""
    padded = np.pad(images, ((0, 0), (REACH, REACH), (REACH, REACH)))
    offset = np.arange(WINDOW)
    rows = tips.imag.astype(int)[:, :, None, None] + offset[:, None]
    columns = tips.real.astype(int)[:, :, None, None] + offset
    windows = padded[np.arange(len(images))[:, None, None, None], rows, columns]
    return windows.reshape(*tips.shape, -1)


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


def fit(network: MarkerNetwork, markers: Arrays, labels: Arrays) -> list[float]:
    """Train on markers (n, 2, features); return validation and test accuracy in %."""
    flat = markers["train"].reshape(-1, markers["train"].shape[-1])
    mean, deviation = flat.mean(axis=0), flat.std(axis=0) + 1e-6
    x = {k: torch.from_numpy((v - mean) / deviation).float() for k, v in markers.items()}
    y = {k: torch.from_numpy(v) for k, v in labels.items()}
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    network.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y["train"])).split(32):
            loss = F.cross_entropy(network(x["train"][rows]), y["train"][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        hits = {k: network(x[k]).argmax(dim=1) == y[k] for k in ("val", "test")}
    return [100 * hit.double().mean().item() for hit in hits.values()]


def score_distance(positions: Arrays, labels: Arrays) -> list[float]:
    """Score the most frequent training label at each distance of the markers, in full pixels.

    Returns:
        Validation and test accuracy in %.
    """
    apart = {k: np.hypot(*np.diff(x, axis=1)[:, 0].T).astype(int) for k, x in positions.items()}
    votes = np.bincount(apart["train"], 2 * labels["train"] - 1, minlength=64)
    return [100 * float(((votes[apart[k]] > 0) == labels[k]).mean()) for k in ("val", "test")]


def measure(
    difficulty: Difficulty, network: MarkerNetwork | None
) -> tuple[dict[str, list[float]], MarkerNetwork]:
    """Return the scores of one of LRA's three splits by input, and the network that read pixels.

    Args:
        network: the one returned for shorter contours, which continues to learn here.
    """
    rng = np.random.default_rng(0)
    drawn = {k: draw_markers(rng, SCENES[k], difficulty) for k in SPLITS}
    labels = {k: x.labels for k, x in drawn.items()}
    positions = {k: x.positions for k, x in drawn.items()}
    torch.manual_seed(0)
    exact = {k: np.concatenate([x.positions, x.headings], axis=2) for k, x in drawn.items()}
    seen = {k: np.concatenate([x.positions, x.windows], axis=2) for k, x in drawn.items()}
    around = f"positions and the {WINDOW} x {WINDOW} pixels around"
    fresh = MarkerNetwork(2 + WINDOW**2, 128)
    scores = {
        "distance, in full pixels": score_distance(positions, labels),
        "positions and headings, added up": fit(MarkerNetwork(4, 0), exact, labels),
        "positions and headings, related": fit(MarkerNetwork(4, 128), exact, labels),
        f"{around}, related": fit(fresh, seen, labels),
    }
    if network is None:
        return scores, fresh
    scores[f"{around}, after shorter contours"] = fit(network, seen, labels)
    return scores, network


def command() -> None:
    """Print the table of the three splits."""
    Parser(prog=PROGRAM, description=__doc__.split("\n\n")[0]).parse_args()
    rows: list[list[str]] = []
    network = None
    for difficulty in DIFFICULTIES.values():
        scores, network = measure(difficulty, network)
        for name, (val, test) in scores.items():
            rows.append([str(difficulty.contour_length), name, f"{val:.1f}", f"{test:.1f}"])
    header = ["paddles", "read of both markers", "validation, %", "test, %"]
    print_result(markdown(header, rows, numbers=2))


def main() -> int:
    """Run the command line; return its exit status."""
    return run_program(PROGRAM, command)


if __name__ == "__main__":
    sys.exit(main())
