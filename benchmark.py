"""Peak memory, throughput and scaling: `python benchmark.py WHAT --json FILE`.

    memory       RMAAT by AMRB, by BPTT and by BPTT with torch.utils.checkpoint, RMT, Transformer;
                 with --replayed, AMRB by the number of replayed segments
    tasks        the paper's memory table, counted: five tasks, four systems
    throughput   training speed of every system, and the share of the matrix-multiply rate
    scaling      RMAAT by AMRB from 1,024 to 1,048,576 tokens

`memory --count`, `memory --batch 1 2 4 8` and `tasks` count the bytes of the live tensors of a
training step, on tensors without data. The count is exact, takes seconds at any size, and needs
neither the memory nor the device. Softmax attention counts as the memory-efficient kernels of CUDA
and CPU run it, without an N x N matrix. `memory --validate` compares counts with the growth of a
process.

All other commands measure. The systems take turns, `--repeats` times, and a row states medians. On
a CPU each row has its own process. Its peak is the process's high-water mark during the steps,
minus the memory held once model, gradients and optimizer state existed. On CUDA the peak is that of
allocated bytes. Compare ratios within one run: absolute times depend on the machine. `--set`
changes the configuration, as in `memory --count --set dim=512`.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import tables
from dataloader import Batch
from lra_config import Config, make_config, read_mapping, single_values
from model import RMAAT, build_model
from run.files import write_json
from run.program import Parser, UserError, note, run_program
from tables import AMRB, BPTT, markdown
from training.acceleration import BudgetedReplay, GraphedBackward, compile_model, resolve_device
from training.diagnostics import count_flop, peak_memory_mib, reset_peak_memory
from training.gradients import StepResult, amrb_backward, bptt_backward
from training.optimizer import STATE_TENSORS, build_optimizers
from utils import first_line, hardware, versions

STEPS = {"cpu": (1, 3), "cuda": (5, 20)}  # warm-up, timed
LONG = 65_536  # tokens from which a single step is timed, after a warm-up on fewer
CONFIGS = Path(__file__).parent / "configs"
BATCH_SIZE = 4
BATCH_GOAL = 64  # sequences per optimizer step, reached by gradient accumulation
VALIDATED = "peak_mib / measured_mib"
PASSES = f"passes for {BATCH_GOAL}"

BASE = {
    "dataset": "listops", "dim": 128, "num_layers": 4, "num_heads": 4, "ffn_dim": 512,
    "num_memory_tokens": 1, "precision": "float32", "position_embedding": "sinusoidal",
}
# The model and batch of `tasks`: the paper does not publish its own.
TASK_SIZE = {"dim": 512, "num_heads": 8, "ffn_dim": 2048, "batch_size": 16}
CHECKPOINTED = f"{BPTT}, checkpointed"
# Name: file in configs/tables/, further overrides.
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    AMRB: ("rmaat", {}),
    BPTT: ("rmaat", {"memory_replay_backprop": False}),
    CHECKPOINTED: ("rmaat", {"memory_replay_backprop": False}),
    f"{AMRB}, compiled": ("rmaat", {"compile": True}),
    f"{AMRB}, bfloat16": ("rmaat", {"precision": "bfloat16"}),
    f"{AMRB}, bfloat16, compiled": ("rmaat", {"precision": "bfloat16", "compile": True}),
    **{name: (key, {}) for key, name in reversed(tables.SYSTEMS.items()) if key != "rmaat"},
}
RMT, TRANSFORMER = tables.SYSTEMS["rmt"], tables.SYSTEMS["transformer"]
MEMORY_SYSTEMS = [AMRB, BPTT, CHECKPOINTED, RMT, TRANSFORMER]
PAPER_SYSTEMS = [AMRB, BPTT, RMT, TRANSFORMER]
MEASURED = ("step_seconds", "peak_mib", "reserved_mib", "gflop", "kernels", "compile_seconds")
# Operations that launch nothing: they allocate, look at a tensor in another way, or at its type.
NO_KERNELS = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "promote_types",
    "_unsafe_view", "_reshape_alias",
}
Row = dict[str, Any]


def checkpointed_backward(model: RMAAT, batch: Batch, scale: float = 1.0) -> StepResult:
    """Run BPTT with one activation checkpoint per segment, the usual way to save memory."""
    segments, mask = model.split(batch.tokens, batch.mask)
    # No random state to preserve: dropout is a function of its keys.
    run = functools.partial(
        checkpoint, model.segment, use_reentrant=False, preserve_rng_state=False
    )
    readouts = [readout for _, readout in model.recur(segments, run=run)]
    logits = model.head(model.combine(readouts, mask))
    loss = F.cross_entropy(logits, batch.labels)
    (scale * loss).backward()
    return StepResult(loss.detach(), logits.detach())


def benchmark_config(
    system: str, seq_len: int, segment_len: int, device: str, batch_size: int, **further: Any
) -> Config:
    """Build the configuration of one row; `further` keys override the system's."""
    file, own = SYSTEMS[system]
    return make_config({
        **BASE, "max_seq_len": seq_len, "num_segments": max(seq_len // segment_len, 1),
        **read_mapping(CONFIGS / "tables" / f"{file}.yaml"), **own, "device": device,
        "batch_size": batch_size, **further,
    })


def random_batch(config: Config, length: int) -> Batch:
    """Draw unpadded tokens (B, length) and labels (B,) on the configuration's device."""
    shape = (config.batch_size, length)
    return Batch(
        torch.randint(1, config.task.tokenizer.vocab_size, shape, device=config.device),
        None,
        torch.randint(config.task.num_classes, shape[:1], device=config.device),
    )


def step_backward(system: str, config: Config) -> Callable[..., StepResult]:
    """Return the eager function that leaves the gradients of one step of a system."""
    if system == CHECKPOINTED:
        return checkpointed_backward
    return amrb_backward if config.memory_replay_backprop else bptt_backward


# Counting


class NoModules:
    """Substitute for MemTracker's tracker of modules, which expects each to run once per step."""

    parents = ()
    is_bw = property(lambda self: torch._C._current_graph_task_id() != -1)  # inside autograd

    def register_user_hooks(self, *hooks: Any) -> None:
        """Ignore hooks on modules."""

    clear_user_hooks = __enter__ = __exit__ = register_user_hooks


def count(config: Config, backward: Callable[..., StepResult]) -> dict[str, float]:
    """Count the bytes of the live tensors at the peak of one training step.

    The optimizer's own step is not run: it updates in place, after the peak.

    Returns:
        MiB at the peak: `weights_mib` with buffers, `optimizer_mib`, `gradients_mib` (those that
        exist by then), `activations_mib` with the copies of weights that a lower precision takes,
        `replay_buffer_mib`, `temporary_mib` of the backward pass, and their sum `total_mib`.
        `peak_mib` is the total without weights, all gradients and optimizer state, as measured.
    """
    if config.replay_segments != "all":
        backward = BudgetedReplay(backward, config)
    if not torch.cuda.is_available():  # autograd of torch without CUDA has no CUDA tensors
        config = config.model_copy(update={"device": "cpu"})
    model = build_model(config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model._apply(lambda x: torch.empty_like(x, device=config.device))
        batch = random_batch(config, config.max_seq_len)
        memory = MemTracker()
        memory._mod_tracker = NoModules()
        memory._track_module_params_and_buffers(model)
        with memory:
            backward(model, batch)
    (kinds,) = memory.get_tracker_snapshot("peak").values()
    optimizer = sum(
        parameter.nbytes * len(STATE_TENSORS[name] - {"step"})
        for name, each in build_optimizers(model, config).items()
        for group in each.param_groups for parameter in group["params"]
    )
    buffer = 0
    if config.memory_replay_backprop:
        memories = config.segments_per_sequence - getattr(backward, "kept", 1) + 1
        buffer = memories * model.initial_memory(len(batch.tokens) * config.num_sequences).nbytes
    weights, total = kinds[_MemRefType.PARAM], kinds["Total"] + optimizer
    counted = {
        "peak": kinds["Total"] - kinds[_MemRefType.BUFFER] - 2 * weights, "total": total,
        "weights": weights + kinds[_MemRefType.BUFFER], "optimizer": optimizer,
        "gradients": kinds[_MemRefType.GRAD], "replay_buffer": buffer,
        "activations": kinds[_MemRefType.ACT] - buffer, "temporary": kinds[_MemRefType.TEMP],
    }
    return {f"{kind}_mib": value / 2**20 for kind, value in counted.items()} | {
        "total_gb": total / 1e9
    }


def count_row(request: Row) -> Row:
    """Count one row of the tables."""
    config = benchmark_config(**request)
    return described(request) | count(config, step_backward(request["system"], config))


def validate_row(request: Row) -> Row:
    """Count one row, and measure the growth of a process that runs it."""
    row = count_row(request)
    measured = in_fresh_process(measure, request)["peak_mib"]
    return {**row, "measured_mib": measured, VALIDATED: row["peak_mib"] / measured}


# Measuring


class KernelCounter(TorchDispatchMode):
    """Counts the operations that compute or copy, each a kernel on a GPU; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        aliases = [returned.alias_info for returned in operation._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        name = operation._schema.name.removeprefix("aten::")
        self.count += not is_view and name not in NO_KERNELS
        return operation(*args, **(kwargs or {}))


def count_kernels(step: Callable[[], object]) -> int:
    """Return the number of kernels of one call, which must run eagerly."""
    with KernelCounter() as counter:
        step()
    return counter.count


def measure(request: Row) -> dict[str, float | None]:
    """Measure one row of the tables in this process.

    Returns:
        `step_seconds`, the median of the timed steps, `peak_mib` above the model's own state,
        `gflop`, executed in the matrix products of a step, `kernels` of an eager step without the
        optimizer, `compile_seconds`, and on CUDA `reserved_mib`.
    """
    config = benchmark_config(**request)
    device = resolve_device(config)
    torch.manual_seed(0)
    model = build_model(config).to(device)
    eager = step_backward(request["system"], config)
    step = training_step(model, config, eager)
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
    # Libraries load parts of themselves on their first call, which is not the step's memory.
    step(warm_up if config.compile is True else Batch(batch.tokens[:1, :8], None, batch.labels[:1]))
    held = reset_peak_memory(device)
    warm_up_steps, timed_steps = (1, 1) if is_long else STEPS[device.type]
    for _ in range(warm_up_steps):
        step(warm_up)
    seconds = statistics.median(step(batch) for _ in range(timed_steps))
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


def training_step(
    model: RMAAT, config: Config, backward: Callable[..., StepResult]
) -> Callable[[Batch], float]:
    """Return a function that runs one training step and returns its seconds."""
    device = resolve_device(config)
    optimizers = build_optimizers(model, config).values()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()  # creates its state
    if config.cuda_graphs is True:
        backward = GraphedBackward(backward)
    if config.replay_segments != "all":
        backward = BudgetedReplay(backward, config)

    def step(batch: Batch) -> float:
        started = time.perf_counter()
        model.zero_grad(set_to_none=config.cuda_graphs is not True)  # as a run does
        backward(model, batch)
        for optimizer in optimizers:
            optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return step


def matmul_gflop_per_second(device_name: str) -> float:
    """Measure the best rate of a product over the shapes of the model's own linear maps."""
    device = torch.device(device_name)
    D, F_ = BASE["dim"], BASE["ffn_dim"]
    rows = BATCH_SIZE * (512 + BASE["num_memory_tokens"])
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


def in_this_process(function: Callable[[Any], Any], argument: Any) -> Any:
    """Call a function that fills memory, and free the memory afterwards.

    Raises:
        RuntimeError: it failed.
    """
    try:
        return function(argument)
    except Exception as error:  # a row that fails is a row
        raise RuntimeError(first_line(error)) from None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def in_fresh_process(function: Callable[[Any], Any], argument: Any) -> Any:
    """Call a function in a process of its own, whose memory is the function's alone.

    Raises:
        RuntimeError: it failed, or the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(in_this_process, function, argument).result()


def described(request: Row) -> Row:
    """Return the request of a row with its segments and the version of torch."""
    config = benchmark_config(**request)
    return {
        **request, "num_segments": config.num_segments, "segment_len": config.segment_len,
        "torch": torch.__version__,
    }


def measure_in_turn(requests: Sequence[Row], repeats: int, *, with_rate: bool = False) -> list[Row]:
    """Measure every request once per round; return medians over `repeats` rounds.

    A row that cannot be measured (no memory left) holds the reason under `error`.

    Args:
        with_rate: add each row's `matmul_share`, its executed operations over the machine's own
            rate, measured in every round too.
    """
    call = in_this_process if requests[0]["device"] == "cuda" else in_fresh_process
    answers: list[list[Row]] = [[] for _ in requests]
    errors: dict[int, str] = {}
    rates = []
    for _ in range(repeats):
        if with_rate:
            rates.append(call(matmul_gflop_per_second, requests[0]["device"]))
        for i, request in enumerate(requests):
            if i not in errors:
                try:
                    answers[i].append(call(measure, request))
                except RuntimeError as error:
                    errors[i] = str(error)
            print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = []
    for i, (request, measured) in enumerate(zip(requests, answers, strict=True)):
        row = described(request)
        rows.append(row)
        if i in errors:
            row["error"] = errors[i]
            continue
        row |= {
            key: statistics.median(m[key] for m in measured)
            for key in MEASURED if measured[0].get(key) is not None
        }
        row["tokens_per_second"] = request["batch_size"] * request["seq_len"] / row["step_seconds"]
        row["us_per_token"] = 1e6 / row["tokens_per_second"]
        is_float32 = benchmark_config(**request).precision == "float32"  # as the rate is
        if with_rate and "gflop" in row and is_float32:
            row["matmul_share"] = row["gflop"] / row["step_seconds"] / statistics.median(rates)
    return rows


# Commands


def request(arguments: argparse.Namespace, system: str, seq_len: int, **further: Any) -> Row:
    """Return the request of one row: the arguments of `benchmark_config`."""
    return {
        "system": system, "seq_len": seq_len, "segment_len": arguments.segment_len,
        "device": arguments.device, "batch_size": BATCH_SIZE, **further, **arguments.keys,
    }


def memory(arguments: argparse.Namespace) -> list[Row]:
    """Count or measure every chosen system at every length, in segments of one length."""
    requests = []
    for seq_len in arguments.seq_lens:
        for system in arguments.systems or MEMORY_SYSTEMS:
            own = request(arguments, system, seq_len)
            by_replays = [{**own, "replay_segments": count} for count in arguments.replayed or ()]
            requests += by_replays if by_replays and system == AMRB else [own]
    if arguments.batch:
        return batches(requests, arguments.batch, 2**10 * arguments.memory)
    if arguments.count:
        return [count_row(each) for each in requests]
    if arguments.validate:
        return [validate_row(each) for each in requests]
    return measure_in_turn(requests, arguments.repeats)


def batches(requests: Sequence[Row], sizes: Sequence[int], limit_mib: float) -> list[Row]:
    """Count every request by the batch, and find the largest batch within the limit."""
    rows = []
    for own in requests:
        counted = [count_row({**own, "batch_size": size}) for size in sizes]
        largest = largest_batch(own, limit_mib)
        goal = {"largest_batch": largest, PASSES: -(-BATCH_GOAL // max(largest, 1))}
        rows += [row | goal for row in counted]
    return rows


def largest_batch(request: Row, limit_mib: float) -> int:
    """Return the largest batch whose step fits into the limit, weights and optimizer included."""
    def total(batch_size: int) -> float:
        return count_row({**request, "batch_size": batch_size})["total_mib"]

    # From batches of some size on, memory is affine in the batch.
    first, second = total(16), total(32)
    return max(int(16 + 16 * (limit_mib - first) / (second - first)), 0)


def tasks(arguments: argparse.Namespace) -> list[Row]:
    """Count the paper's memory table, and again where BPTT takes the memory that the paper has."""
    rows = []
    for task in tables.TASKS:
        dataset = read_mapping(CONFIGS / f"{task}.yaml")["dataset"]
        own = make_config({"dataset": dataset})  # in the paper's length
        keys = {**TASK_SIZE, "dataset": dataset, "segment_len": own.segment_len}
        sizes = [keys["batch_size"]]
        if limit := tables.PEAK_GB[BPTT][task]:
            bptt = request(arguments, BPTT, own.max_seq_len, **keys)
            sizes.append(largest_batch(bptt, limit * 1e9 / 2**20))
        for size in sizes:
            keys["batch_size"] = size
            rows += [
                count_row(request(arguments, system, own.max_seq_len, **keys))
                | {"task": task, "paper_gb": tables.PEAK_GB[system][task]}
                for system in PAPER_SYSTEMS
            ]
    return rows


def throughput(arguments: argparse.Namespace) -> list[Row]:
    """Measure every chosen system, with the share of the machine's matrix-multiply rate."""
    systems = arguments.systems or SYSTEMS
    return measure_in_turn(
        [request(arguments, system, length) for length in arguments.seq_lens for system in systems],
        arguments.repeats, with_rate=True,
    )


def scaling(arguments: argparse.Namespace) -> list[Row]:
    """Measure one sequence of growing length."""
    return measure_in_turn(
        [
            request(arguments, system, seq_len, batch_size=1)
            for system in arguments.systems or [AMRB] for seq_len in arguments.seq_lens
        ],
        arguments.repeats,
    )


CASE = ["system", "seq_len", "replay_segments"]
TABLES = {  # keys of rows, a column each
    "memory": [*CASE, "peak_mib", "peak_mib x AMRB", "step_seconds", "step_seconds x AMRB"],
    "count": [*CASE, "peak_mib", "peak_mib x AMRB", "activations_mib", "temporary_mib"],
    "validate": [*CASE, "peak_mib", "measured_mib", VALIDATED],
    "batch": [*CASE, "batch_size", "total_mib", "largest_batch", PASSES],
    "tasks": [
        "task", "batch_size", "system", "total_gb", "total_gb x AMRB", "paper_gb",
        "paper_gb x AMRB",
    ],
    "throughput": [
        "system", "seq_len", "num_segments", "tokens_per_second", "tokens_per_second x RMT",
        "matmul_share", "kernels",
    ],
    "scaling": ["system", "seq_len", "num_segments", "step_seconds", "us_per_token", "peak_mib"],
}
REFERENCES = {  # of ratios
    "peak_mib": AMRB, "total_gb": AMRB, "paper_gb": AMRB, "step_seconds": AMRB,
    "tokens_per_second": RMT,
}


def add_ratios(rows: Sequence[Row]) -> None:
    """Add each figure over that of AMRB or RMT in the same case, where both exist."""
    def case(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in ("task", "seq_len", "batch_size"))

    for key, system in REFERENCES.items():
        own = [row for row in rows if row["system"] == system]
        references = {case(row): row.get(key) for row in reversed(own)}  # the first one counts
        for row in rows:
            if row.get(key) and references.get(case(row)):
                row[f"{key} x {system.split(', ')[-1]}"] = row[key] / references[case(row)]


def print_table(rows: Sequence[Row], keys: Sequence[str]) -> None:
    """Print Markdown, a cell empty where its figure is missing, and the errors on stderr."""
    def cell(value: Any) -> str:
        if not isinstance(value, float):
            return "" if value is None else str(value)
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    print(markdown(keys, [[cell(row.get(key)) for key in keys] for row in rows]))
    for row in rows:
        if "error" in row:
            print(f"{row['system']}, {row['seq_len']} tokens: {row['error']}", file=sys.stderr)


COMMANDS = {
    "memory": (memory, [1024, 2048, 4096, 8192]),
    "tasks": (tasks, []),
    "throughput": (throughput, [1024, 2048, 4096, 8192]),
    "scaling": (scaling, [2**k for k in range(10, 21)]),
}


def positive(text: str) -> int:
    """Read a number that is at least 1."""
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
        command.add_argument("--json", type=Path, help="write the rows to this file")
        command.add_argument("--systems", nargs="+", choices=list(SYSTEMS), metavar="SYSTEM")
        command.add_argument("--seq_lens", nargs="+", type=positive, default=lengths)
        command.add_argument("--segment_len", type=positive, default=512)
        command.add_argument("--repeats", type=positive, default=3, metavar="N")
        command.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
        if name == "memory":
            command.add_argument("--count", action="store_true", help="count, do not measure")
            command.add_argument("--validate", action="store_true", help="count and measure")
            command.add_argument("--batch", nargs="+", type=positive, help="count, by the batch")
            command.add_argument("--memory", type=float, default=16, help="GiB to fit a batch into")
            command.add_argument("--replayed", nargs="+", type=int, help="segments, of AMRB")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    table = arguments.what
    if table == "memory":
        modes = ("batch", "count", "validate")
        table = next((mode for mode in modes if getattr(arguments, mode)), "memory")
    is_counted = table in ("tasks", "batch", "count")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        if not is_counted:
            raise UserError("--device cuda, but torch sees no CUDA device; counts need none")
        note("no CUDA device: the tensors of a step on the CPU are counted")
    arguments.keys = single_values(arguments.set)
    S = arguments.segment_len
    for length in arguments.seq_lens:
        if length % min(S, length):
            raise UserError(f"--seq_lens {length} is no multiple of --segment_len {S}")
    rows = COMMANDS[arguments.what][0](arguments)
    add_ratios(rows)
    print_table(rows, TABLES[table])
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        machine = "none, counted" if is_counted else hardware(torch.device(arguments.device))
        write_json(arguments.json, {"rows": rows, "hardware": machine, **versions()})
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(run_program("benchmark.py", main))
