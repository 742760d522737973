"""Generate Long Range Arena data in the official on-disk format, from a seed.

Use `python generate_lra.py listops --out datasets --seed 0`, or `pathfinder32`: the same seed gives
the same bytes whatever the number of workers, because chunk i always draws from random stream i
and the chunks are consumed in order. `review_pairs` cuts up the IMDb reviews of the data root.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

import pathfinder
import review_pairs

# Raise it whenever a change alters the bytes that a seed gives.
FORMAT_VERSION = 1

LISTOPS_FOLDER = Path("lra_release", "listops-1000")
OPERATORS = ("MIN", "MAX", "MED", "SM")
MAX_DEPTH = 10  # depth of the root is 1; at this depth every node is a digit
OPERATOR_PROBABILITY = 0.25
MIN_ARGS, MAX_ARGS = 2, 10
SHORTEST_TREE = 2 + MIN_ARGS  # an operator, its bracket and the fewest digits

# Part of the format: another size assigns other candidates to a random stream.
CHUNK_CANDIDATES = 4096
# Far more than chance needs even for the last of a few hundred possible sequences.
MAX_BARREN_CHUNKS = 200

# LRA writes nested pairs: "( a b )". An operator with k arguments closes k + 1 pairs, one per
# argument and one at its bracket, and all of them open before it. Gluing each parenthesis to the
# token beside it leaves exactly one piece per counted token, so a tree of length n has n pieces.
DIGIT, ROOT_END, INNER_END, OPERATOR = 0, 10, 11, 12  # first code of each kind
PIECES = [f"{digit} )".encode() for digit in range(10)]
PIECES += [b"] )", b"] ) )"]
PIECES += [
    ("( " * (num_args + 1) + f"[{name}").encode()
    for name in OPERATORS
    for num_args in range(MIN_ARGS, MAX_ARGS + 1)
]

PATHFINDER_FOLDER = Path("lra_release", "pathfinder32")
AAN_FOLDER = Path("lra_release", "tsv_data")
BATCH_IMAGES = 1_000  # images in one folder imgs/K
CHUNK_IMAGES = 250  # drawn at once from one random stream, part of the format; divides a batch


class Level(NamedTuple):
    """The nodes of all trees at one depth; children of one parent are neighbours, in order."""

    tree: np.ndarray  # (n,) int64, index of the tree that owns the node, ascending
    num_args: np.ndarray  # (n,) int64, 0 at digits
    symbol: np.ndarray  # (n,) int64, the digit, or the index into OPERATORS


def grow_trees(
    rng: np.random.Generator, num_trees: int, max_length: int
) -> tuple[list[Level], np.ndarray]:
    """Draw trees level by level, giving up on each one as soon as it is too long.

    Args:
        rng: source of every draw.
        num_trees: trees to start, K.
        max_length: a tree that reaches this many tokens is not grown further.
    Returns:
        The levels from the root down, and the lengths (K,) in tokens without parentheses. Lengths
        below `max_length` are final; the lower levels of the other trees are missing.
    Source: Nangia & Bowman 2018 (ListOps); Tay et al. 2021 (LRA), its sampling rule.
    """
    levels = []
    lengths = np.zeros(num_trees, dtype=np.int64)
    tree = np.arange(num_trees)
    for depth in range(1, MAX_DEPTH + 1):
        n = len(tree)
        symbol = rng.integers(10, size=n)
        num_args = np.zeros(n, dtype=np.int64)
        if depth < MAX_DEPTH:
            operators = np.flatnonzero(rng.random(n) < OPERATOR_PROBABILITY)
            num_args[operators] = rng.integers(MIN_ARGS, MAX_ARGS + 1, size=len(operators))
            symbol[operators] = rng.integers(len(OPERATORS), size=len(operators))
            lengths += np.bincount(tree[operators], minlength=num_trees)  # the closing brackets
        lengths += np.bincount(tree, minlength=num_trees)
        levels.append(Level(tree, num_args, symbol))
        tree = np.repeat(tree, num_args)
        # Nodes are drawn independently, so ending one tree leaves the law of the others unchanged.
        tree = tree[lengths[tree] < max_length]
    return levels, lengths


def keep_trees(levels: Sequence[Level], kept: np.ndarray) -> list[Level]:
    """Restrict the levels to the trees where `kept` (K,) is True, renumbered from 0."""
    new_index = np.cumsum(kept) - 1
    restricted = []
    for level in levels:
        tree, num_args, symbol = (column[kept[level.tree]] for column in level)
        restricted.append(Level(new_index[tree], num_args, symbol))
    return restricted


def apply_operators(operators: np.ndarray, num_args: np.ndarray, args: np.ndarray) -> np.ndarray:
    """Evaluate m operators at once.

    Args:
        operators: (m,) indices into OPERATORS.
        num_args: (m,) all at least 1.
        args: (sum of num_args,) digits, the arguments of the first operator, then of the second...
    Returns:
        (m,) digits.
    Source: Nangia & Bowman 2018; an even median is the truncated mean of the middle two, as in LRA.
    """
    first = np.cumsum(num_args) - num_args  # (m,) where each group begins
    group = np.repeat(np.arange(len(num_args)), num_args)
    # Digits are below 10, so one sort of group * 10 + digit sorts within every group at once.
    ordered = np.sort(group * 10 + args) % 10
    median = (ordered[first + (num_args - 1) // 2] + ordered[first + num_args // 2]) // 2
    results = (
        ordered[first],
        ordered[first + num_args - 1],
        median,
        np.add.reduceat(args, first) % 10,
    )
    return np.choose(operators, results)


def evaluate_and_measure(levels: Sequence[Level]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the value of each root (K,) and, per level, the number of tokens under each node."""
    values = np.empty(0, dtype=np.int64)  # of the level below
    sizes: list[np.ndarray] = []  # deepest level first
    for level in reversed(levels):
        value, size = level.symbol.copy(), np.ones_like(level.symbol)
        operators = np.flatnonzero(level.num_args)
        if len(operators):
            num_args = level.num_args[operators]
            value[operators] = apply_operators(level.symbol[operators], num_args, values)
            size[operators] = 2 + np.add.reduceat(sizes[-1], np.cumsum(num_args) - num_args)
        values = value
        sizes.append(size)
    return values, sizes[::-1]


