"""How the steps of a run are computed on this machine: device, precision, compilation, CUDA graphs.

Every `auto` of the configuration is resolved here; what cannot work falls back with one line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataloader import Batch
from lra_config import Config, ConfigError
from model import RMAAT, autocast_dtype
from run.program import UserError, launched_processes, log_line
from utils import first_line, restore

Backward = Callable[..., Any]  # (model, batch, scale, seed) to a `train.StepResult`

WARMUP_RUNS = 2
# Of the gradient's norm: rounding (atomic sums in bfloat16) stays below, a wrong graph does not.
GRAPH_TOLERANCE = 0.02
# The same for a compiled step against an eager one, by whether the precision is a lower one: there
# the two round in other places.
COMPILE_TOLERANCE = {False: 1e-3, True: 0.1}
LONG_RUN = 1e14  # floating-point operations, half an hour of one CPU core
RECOMPILE_LIMIT = 64  # forms of one segment: passes, masks, the last batches of evaluations


def resolve_device(config: Config) -> torch.device:
    """The device of the run; under `torchrun`, this process's own.

    On a CPU this process takes subnormal numbers for 0 from here on.

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
    processes = launched_processes().local_world_size
    if processes > present:
        raise ConfigError(
            f"{processes} processes share {present} CUDA devices; start as many as there are "
            "devices, or set device=cpu"
        )
    return torch.device("cuda", torch.cuda.current_device())


class OutOfMemory(UserError):
    """The device has no memory left for the run."""

    met_by_all = False


@contextlib.contextmanager
def told_out_of_memory() -> Iterator[None]:
    """Say in one line that the device's memory, or the machine's, did not suffice.

    Raises:
        OutOfMemory: in the place of torch's OutOfMemoryError, of the RuntimeError of its allocator
            on the CPU, and of numpy's MemoryError.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        what = str(error) or "out of memory"
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            _, allocator, what = what.partition("DefaultCPUAllocator: ")
            if not allocator:
                raise
        what, _, _ = what.partition(" GPU ")  # how the allocator's memory is laid out
        what = what.strip().splitlines()[0].partition(". Error code")[0].rstrip(".")
        advice = "lower batch_size, for which accumulate makes up, or raise num_segments"
        raise OutOfMemory(f"{what}; {advice}") from error


class Manner(NamedTuple):
    """How a run computes: what `precision` and `compile` come to on this machine."""

    precision: str  # "auto" on CUDA, which `model.autocast_dtype` resolves
    compile: bool
    why: str = ""  # where something was chosen


def choose_manner(
    config: Config, device: torch.device, parameters: int, begun: str | None = None
) -> Manner:
    """`precision` and `compile`, with auto resolved.

    CUDA compiles. On a CPU with instructions for bfloat16 an eager step in it takes about half of
    float32's time (measured with AVX-512), and compiling it gains nothing on that: long runs take
    it, short ones keep float32's digits. What a run was begun in, it goes on in. Where bfloat16 was
    asked for and is emulated (7 times slower than float32, measured with AVX2), `why` says so.

    Args:
        parameters: of the model.
        begun: the precision of the run that is resumed, None for a new one.
    """
    asked, compiled = config.precision, config.compile
    if device.type == "cuda":
        return Manner(asked, compiled is not False)
    flop = 8 * parameters * config.max_steps * config.accumulate  # forward, backward and replay
    is_long = flop * config.batch_size * config.max_seq_len >= LONG_RUN
    if asked == "auto" and begun is not None:
        precision = "float32" if begun == "auto" else begun  # auto: it was begun on CUDA
        why = "as the run was begun"
    elif asked == "bfloat16" and not bfloat16_instructions():
        precision, why = asked, "this CPU has no instructions for it; precision=float32 is faster"
    elif asked != "auto":
        precision, why = asked, ""
    elif not bfloat16_instructions():
        precision, why = "float32", "this CPU has no bfloat16 instructions"
    elif not is_long:
        precision, why = "float32", "a short run"
    else:
        precision, why = "bfloat16", "a long run on a CPU with instructions for it"
    return Manner(precision, compiled is True, why)


def bfloat16_instructions() -> bool:
    """Whether this CPU multiplies bfloat16 itself: AMX, or AVX-512's dot product."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in text or "avx512_bf16" in text


def uses_cuda_graphs(config: Config, device: torch.device) -> bool:
    """`cuda_graphs`, with auto resolved; says why where it was asked for and cannot work."""
    reason = None
    if device.type != "cuda":
        reason = "it needs a CUDA device"
    elif autocast_dtype(config.precision, device) == torch.float16:
        reason = "float16 scales its gradients from step to step"
    if reason and config.cuda_graphs is True:
        log_line(f"cuda_graphs is off: {reason}")
    return reason is None and config.cuda_graphs is not False


