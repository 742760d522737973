"""Peak memory, throughput and scaling: `python benchmark.py WHAT --json FILE`.

    memory       RMAAT by AMRB, by BPTT and by BPTT with torch.utils.checkpoint, RMT, Transformer
    replay       RMAAT by AMRB, by how many segments it replays: memory for time
    throughput   training speed of every system, and the share of the matrix-multiply rate
    scaling      RMAAT by AMRB from 1,024 to 1,048,576 tokens

The systems are measured in turn, `--repeats` times; a row states medians. On a CPU each row has a
process of its own, and its peak memory is the process's high-water mark during the steps minus what
it held once model, gradients and optimizer state existed. On CUDA all rows share this process, its
events time the steps, and the peak is that of allocated bytes (what the allocator reserved stands
beside it). Ratios within one run are what to compare; absolute times depend on the machine.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tables
from dataloader import Batch
from lra_config import Config, make_config, read_mapping
from model import RMAAT, build_model
from run.files import write_json
from run.program import Parser, run_program
from tables import AMRB, BPTT, markdown
from train import StepResult, amrb_backward, bptt_backward
from training.acceleration import (
    BudgetedReplay,
    GraphedBackward,
    compile_model,
    resolve_device,
)
from training.diagnostics import count_flop, peak_memory_mib, reset_peak_memory
from training.optimizer import build_optimizers
from utils import first_line, hardware, versions

STEPS = {"cpu": (1, 3), "cuda": (5, 20)}  # warm-up, timed
LONG = 65_536  # tokens from which a single step is timed, after a warm-up on fewer
SCALING_LENGTHS = [2**k for k in range(10, 21)]
TABLES = Path(__file__).parent / "configs" / "tables"

BASE = {
    "dataset": "listops", "dim": 128, "num_layers": 4, "num_heads": 4, "ffn_dim": 512,
    "num_memory_tokens": 1, "batch_size": 4, "precision": "float32",
}
CHECKPOINTED, GRAPHED = f"{BPTT}, checkpointed", f"{AMRB}, CUDA graphs"
# Name: file in configs/tables/, further overrides.
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    AMRB: ("rmaat", {}),
    BPTT: ("rmaat", {"memory_replay_backprop": False}),
    CHECKPOINTED: ("rmaat", {"memory_replay_backprop": False}),
    f"{AMRB}, compiled": ("rmaat", {"compile": True}),
    f"{AMRB}, bfloat16": ("rmaat", {"precision": "bfloat16"}),
    f"{AMRB}, bfloat16, compiled": ("rmaat", {"precision": "bfloat16", "compile": True}),
    GRAPHED: ("rmaat", {"cuda_graphs": True}),
    f"{AMRB}, bfloat16, compiled, CUDA graphs": (
        "rmaat", {"precision": "bfloat16", "compile": True, "cuda_graphs": True}
    ),
    **{name: (key, {}) for key, name in reversed(tables.SYSTEMS.items()) if key != "rmaat"},
}
RMT, TRANSFORMER = tables.SYSTEMS["rmt"], tables.SYSTEMS["transformer"]
MEMORY_SYSTEMS = [AMRB, BPTT, CHECKPOINTED, RMT, TRANSFORMER]
MEASURED = ("step_seconds", "peak_mib", "reserved_mib", "gflop", "kernels", "compile_seconds")
# Operations that launch nothing: they allocate, look at a tensor in another way, or at its type.
NO_KERNELS = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "promote_types",
    "_unsafe_view", "_reshape_alias",
}


class Stopwatch:
    """Measures the seconds from its construction to `stop`.

    On CUDA it uses the device's own events, and only reading them waits for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = self._stopped = self._mark()

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def stop(self) -> Stopwatch:
        """End the measurement; return the stopwatch."""
        self._stopped = self._mark()
        return self

    def seconds(self) -> float:
        """Return the measured time."""
        if self._device.type != "cuda":
            return self._stopped - self._started
        self._stopped.synchronize()
        return self._started.elapsed_time(self._stopped) / 1e3