def lay_out(levels: Sequence[Level], sizes: Sequence[np.ndarray]) -> np.ndarray:
    """Return the codes of all trees as one flat array, tree after tree in reading order."""
    codes = np.empty(sizes[0].sum(), dtype=np.uint8)
    start = np.cumsum(sizes[0]) - sizes[0]  # (n,) position of each node's first token
    for depth, (level, size) in enumerate(zip(levels, sizes, strict=True), start=1):
        is_operator = level.num_args > 0
        codes[start[~is_operator]] = DIGIT + level.symbol[~is_operator]
        first, num_args = start[is_operator], level.num_args[is_operator]
        choices_of_args = MAX_ARGS - MIN_ARGS + 1
        codes[first] = OPERATOR + level.symbol[is_operator] * choices_of_args + num_args - MIN_ARGS
        codes[first + size[is_operator] - 1] = ROOT_END if depth == 1 else INNER_END
        if len(first):
            # A child starts after its parent's operator and its elder siblings.
            before = np.cumsum(sizes[depth]) - sizes[depth]
            before_family = before[np.cumsum(num_args) - num_args]
            start = np.repeat(first + 1 - before_family, num_args) + before
        else:
            start = first  # empty, as are all deeper levels
    return codes


def listops_chunk(index: int, *, seed: int, min_length: int, max_length: int) -> list[bytes]:
    """Return the rows of the trees that candidate chunk `index` keeps, repeats included."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(index,))))
    levels, lengths = grow_trees(rng, CHUNK_CANDIDATES, max_length)
    kept = (min_length < lengths) & (lengths < max_length)
    if not kept.any():
        return []
    levels = keep_trees(levels, kept)
    targets, sizes = evaluate_and_measure(levels)
    codes = lay_out(levels, sizes).tobytes()
    ends = np.cumsum(sizes[0]).tolist()
    return [
        b"%s\t%d\n" % (b" ".join([PIECES[code] for code in codes[start:end]]), target)
        for start, end, target in zip([0, *ends], ends, targets.tolist(), strict=False)
    ]


def _tie_worker_to_parent() -> None:
    """Leave Ctrl-C to the parent, and end with it even if it is killed without a clean-up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def results_in_order(function: Callable[[int], Any], workers: int) -> Iterator[Any]:
    """Yield function(0), function(1), ... from `workers` processes, without end until closed.

    Args:
        function: importable by a fresh process; called here when `workers` is 1.
        workers: closing the iterator ends them.
    Yields:
        The results in the order of the indices, whichever worker was first.
    Raises:
        ChildProcessError: a worker died.
    """
    if workers == 1:
        yield from map(function, itertools.count())
        return
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_tie_worker_to_parent
    )
    indices = itertools.count()
    try:
        # A bounded window: Pool.imap would queue the endless indices without waiting for results.
        pending = deque(executor.submit(function, next(indices)) for _ in range(2 * workers))
        while True:
            result = pending.popleft().result()
            pending.append(executor.submit(function, next(indices)))
            yield result
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process died (out of memory, or the calling script runs without an "
            '`if __name__ == "__main__":` guard); use fewer workers'
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def whole_files(folder: Path, names: Sequence[str]) -> Iterator[list[BinaryIO]]:
    """Open one file per name that appear in `folder` together when the body ends, or not at all.

    Args:
        folder: created if missing.
        names: renamed into place in this order.
    Raises:
        FileExistsError: a file of that name is there already; it is left as it is.
        OSError: the folder cannot be written.
    """
    targets = [folder / name for name in names]

    def refuse_to_overwrite() -> None:
        for target in targets:
            if os.path.lexists(target):
                raise FileExistsError(f"{target} exists; remove it or choose another --out")

    refuse_to_overwrite()
    folder.mkdir(parents=True, exist_ok=True)
    temporaries = [folder / f".{name}.{os.getpid()}.tmp" for name in names]
    files: list[BinaryIO] = []
    placed: list[Path] = []
    try:
        for temporary in temporaries:
            files.append(open(temporary, "wb"))
        yield files
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        refuse_to_overwrite()
        for temporary, target in zip(temporaries, targets, strict=True):
            os.replace(temporary, target)
            placed.append(target)
    except BaseException:
        for file in files:
            # On a full disk, closing tries to write the rest and fails again.
            with contextlib.suppress(OSError):
                file.close()
        for path in [*temporaries, *placed]:
            path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder that becomes `target` when the body ends, or vanishes.

    Args:
        target: its parents are created if missing.
    Raises:
        FileExistsError: the target is there already; it is left as it is.
        OSError: the folder cannot be written.
    """

    def refuse_to_overwrite() -> None:
        if os.path.lexists(target):
            raise FileExistsError(f"{target} exists; remove it or choose another --out")

    refuse_to_overwrite()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        # One call instead of an fsync per file, of which there may be hundreds of thousands.
        if hasattr(os, "sync"):
            os.sync()
        refuse_to_overwrite()
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def distinct_rows(chunk: Callable[[int], list[bytes]], workers: int) -> Iterator[bytes]:
    """Yield the rows of chunk 0, 1, ... in order, dropping the repeated ones, until closed.

    Raises:
        ValueError: MAX_BARREN_CHUNKS chunks in a row gave nothing new.
    """
    seen: set[bytes] = set()  # digests: the rows themselves would hold the whole data in memory
    barren = 0
    with contextlib.closing(results_in_order(chunk, workers)) as chunks:
        for rows in chunks:
            seen_before = len(seen)
            for row in rows:
                digest = hashlib.blake2b(row, digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield row
            barren = barren + 1 if len(seen) == seen_before else 0
            if barren == MAX_BARREN_CHUNKS:
                raise ValueError(
                    f"found {len(seen)} distinct sequences, then none in "
                    f"{barren * CHUNK_CANDIDATES} candidates; widen min_length and max_length "
                    f"or lower train, val and test"
                )


def _write_split(file: BinaryIO, rows: Iterable[bytes], progress: tqdm) -> str:
    """Write the header and the rows to `file` and return the sha256 of its bytes."""
    header = b"Source\tTarget\n"
    file.write(header)
    digest = hashlib.sha256(header)
    for row in rows:
        file.write(row)
        digest.update(row)
        progress.update()
    return digest.hexdigest()


def _available_cores() -> int:
    # Containers and batch systems often grant fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_numbers(seed: int, **counts: int) -> None:
    """Raise ValueError, naming the option, for a negative seed or a count below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} is too small; it must be at least 1")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; it must be 0 or more")


