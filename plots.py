"""Pictures from what runs and measurements leave.

    python plots.py curves RUN...        training loss and validation accuracy over the steps
    python plots.py segments RUN...      test accuracy over the number of segments
    python plots.py retention RUN...     the retention factors of the runs' memories
    python plots.py attention RUN LINE   what every row of a segment reads from every other
    python plots.py memory FILE...       peak memory over time of `benchmark.py memory`'s systems

RUN is a folder as `run_train.py` leaves it; `--out FILE` names the picture. Without a word in front
the runs' curves are drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field, TypeAdapter

from lra_config import Config, Size, load_config
from run.figures import PlotError, curves_figure, line_styles, new_figure, save_figure
from run.files import read_json
from run.program import Parser, run_program

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from model import RMAAT


class Finished(BaseModel):
    """What a `summary.json` says that pictures need."""

    steps: Size
    test_accuracy: Annotated[float, Field(ge=0, le=1)]
    examples: dict[str, Size]


def draw_curves(arguments: argparse.Namespace) -> Figure:
    # By the folders' names, with as much of their paths as tells runs of one name apart.
    common = os.path.commonpath([folder.absolute().parent for folder in arguments.runs])
    runs = {str(folder.absolute().relative_to(common)): folder for folder in arguments.runs}
    return curves_figure(runs)


def draw_attention(arguments: argparse.Namespace) -> Figure:
    from predict import encode_line, load_trained, tokenizer_of

    model = load_trained(arguments.run / "model.safetensors")
    text = arguments.line.encode()
    try:
        documents = encode_line(text, model.config, tokenizer_of(model))
    except ValueError as error:
        raise PlotError(f"LINE {error}") from None
    if len(documents) > 1:
        raise PlotError(f"{arguments.run}: of a pair of documents there is no picture")
    return attention_figure(model, documents[0], arguments.segment)


def finished_run(folder: Path) -> tuple[Config, Finished]:
    """The configuration and the summary of a run.

    Raises:
        PlotError: it has not come to its end, or its summary is damaged.
    """
    path = folder / "summary.json"
    try:
        return load_config(folder / "config.yaml"), read_json(path, TypeAdapter(Finished))
    except FileNotFoundError:
        raise PlotError(f"{path}: missing; name the folder of a finished run") from None
    except ValueError as error:
        raise PlotError(f"{path}: {error}; name the folder of a finished run") from None


def segments_figure(runs: Sequence[Path]) -> Figure:
    """Draw test accuracy over T with its standard error: a point per T, the mean over its runs.

    A line holds the runs of one task, attention and number of steps.

    Raises:
        PlotError: a run is not finished.
    """
    lines: dict[str, dict[int, list[Finished]]] = defaultdict(lambda: defaultdict(list))
    for folder in runs:
        config, summary = finished_run(folder)
        label = f"{config.dataset}, {config.attention_type}, {summary.steps:,} steps"
        lines[label][config.num_segments].append(summary)
    figure = new_figure(5.2, 3.6)
    axes = figure.subplots()
    for (label, points), style in zip(lines.items(), line_styles(), strict=False):
        segments = sorted(points)
        means, errors = zip(*(mean_accuracy(points[T]) for T in segments), strict=True)
        axes.errorbar(segments, means, errors, capsize=3, label=label, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts := sorted({T for points in lines.values() for T in points}), counts)
    axes.set(xlabel="segments T", ylabel="test accuracy (%), standard error")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def mean_accuracy(summaries: Sequence[Finished]) -> tuple[float, float]:
    """Test accuracy in % over runs of one kind, and its standard error for the test examples.

    Seeds are tested on the same examples: more of them do not make the error smaller.
    """
    mean = statistics.mean(summary.test_accuracy for summary in summaries)
    examples = min(summary.examples["test"] for summary in summaries)
    return 100 * mean, 100 * math.sqrt(mean * (1 - mean) / examples)


def retention_figure(runs: Sequence[Path]) -> Figure:
    """Draw RetentionFactor(t, T) of the memory that leaves each segment, a line per T."""
    from astrocyte import retention_factors

    configs = [load_config(folder / "config.yaml") for folder in runs]
    figure = new_figure(5.2, 3.6)
    axes = figure.subplots()
    # Paired documents are encoded apart, each in its share of the segments.
    counts = sorted({(c.num_segments // c.num_sequences, c.astro_mem) for c in configs})
    for (T, astro_mem), style in zip(counts, line_styles(), strict=False):
        factors = retention_factors(T).tolist() if astro_mem else [1.0] * T
        label = f"T = {T}" if astro_mem else f"T = {T}, astro_mem: false"
        axes.plot(range(1, T + 1), factors, label=label, **style)
    axes.set(xlabel="segment t", ylabel="RetentionFactor(t, T)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def attention_figure(model: RMAAT, document: np.ndarray, index: int = 0) -> Figure:
    """Per layer and head, the weights with which rows read rows of one segment.

    Args:
        model: in evaluation mode.
        document: (length,) as its tokenizer stores it.
        index: of the segment, from 0.
    Raises:
        PlotError: the document has no such segment, or the attention no such weights.
    """
    import torch

    from training.diagnostics import attention_rows

    ids = torch.from_numpy(document.astype("int64") + model.config.task.tokenizer.offset)
    try:
        maps = attention_rows(model, ids[None].to(model.memory.device), index).cpu()
    except ValueError as error:
        raise PlotError(str(error)) from None
    layers, heads, N, _ = maps.shape
    M = model.config.num_memory_tokens
    names = row_names(model.config, ids[index * model.segment_len :][: N - M].tolist())
    figure = new_figure(3.4 * heads + 0.6, 3.2 * layers)
    all_axes = figure.subplots(layers, heads, squeeze=False)
    for layer, head in ((i, j) for i in range(layers) for j in range(heads)):
        axes, weights = all_axes[layer][head], maps[layer, head].numpy()
        image = axes.imshow(weights, cmap="gray_r", vmin=min(0, weights.min()))
        axes.set(title=f"layer {layer + 1}, head {head + 1}", xlabel="row that is read")
        axes.set_ylabel("reading row")
        if names:
            axes.set_xticks(range(N), names, rotation=90, fontsize=7)
            axes.set_yticks(range(N), names, fontsize=7)
        figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def row_names(config: Config, ids: Sequence[int]) -> list[str]:
    """The memory rows and the tokens by name; none where there are too many or only numbers."""
    tokens = getattr(config.task.tokenizer, "tokens", None)
    if tokens is None or len(ids) > 60:
        return []
    memory = [f"mem {i + 1}" for i in range(config.num_memory_tokens)]
    return memory + [tokens[i - 1] for i in ids]


def memory_figure(files: Sequence[Path]) -> Figure:
    """Draw a step's peak memory over its time, a line per system with a marker per length.

    Raises:
        PlotError: a file is not what `benchmark.py memory --json` writes.
    """
    lines: dict[str, list[tuple[float, float, int]]] = defaultdict(list)
    for file in files:
        try:
            for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
                if "error" not in row:
                    point = row["step_seconds"], row["peak_mib"], row["seq_len"]
                    lines[row["system"]].append(point)
        except (ValueError, KeyError, TypeError):
            raise PlotError(
                f"{file}: holds no rows of `benchmark.py memory`; measure with --json {file}"
            ) from None
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    for (system, points), style in zip(lines.items(), line_styles(), strict=False):
        seconds, peaks, lengths = zip(*sorted(points, key=lambda p: p[2]), strict=True)
        axes.plot(seconds, peaks, label=system, **style)
        if system == next(iter(lines)):  # the others' markers follow in the same order
            for *place, length in zip(seconds, peaks, lengths, strict=True):
                axes.annotate(
                    f"{length:,}", place, xytext=(0, -13), textcoords="offset points",
                    fontsize="x-small", ha="center",
                )
    axes.set(xscale="log", yscale="log", ylabel="peak memory of a step (MiB)")
    axes.set_xlabel("time of a step (s); a marker per length, in tokens")
    axes.margins(x=0.12, y=0.12)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    return figure


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="plots.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True, metavar="{curves,segments,...}")
    for name, draw in (
        ("curves", draw_curves),
        ("segments", lambda arguments: segments_figure(arguments.runs)),
        ("retention", lambda arguments: retention_figure(arguments.runs)),
    ):
        kind = kinds.add_parser(name)
        kind.add_argument("runs", nargs="+", type=Path, metavar="RUN")
        kind.set_defaults(draw=draw)
    kind = kinds.add_parser("attention")
    kind.add_argument("run", type=Path, metavar="RUN", help="holds model.safetensors")
    kind.add_argument("line", metavar="LINE", help="an example, as --predict reads it")
    kind.add_argument("--segment", type=int, default=0, help="from 0")
    kind.set_defaults(draw=draw_attention)
    kind = kinds.add_parser("memory")
    kind.add_argument("files", nargs="+", type=Path, metavar="FILE")
    kind.set_defaults(draw=lambda arguments: memory_figure(arguments.files))
    for name, kind in kinds.choices.items():
        kind.add_argument("--out", type=Path, default=Path(f"{name}.png"), metavar="PICTURE")
    if words and words[0] not in {*kinds.choices, "-h", "--help"}:
        words = ["curves", *words]
    return parser.parse_args(words)


def command() -> None:
    arguments = parse_arguments(sys.argv[1:])
    save_figure(arguments.draw(arguments), arguments.out)


def main() -> int:
    return run_program("plots.py", command)


if __name__ == "__main__":
    sys.exit(main())
