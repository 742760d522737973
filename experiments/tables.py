"""Markdown tables of ours beside the published figures; what was not run stays empty."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tables as published


def difference(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours - theirs


def ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def average(values: Iterable[float | None]) -> float | None:
    """The mean, or None where a value is missing."""
    values = list(values)
    return None if None in values else statistics.mean(values)


def number(value: float | None, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: int = 0) -> str:
    """A Markdown table; the last `numbers` columns are aligned to the right."""
    rule = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    lines = [header, rule, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@dataclass(frozen=True)
class Measured:
    """The finished runs of one cell, one per seed."""

    summaries: list[dict[str, Any]]

    def mean(self, key: str, scale: float = 1.0) -> float | None:
        values = [scale * summary[key] for summary in self.summaries]
        return statistics.mean(values) if values else None

    @property
    def accuracy(self) -> float | None:
        """Test accuracy in %."""
        return self.mean("test_accuracy", 100)

    def accuracy_text(self) -> str:
        values = [100 * summary["test_accuracy"] for summary in self.summaries]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return number(self.accuracy) + spread

    def counts(self) -> list[str]:
        """Seeds and steps."""
        steps = sorted({summary["steps"] for summary in self.summaries})
        return [str(len(self.summaries) or ""), ", ".join(f"{n:,}" for n in steps)]


def accuracy_table(found: Mapping[tuple[str, str], Measured]) -> str:
    """Accuracy per task and system; with all tasks their average where no task is missing."""
    rows = []
    for (task, system), measured in found.items():
        theirs = published.ACCURACY.get(system, {}).get(task)
        rows.append([
            published.TASKS[task], published.SYSTEMS[system], measured.accuracy_text(),
            number(theirs), number(difference(measured.accuracy, theirs), "+.1f"),
            *measured.counts(),
        ])
    if {task for task, _ in found} == set(published.TASKS):
        for system in dict.fromkeys(system for _, system in found):
            ours = average(found[task, system].accuracy for task in published.TASKS)
            theirs = average(published.ACCURACY.get(system, {}).get(t) for t in published.TASKS)
            rows.append([
                "average", published.SYSTEMS[system], number(ours), number(theirs),
                number(difference(ours, theirs), "+.1f"), "", "",
            ])
    header = ["task", "system", "ours, %", "published, %", "difference", "seeds", "steps"]
    return markdown(header, rows)


def ablation_table(
    found: Mapping[tuple[str, str], Measured], labels: Mapping[tuple[str, str], str]
) -> str:
    """Accuracy per task and variant, and its change from RMAAT under the same budget.

    Args:
        found: by task and variant, one of which is `rmaat`.
        labels: what a variant is.
    """
    rows = []
    for (task, variant), measured in found.items():
        theirs = published.ABLATIONS.get(variant, {}).get(task)
        base = found[task, "rmaat"].accuracy if (task, "rmaat") in found else None
        rows.append([
            published.TASKS[task], labels[task, variant], measured.accuracy_text(),
            number(theirs), number(difference(measured.accuracy, theirs), "+.1f"),
            number(difference(measured.accuracy, base), "+.1f"),
            number(difference(theirs, published.ACCURACY["rmaat"][task]), "+.1f"),
            number(measured.mean("peak_memory_mib"), ".0f"), *measured.counts(),
        ])
    return markdown(
        ["task", "variant", "ours, %", "published, %", "difference", "ours - our RMAAT",
         "published - its RMAAT", "process peak, MiB", "seeds", "steps"],
        rows,
    )


def ratio_table(
    measured: Sequence[Mapping[str, Any]], lengths: Mapping[str, int], *, value: str, unit: str,
    figures: Mapping[str, Mapping[str, float | None]], figures_unit: str | None, reference: str,
) -> str:
    """Measurements at each task's length beside the published figures, as ratios to a system.

    Args:
        measured: rows of `benchmark.py`; the key `value` is shown.
        lengths: tokens, by task.
        figures: published, by system and task.
        figures_unit: None where they are ratios to `reference` already.
        reference: the system that ratios are taken to: of the same length, and where it was
            measured with several numbers of segments, of the same one.
    """
    rows = []
    for task, length in lengths.items():
        here = [row for row in measured if row["seq_len"] == length]
        absent = [{"system": s, "seq_len": length} for s in figures
                  if s not in {row["system"] for row in here}]
        for row in [*here, *absent]:
            candidates = sorted(
                (r for r in here if r["system"] == reference),
                key=lambda r: r["num_segments"] != row.get("num_segments"),
            )
            ours = ratio(row.get(value), candidates[0].get(value) if candidates else None)
            figure = figures.get(row["system"], {}).get(task)
            theirs = ratio(figure, figures[reference][task])
            rows.append([
                published.TASKS[task], row["system"], f"{length:,}",
                str(row.get("num_segments", "")), number(row.get(value), ",.0f"),
                number(ours, ".2f"), *([number(figure, "g")] if figures_unit else []),
                number(theirs, ".2f"), number(difference(ours, theirs), "+.2f"),
            ])
    return markdown(
        ["task", "system", "tokens", "segments", f"ours, {unit}", f"ours / {reference}",
         *([f"published, {figures_unit}"] if figures_unit else []), f"published / {reference}",
         "difference of the ratios"],
        rows,
    )