def _check_lengths(min_length: int, max_length: int) -> None:
    """Raise ValueError, naming the option, for bounds with no sequence between them."""
    shortest = max(min_length + 1, SHORTEST_TREE)
    if max_length <= shortest:
        raise ValueError(
            f"max_length={max_length} leaves no sequence with min_length={min_length}: lengths lie "
            f"strictly between the two and the shortest is {shortest}; "
            f"max_length must be at least {shortest + 1}"
        )


def generate_listops(
    out: str | Path,
    *,
    seed: int,
    train: int = 96_000,
    val: int = 2_000,
    test: int = 2_000,
    workers: int | None = None,
    min_length: int = 500,
    max_length: int = 2_000,
) -> Path:
    """Write the three ListOps splits, with no sequence in them twice, and GENERATED.json.

    Args:
        out: data root; the files go to `out`/lra_release/listops-1000.
        seed: with the lengths and counts, it determines every byte.
        train, val, test: sequences per split.
        workers: processes; None takes every available core. More than one needs a calling script
            whose work stands under `if __name__ == "__main__":`.
        min_length, max_length: exclusive bounds on the tokens of a sequence without parentheses.
    Returns:
        The folder of the files.
    Raises:
        ValueError: an argument is out of range, or there are too few distinct sequences.
        OSError: a file exists already or cannot be written; nothing of this call remains.
    Source: Nangia & Bowman 2018 (ListOps); Tay et al. 2021 (LRA), the file format and the lengths.
    """
    if workers is None:
        workers = _available_cores()
    counts = {"train": train, "val": val, "test": test}
    lengths = {"min_length": min_length, "max_length": max_length}
    _check_numbers(seed, **counts, workers=workers, min_length=min_length)
    _check_lengths(**lengths)

    folder = Path(out) / LISTOPS_FOLDER
    names = {split: f"basic_{split}.tsv" for split in counts}
    chunk = functools.partial(listops_chunk, seed=seed, **lengths)
    with (
        whole_files(folder, [*names.values(), "GENERATED.json"]) as (*split_files, record_file),
        contextlib.closing(distinct_rows(chunk, workers)) as rows,
        tqdm(total=sum(counts.values()), desc="listops", unit="seq", disable=None) as progress,
    ):
        sha256 = {
            names[split]: _write_split(file, itertools.islice(rows, count), progress)
            for file, (split, count) in zip(split_files, counts.items(), strict=True)
        }
        record = {
            "task": "listops",
            "format_version": FORMAT_VERSION,
            "seed": seed,
            "counts": counts,
            "parameters": {
                **lengths,
                "max_depth": MAX_DEPTH,
                "min_args": MIN_ARGS,
                "max_args": MAX_ARGS,
                "operator_probability": OPERATOR_PROBABILITY,
                "chunk_candidates": CHUNK_CANDIDATES,
            },
            "numpy": np.__version__,
            "sha256": sha256,
        }
        record_file.write((json.dumps(record, indent=2) + "\n").encode())
    return folder


