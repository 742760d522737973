"""Figures of runs and measurements.

    python plots.py all                  redraw every figure that a page of results/ or docs/ shows
    python plots.py curves RUN...        training loss and validation accuracy over the steps
    python plots.py attention RUN TEXT   the weights with which positions read each other
    python plots.py memory FILE...       peak memory over length, from `benchmark.py memory`
    python plots.py scaling FILE...      time and memory over length, from `benchmark.py scaling`
    python plots.py astrocyte            the two processes of the macro model, and its factors

RUN is a folder that `run_train.py` wrote; `--out FILE` names the figure.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

# Before matplotlib is imported: a notebook's kernel may pass on a backend that is not installed.
if "ipykernel" not in sys.modules:
    os.environ["MPLBACKEND"] = "agg"

from data.tasks import ByteTokenizer
from lra_config import Config, load_config
from run.files import atomic_write, write_json
from run.log import read_metrics
from run.program import Parser, UserError, log_line, one_line, run_program
from tables import ACCURACY, SYSTEMS, TASKS

if TYPE_CHECKING:  # matplotlib takes half a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from model import RMAAT

ROOT = Path(__file__).parent
SOURCES = "results/figures/sources.json"  # the SHA-256 of each figure's input files

STYLE = {
    "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
    "axes.spines.right": False, "legend.fontsize": "small", "legend.frameon": False,
    "legend.handlelength": 3,
    "lines.linewidth": 1.3, "lines.markersize": 4.5, "errorbar.capsize": 4.5,
    "savefig.dpi": 160, "image.cmap": "gray_r", "svg.fonttype": "none",
}
# Okabe and Ito's colors, with darker ones of Paul Tol's for their pale ones. Dashes and markers
# differ too, so that lines differ in grayscale. Eight each, as the paper compares eight systems.
COLORS = (
    "#000000", "#D55E00", "#0072B2", "#882255", "#117733", "#777777", "#332288", "#CC6677",
)
DASHES = (
    "-", "--", "-.", ":", (0, (6, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 1, 2, 1)),
)
MARKERS = ("o", "s", "^", "D", "v", "<", ">", "p")
GRAY = "0.45"  # of reference lines
MOST_MARKERS = 40  # on a curve; more would hide it


def line_style(number: int) -> dict[str, Any]:
    """Return arguments of `Axes.plot` that distinguish line `number` from the others."""
    return {
        "color": COLORS[number % len(COLORS)], "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)], "markerfacecolor": "white", "clip_on": False,
    }


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, that needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write_figure(path: str | Path, draw: Callable[[], Figure]) -> None:
    """Draw a figure in the common style and write it atomically; the suffix chooses the format.

    Raises:
        UserError: the suffix is not a format of matplotlib, or `draw` raises it.
    """
    path = Path(path)
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = draw()
        if path.suffix[1:] not in figure.canvas.get_supported_filetypes():
            raise UserError(f"{path}: the suffix names no figure format; use .png, .pdf or .svg")
        with atomic_write(path) as handle:
            figure.savefig(handle, format=path.suffix[1:])


def write_curves(folder: str | Path) -> None:
    """Write a run's `curves.png`. Never raises: a failure is one line of the log."""
    path = Path(folder) / "curves.png"
    try:
        write_figure(path, lambda: curves_figure([Path(folder)]))
    except Exception as error:
        log_line(one_line(f"{path}: not drawn, {type(error).__name__}: {error}"))


def run_config(folder: Path) -> Config | None:
    """Return a run's configuration; None if it is missing or cannot be read."""
    try:
        return load_config(folder / "config.yaml", quiet=True)
    except UserError:
        return None


def system_name(config: Config) -> str:
    """Return the paper's name of the system that a configuration describes."""
    single = config.num_segments == config.num_sequences
    systems = {
        "astro": "at" if single and config.hebbian_sigmoid else "rmaat",
        "linear": "linear_transformer" if single else "rlt",
        "softmax": "transformer" if single else "rmt",
        "nystrom": "nystromformer", "luna": "luna",
    }
    return SYSTEMS[systems[config.attention_type]]