class KernelCounter(TorchDispatchMode):
    """Counts the operations that compute or copy, each a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += launches(operation)
        return operation(*args, **(kwargs or {}))


def launches(operation: torch._ops.OpOverload) -> bool:
    """Return whether an operation is a kernel; views are none."""
    returns = [r.alias_info for r in operation._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returns)
    return not is_view and operation._schema.name.removeprefix("aten::") not in NO_KERNELS


def count_kernels(step: Callable[[], object]) -> int:
    """Return the number of kernels of one call, which must run eagerly."""
    with KernelCounter() as counter:
        step()
    return counter.count


def checkpointed_backward(model: RMAAT, batch: Batch, scale: float = 1.0) -> StepResult:
    """BPTT that keeps each segment's inputs and runs it again: what one would otherwise use."""
    segments, mask = model.split(batch.tokens, batch.mask)
    run = functools.partial(checkpoint, model.segment, use_reentrant=False)
    readouts = [readout for _, readout in model.recur(segments, run=run)]
    logits = model.head(model.combine(readouts, mask))
    loss = F.cross_entropy(logits, batch.labels)
    (scale * loss).backward()
    return StepResult(loss.detach(), logits.detach())


def benchmark_config(
    system: str, seq_len: int, segment_len: int, device: str, batch_size: int, **further: Any
) -> Config:
    """The configuration of one row; `further` keys override the system's."""
    file, own = SYSTEMS[system]
    return make_config({
        **BASE, "max_seq_len": seq_len, "num_segments": max(seq_len // segment_len, 1),
        **read_mapping(TABLES / f"{file}.yaml"), **own, "device": device,
        "batch_size": batch_size, "position_embedding": "sinusoidal", **further,
    })


def random_batch(config: Config, length: int) -> Batch:
    shape = (config.batch_size, length)
    return Batch(
        torch.randint(1, config.task.tokenizer.vocab_size, shape, device=config.device),
        None,
        torch.randint(config.task.num_classes, shape[:1], device=config.device),
    )


def eager_backward(system: str, config: Config) -> Callable[..., StepResult]:
    """What leaves the gradients of one step of a system."""
    if system == CHECKPOINTED:
        return checkpointed_backward
    return amrb_backward if config.memory_replay_backprop else bptt_backward


def measure(system: str, **row: Any) -> dict[str, float | None]:
    """Measure one row of the tables, as `measure_config` does."""
    config = benchmark_config(system, **row)
    return measure_config(config, eager_backward(system, config))


def measure_task(file: str, **overrides: Any) -> dict[str, float | None]:
    """Measure the model and the shapes of a file in configs/, as `measure_config` does."""
    values = read_mapping(Path(__file__).parent / "configs" / f"{file}.yaml")
    config = make_config({**values, **overrides})
    return measure_config(config, eager_backward(AMRB, config))


def measure_config(config: Config, eager: Callable[..., StepResult]) -> dict[str, float | None]:
    """Train on random tokens in this process.

    Args:
        eager: what leaves the gradients of a step.
    Returns:
        `step_seconds`, the median of the timed steps, `peak_mib` above the model's own state,
        `gflop`, executed in the matrix products of a step, `kernels` of an eager step without the
        optimizer, `compile_seconds`, and on CUDA `reserved_mib`.
    """
    device = resolve_device(config)
    torch.manual_seed(0)
    model = build_model(config).to(device)
    optimizers = build_optimizers(model, config).values()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()  # creates its state
    backward = eager
    if config.cuda_graphs is True:
        backward = GraphedBackward(backward)
    if config.replay_segments != "all":
        backward = BudgetedReplay(backward, config)

    def step(batch: Batch) -> Stopwatch:
        watch = Stopwatch(device)
        model.zero_grad(set_to_none=config.cuda_graphs is not True)  # as a run does
        backward(model, batch)
        for optimizer in optimizers:
            optimizer.step()
        return watch.stop()

    is_long = config.max_seq_len >= LONG
    batch = random_batch(config, config.max_seq_len)
    warm_up = batch
    if is_long:
        warm_up = random_batch(config, min(2 * config.segment_len, config.max_seq_len))
    compile_seconds = None
    if config.compile is True:
        started = time.perf_counter()
        if not compile_model(model, eager, warm_up):
            raise RuntimeError("could not be compiled")
        compile_seconds = time.perf_counter() - started
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
    # What libraries load on their first call is not the step's.
    step(warm_up if config.compile is True else Batch(batch.tokens[:1, :8], None, batch.labels[:1]))
    held = reset_peak_memory(device)
    warm_up_steps, timed_steps = STEPS[device.type]
    for _ in range(1 if is_long else warm_up_steps):
        step(warm_up)
    watches = [step(batch) for _ in range(1 if is_long else timed_steps)]
    seconds = statistics.median(watch.seconds() for watch in watches)
    peak_mib = peak_memory_mib(device) - held
    reserved = torch.cuda.max_memory_reserved() / 2**20 if device.type == "cuda" else None
    model.compiled_encode = None  # the operations of the eager form are counted
    flop = None if is_long else count_flop(model, batch)
    return {
        "step_seconds": seconds, "peak_mib": peak_mib, "reserved_mib": reserved,
        "gflop": None if flop is None else flop / 1e9,
        "kernels": None if is_long else count_kernels(lambda: eager(model, batch)),
        "compile_seconds": compile_seconds,
    }


def matmul_gflop_per_second(device_name: str) -> float:
    """The best rate of a product over the shapes of this model's own linear maps."""
    device = torch.device(device_name)
    D, F_ = BASE["dim"], BASE["ffn_dim"]
    rows = BASE["batch_size"] * (512 + BASE["num_memory_tokens"])
    best = 0.0
    for fan_in, fan_out in ((D, 3 * D), (D, D), (D, F_), (F_, D)):
        x, w = torch.randn(rows, fan_in, device=device), torch.randn(fan_in, fan_out, device=device)
        for _ in range(10):
            started = time.perf_counter()
            for _ in range(20):
                x @ w
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = (time.perf_counter() - started) / 20
            best = max(best, 2 * rows * fan_in * fan_out / seconds / 1e9)
    return best


def in_fresh_process(what: str, request: Any) -> Any:
    """The answer of this file's hidden command `what`, from a child process.

    Raises:
        RuntimeError: it failed.
    """
    child = subprocess.run(
        [sys.executable, __file__, what, json.dumps(request)], capture_output=True, text=True
    )
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"killed by signal {-child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def in_this_process(what: str, request: Any) -> Any:
    """The same, where the device keeps its own account of memory.

    Raises:
        RuntimeError: it failed.
    """
    try:
        return ANSWERS[what](request)
    except Exception as error:  # a row that fails is a row
        raise RuntimeError(first_line(error)) from None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


ANSWERS: dict[str, Callable[[Any], Any]] = {
    "row": lambda request: measure(**request),
    "task": lambda request: measure_task(**request),
    "rate": matmul_gflop_per_second,
}


def serve() -> None:
    """Answer requests `[what, request]`, each a line of JSON, by an `answer` or an `error`."""
    for line in sys.stdin:
        what, request = json.loads(line)
        try:
            reply = {"answer": in_this_process(what, request)}
        except RuntimeError as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), flush=True)


