"""Sweeps: overrides with several values become several runs, and their results one table."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from experiments.grid import value_text
from experiments.tables import markdown
from lra_config import Config
from run.state import Summary, check_unclaimed
from run.terminal import log_line
from train import train

COLUMNS = {"test accuracy, %": "test_accuracy", "best validation accuracy, %": "best_val_accuracy"}


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
    runs, groups = [], defaultdict(list)
    fixed = [key for key in varied if key != "seed"]
    for config, summary in zip(configs, summaries, strict=True):
        text = {key: value_text(getattr(config, key)) for key in varied}
        accuracies = [f"{100 * getattr(summary, name):.2f}" for name in COLUMNS.values()]
        runs.append([config.run_name, *text.values(), *accuracies])
        groups[tuple(text[key] for key in fixed)].append(summary)
    table = markdown(["run", *varied, *COLUMNS], runs, numbers=len(COLUMNS)) + "\n"
    if "seed" not in varied:
        return table
    means = [
        [*values, str(len(group)), *(
            _mean_and_deviation([100 * getattr(summary, name) for summary in group])
            for name in COLUMNS.values()
        )]
        for values, group in groups.items()
    ]
    header = [*fixed, "seeds", *COLUMNS]
    return table + "\n" + markdown(header, means, numbers=len(COLUMNS)) + "\n"


def _mean_and_deviation(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean
