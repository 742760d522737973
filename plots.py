"""Learning curves of one or several runs: `python plots.py runs/a runs/b --out curves.png`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from run_log import read_metrics


def plot_curves(runs: Mapping[str, Path], path: str | Path) -> None:
    """Draw training loss and validation accuracy over the steps.

    Args:
        runs: label to the folder that holds `metrics.jsonl`.
        path: the picture; its suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss_axes, accuracy_axes) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for label, folder in runs.items():
        rows = read_metrics(folder)
        train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        val = [(row["step"], 100 * row["val_accuracy"]) for row in rows if "val_accuracy" in row]
        loss_axes.plot(*zip(*train, strict=True), label=label, linewidth=1)
        accuracy_axes.plot(*zip(*val, strict=True), label=label, marker=".", linewidth=1)
    loss_axes.set(xlabel="step", ylabel="training loss (nats)")
    accuracy_axes.set(xlabel="step", ylabel="validation accuracy (%)")
    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
    accuracy_axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with a metrics.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    for folder in arguments.runs:
        if not (folder / "metrics.jsonl").exists():
            parser.error(f"{folder}: holds no metrics.jsonl; name the folder of a run")
    plot_curves({folder.name: folder for folder in arguments.runs}, arguments.out)


if __name__ == "__main__":
    main()
