"""How the steps of a run are computed here: device, precision, compilation, CUDA graphs, replays.

Every `auto` of the configuration is resolved here. A mechanism that cannot work is switched off,
and one line reports why.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dataloader import Batch
from lra_config import Config, ConfigError
from model import RMAAT, autocast_dtype
from run.program import UserError, launcher_variable, log_line
from training.gradients import shared_weights
from utils import first_line, restore

Backward = Callable[..., Any]  # (model, batch, scale, seed) to a `train.StepResult`

LONG_RUN = 1e14  # floating-point operations, half an hour of one CPU core
RECOMPILE_LIMIT = 64  # forms of one segment: passes, masks, the last batches of evaluations
# Of a captured step, relative to the gradient's norm: rounding (atomic sums in bfloat16) stays
# below, a wrong graph does not.
GRAPH_TOLERANCE = 0.02
WARMUP_RUNS = 2
REPLAY_SHARE = 0.5  # of the memory that is free in the first step, for kept activations


def resolve_device(config: Config) -> torch.device:
    """Return the device of the run; under `torchrun`, that of this process.

    On a CPU this process flushes subnormal numbers to 0 from here on.

    Raises:
        ConfigError: `device: cuda` on a machine without one, or more processes than devices.
    """
    present = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if config.device == "cuda" and not present:
        raise ConfigError("device='cuda' but torch sees no CUDA device; set device to cpu or auto")
    if not present or config.device == "cpu":
        # A saturated sigmoid leaves gradients of such numbers; AT then took twice the time.
        torch.set_flush_denormal(True)
        return torch.device("cpu")
    processes = launcher_variable("LOCAL_WORLD_SIZE")
    if processes > present:
        raise ConfigError(
            f"{processes} processes share {present} CUDA devices; start as many as there are "
            "devices, or set device=cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


@contextlib.contextmanager
def reported_out_of_memory() -> Iterator[None]:
    """Report in one line that the memory of the device, or of the machine, did not suffice.

    Raises:
        UserError: replaces torch's OutOfMemoryError, the RuntimeError of its allocator on the
            CPU, and numpy's MemoryError.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_ours = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_ours and "DefaultCPUAllocator" not in str(error):
            raise
        message, _, _ = first_line(error).partition(" GPU ")  # the layout of the memory
        raise UserError(
            f"{message.rstrip('.')}; lower batch_size and raise accumulate, or raise num_segments",
            alone=True,
        ) from error


class ExecutionPlan(NamedTuple):
    """How a run computes on this machine, with every `auto` resolved."""

    precision: str  # "auto" on CUDA, which `model.autocast_dtype` resolves
    compile: bool
    cuda_graphs: bool
    reason: str = ""  # for a choice made here, or a warning about a slow one


def plan_execution(
    config: Config, device: torch.device, parameters: int, begun: str | None = None
) -> ExecutionPlan:
    """Resolve `precision`, `compile` and `cuda_graphs`.

    CUDA compiles and captures graphs. A CPU computes eagerly unless `compile: true` is set.

    Args:
        parameters: the number of the model's parameters.
        begun: the precision of the run that is resumed, None for a new one.
    """
    if device.type != "cuda":
        if config.cuda_graphs is True:
            log_line("cuda_graphs is off: it needs a CUDA device")
        precision, reason = _cpu_precision(config, parameters, begun)
        return ExecutionPlan(precision, config.compile is True, False, reason)
    graphs = config.cuda_graphs is not False
    if graphs and autocast_dtype(config.precision, device) == torch.float16:
        graphs = False
        if config.cuda_graphs is True:
            log_line("cuda_graphs is off: float16 scales its gradients from step to step")
    return ExecutionPlan(config.precision, config.compile is not False, graphs)


def _cpu_precision(config: Config, parameters: int, begun: str | None) -> tuple[str, str]:
    """Return the precision of a run on a CPU and the reason of the choice.

    With AVX-512's instructions an eager step in bfloat16 takes about half of float32's time, so
    long runs use it and short ones keep float32's digits. With AVX2 it is emulated and about 7
    times slower. A resumed run keeps its precision.
    """
    if config.precision == "bfloat16" and not bfloat16_instructions():
        return "bfloat16", "emulated on this CPU, several times slower than float32"
    if config.precision != "auto":
        return config.precision, ""
    if begun is not None:
        return ("float32" if begun == "auto" else begun), "as the run was begun"  # auto: on CUDA
    if not bfloat16_instructions():
        return "float32", "this CPU has no bfloat16 instructions"
    tokens = config.batch_size * config.accumulate * config.max_seq_len * config.max_steps
    if 8 * parameters * tokens < LONG_RUN:  # operations of forward, backward and replay
        return "float32", "a short run"
    return "bfloat16", "a long run on a CPU with instructions for it"


def bfloat16_instructions() -> bool:
    """Return whether this CPU multiplies bfloat16 itself: AMX, or AVX-512's dot product."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in text or "avx512_bf16" in text


def compile_model(model: RMAAT, backward: Backward, batch: Batch) -> bool:
    """Set `model.compiled_encode`; leave the model eager, with one line, where that fails.

    Args:
        batch: of the run's shapes, for a trial step that compiles both passes.
    Returns:
        Whether the model is compiled.
    """
    torch._dynamo.reset()  # an earlier run of this process has left its own forms
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # For vectors of 512 bits torch 2.13 compiles bfloat16 wrongly: a convolution's gradient is NaN.
    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    narrow = avx512 and model.precision == "bfloat16"
    torch._inductor.config.cpp.simdlen = 256 if narrow else None
    statistics = [buffer.clone() for buffer in model.buffers()]
    model.compiled_encode = torch.compile(model.encode, dynamic=False)
    try:
        backward(model, batch)
    except torch.OutOfMemoryError:
        raise
    # Missing compilers, devices and its own defects raise without a common class.
    except Exception as error:
        model.compiled_encode = None
        log_line(f"compile is off: {first_line(error)}")
    finally:
        model.zero_grad()
        restore(model.buffers(), statistics)
    return model.compiled_encode is not None


class Capture(NamedTuple):
    """A captured step: replaying `graph` turns batch and seed into `result` and gradients."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    seed: Tensor | None
    result: Any  # `train.StepResult`


class GraphedBackward:
    """A backward pass captured as one CUDA graph per shape of batch, and replayed.

    Batches of full segments have one shape per number of active segments. The first replay of
    every graph is compared with the eager gradients. If they differ, or the capture fails, all
    further steps are eager and one line reports it. All captures share one memory pool and one side
    stream: a stream of its own would keep a workspace of the matrix library for each.

    The gradients must stay the same tensors: clear them with `zero_grad(set_to_none=False)`.
    """

    def __init__(self, backward: Backward) -> None:
        """Args:
            backward: (model, batch, scale, seed, ...) to a `train.StepResult`.
        """
        self.backward = backward
        self.captures: dict[tuple, Capture] = {}
        self.enabled = True
        self.stream: torch.cuda.Stream | None = None

    def __call__(
        self, model: RMAAT, batch: Batch, scale: float = 1.0, seed: Tensor | None = None, *rest: Any
    ) -> Any:
        """Return a copy of the step's result; `rest` is constant within a graph."""
        # Drawn outside of the graph, which would repeat its own draw.
        seed = model.dropout_seed() if seed is None else seed
        key = (batch.tokens.shape, batch.mask is None, scale, *rest)
        if self.enabled and key not in self.captures:
            self._try_capture(key, model, batch, scale, seed, *rest)
        if key not in self.captures:
            return self.backward(model, batch, scale, seed, *rest)
        capture = self.captures[key]
        for static, value in zip((*capture.batch, capture.seed), (*batch, seed), strict=True):
            if static is not None:
                static.copy_(value, non_blocking=True)
        capture.graph.replay()
        return type(capture.result)._make(x.clone() for x in capture.result)

    def _try_capture(self, key: tuple, model: RMAAT, *arguments: Any) -> None:
        """Capture one form of the step; leave gradients and running statistics as they were."""
        gradients = _gradients(model)
        written = [*model.buffers(), *gradients]
        values = [tensor.clone() for tensor in written]
        current = torch.cuda.current_stream()
        try:
            capture = self._capture(model, gradients, *arguments)
            if capture is not None:
                self.captures[key] = capture
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a failed capture can leave its own one current
            self.captures.clear()
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.enabled = False
            log_line(f"cuda_graphs is off: {first_line(error.__context__ or error)}")
        finally:
            restore(written, values)
        if not self.enabled:
            torch.cuda.empty_cache()  # the pool's memory

    def _capture(
        self, model: RMAAT, gradients: list[Tensor], batch: Batch, scale: float,
        seed: Tensor | None, *rest: Any,
    ) -> Capture | None:
        """Record the step on copies of batch and seed; None if its gradients are not finite.

        Raises:
            RuntimeError: the step cannot be captured, or its replay computes something else.
        """
        static = Batch(*(None if x is None else x.clone() for x in batch))
        static_seed = None if seed is None else seed.clone()
        main = torch.cuda.current_stream()
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(main)
        with torch.cuda.stream(self.stream):
            for _ in range(WARMUP_RUNS):
                torch._foreach_zero_(gradients)
                self.backward(model, static, scale, static_seed, *rest)
        main.wait_stream(self.stream)
        eager = torch.cat([gradient.flatten() for gradient in gradients])
        if not bool(eager.isfinite().all()):
            return None

        graph = torch.cuda.CUDAGraph()
        pool = next((c.graph.pool() for c in self.captures.values()), None)
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            result = self.backward(model, static, scale, static_seed, *rest)
        torch._foreach_zero_(gradients)
        graph.replay()
        replayed = torch.cat([gradient.flatten() for gradient in gradients])
        difference = float((replayed - eager).norm() / eager.norm())
        if not difference <= GRAPH_TOLERANCE:
            raise RuntimeError(f"its gradients differ from eager ones by {difference:.1e}")
        return Capture(graph, static, static_seed, result)


def _gradients(model: RMAAT) -> list[Tensor]:
    """Return the gradients that a step adds to, created where there are none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    return [parameter.grad for parameter in parameters]


class BudgetedReplay:
    """`amrb_backward` that keeps the activations of as many segments as `replay_segments` allows.

    With auto the first step measures the activations of one segment and keeps as many as fit into
    `REPLAY_SHARE` of the free memory. A step that still runs out of memory is repeated with half
    as many, and so are all later ones; `.grad` contains nothing of the failed attempt.
    """

    def __init__(self, backward: Backward, config: Config) -> None:
        self.backward = backward
        self.num_segments = config.segments_per_sequence
        replayed = config.replay_segments
        self.kept = None if replayed == "auto" else self.num_segments - replayed

    def __call__(
        self, model: RMAAT, batch: Batch, scale: float | Tensor = 1.0, seed: Tensor | None = None
    ) -> Any:
        """Add the gradients of `scale` times the mean loss to `.grad`; a `train.StepResult`."""
        if seed is None:
            seed = model.dropout_seed()  # here: a repeated step must drop the same
        if self.kept is None:
            self.kept = self._affordable(model, batch, seed)
        statistics = [buffer.clone() for buffer in model.head.buffers()]
        while True:
            try:
                return self.backward(model, batch, scale, seed, self.kept)
            except torch.OutOfMemoryError:
                if self.kept == 1:
                    raise
            # Outside of the handler, whose error holds the failed step's tensors.
            kept, self.kept = self.kept, self.kept // 2
            restore(model.head.buffers(), statistics)
            torch.cuda.empty_cache()
            log_line(
                f"out of memory with the activations of {kept} segments kept, "
                f"{self.kept} from now on"
            )

    def _affordable(self, model: RMAAT, batch: Batch, seed: Tensor | None) -> int:
        """Return how many segments' activations fit into memory, at least 1."""
        free = free_memory(model.memory.device)
        each = activation_bytes(model, batch, seed)
        kept = min(1 + int(REPLAY_SHARE * free / each), self.num_segments)
        log_line(
            f"replay_segments: {self.num_segments - kept} of {self.num_segments}; a segment's "
            f"activations take {each / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free"
        )
        return kept


def activation_bytes(model: RMAAT, batch: Batch, seed: Tensor | None = None) -> int:
    """Return the bytes that one full segment of `batch` keeps for its backward pass, run eagerly.

    Compiled segments keep less.
    """
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def keep_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pack(inputs[0])

    segments, _ = model.split(batch.tokens, batch.mask)
    with (
        contextlib.ExitStack() as hooks,
        shared_weights(model) as weights, torch.compiler.set_stance("force_eager"),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        positions = model.positions()
        if model.recompute == "layer":  # the layers' inputs do not pass through `pack`
            for layer in model.layers:
                hooks.enter_context(layer.register_forward_pre_hook(keep_input))
        kept.clear()
        outputs = next(model.recur(segments[:1], positions, seed))  # holds the saved tensors
        for _, leaf in weights:
            kept.pop(leaf.data_ptr(), None)
        del outputs
    M, length = model.memory.shape[0], segments[0].tokens.shape[1]
    return sum(kept.values()) * (M + model.segment_len) // (M + length)


def free_memory(device: torch.device) -> float:
    """Return the bytes that this process can still take; 0 where the system does not say."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if not sys.platform.startswith("linux"):
        return 0
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")  # of a container; without a limit "max" is no number
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return max(free, 0)