def pathfinder_chunk(index: int, *, seed: int, split: str, images: int) -> list[tuple[bytes, int]]:
    """Return image chunk `index` as pairs (PNG, label), empty after the last of `images` images."""
    n = min(CHUNK_IMAGES, images - index * CHUNK_IMAGES)
    if n <= 0:
        return []
    difficulty = pathfinder.DIFFICULTIES[split]
    stream = np.random.SeedSequence(seed, spawn_key=(difficulty.contour_length, index))
    drawn, labels = pathfinder.draw_images(
        np.random.Generator(np.random.PCG64(stream)), n, difficulty
    )
    return [(_to_png(image), label) for image, label in zip(drawn, labels.tolist(), strict=True)]


def _to_png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()


def _write_images(
    folder: Path, pairs: Iterable[tuple[bytes, int]], progress: tqdm, row_end: str
) -> tuple[dict[int, int], str]:
    """Write the pairs (PNG, label) in batches below `folder`, each with its metadata.

    Args:
        row_end: the generation parameters that close every row of the metadata.
    Returns:
        The number of images per label, and a digest of all files; see `files_sha256` in
        `generate_pathfinder`.
    """
    counts = {0: 0, 1: 0}
    digests: dict[str, str] = {}

    def write(name: str, content: bytes) -> None:
        (folder / name).write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()

    (folder / "metadata").mkdir()
    pairs = iter(pairs)
    for batch in itertools.count():
        # The metadata of a batch have the suffix of numpy's files, yet they are plain text.
        rows = []
        for number, (png, label) in enumerate(itertools.islice(pairs, BATCH_IMAGES)):
            if number == 0:
                (folder / "imgs" / str(batch)).mkdir(parents=True)
            write(f"imgs/{batch}/sample_{number}.png", png)
            rows.append(f"imgs/{batch} sample_{number}.png {number} {label} {row_end}\n")
            counts[label] += 1
            progress.update()
        if not rows:
            break
        write(f"metadata/{batch}.npy", "".join(rows).encode())
    lines = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return counts, hashlib.sha256(lines.encode()).hexdigest()


