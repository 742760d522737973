"""The models that are asked about their memory: finished runs, and configurations as they start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from data.packing import PackedSplit, load_splits
from lra_config import load_config, single_values
from lra_datasets import open_dataset
from model import RMAAT, build_model
from predict import load_trained, tokenizer_of
from run.program import Parser, UserError
from training.acceleration import resolve_device
from utils import seed_everything


def parse_places(program: str, description: str) -> tuple[list[Path], list[str]]:
    """The places and the overrides of a command line."""
    parser = Parser(prog=program, description=description)
    parser.add_argument(
        "places", nargs="+", type=Path, metavar="PLACE",
        help="the folder of a finished run, or a YAML file",
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="overrides")
    arguments = parser.parse_args()
    return arguments.places, arguments.overrides


def open_place(place: Path, overrides: Sequence[str]) -> tuple[RMAAT, Mapping[str, PackedSplit]]:
    """The model of a finished run's folder, or the start of a configuration's, and its data.

    Raises:
        UserError: `place` has no memory that is handed on.
    """
    if place.is_dir():
        model = load_trained(place / "model.safetensors", None, single_values(overrides))
    else:
        config = load_config(place, overrides)
        seed_everything(config.seed)
        model = build_model(config).to(resolve_device(config)).eval()
    config = model.config
    if config.num_segments == config.num_sequences or not config.num_memory_tokens:
        raise UserError(f"{place}: hands no memory on; name a model of several segments")
    reader = open_dataset(config)
    if place.is_dir():
        reader.tokenizer = tokenizer_of(model)
    return model, load_splits(reader)