def compile_model(model: RMAAT, backward: Backward, batch: Batch) -> bool:
    """Compile the segment's encoder; leave it eager, with one line, where that fails.

    Args:
        batch: of the run's shapes, for the trial step that compiles both passes. Its gradients are
            held against those of an eager step.
    Returns:
        Whether it is compiled.
    """
    torch._dynamo.reset()  # an earlier run of this process has left its own forms
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    eager = model.encode
    compiled = torch.compile(eager, dynamic=False)

    def give_up(reason: str) -> None:
        model.encode = eager
        log_line(f"compile is off: {reason}")

    def encode(*arguments: Any) -> tuple[Tensor, Tensor]:
        try:
            return compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        # Missing compilers, devices and its own defects raise without a common class.
        except Exception as error:
            give_up(first_line(error))
            return eager(*arguments)

    statistics = [buffer.clone() for buffer in model.buffers()]
    seed = model.dropout_seed()
    gradients = []
    for form in (eager, encode):
        model.encode = form
        model.zero_grad()
        try:
            backward(model, batch, 1.0, seed)
            gradients.append(_flat_gradient(model))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of compiling the backward pass
            if form is eager:
                raise
            give_up(first_line(error))
        restore(model.buffers(), statistics)
    model.zero_grad()
    if model.encode is encode and bool(gradients[0].isfinite().all()):
        difference = _relative_difference(gradients[1], gradients[0])
        low = autocast_dtype(model.precision, batch.tokens.device) is not None
        if not difference <= COMPILE_TOLERANCE[low]:
            give_up(f"its gradients differ from eager ones by {difference:.1e}")
    return model.encode is encode


class Capture(NamedTuple):
    """A captured step: replaying `graph` turns batch and seed into `result` and gradients."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    seed: Tensor | None
    result: Any  # `train.StepResult`


class Graphed:
    """A step captured as one CUDA graph per shape of batch, and replayed.

    Batches of whole segments have one shape per number of active segments. The first replay of
    every graph is held against the eager result; where they differ, or the capture fails, all
    further steps are eager and one line says so. All captures share one memory pool and one side
    stream: a stream of its own would keep a workspace of the matrix library for each.
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        """Args:
            step: (model, batch, scale, seed, ...) to a named tuple of tensors.
        """
        self.step = step
        self.captures: dict[tuple, Capture] = {}
        self.enabled = True
        self.stream: torch.cuda.Stream | None = None

    def __call__(
        self, model: RMAAT, batch: Batch, scale: float = 1.0, seed: Tensor | None = None, *rest: Any
    ) -> Any:
        """What the step returns, copied; `rest` is part of a graph."""
        # Drawn outside of the graph, which would repeat its own draw.
        seed = model.dropout_seed() if seed is None else seed
        key = (batch.tokens.shape, batch.mask is None, scale, model.training, *rest)
        if self.enabled and key not in self.captures:
            self._try_capture(key, model, batch, scale, seed, *rest)
        if key not in self.captures:
            return self.step(model, batch, scale, seed, *rest)
        capture = self.captures[key]
        for static, value in zip((*capture.batch, capture.seed), (*batch, seed), strict=True):
            if static is not None:
                static.copy_(value, non_blocking=True)
        capture.graph.replay()
        return type(capture.result)._make(x.clone() for x in capture.result)

    def _try_capture(self, key: tuple, model: RMAAT, *arguments: Any) -> None:
        """Capture one form of the step; leave gradients and running statistics as they were."""
        kept = self._state(model)
        values = [tensor.clone() for tensor in kept]
        current = torch.cuda.current_stream()
        try:
            capture = self._capture(model, *arguments)
            if capture is not None:
                self.captures[key] = capture
        except torch.OutOfMemoryError:
            torch.cuda.set_stream(current)
            self.captures.clear()
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a failed capture can leave its own one current
            self.enabled = False
            self.captures.clear()
            log_line(f"cuda_graphs is off: {first_line(error.__context__ or error)}")
        finally:
            restore(kept, values)
        if not self.enabled:
            torch.cuda.empty_cache()  # the pool's memory

    def _capture(
        self, model: RMAAT, batch: Batch, scale: float, seed: Tensor | None, *rest: Any
    ) -> Capture | None:
        """Record the step on copies of batch and seed; None where the batch itself is sick.

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
                self._clear(model)
                result = self.step(model, static, scale, static_seed, *rest)
        main.wait_stream(self.stream)
        eager = self._witness(model, result)
        if not bool(eager.isfinite().all()):
            return None

        graph = torch.cuda.CUDAGraph()
        pool = next((c.graph.pool() for c in self.captures.values()), None)
        self._clear(model)
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            result = self.step(model, static, scale, static_seed, *rest)
        self._clear(model)
        graph.replay()
        difference = _relative_difference(self._witness(model, result), eager)
        if not difference <= GRAPH_TOLERANCE:
            raise RuntimeError(f"its results differ from eager ones by {difference:.1e}")
        return Capture(graph, static, static_seed, result)

    def _state(self, model: RMAAT) -> list[Tensor]:
        """What a step changes."""
        return list(model.buffers())

    def _clear(self, model: RMAAT) -> None:
        """Undo what a step adds up."""

    def _witness(self, model: RMAAT, result: Any) -> Tensor:
        """What tells a right step from a wrong one, a copy."""
        return result.logits.clone()


class GraphedBackward(Graphed):
    """A captured backward pass, which adds the gradients of `scale` times the loss to `.grad`.

    The gradients must stay the same tensors: clear them with `zero_grad(set_to_none=False)`.
    """

    def _state(self, model: RMAAT) -> list[Tensor]:
        parameters = [p for p in model.parameters() if p.requires_grad]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [*super()._state(model), *(p.grad for p in parameters)]

    def _clear(self, model: RMAAT) -> None:
        model.zero_grad(set_to_none=False)

    def _witness(self, model: RMAAT, result: Any) -> Tensor:
        return _flat_gradient(model)


def _flat_gradient(model: RMAAT) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _relative_difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