def labeled_runs(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Group runs that differ by their seed only, under a label for the legend.

    A label is the system's name. It adds the path of a run where several groups share a system. A
    run without a readable configuration is labeled by its path.
    """
    groups: dict[str, list[Path]] = defaultdict(list)
    names: dict[str, str] = {}
    common = os.path.commonpath([folder.absolute().parent for folder in folders])
    for folder in folders:
        config = run_config(folder)
        path = str(folder.absolute().relative_to(common))
        outcome = config and config.model_dump(include=set(Config.keys("outcome")) - {"seed"})
        key = json.dumps(outcome or path, sort_keys=True)
        groups[key].append(folder)
        names.setdefault(key, system_name(config) if config else path)
    shared = list(names.values())
    labels = {}
    for key, runs in groups.items():
        path = str(runs[0].absolute().relative_to(common))
        label = names[key] if shared.count(names[key]) == 1 else f"{names[key]}, {path}"
        labels[label] = runs
    return labels


def mean_and_range(
    runs: Sequence[Sequence[dict[str, Any]]], key: str, scale: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the steps that all runs have logged, and the mean, least and largest value there."""
    series = [
        {row["step"]: scale * row[key] for row in rows if row.get(key) is not None}
        for rows in runs
    ]
    steps = sorted(set.intersection(*map(set, series)))
    values = np.array([[own[step] for step in steps] for own in series])
    return np.array(steps), values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def draw_curves(axes: Axes, labels: dict[str, list[Path]], key: str, scale: float) -> None:
    """Draw the mean over each label's runs, with a band from the least to the largest value.

    Raises:
        UserError: a run has not logged anything yet.
    """
    for number, (label, folders) in enumerate(labels.items()):
        rows = [read_metrics(folder) for folder in folders]
        for folder, own in zip(folders, rows, strict=True):
            if not own:
                raise UserError(f"{folder}: its metrics.jsonl holds no row yet; wait for the first")
        steps, mean, low, high = mean_and_range(rows, key, scale)
        style = line_style(number)
        if len(folders) > 1:
            label += f" ({len(folders)} seeds)"
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
        if len(steps) < 3:
            style["linestyle"] = "none"  # two points are no curve
        elif len(steps) > MOST_MARKERS:
            style |= {"marker": "", "linewidth": 0.8}
        axes.plot(steps, mean, label=label, **style)


def curves_figure(folders: Sequence[Path]) -> Figure:
    """Draw training loss and validation accuracy over the steps, with bands over seeds.

    Args:
        folders: of runs. One without a validation so far shows its training loss only.
    Raises:
        UserError: a run has not logged anything yet.
    """
    figure = new_figure(9, 3.8)
    loss_axes, accuracy_axes = figure.subplots(1, 2, sharex=True)
    labels = labeled_runs(folders)
    draw_curves(loss_axes, labels, "loss", 1)
    draw_curves(accuracy_axes, labels, "val_accuracy", 100)
    configs = [config for folder in folders if (config := run_config(folder)) is not None]
    if len({config.dataset for config in configs}) == 1:
        label, accuracy = constant_answer(configs[0])
        accuracy_axes.axhline(accuracy, color=GRAY, linestyle=":", label=label)
        splits = configs[0].training_splits if len(labels) == 1 else {}
        for split, step in list(splits.items())[1:]:
            for axes in figure.axes:
                axes.axvline(step, color=GRAY, linestyle="--", linewidth=0.8)
            accuracy_axes.text(
                step, 0.98, f"{split} split", rotation=90, ha="right", va="top", fontsize="small",
                transform=accuracy_axes.get_xaxis_transform(),
            )
    loss_axes.set(xlabel="step", ylabel="training loss (nats)")
    accuracy_axes.set(xlabel="step", ylabel="validation accuracy (%)", xlim=(0, None))
    # Outside the axes, as curves may fill every corner.
    figure.legend(
        *accuracy_axes.get_legend_handles_labels(), loc="outside lower center", ncols=3
    )
    return figure


def constant_answer(config: Config) -> tuple[str, float]:
    """Return the name and the accuracy in % of the best constant answer.

    The classes are about equally frequent in all tasks but ListOps.
    """
    if config.dataset == "listops":
        return "majority class", 17.6
    return "chance", 100 / config.task.num_classes


# Tasks whose equal-step runs have other data than the paper's, and the title to say so.
OTHER_DATA = {"retrieval": "Retrieval substitute", "pathfinder": "Pathfinder, easy split"}
# The systems in the order of the table in docs/comparing.md.
ORDER = (
    "rmaat", "rmt", "rlt", "at", "transformer", "linear_transformer", "nystromformer", "luna",
)


def accuracy_figure(runs: dict[str, dict[str, list[Path]]]) -> Figure:
    """Draw test accuracy per task and system next to the paper's, with bars over the seeds.

    Args:
        runs: by task and system, the folders of its seeds; as named in `tables`.
    """
    figure = new_figure(11, 3.8)
    entries: dict[str, Any] = {}  # of the legend
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, (task, systems) in zip(panels, runs.items(), strict=True):
        rows = {
            system: [json.loads((folder / "summary.json").read_text()) for folder in folders]
            for system, folders in systems.items()
        }
        steps = max(row["steps"] for seeds in rows.values() for row in seeds)
        for number, (system, seeds) in enumerate(rows.items()):
            values = [100 * row["test_accuracy"] for row in seeds]
            label, style = "ours, one seed", {"fmt": "o", "markerfacecolor": "white"}
            if len(values) > 1:
                label, style = "ours, mean and standard deviation of three seeds", {"fmt": "o"}
                style["yerr"] = statistics.stdev(values)
            elif seeds[0]["steps"] < steps:
                label, style["fmt"] = "ours, one seed, stopped early", "v"
            entries[label] = axes.errorbar(
                [number], [statistics.mean(values)], color="black", **style
            )
            published = ACCURACY.get(system, {}).get(task)
            if published is not None and task not in OTHER_DATA:
                ends = [number - 0.4, number + 0.4]
                (entries["paper"],) = axes.plot(ends, 2 * [published], color=GRAY, zorder=1)
        config = load_config(systems["rmaat"][0] / "config.yaml", quiet=True)
        constant = axes.axhline(constant_answer(config)[1], color=GRAY, linestyle=":")
        entries["chance; ListOps: majority class"] = constant
        axes.set_xticks(range(len(systems)), [SYSTEMS[name] for name in systems], rotation=90)
        axes.set(title=OTHER_DATA.get(task, TASKS[task]), xlim=(-0.6, len(systems) - 0.4))
        axes.margins(y=0.1)
        axes.yaxis.get_major_locator().set_params(integer=True, nbins=7)
        axes.grid(axis="x", visible=False)
    figure.axes[0].set_ylabel("test accuracy (%)")
    labels = sorted(entries)
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def draw_attention(folder: Path, text: str) -> Figure:
    """Draw the attention of a finished run on a ListOps expression or a text.

    Raises:
        UserError: the run has no weights, the task has no texts, or the text cannot be read.
    """
    from model import RMAAT

    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder / 'model.safetensors'}: missing; name a finished run")
    model = RMAAT.from_pretrained(str(folder))
    task = model.config.task
    if task.is_image or task.num_documents > 1:
        raise UserError(f"{folder}: {model.config.dataset} has no single text to draw")
    tokenizer = task.tokenizer(model.vocabulary) if model.vocabulary else task.tokenizer()
    try:
        document = tokenizer.encode(text.encode() if task.tokenizer is ByteTokenizer else text)
        return attention_figure(model, document)
    except ValueError as error:
        raise UserError(f"TEXT {text!r}: {error}") from None