def measure_in_turn(
    requests: Sequence[dict[str, Any]], repeats: int, *, with_rate: bool
) -> list[dict[str, Any]]:
    """Medians over `repeats` rounds, each of which measures every request once.

    A row that cannot be measured (no memory left) says so under `error`.

    Args:
        with_rate: add each row's `matmul_share`, its executed operations over the machine's own
            rate, measured in every round too.
    """
    answer = in_this_process if requests[0]["device"] == "cuda" else in_fresh_process
    answers: list[list[dict[str, Any]]] = [[] for _ in requests]
    errors: dict[int, str] = {}
    rates = []
    for _ in range(repeats):
        if with_rate:
            rates.append(answer("rate", requests[0]["device"]))
        for i, request in enumerate(requests):
            if i in errors:
                continue
            try:
                answers[i].append(answer("row", request))
            except RuntimeError as error:
                errors[i] = str(error)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = []
    for i, (request, measured) in enumerate(zip(requests, answers, strict=True)):
        config = benchmark_config(**request)
        row = {
            **request, "num_segments": config.num_segments, "segment_len": config.segment_len,
            "torch": torch.__version__,
        }
        if i in errors:
            rows.append({**row, "error": errors[i]})
            continue
        row |= {
            key: statistics.median(m[key] for m in measured)
            for key in MEASURED if measured[0].get(key) is not None
        }
        tokens = request["batch_size"] * request["seq_len"]
        row["tokens_per_second"] = tokens / row["step_seconds"]
        if with_rate and "gflop" in row and config.precision == "float32":  # as the rate is
            row["matmul_share"] = row["gflop"] / row["step_seconds"] / statistics.median(rates)
        rows.append(row)
    return rows


def memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every chosen system at every length, segments of one length."""
    return measure_in_turn(
        [
            request(arguments, system, seq_len)
            for seq_len in arguments.seq_lens for system in arguments.systems or MEMORY_SYSTEMS
        ],
        arguments.repeats, with_rate=False,
    )


def replay(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """AMRB by the number of segments that it replays, from all to none."""
    requests = []
    for seq_len in arguments.seq_lens:
        own = request(arguments, AMRB, seq_len)
        T = benchmark_config(**own).num_segments
        counts = sorted({T - 1, *(T * k // 4 for k in range(4))} - {-1}, reverse=True)
        requests += [{**own, "replay_segments": count} for count in counts]
    return measure_in_turn(requests, arguments.repeats, with_rate=False)


def throughput(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every chosen system, with the share of the machine's matrix-multiply rate."""
    return measure_in_turn(
        [
            request(arguments, system, seq_len)
            for seq_len in arguments.seq_lens
            for system in arguments.systems or speed_systems(arguments.device)
        ],
        arguments.repeats, with_rate=True,
    )


def speed_systems(device: str) -> list[str]:
    return [
        system for system, (_, keys) in SYSTEMS.items()
        if device == "cuda" or not keys.get("cuda_graphs")
    ]


def scaling(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One sequence, ever longer."""
    return measure_in_turn(
        [
            {**request(arguments, system, seq_len), "batch_size": 1}
            for system in arguments.systems or [AMRB] for seq_len in arguments.seq_lens
        ],
        arguments.repeats, with_rate=False,
    )


def request(arguments: argparse.Namespace, system: str, seq_len: int) -> dict[str, Any]:
    return {
        "system": system, "seq_len": seq_len, "segment_len": arguments.segment_len,
        "device": arguments.device, "batch_size": BASE["batch_size"],
    }


def print_table(rows: Sequence[dict[str, Any]], columns: dict[str, Callable[[dict], str]]) -> None:
    """Markdown, a cell empty where its figure is missing."""

    def cell(text: Callable[[dict], str], row: dict[str, Any]) -> str:
        try:
            return text(row)
        except KeyError:
            return ""

    print(markdown(list(columns), [[cell(text, row) for text in columns.values()] for row in rows]))
    for row in rows:
        if "error" in row:
            print(f"{row['system']}, {row['seq_len']} tokens: {row['error']}", file=sys.stderr)


def relative_to(
    rows: Sequence[dict[str, Any]], system: str, key: str
) -> Callable[[dict[str, Any]], str]:
    """A column: `key` over that of `system` at the same length."""
    reference = {row["seq_len"]: row[key] for row in rows if row["system"] == system and key in row}
    return lambda row: f"{row[key] / reference[row['seq_len']]:.2f}"


def report(what: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of one command."""
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "system": lambda r: r["system"],
        "tokens": lambda r: f"{r['seq_len']:,}",
        "segments": lambda r: str(r["num_segments"]),
    }
    peak, step = (lambda r: f"{r['peak_mib']:,.0f}"), (lambda r: milliseconds(r["step_seconds"]))
    if what == "memory":
        columns |= {
            "peak MiB": peak, "x AMRB": relative_to(rows, AMRB, "peak_mib"),
            "step ms": step, "x AMRB's time": relative_to(rows, AMRB, "step_seconds"),
        }
    elif what == "replay":
        columns |= {
            "replayed": lambda r: str(r["replay_segments"]), "peak MiB": peak, "step ms": step,
        }
    elif what == "throughput":
        columns |= {
            "tokens/s": lambda r: f"{r['tokens_per_second']:,.0f}",
            "x RMT": relative_to(rows, RMT, "tokens_per_second"),
            "of the matmul rate": lambda r: f"{100 * r['matmul_share']:.0f} %",
            "step ms": step, "kernels, eager": lambda r: f"{r['kernels']:,}",
        }
    else:
        columns |= {
            "step ms": step, "us per token": lambda r: f"{1e6 / r['tokens_per_second']:.1f}",
            "peak MiB": peak,
        }
    print_table(rows, columns)


