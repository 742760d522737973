"""How the steps of a run are computed on this machine: device, precision, compilation, CUDA graphs.

Every `auto` of the configuration is resolved here; what cannot work falls back with one line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataloader import Batch
from lra_config import Config, ConfigError, UserError
from model import RMAAT, autocast_dtype
from run.environment import launched_processes
from run.terminal import log_line
from utils import first_line

Backward = Callable[..., Any]  # (model, batch, scale, seed) to a `train.StepResult`

WARMUP_RUNS = 2
# Of the gradient's norm: rounding (atomic sums in bfloat16) stays below, a wrong graph does not.
GRAPH_TOLERANCE = 0.02
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


def uses_compile(config: Config, device: torch.device) -> bool:
    """`compile`, with auto resolved: on CUDA alone, as a CPU run seldom earns the minutes back."""
    return device.type == "cuda" if config.compile == "auto" else config.compile


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


def compile_model(model: RMAAT, backward: Backward, batch: Batch) -> None:
    """Compile the segment's encoder; leave it eager, with one line, where that fails.

    Args:
        batch: of the run's shapes, for the trial step that compiles both passes.
    """
    torch._dynamo.reset()  # an earlier run of this process has left its own forms
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    eager = model.encode
    compiled = torch.compile(eager, dynamic=False)

    def give_up(error: Exception) -> None:
        model.encode = eager
        log_line(f"compile is off: {first_line(error)}")

    def encode(*arguments: Any) -> tuple[Tensor, Tensor]:
        try:
            return compiled(*arguments)
        except torch.OutOfMemoryError:
            raise
        # Missing compilers, devices and its own defects raise without a common class.
        except Exception as error:
            give_up(error)
            return eager(*arguments)

    model.encode = encode
    statistics = [buffer.clone() for buffer in model.buffers()]
    try:
        backward(model, batch)
    except Exception as error:  # of compiling the backward pass
        give_up(error)
    model.zero_grad()
    _restore(model.buffers(), statistics)


class Capture(NamedTuple):
    """A captured step: replaying `graph` turns batch and seed into `result` and gradients."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    seed: Tensor | None
    result: Any  # `train.StepResult`


class GraphedBackward:
    """A backward pass captured as one CUDA graph per shape of batch, and replayed.

    Batches of whole segments have one shape per number of active segments. The gradients must stay
    the same tensors: clear them with `zero_grad(set_to_none=False)`. The first replay of every
    graph is held against the eager gradients; where they differ, or the capture fails, all
    further steps are eager and one line says so.
    """

    def __init__(self, backward: Backward) -> None:
        self.backward = backward
        self.captures: dict[tuple, Capture] = {}
        self.enabled = True

    def __call__(self, model: RMAAT, batch: Batch, scale: float = 1.0) -> Any:
        """Add the gradients of `scale` times the mean loss to `.grad`."""
        # Drawn outside of the graph, which would repeat its own draw.
        seed = model.dropout_seed()
        key = (batch.tokens.shape, batch.mask is None, scale, model.training)
        if self.enabled and key not in self.captures:
            self._try_capture(key, model, batch, scale, seed)
        if key not in self.captures:
            return self.backward(model, batch, scale, seed)
        capture = self.captures[key]
        for static, value in zip((*capture.batch, capture.seed), (*batch, seed), strict=True):
            if static is not None:
                static.copy_(value)
        capture.graph.replay()
        return type(capture.result)._make(x.clone() for x in capture.result)

    def _try_capture(
        self, key: tuple, model: RMAAT, batch: Batch, scale: float, seed: Tensor | None
    ) -> None:
        """Capture one form of the step; leave gradients and running statistics as they were."""
        parameters = list(model.parameters())
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        kept = [p.grad.clone() for p in parameters]
        statistics = [buffer.clone() for buffer in model.buffers()]
        stream = torch.cuda.current_stream()
        try:
            capture = self._capture(model, batch, scale, seed)
            if capture is not None:
                self.captures[key] = capture
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # a failed capture can leave its own one current
            self.enabled = False
            self.captures.clear()
            log_line(f"cuda_graphs is off: {first_line(error.__context__ or error)}")
        finally:
            _restore([p.grad for p in parameters], kept)
            _restore(model.buffers(), statistics)

    def _capture(
        self, model: RMAAT, batch: Batch, scale: float, seed: Tensor | None
    ) -> Capture | None:
        """Record the step on copies of batch and seed; None where the batch itself is sick.

        Raises:
            RuntimeError: the step cannot be captured, or its replay computes something else.
        """
        static = Batch(*(None if x is None else x.clone() for x in batch))
        static_seed = None if seed is None else seed.clone()
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            for _ in range(WARMUP_RUNS):
                model.zero_grad(set_to_none=False)
                self.backward(model, static, scale, static_seed)
        main.wait_stream(side)
        eager = _flat_gradient(model)
        if not bool(eager.isfinite().all()):
            return None

        graph = torch.cuda.CUDAGraph()
        pool = next((c.graph.pool() for c in self.captures.values()), None)
        model.zero_grad(set_to_none=False)
        with torch.cuda.graph(graph, pool=pool):
            result = self.backward(model, static, scale, static_seed)
        model.zero_grad(set_to_none=False)
        graph.replay()
        difference = float((_flat_gradient(model) - eager).norm() / eager.norm())
        if not difference <= GRAPH_TOLERANCE:
            raise RuntimeError(f"its gradients differ from eager ones by {difference:.1e}")
        return Capture(graph, static, static_seed, result)


def _restore(tensors: Iterable[Tensor], kept: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, kept, strict=True):
        tensor.copy_(value)


def _flat_gradient(model: RMAAT) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])
