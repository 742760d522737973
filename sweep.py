"""Sweeps: overrides with several values become several runs, and their results one table."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lra_config import Config, ConfigError, make_config, parse_overrides, read_mapping
from run_state import Summary, check_unclaimed
from train import train
from utils import log_line

COLUMNS = {"test accuracy, %": "test_accuracy", "best validation accuracy, %": "best_val_accuracy"}
_IN_DEFAULT_NAME = {"dataset", "attention_type", "seed"}  # keys that a null run_name spells out


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
    configs = []
    for chosen in itertools.product(*parsed.values()):
        values = {**base, **dict(zip(parsed, chosen, strict=True))}
        config = make_config(values, str(path))
        spelled_out = _IN_DEFAULT_NAME if values.get("run_name") is None else set()
        suffix = "".join(
            f"_{key}{_text(values[key])}" for key in varied if key not in {*spelled_out, "run_name"}
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


def run_sweep(configs: Sequence[Config], *, resume: bool) -> list[Summary]:
    """Train the runs one after the other.

    Args:
        configs: the runs.
        resume: leave finished runs as they are, go on with the one that was interrupted.
    Raises:
        ConfigError: without `resume`, one of the folders already holds a run.
        What `train` raises: the first failure ends the sweep.
    """
    if not resume:  # before the first run, not hours later
        for config in configs:
            check_unclaimed(config)
    summaries = []
    for number, config in enumerate(configs, start=1):
        log_line(f"run {number} of {len(configs)}: {config.run_dir}")
        summaries.append(train(config, resume=resume))
    return summaries


def sweep_table(
    configs: Sequence[Config], summaries: Sequence[Summary], varied: Sequence[str]
) -> str:
    """The runs as a Markdown table, and where seeds vary the means and deviations over them.

    The deviation is that of a sample (n - 1); a single run has none.
    """
    lines = _row("run", *varied, *COLUMNS) + _rule(1 + len(varied))
    groups: dict[tuple[str, ...], list[Summary]] = defaultdict(list)
    fixed = [key for key in varied if key != "seed"]
    for config, summary in zip(configs, summaries, strict=True):
        cells = [f"{100 * getattr(summary, name):.2f}" for name in COLUMNS.values()]
        lines += _row(config.run_name, *(_text(getattr(config, key)) for key in varied), *cells)
        groups[tuple(_text(getattr(config, key)) for key in fixed)].append(summary)
    if "seed" not in varied:
        return lines
    lines += "\n" + _row(*fixed, "seeds", *COLUMNS) + _rule(1 + len(fixed))
    for values, group in groups.items():
        cells = [
            _mean_and_deviation([100 * getattr(summary, name) for summary in group])
            for name in COLUMNS.values()
        ]
        lines += _row(*values, str(len(group)), *cells)
    return lines


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def _rule(text_columns: int) -> str:
    return f"|{'---|' * text_columns}{'---:|' * len(COLUMNS)}\n"


def _text(value: Any) -> str:
    """A value as one would type it behind `key=`."""
    return value if isinstance(value, str) else json.dumps(value)