def milliseconds(seconds: float) -> str:
    """Three significant digits."""
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def plot_scaling(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time per token and peak memory over the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axes, memory_axes) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system and "error" not in row]
        lengths = [row["seq_len"] for row in own]
        time_axes.plot(lengths, [1e6 / row["tokens_per_second"] for row in own], "o-", label=system)
        memory_axes.plot(lengths, [row["peak_mib"] for row in own], "o-")
    time_axes.set(ylabel="time per token (us)")
    memory_axes.set(ylabel="peak memory of a step (MiB)")
    for axes in (time_axes, memory_axes):
        axes.set(xscale="log", xlabel="tokens", ylim=(0, None))
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    time_axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


COMMANDS = {
    "memory": (memory, [1024, 2048, 4096, 8192]),
    "replay": (replay, [8192]),
    "throughput": (throughput, [1024, 2048, 4096, 8192]),
    "scaling": (scaling, SCALING_LENGTHS),
}


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = Parser(
        prog="benchmark.py", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = "{" + ",".join(COMMANDS) + "}"
    commands = parser.add_subparsers(dest="what", required=True, metavar=names)
    for name, (_, lengths) in COMMANDS.items():
        command = commands.add_parser(name)
        command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
        if name != "replay":
            command.add_argument("--systems", nargs="+", choices=list(SYSTEMS), metavar="SYSTEM")
        command.add_argument("--seq_lens", nargs="+", type=positive, default=lengths)
        command.add_argument("--segment_len", type=positive, default=512)
        command.add_argument("--repeats", type=int, choices=range(1, 100), default=3, metavar="N")
        command.add_argument("--json", type=Path, help="write the rows here, and a plot beside it")
    commands.add_parser("serve")
    # One measurement, for the child process.
    for name in ANSWERS:
        commands.add_parser(name).add_argument("request", type=json.loads)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.what == "serve":
        serve()
        return 0
    if arguments.what in ANSWERS:
        print(json.dumps(ANSWERS[arguments.what](arguments.request)))
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benchmark.py: --device cuda, but torch sees no CUDA device", file=sys.stderr)
        return 2
    S = arguments.segment_len
    for length in arguments.seq_lens:
        if length % min(S, length):
            print(
                f"benchmark.py: --seq_lens {length} is no multiple of --segment_len {S}",
                file=sys.stderr,
            )
            return 2
    run, _ = COMMANDS[arguments.what]
    rows = run(arguments)
    report(arguments.what, rows)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, {
            "rows": rows, "hardware": hardware(torch.device(arguments.device)), **versions(),
        })
        if arguments.what == "scaling":
            plot_scaling(rows, arguments.json.with_suffix(".png"))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(run_program("benchmark.py", main))
