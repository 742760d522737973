"""The runs that a command line stands for: one, or a grid of overrides with several values."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lra_config import Config, ConfigError, make_config, parse_overrides, read_mapping

MAX_RUNS = 1_000
IN_DEFAULT_NAME = {"dataset", "attention_type", "seed"}  # keys that a null run_name spells out


def load_runs(path: str | Path, overrides: Sequence[str]) -> tuple[list[Config], list[str]]:
    """The runs that a file and its overrides stand for: one, or the product of all lists.

    Where there are several, each run's name is extended by the keys that vary and their values,
    `_seed0`; a null `run_name` already names dataset, attention type and seed.

    Returns:
        The configurations, and the keys that vary.
    Raises:
        ConfigError: any of them is invalid, or two of them would share a folder.
    """
    base, parsed = read_mapping(path), parse_overrides(overrides)
    varied = [key for key, values in parsed.items() if len(values) > 1]
    for key in varied:
        if key in Config.model_fields and key not in Config.keys("sweep"):
            given = ",".join(map(value_text, parsed[key]))
            raise ConfigError(
                f"{key}={given}: only keys of what a run computes may hold several values; give one"
            )
    if (count := math.prod(map(len, parsed.values()))) > MAX_RUNS:
        raise ConfigError(
            f"{', '.join(varied)}: their values make {count:,} runs; a sweep has {MAX_RUNS:,} at "
            "most, give fewer"
        )
    configs = []
    for chosen in itertools.product(*parsed.values()):
        values = {**base, **dict(zip(parsed, chosen, strict=True))}
        config = make_config(values, str(path))
        spelled_out = IN_DEFAULT_NAME if values.get("run_name") is None else set()
        suffix = "".join(
            f"_{key}{value_text(values[key])}"
            for key in varied if key not in {*spelled_out, "run_name"}
        )
        changes = {"run_name": config.run_name + re.sub(r"[^\w.+-]", "-", suffix)}
        if config.wandb_run_name:
            changes["wandb_run_name"] = config.wandb_run_name + suffix
        configs.append(make_config({**values, **changes}, str(path)))
    for folder, count in Counter(config.run_dir for config in configs).items():
        if count > 1:
            raise ConfigError(
                f"{count} runs of the sweep over {', '.join(varied)} would share {folder}; give "
                "each value once"
            )
    return configs, varied


def single_run_arguments(
    path: str | Path, overrides: Sequence[str], config: Config, varied: Sequence[str]
) -> list[str]:
    """The command line of one run of `load_runs(path, overrides)`, on its own."""
    shared = [text for text in overrides if text.partition("=")[0] not in varied]
    # JSON: quotes keep a text from being read as a number, or as several values.
    own = {key: getattr(config, key) for key in (*varied, "run_name", "wandb_run_name")}
    return ["--config", str(path), *shared, *(f"{k}={json.dumps(v)}" for k, v in own.items())]


def value_text(value: Any) -> str:
    """A value as one would type it behind `key=`."""
    return value if isinstance(value, str) else json.dumps(value)
