"""Learning curves of one or several runs: `python plots.py runs/a runs/b --out curves.png`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from lra_config import UserError
from run.files import atomic_write
from run.log import read_metrics
from run.program import Parser, run_program


class PlotError(UserError, ValueError):
    """A run that cannot be drawn, or a picture that cannot be written, told in one line."""


def plot_curves(runs: Mapping[str, Path], path: str | Path) -> None:
    """Draw training loss and validation accuracy over the steps.

    Args:
        runs: label to the folder that holds `metrics.jsonl`; one without a validation so far has
            its training loss alone.
        path: the picture, whole or not at all; its suffix chooses the format.
    Raises:
        PlotError: a run has not logged anything yet, or the suffix is no format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path = Path(path)
    figure, (loss_axes, accuracy_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    curves = ((loss_axes, "loss", 1, ""), (accuracy_axes, "val_accuracy", 100, "."))
    for label, folder in runs.items():
        rows = read_metrics(folder)
        if not rows:
            raise PlotError(f"{folder}: its metrics.jsonl holds no row yet; wait for the first")
        for axes, key, scale, marker in curves:
            points = [(row["step"], scale * row[key]) for row in rows if key in row]
            steps, values = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, values, label=label, marker=marker, linewidth=1)
    loss_axes.set(xlabel="step", ylabel="training loss (nats)")
    accuracy_axes.set(xlabel="step", ylabel="validation accuracy (%)")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
    accuracy_axes.legend(loc="lower right", fontsize="small")
    if path.suffix[1:] not in figure.canvas.get_supported_filetypes():
        raise PlotError(f"{path}: its suffix names no picture format; use .png, .pdf or .svg")
    with atomic_write(path) as handle:
        figure.savefig(handle, dpi=120, format=path.suffix[1:])
    plt.close(figure)


def main() -> int:
    return run_program("plots.py", command)


def command() -> None:
    parser = Parser(prog="plots.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    # The folders' names, unless two of them are the same.
    names = Counter(folder.name for folder in arguments.runs)
    runs = {
        folder.name if names[folder.name] == 1 else str(folder): folder
        for folder in arguments.runs
    }
    plot_curves(runs, arguments.out)


if __name__ == "__main__":
    sys.exit(main())