def attention_figure(model: RMAAT, document: np.ndarray, index: int = 0) -> Figure:
    """Draw, per layer and head, the weights with which positions read each other in one segment.

    Args:
        model: in evaluation mode.
        document: (length,) as its tokenizer stores it.
        index: of the segment, from 0.
    Raises:
        ValueError: the document has no such segment, or the attention no such weights.
    """
    import torch

    from training.diagnostics import attention_rows

    config = model.config
    ids = torch.from_numpy(document.astype("int64") + config.task.tokenizer.offset)
    maps = attention_rows(model, ids[None].to(model.memory.device), index).float().cpu().numpy()
    layers, heads, N, _ = maps.shape
    M = config.num_memory_tokens
    names = position_names(config, ids[index * model.segment_len :][: N - M].tolist())
    figure = new_figure(3.4 * heads + 0.6, 3.2 * layers)
    all_axes = figure.subplots(layers, heads, squeeze=False)
    for layer, head in np.ndindex(layers, heads):
        axes, weights = all_axes[layer][head], maps[layer, head]
        image = axes.imshow(weights, vmin=min(0, weights.min()))
        axes.set(title=f"layer {layer + 1}, head {head + 1}", xlabel="position that is read")
        axes.set_ylabel("reading position")
        axes.grid(False)
        if names:
            axes.set_xticks(range(N), names, rotation=90, fontsize=7)
            axes.set_yticks(range(N), names, fontsize=7)
        figure.colorbar(image, ax=axes, shrink=0.8, label="weight")
    return figure


