"""Generate Long Range Arena data in the official on-disk format, from a seed.

Use `python generate_lra.py listops --out datasets --seed 0`, or `pathfinder32`. The same seed gives
the same bytes for any number of workers, because chunk i always draws from random stream i and the
chunks are consumed in order. `review_pairs` divides the IMDb reviews of the data root.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from data.listops import TEST, TRAIN, VAL, generate_listops
from data.pathfinder import IMAGES, generate_pathfinder
from data.pathfinder_scenes import DIFFICULTIES
from data.review_pairs import generate_review_pairs
from run.program import Parser, UserError, end_by_exception, log_line, run_program


def build_parser() -> argparse.ArgumentParser:
    """Return the parser; each task is a sub-command whose `generate` takes the other arguments."""
    parser = Parser(prog="generate_lra.py", description="Generate Long Range Arena data.")
    commands = parser.add_subparsers(required=True)

    def add(name: str, generate: object, description: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        command.set_defaults(generate=generate)
        command.add_argument("--out", required=True, help="data root, as data_dir names it")
        command.add_argument("--seed", type=int, required=True, help="same seed, same bytes")
        return command

    listops = add("listops", generate_listops, "nested list operations, 10 classes")
    listops.add_argument("--train", type=int, default=TRAIN, help="training sequences")
    listops.add_argument("--val", type=int, default=VAL, help="validation sequences")
    listops.add_argument("--test", type=int, default=TEST, help="test sequences")
    listops.add_argument("--min_length", type=int, default=500, help="exclusive, in tokens")
    listops.add_argument("--max_length", type=int, default=2_000, help="exclusive, in tokens")

    paths = add("pathfinder32", generate_pathfinder, "connected markers in an image, 2 classes")
    paths.add_argument(
        "--split", choices=list(DIFFICULTIES), default="hard", help="contours of 6, 9, 14 paddles"
    )
    paths.add_argument("--images", type=int, default=IMAGES, help="images, labels balanced")
    for command in (listops, paths):
        command.add_argument("--workers", type=int, help="processes; None: one per core")

    pairs = add("review_pairs", generate_review_pairs, "halves of IMDb reviews, instead of AAN")
    pairs.add_argument("--imdb", help="folder aclImdb (default: in --out)")
    pairs.add_argument("--reviews", type=int, help="of each of its two parts (default: all)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 (user's mistake), 130 or 143."""
    def command() -> None:
        options = vars(build_parser().parse_args(argv))
        generate = options.pop("generate")
        end_by_exception()
        try:
            folder = generate(**options)
        except ValueError as error:  # of an argument
            raise UserError(error) from None
        log_line(f"wrote {folder}")

    return run_program("generate_lra.py", command)


if __name__ == "__main__":
    sys.exit(main())
