"""How the steps of a run are computed on this machine: device, precision, compilation, CUDA graphs.

Every `auto` of the configuration is resolved here; what cannot work falls back with one line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from backprop import StepResult
from dataloader import Batch
from lra_config import Config, ConfigError
from model import RMAAT, autocast_dtype
from utils import log_line

Backward = Callable[[RMAAT, Batch, "float | Tensor"], StepResult]

WARMUP_RUNS = 2
# Of the gradient's norm: rounding (atomic sums in bfloat16) stays below, a wrong graph does not.
GRAPH_TOLERANCE = 0.02


def resolve_device(config: Config) -> torch.device:
    """The device of the run; under `torchrun`, this process's own.

    Raises:
        ConfigError: `device: cuda` on a machine without one.
    """
    present = torch.cuda.is_available()
    if config.device == "cuda" and not present:
        raise ConfigError("device='cuda' but torch sees no CUDA device; set device to cpu or auto")
    if present and config.device != "cpu":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


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
    eager = model.encode
    model.encode = torch.compile(eager, dynamic=False)
    try:
        backward(model, batch, 1.0)
    # Missing compilers, unsupported devices and its own defects raise without a common class.
    except Exception as error:
        model.encode = eager
        log_line(f"compile is off: {_first_line(error)}")
    model.zero_grad()


class Capture(NamedTuple):
    """A captured step: replaying `graph` turns what is in `batch` into `result` and gradients."""

    graph: torch.cuda.CUDAGraph
    batch: Batch
    result: StepResult


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

    def __call__(self, model: RMAAT, batch: Batch, scale: float = 1.0) -> StepResult:
        """Add the gradients of `scale` times the mean loss to `.grad`."""
        key = (batch.tokens.shape, batch.mask is None, scale, model.training)
        if self.enabled and key not in self.captures:
            try:
                self.captures[key] = self._capture(model, batch, scale)
            except RuntimeError as error:
                self.enabled = False
                self.captures.clear()
                log_line(f"cuda_graphs is off: {_first_line(error)}")
        if not self.enabled:
            return self.backward(model, batch, scale)
        capture = self.captures[key]
        for static, value in zip(capture.batch, batch, strict=True):
            if static is not None:
                static.copy_(value)
        capture.graph.replay()
        return StepResult(*(x.clone() for x in capture.result))

    def _capture(self, model: RMAAT, batch: Batch, scale: float) -> Capture:
        """Record the step on copies of `batch`; leave gradients and random state as they were."""
        device = batch.tokens.device
        parameters = list(model.parameters())
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        kept = [p.grad.clone() for p in parameters]
        rng_state = torch.cuda.get_rng_state(device)
        static = Batch(*(None if x is None else x.clone() for x in batch))

        def fresh() -> None:
            model.zero_grad(set_to_none=False)
            torch.cuda.set_rng_state(rng_state, device)

        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARMUP_RUNS):
                fresh()
                self.backward(model, static, scale)
        torch.cuda.current_stream(device).wait_stream(side)
        eager = _flat_gradient(parameters)

        graph = torch.cuda.CUDAGraph()
        pool = next((c.graph.pool() for c in self.captures.values()), None)
        fresh()
        with torch.cuda.graph(graph, pool=pool):
            result = self.backward(model, static, scale)
        fresh()
        graph.replay()
        difference = (_flat_gradient(parameters) - eager).norm() / eager.norm()
        fresh()
        for p, gradient in zip(parameters, kept, strict=True):
            p.grad.copy_(gradient)
        if not difference <= GRAPH_TOLERANCE:
            raise RuntimeError(f"its gradients differ from eager ones by {float(difference):.1e}")
        return Capture(graph, static, result)


def _flat_gradient(parameters: list[Tensor]) -> Tensor:
    return torch.cat([p.grad.flatten() for p in parameters])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