def position_names(config: Config, ids: Sequence[int]) -> list[str]:
    """Return the names of memory tokens and tokens; none for many tokens or plain numbers."""
    tokens = getattr(config.task.tokenizer, "tokens", None)
    if tokens is None or len(ids) > 60:
        return []
    return [f"mem {i + 1}" for i in range(config.num_memory_tokens)] + [tokens[i - 1] for i in ids]


# The quantities drawn over the length of the sequence: label and value of a row.
QUANTITIES: dict[str, Callable[[dict[str, Any]], float]] = {
    "time per token (µs)": lambda row: 1e6 * row["step_seconds"] / row["seq_len"],
    "peak memory of a training step (MiB)": itemgetter("peak_mib"),
}


def length_figure(files: Sequence[Path], what: str) -> Figure:
    """Draw measurements over the length of the sequence, one line per system.

    Args:
        files: of `benchmark.py WHAT --json`.
        what: memory or scaling; scaling has a second panel with the time per token.
    Raises:
        UserError: a file is not what `benchmark.py WHAT --json` writes.
    """
    labels = list(QUANTITIES)[what == "memory":]
    points: dict[str, dict[str, list[tuple[int, float]]]] = {label: {} for label in labels}
    for file, label in itertools.product(files, labels):
        try:
            for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
                if "error" not in row:
                    line = points[label].setdefault(row["system"], [])
                    line.append((row["seq_len"], QUANTITIES[label](row)))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{file}: holds no rows of `benchmark.py {what}`; measure with --json {file}"
            ) from None
    figure = new_figure(2 + 4.2 * len(labels), 3.8)
    for axes, label in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels, strict=True):
        for number, (system, line) in enumerate(points[label].items()):
            # Later lines are thinner, so that a line below them remains visible.
            size = (len(points[label]) - number) / 2
            style = line_style(number) | {"linewidth": 0.6 + size, "markersize": 3 + 2.4 * size}
            axes.plot(*zip(*sorted(line), strict=True), label=system, **style)
        lengths = sorted({length for line in points[label].values() for length, _ in line})
        lengths = lengths[:: 1 + len(lengths) // 5]
        axes.set(xscale="log", xlabel="sequence length (tokens)", ylabel=label)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xticks([], minor=True)
        if len(points[label]) == 1:
            axes.set_ylim(0, 1.1 * axes.dataLim.y1)
            continue
        axes.set_yscale("log", subs=[])
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.legend()
    return figure


def astrocyte_figure() -> Figure:
    """Draw the two astrocytic processes over the cycles, and the factors they yield."""
    from astrocyte import DEFAULT, TABLE_SEGMENTS, retention_factors, simulate

    trajectory = simulate(DEFAULT)
    figure = new_figure(11, 3.2)
    axes = figure.subplots(1, 3)
    cycles, ends = trajectory.times / DEFAULT.tau_cycle, trajectory.cycle_ends
    for axis, process, title, label, color in (
        (axes[0], trajectory.p_short, "Fast process, STP", "$p^s$, mean over synapses", COLORS[1]),
        (axes[1], trajectory.p_long, "Slow process, LTP", "$p^l$, mean over synapses", COLORS[2]),
    ):
        for cycle in range(DEFAULT.num_cycles):
            axis.axvspan(cycle, cycle + DEFAULT.duty_cycle, color="0.93", linewidth=0)
        mean = process.mean(axis=(1, 2))
        axis.plot(cycles, mean, color=color)
        axis.plot(cycles[ends], mean[ends], "o", color=color, clip_on=False)
        axis.set(title=title, xlabel="time (cycles; gray: input on, dots: ends of cycles)")
        axis.set(xlim=(0, DEFAULT.num_cycles), ylim=(0, None))
        axis.set_ylabel(label, fontsize="large")
    for number, T in enumerate(TABLE_SEGMENTS):
        factors = retention_factors(T).tolist()
        axes[2].plot(range(1, T + 1), factors, label=f"T = {T}", **line_style(number))
    axes[2].set(title="Memory retention factor", xlabel="segment t", ylabel="factor")
    axes[2].set(ylim=(0, None), xticks=(1, *TABLE_SEGMENTS))
    axes[2].legend()
    return figure


def committed_figures(root: Path = ROOT) -> Iterator[tuple[str, list[Path], Callable[[], Figure]]]:
    """Yield the path of each figure below `results`, its input files and how to draw it."""
    results = root / "results"
    listops = results / "listops/rmaat"
    weights = [listops / "model.safetensors", listops / "config.json"]
    expression = "[MAX 2 9 [MIN 4 7 ] 0 ]"
    yield "figures/attention.png", weights, lambda: draw_attention(listops, expression)
    yield "figures/astrocyte.png", [], astrocyte_figure
    memory, scaling = ([results / f"benchmark/{what}_cpu.json"] for what in ("memory", "scaling"))
    yield "figures/memory.png", memory, lambda: length_figure(memory, "memory")
    yield "benchmark/scaling_cpu.png", scaling, lambda: length_figure(scaling, "scaling")
    runs = {
        task: {system: sorted((results / task / "equal" / system).glob("seed*"))
               for system in ORDER}
        for task in TASKS
    }
    files = [folder / name for systems in runs.values() for folders in systems.values()
             for folder in folders for name in ("config.yaml", "summary.json")]
    yield "figures/accuracy.png", files, lambda: accuracy_figure(runs)
    for run in (results / "quickstart", results / "pathfinder/rmaat_curriculum/seed0"):
        files = [run / name for name in ("config.yaml", "metrics.jsonl")]
        yield f"{run.relative_to(results)}/curves.png", files, lambda run=run: curves_figure([run])


def digests(files: Sequence[Path], root: Path = ROOT) -> dict[str, str]:
    """Return the SHA-256 of each file, by its path below `root`."""
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def draw_all(root: Path = ROOT) -> None:
    """Redraw every committed figure and record the digests of the input files."""
    sources = {}
    for name, files, draw in committed_figures(root):
        write_figure(root / "results" / name, draw)
        sources[name] = digests(files, root)
        log_line(f"results/{name}")
    write_json(root / SOURCES, sources)


def stale_figures(root: Path = ROOT) -> list[str]:
    """Return the committed figures whose input files changed after they were drawn."""
    recorded = json.loads((root / SOURCES).read_text())
    return [
        name for name, files, _ in committed_figures(root)
        if recorded.get(name) != digests(files, root) or not (root / "results" / name).is_file()
    ]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(
        prog="plots.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True, dest="kind")
    kinds.add_parser("all")
    kind = kinds.add_parser("curves")
    kind.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    kind.set_defaults(draw=lambda arguments: curves_figure(arguments.runs))
    for name in ("memory", "scaling"):
        kind = kinds.add_parser(name)
        kind.add_argument("files", nargs="+", type=Path, metavar="FILE")
        kind.set_defaults(draw=lambda arguments: length_figure(arguments.files, arguments.kind))
    kind = kinds.add_parser("attention")
    kind.add_argument("run", type=Path, metavar="RUN", help="holds model.safetensors")
    kind.add_argument("text", metavar="TEXT", help="a ListOps expression or a text")
    kind.set_defaults(draw=lambda arguments: draw_attention(arguments.run, arguments.text))
    kind = kinds.add_parser("astrocyte")
    kind.set_defaults(draw=lambda arguments: astrocyte_figure())
    for name, kind in kinds.choices.items():
        kind.add_argument("--out", type=Path, default=Path(f"{name}.png"), metavar="FIGURE")
    return parser.parse_args()


def command() -> None:
    """Draw the figure of the command line, or all of them."""
    arguments = parse_arguments()
    if arguments.kind == "all":
        draw_all()
    else:
        write_figure(arguments.out, lambda: arguments.draw(arguments))


def main() -> int:
    """Run the command line; return its exit status."""
    return run_program("plots.py", command)


if __name__ == "__main__":
    sys.exit(main())
