"""Pathfinder images from a seed, in the official on-disk format."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from data import pathfinder_scenes
from data.generation import available_cores, check_numbers, results_in_order, write_record
from data.layout import split_layout
from run.files import atomic_folder

(IMAGES,) = split_layout("hard").expected
BATCH_IMAGES = 1_000  # images in one folder imgs/K
CHUNK_IMAGES = 250  # drawn at once from one random stream, part of the format; divides a batch


def pathfinder_chunk(index: int, *, seed: int, split: str, images: int) -> list[tuple[bytes, int]]:
    """Return image chunk `index` as pairs (PNG, label), empty after the last of `images` images."""
    n = min(CHUNK_IMAGES, images - index * CHUNK_IMAGES)
    if n <= 0:
        return []
    difficulty = pathfinder_scenes.DIFFICULTIES[split]
    stream = np.random.SeedSequence(seed, spawn_key=(difficulty.contour_length, index))
    drawn, labels = pathfinder_scenes.draw_images(
        np.random.Generator(np.random.PCG64(stream)), n, difficulty
    )
    return [(_to_png(image), label) for image, label in zip(drawn, labels.tolist(), strict=True)]


def _to_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()


def _write_images(
    folder: Path, pairs: Iterable[tuple[bytes, int]], progress: tqdm, row_end: str
) -> dict[int, int]:
    """Write the pairs (PNG, label) in batches below `folder`, each with its metadata.

    Args:
        row_end: the generation parameters that close every row of the metadata.
    Returns:
        The number of images per label.
    """
    counts = {0: 0, 1: 0}
    (folder / "metadata").mkdir()
    pairs = iter(pairs)
    for batch in itertools.count():
        # The metadata of a batch have the suffix of numpy's files, yet they are plain text.
        rows = []
        for number, (png, label) in enumerate(itertools.islice(pairs, BATCH_IMAGES)):
            if number == 0:
                (folder / "imgs" / str(batch)).mkdir(parents=True)
            (folder / f"imgs/{batch}/sample_{number}.png").write_bytes(png)
            rows.append(f"imgs/{batch} sample_{number}.png {number} {label} {row_end}\n")
            counts[label] += 1
            progress.update()
        if not rows:
            break
        (folder / f"metadata/{batch}.npy").write_bytes("".join(rows).encode())
    return counts


def metadata_columns(difficulty: pathfinder_scenes.Difficulty) -> dict[str, float]:
    """Return the generation parameters that close every row of the official metadata."""
    return {
        "continuity": pathfinder_scenes.CONTINUITY,
        "contour_length": difficulty.contour_length,
        "distractor_length": difficulty.distractor_length,
        "paddle_length": int(pathfinder_scenes.PADDLE_LENGTH),
        "paddle_thickness": pathfinder_scenes.PADDLE_THICKNESS,
        "paddle_margin": int(pathfinder_scenes.PADDLE_MARGIN),
        "num_paddle_contrasts": 1,  # paddle contrasts to choose from
    }


def generate_pathfinder(
    out: str | Path,
    *,
    seed: int,
    split: str = "hard",
    images: int = IMAGES,
    workers: int | None = None,
) -> Path:
    """Write one split of Pathfinder at 32 x 32, labels balanced, and GENERATED.json.

    Args:
        out: data root; the files go to `out`/lra_release/pathfinder32/curv_*.
        seed: with split and images, it determines every pixel, and every byte for one Pillow.
        split: "baseline", "intermediate" or "hard": targets of 6, 9 or 14 paddles.
        images: images in all; half of them have label 1, rounded down.
        workers: processes; None takes every available core. More than one needs a calling script
            whose work stands under `if __name__ == "__main__":`.
    Returns:
        The folder that holds imgs and metadata.
    Raises:
        ValueError: an argument is out of range.
        OSError: the folder exists already or cannot be written; nothing of this call remains.
    Source: Linsley et al. 2018, Kim et al. 2020 (the task); Tay et al. 2021 (LRA), the file format.
    """
    if workers is None:
        workers = available_cores()
    check_numbers(seed, images=images, workers=workers)
    if split not in pathfinder_scenes.DIFFICULTIES:
        raise ValueError(f"split={split} is none of {', '.join(pathfinder_scenes.DIFFICULTIES)}")
    difficulty = pathfinder_scenes.DIFFICULTIES[split]
    columns = metadata_columns(difficulty)
    target = Path(out, split_layout(split).paths[0])
    chunk = functools.partial(pathfinder_chunk, seed=seed, split=split, images=images)
    num_chunks = -(-images // CHUNK_IMAGES)
    with (
        atomic_folder(target, "generates Pathfinder32") as folder,
        contextlib.closing(results_in_order(chunk, workers)) as chunks,
        tqdm(total=images, desc=f"pathfinder32 {split}", unit="img", disable=None) as progress,
    ):
        pairs = itertools.chain.from_iterable(itertools.islice(chunks, num_chunks))
        counts = _write_images(folder, pairs, progress, " ".join(map(str, columns.values())))
        parameters = {
            **columns,
            "num_distractors": difficulty.num_distractors,
            "size": pathfinder_scenes.SIZE,
            "padding": pathfinder_scenes.PADDING,
            "seed_distance": pathfinder_scenes.SEED_DISTANCE,
            "marker_radius": pathfinder_scenes.MARKER_RADIUS,
            "antialias_scale": pathfinder_scenes.ANTIALIAS_SCALE,
            "snake_contrast": pathfinder_scenes.SNAKE_CONTRAST,
            "paddle_contrast": pathfinder_scenes.PADDLE_CONTRAST,
            "batch_images": BATCH_IMAGES,
            "chunk_images": CHUNK_IMAGES,
        }
        write_record(
            folder, "pathfinder32", seed, split=split,
            counts={"images": images, "label_0": counts[0], "label_1": counts[1]},
            parameters=parameters, pillow=PIL.__version__,
        )
    return target
