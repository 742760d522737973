"""Pairs of texts from IMDb reviews: a substitute for AAN, whose texts may not be redistributed.

The question is whether two texts are the two parts of one review. Two reviews of one rating and of
nearly the same length make a couple, and both are cut at the same share of their length. In every
other couple the second parts are exchanged. Each part stands in one pair alone, so that neither a
part by itself nor the two lengths give the label away: what does is that the parts fit together.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.generation import check_numbers, write_record
from data.layout import LAYOUTS
from run.files import atomic_folder

LAYOUT = LAYOUTS["aan"]
CUT = (0.4, 0.6)  # bounds of the share of a review that its first part takes
COLUMN_BREAKS = bytes.maketrans(b"\t\r\n", b"   ")
MARKUP = b"<br />"  # an author who divides one part of a review so does it in the other too


class Review(NamedTuple):
    """One file of IMDb, named `<number>_<rating>.txt`."""

    name: str  # unique over the data set
    rating: int  # 1 to 10
    text: bytes  # without tabs, line ends and markup


def read_reviews(folder: Path, part: str) -> list[Review]:
    """Return the labeled reviews of `folder`/{part}/{pos,neg}, in the order of their names.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file's name holds no rating.
    """
    reviews = []
    for path in sorted((folder / part).glob("[np]*/*.txt")):
        rating = path.stem.partition("_")[2]
        if not rating.isdigit():
            raise ValueError(f"{path}: the name is not <number>_<rating>.txt; fetch IMDb again")
        text = path.read_bytes().translate(COLUMN_BREAKS).replace(MARKUP, b" ")
        reviews.append(Review(f"{part}_{path.parent.name}_{path.stem}", int(rating), text))
    if not reviews:
        raise FileNotFoundError(
            f"{folder / part}: holds no reviews; run ./get_lra_data.sh imdb, or name its aclImdb"
        )
    return reviews


def cut(text: bytes, share: float) -> tuple[bytes, bytes]:
    """Two parts of a text, divided at a space near `share` of its length; it belongs to neither."""
    middle = round(share * len(text))
    space = text.find(b" ", middle)
    if space < 0:
        space = text.rfind(b" ", 0, middle)
    return (text[:middle], text[middle:]) if space < 0 else (text[:space], text[space + 1 :])


def pair_rows(reviews: Sequence[Review], rng: np.random.Generator) -> Iterator[bytes]:
    """Return rows `label, name, name, text, text` in random order, with as many of label 1 as 0.

    The longest review of a rating with an odd number of them is not used, and one couple at most.
    """
    by_rating = defaultdict(list)
    for review in reviews:
        by_rating[review.rating].append(review)
    couples = []
    for rating in sorted(by_rating):
        ordered = sorted(by_rating[rating], key=lambda review: (len(review.text), review.name))
        couples += zip(ordered[::2], ordered[1::2], strict=False)
    couples = [couples[i] for i in rng.permutation(len(couples) // 2 * 2)]

    rows = []
    for number, couple in enumerate(couples):
        share = rng.uniform(*CUT)
        first, second = ([*zip(couple, parts, strict=True)] for parts in
                         zip(*(cut(review.text, share) for review in couple), strict=True))
        label = number % 2
        for (a, text_a), (b, text_b) in zip(first, second if label else second[::-1], strict=True):
            columns = (b"%d.0" % label, a.name.encode(), b.name.encode(), text_a, text_b)
            rows.append(b"\t".join(columns) + b"\n")
    for i in rng.permutation(len(rows)):
        yield rows[i]


def generate_review_pairs(
    out: str | Path, *, seed: int, imdb: str | Path | None = None, reviews: int | None = None
) -> Path:
    """Write a substitute for AAN, cut from IMDb reviews, in AAN's format, and GENERATED.json.

    A tenth of IMDb's training reviews, drawn by the seed, makes the eval file.

    Args:
        out: data root; the files go to `out`/lra_release/tsv_data, the folder of AAN.
        seed: with the reviews, it determines every byte.
        imdb: the folder aclImdb; None takes `out`/aclImdb.
        reviews: how many of each of IMDb's two parts to use; None takes all.
    Returns:
        The folder of the files.
    Raises:
        ValueError: an argument is out of range.
        OSError: IMDb is missing, or the folder exists already or cannot be written; nothing of this
            call remains.
    """
    check_numbers(seed, **({} if reviews is None else {"reviews": reviews}))
    imdb = Path(out, "aclImdb") if imdb is None else Path(imdb)
    rng = np.random.default_rng(seed)
    drawn = {}
    for part in ("train", "test"):
        found = read_reviews(imdb, part)
        drawn[part] = [found[i] for i in rng.permutation(len(found))[:reviews]]
    held_out = len(drawn["train"]) // 10
    splits = {
        "train": drawn["train"][held_out:], "eval": drawn["train"][:held_out],
        "test": drawn["test"],
    }

    target = Path(out, LAYOUT.paths[0])
    names = dict(zip(splits, (name for (name,) in LAYOUT.parts.values()), strict=True))
    with atomic_folder(target, "generates review pairs") as folder:
        counts, sha256 = {}, {}
        for split, chosen in splits.items():
            rows = list(pair_rows(chosen, rng))
            content = b"".join(rows)
            (folder / names[split]).write_bytes(content)
            counts[split] = len(rows)
            sha256[names[split]] = hashlib.sha256(content).hexdigest()
        write_record(
            folder, "review_pairs", seed, stand_in="substitute for AAN: parts of IMDb reviews",
            counts=counts, parameters={"cut": CUT, "reviews": reviews}, sha256=sha256,
        )
    return target
