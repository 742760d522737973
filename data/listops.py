"""ListOps sequences from a seed, in the official on-disk format."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data.generation import available_cores, check_numbers, results_in_order, write_record
from data.layout import LAYOUTS
from run.files import atomic_folder

LAYOUT = LAYOUTS["listops"]
TRAIN, VAL, TEST = LAYOUT.expected  # sequences
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
# next token leaves exactly one piece per counted token, so a tree of length n has n pieces.
DIGIT, ROOT_END, INNER_END, OPERATOR = 0, 10, 11, 12  # first code of each kind
PIECES = [f"{digit} )".encode() for digit in range(10)]
PIECES += [b"] )", b"] ) )"]
PIECES += [
    ("( " * (num_args + 1) + f"[{name}").encode()
    for name in OPERATORS
    for num_args in range(MIN_ARGS, MAX_ARGS + 1)
]


class Level(NamedTuple):
    """The nodes of all trees at one depth; children of one parent are neighbors, in order."""

    tree: np.ndarray  # (n,) int64, index of the tree that owns the node, ascending
    num_args: np.ndarray  # (n,) int64, 0 at digits
    symbol: np.ndarray  # (n,) int64, the digit, or the index into OPERATORS


def grow_trees(
    rng: np.random.Generator, num_trees: int, max_length: int
) -> tuple[list[Level], np.ndarray]:
    """Draw trees level by level, and stop each one when it becomes too long.

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


def distinct_rows(chunk: Callable[[int], list[bytes]], workers: int) -> Iterator[bytes]:
    """Yield the rows of chunk 0, 1, ... in order, dropping the repeated ones, until closed.

    Raises:
        ValueError: MAX_BARREN_CHUNKS chunks in a row gave nothing new.
    """
    seen: set[bytes] = set()  # digests: the rows themselves would keep all data in memory
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


def _write_split(path: Path, rows: Iterable[bytes], progress: tqdm) -> str:
    """Write the header and the rows and return the sha256 of the file's bytes."""
    header = b"Source\tTarget\n"
    digest = hashlib.sha256(header)
    with open(path, "wb") as file:
        file.write(header)
        for row in rows:
            file.write(row)
            digest.update(row)
            progress.update()
    return digest.hexdigest()


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
    train: int = TRAIN,
    val: int = VAL,
    test: int = TEST,
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
        OSError: the folder exists already or cannot be written; nothing of this call remains.
    Source: Nangia & Bowman 2018 (ListOps); Tay et al. 2021 (LRA), the file format and the lengths.
    """
    if workers is None:
        workers = available_cores()
    counts = {"train": train, "val": val, "test": test}
    lengths = {"min_length": min_length, "max_length": max_length}
    check_numbers(seed, **counts, workers=workers, min_length=min_length)
    _check_lengths(min_length, max_length)

    target = Path(out, LAYOUT.paths[0])
    names = {split: LAYOUT.parts[split][0] for split in counts}
    chunk = functools.partial(listops_chunk, seed=seed, **lengths)
    with (
        atomic_folder(target, "generates ListOps") as folder,
        contextlib.closing(distinct_rows(chunk, workers)) as rows,
        tqdm(total=sum(counts.values()), desc="listops", unit="seq", disable=None) as progress,
    ):
        sha256 = {
            names[split]: _write_split(
                folder / names[split], itertools.islice(rows, count), progress
            )
            for split, count in counts.items()
        }
        parameters = {
            **lengths,
            "max_depth": MAX_DEPTH,
            "min_args": MIN_ARGS,
            "max_args": MAX_ARGS,
            "operator_probability": OPERATOR_PROBABILITY,
            "chunk_candidates": CHUNK_CANDIDATES,
        }
        write_record(folder, "listops", seed, counts=counts, parameters=parameters, sha256=sha256)
    return target
