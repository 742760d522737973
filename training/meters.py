"""What a step costs: its time, and the kernels that it launches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that launch nothing: they allocate, look at a tensor in another way, or at its type.
NO_KERNELS = {
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "promote_types",
    "_unsafe_view", "_reshape_alias",
}


class Stopwatch:
    """Seconds from its making to `stop`.

    On CUDA they are those of the device's own events, and only reading them waits for it.
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
        self._stopped = self._mark()
        return self

    def seconds(self) -> float:
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
    """Whether an operation is a kernel; views are none."""
    returns = [r.alias_info for r in operation._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in returns)
    return not is_view and operation._schema.name.removeprefix("aten::") not in NO_KERNELS


def count_kernels(step: Callable[[], object]) -> int:
    """The kernels of one call, which must run eagerly."""
    with KernelCounter() as counter:
        step()
    return counter.count
