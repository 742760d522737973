"""Sweeps: overrides with several values become several runs, and their results one table.

torch is imported where it is needed: wrong command lines are reported before it is loaded.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lra_config import Config, ConfigError, make_config, parse_overrides, read_mapping, renamed
from run.program import log_line
from tables import markdown

if TYPE_CHECKING:
    from run.checkpoint import Summary

IN_DEFAULT_NAME = {"dataset", "attention_type", "seed"}  # keys that a null run_name spells out
COLUMNS = {"test accuracy, %": "test_accuracy", "best validation accuracy, %": "best_val_accuracy"}


def load_runs(path: str | Path, overrides: Sequence[str]) -> tuple[list[Config], list[str]]:
    """Return the runs of a file and its overrides: one, or the product of all lists.

    The name of each of several runs is extended by the keys that vary and their values, as in
    `_seed0`. A null `run_name` already contains dataset, attention type and seed.

    Returns:
        The configurations, and the keys that vary.
    Raises:
        ConfigError: any of them is invalid, or two of them would share a folder.
    """
    base, parsed = renamed(read_mapping(path), str(path)), parse_overrides(overrides)
    varied = [key for key, values in parsed.items() if len(values) > 1]
    for key in varied:
        if key in Config.model_fields and key not in Config.keys("sweep"):
            given = ",".join(map(value_text, parsed[key]))
            raise ConfigError(
                f"{key}={given}: only keys of what a run computes may hold several values; give one"
            )
    configs = []
    for chosen in itertools.product(*parsed.values()):
        override = dict(zip(parsed, chosen, strict=True))
        values = base | renamed(override, "override")
        config = make_config(values, str(path))
        spelled_out = IN_DEFAULT_NAME if values.get("run_name") is None else set()
        suffix = "".join(
            f"_{key}{value_text(override[key])}"
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


def value_text(value: Any) -> str:
    """Return a value as one would type it after `key=`."""
    return value if isinstance(value, str) else json.dumps(value)


def run_sweep(configs: Sequence[Config], *, resume: bool) -> list[Summary]:
    """Train the runs one after the other; the first failure ends the sweep.

    Args:
        configs: the runs.
        resume: keep finished runs, and continue interrupted ones.
    Raises:
        ConfigError: without `resume`, one of the folders already holds a run.
        What `train` raises.
    """
    from run.checkpoint import check_unclaimed
    from train import train

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
    """Return the runs as a Markdown table; where seeds vary, also means and standard deviations.

    The deviation is that of a sample (n - 1); a single run has no deviation.
    """
    runs, groups = [], defaultdict(list)
    fixed = [key for key in varied if key != "seed"]
    for config, summary in zip(configs, summaries, strict=True):
        text = {key: value_text(getattr(config, key)) for key in varied}
        accuracies = [100 * getattr(summary, name) for name in COLUMNS.values()]
        runs.append([config.run_name, *text.values(), *(f"{value:.2f}" for value in accuracies)])
        groups[tuple(text[key] for key in fixed)].append(accuracies)
    table = markdown(["run", *varied, *COLUMNS], runs, numbers=len(COLUMNS)) + "\n"
    if "seed" not in varied:
        return table
    means = [
        [*values, str(len(group)), *map(_mean_and_deviation, zip(*group, strict=True))]
        for values, group in groups.items()
    ]
    header = [*fixed, "seeds", *COLUMNS]
    return table + "\n" + markdown(header, means, numbers=len(COLUMNS)) + "\n"


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