def generate_pathfinder(
    out: str | Path,
    *,
    seed: int,
    split: str = "hard",
    images: int = 200_000,
    workers: int | None = None,
) -> Path:
    """Write one split of Pathfinder at 32 x 32, labels balanced, and GENERATED.json.

    `files_sha256` in that record is the sha256 of what this prints within the folder:
    `find imgs metadata -type f | LC_ALL=C sort | xargs sha256sum`.

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
        workers = _available_cores()
    _check_numbers(seed, images=images, workers=workers)
    if split not in pathfinder.DIFFICULTIES:
        raise ValueError(f"split={split} is none of {', '.join(pathfinder.DIFFICULTIES)}")
    difficulty = pathfinder.DIFFICULTIES[split]
    # The columns of the official files: the last one counts the paddle contrasts to choose from.
    columns = {
        "continuity": pathfinder.CONTINUITY,
        "contour_length": difficulty.contour_length,
        "distractor_length": difficulty.distractor_length,
        "paddle_length": int(pathfinder.PADDLE_LENGTH),
        "paddle_thickness": pathfinder.PADDLE_THICKNESS,
        "paddle_margin": int(pathfinder.PADDLE_MARGIN),
        "num_paddle_contrasts": 1,
    }

    target = Path(out) / PATHFINDER_FOLDER / difficulty.folder
    chunk = functools.partial(pathfinder_chunk, seed=seed, split=split, images=images)
    num_chunks = -(-images // CHUNK_IMAGES)
    with (
        whole_folder(target) as folder,
        contextlib.closing(results_in_order(chunk, workers)) as chunks,
        tqdm(total=images, desc=f"pathfinder32 {split}", unit="img", disable=None) as progress,
    ):
        pairs = itertools.chain.from_iterable(itertools.islice(chunks, num_chunks))
        counts, sha256 = _write_images(
            folder, pairs, progress, " ".join(map(str, columns.values()))
        )
        record = {
            "task": "pathfinder32",
            "format_version": FORMAT_VERSION,
            "seed": seed,
            "split": split,
            "counts": {"images": images, "label_0": counts[0], "label_1": counts[1]},
            "parameters": {
                **columns,
                "num_distractors": difficulty.num_distractors,
                "size": pathfinder.SIZE,
                "padding": pathfinder.PADDING,
                "seed_distance": pathfinder.SEED_DISTANCE,
                "marker_radius": pathfinder.MARKER_RADIUS,
                "antialias_scale": pathfinder.ANTIALIAS_SCALE,
                "snake_contrast": pathfinder.SNAKE_CONTRAST,
                "paddle_contrast": pathfinder.PADDLE_CONTRAST,
                "batch_images": BATCH_IMAGES,
                "chunk_images": CHUNK_IMAGES,
            },
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "files_sha256": sha256,
        }
        (folder / "GENERATED.json").write_text(json.dumps(record, indent=2) + "\n")
    return target


def generate_review_pairs(
    out: str | Path, *, seed: int, imdb: str | Path | None = None, reviews: int | None = None
) -> Path:
    """Write a stand-in for AAN, cut from IMDb reviews, in AAN's format, and GENERATED.json.

    A tenth of IMDb's training reviews, drawn by the seed, makes the eval file.

    Args:
        out: data root; the files go to `out`/lra_release/tsv_data, where AAN's stand.
        seed: with the reviews, it determines every byte.
        imdb: the folder aclImdb; None takes `out`/aclImdb.
        reviews: how many of each of IMDb's two parts to use; None takes all.
    Returns:
        The folder of the files.
    Raises:
        ValueError: an argument is out of range.
        OSError: IMDb is missing, or a file exists already or cannot be written; nothing of this
            call remains.
    """
    _check_numbers(seed, **({} if reviews is None else {"reviews": reviews}))
    imdb = Path(out, "aclImdb") if imdb is None else Path(imdb)
    rng = np.random.default_rng(seed)
    drawn = {}
    for part in ("train", "test"):
        found = review_pairs.read_reviews(imdb, part)
        drawn[part] = [found[i] for i in rng.permutation(len(found))[:reviews]]
    held_out = len(drawn["train"]) // 10
    splits = {
        "train": drawn["train"][held_out:], "eval": drawn["train"][:held_out],
        "test": drawn["test"],
    }

    folder = Path(out) / AAN_FOLDER
    names = {split: f"new_aan_pairs.{split}.tsv" for split in splits}
    with whole_files(folder, [*names.values(), "GENERATED.json"]) as (*split_files, record_file):
        counts, sha256 = {}, {}
        for file, (split, chosen) in zip(split_files, splits.items(), strict=True):
            rows = list(review_pairs.pair_rows(chosen, rng))
            content = b"".join(rows)
            file.write(content)
            counts[split] = len(rows)
            sha256[names[split]] = hashlib.sha256(content).hexdigest()
        record = {
            "task": "review_pairs",
            "stand_in": "stand-in for AAN: parts of IMDb reviews",
            "format_version": FORMAT_VERSION,
            "seed": seed,
            "counts": counts,
            "parameters": {"cut": review_pairs.CUT, "reviews": reviews},
            "numpy": np.__version__,
            "sha256": sha256,
        }
        record_file.write((json.dumps(record, indent=2) + "\n").encode())
    return folder


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; each task is a sub-command whose `generate` takes the other arguments."""
    parser = OneLineParser(prog="generate_lra.py", description="Generate Long Range Arena data.")
    tasks = parser.add_subparsers(dest="task", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", required=True, help="data root, the data_dir of a configuration")
    common.add_argument("--seed", type=int, required=True, help="same seed, same bytes")
    parallel = argparse.ArgumentParser(add_help=False)
    parallel.add_argument("--workers", type=int, help="processes (default: all available cores)")

    listops = tasks.add_parser(
        "listops",
        parents=[common, parallel],
        help="nested list operations, 10 classes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    listops.add_argument("--train", type=int, default=96_000, help="training sequences")
    listops.add_argument("--val", type=int, default=2_000, help="validation sequences")
    listops.add_argument("--test", type=int, default=2_000, help="test sequences")
    listops.add_argument("--min_length", type=int, default=500, help="exclusive, in tokens")
    listops.add_argument("--max_length", type=int, default=2_000, help="exclusive, in tokens")
    listops.set_defaults(generate=generate_listops)

    paths = tasks.add_parser(
        "pathfinder32",
        parents=[common, parallel],
        help="are the two markers on one contour, 2 classes",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    paths.add_argument(
        "--split",
        choices=list(pathfinder.DIFFICULTIES),
        default="hard",
        help="contours of 6, 9 or 14 paddles",
    )
    paths.add_argument("--images", type=int, default=200_000, help="images, labels balanced")
    paths.set_defaults(generate=generate_pathfinder)

    pairs = tasks.add_parser(
        "review_pairs",
        parents=[common],
        help="are two texts parts of one IMDb review: a stand-in for AAN, 2 classes",
    )
    pairs.add_argument("--imdb", help="folder aclImdb (default: in --out)")
    pairs.add_argument("--reviews", type=int, help="of each of its two parts (default: all)")
    pairs.set_defaults(generate=generate_review_pairs)
    return parser


def _exit_on_sigterm(signum: int, frame: object) -> NoReturn:
    # As an exception, so that the clean-up of the temporaries runs.
    sys.exit(128 + signum)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 (user's mistake) or 130 (Ctrl-C)."""
    parser = build_parser()
    options = vars(parser.parse_args(argv))
    task, generate = options.pop("task"), options.pop("generate")
    signal.signal(signal.SIGTERM, _exit_on_sigterm)
    try:
        folder = generate(**options)
    except (ValueError, OSError) as error:
        print(f"{parser.prog} {task}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog} {task}: interrupted, nothing written", file=sys.stderr)
        return 130
    print(f"wrote {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
