"""Pictures: lines that a printer without colour tells apart, files whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from run.files import atomic_write
from run.log import read_metrics
from run.program import UserError

# Half a second, for pictures alone.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

# By lightness, dash and marker, so that colour is only a help; eight, as the paper compares eight
# systems. Colours: Okabe and Ito, and a grey in the place of their yellow.
COLORS = (
    "#000000", "#D55E00", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#CC79A7", "#777777",
)
DASHES = (
    "-", "--", "-.", ":", (0, (6, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 1, 2, 1)),
)
MOST_MARKERS = 20  # on a curve, about
MARKERS = ("o", "s", "^", "D", "v", "x", "*", "P")


class PlotError(UserError, ValueError):
    """What cannot be drawn, or a picture that cannot be written, told in one line."""


def line_styles() -> Iterator[dict[str, Any]]:
    """Arguments of `Axes.plot` that tell one line after the other apart, endlessly."""
    number = 0
    while True:
        color, dash, marker = (
            choices[number % len(choices)] for choices in (COLORS, DASHES, MARKERS)
        )
        yield {
            "color": color, "linestyle": dash, "marker": marker, "linewidth": 1.2,
            "markersize": 5, "markerfacecolor": "white",
        }
        number += 1


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure whole or not at all; the suffix of `path` chooses the format.

    Raises:
        PlotError: the suffix is no format.
    """
    path = Path(path)
    if path.suffix[1:] not in figure.canvas.get_supported_filetypes():
        raise PlotError(f"{path}: its suffix names no picture format; use .png, .pdf or .svg")
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_write(path) as handle:
        figure.savefig(handle, dpi=120, format=path.suffix[1:])


def curves_figure(runs: Mapping[str, Path]) -> Figure:
    """Draw training loss and validation accuracy over the steps.

    Args:
        runs: label to the folder that holds `metrics.jsonl`; one without a validation so far has
            its training loss alone.
    Raises:
        PlotError: a run has not logged anything yet.
    """
    figure = new_figure(10, 4)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for (label, folder), style in zip(runs.items(), line_styles(), strict=False):
        rows = read_metrics(folder)
        if not rows:
            raise PlotError(f"{folder}: its metrics.jsonl holds no row yet; wait for the first")
        for axes, key, scale in ((loss_axes, "loss", 1), (accuracy_axes, "val_accuracy", 100)):
            points = [(row["step"], scale * row[key]) for row in rows if row.get(key) is not None]
            steps, values = zip(*points, strict=True) if points else ((), ())
            # A marker per row would hide a long curve.
            every = max(1, len(points) // MOST_MARKERS)
            axes.plot(steps, values, label=label, markevery=every, **style)
    loss_axes.set(xlabel="step", ylabel="training loss (nats)")
    accuracy_axes.set(xlabel="step", ylabel="validation accuracy (%)")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
    # Beside the axes, as no corner of them stays free of curves.
    figure.legend(
        *accuracy_axes.get_legend_handles_labels(), loc="outside lower center", ncols=4,
        fontsize="small",
    )
    return figure
