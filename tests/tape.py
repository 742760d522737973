"""CPU substitutes for a GPU's features: CUDA graphs, and a device with strict rules.

`Tape` records the operations of a step and repeats them on the same memory, as a CUDA graph does.
Values read from the host are fixed at the capture; tensors are read again. `fake_cuda_graphs`
replaces CUDA's graphs by it. `StrictStep` fails on every operation that a captured step must avoid.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmark import NO_KERNELS
from training import acceleration

SYNCS = {"_local_scalar_dense", "item", "is_nonzero", "equal"}  # others have tags


def name_of(operation: torch._ops.OpOverload) -> str:
    return operation._schema.name.removeprefix("aten::")


def waits_for_the_device(operation: torch._ops.OpOverload) -> bool:
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return bool(tags & set(operation.tags)) or name_of(operation) in SYNCS


def draws(operation: torch._ops.OpOverload) -> bool:
    is_attention = "scaled_dot_product" in name_of(operation)  # its dropout is never used here
    return torch.Tag.nondeterministic_seeded in operation.tags and not is_attention


def tensors(*trees: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


class Tape(TorchDispatchMode):
    """A captured step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.shared_pool: Any = None

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if waits_for_the_device(operation):
            raise RuntimeError("operation not permitted when stream is capturing")
        result = operation(*args, **kwargs)
        self.calls.append((operation, args, kwargs, result))  # keeps all memory alive
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for operation, args, kwargs, result in self.calls:
            if name_of(operation) in NO_KERNELS:
                continue
            again = operation(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # not a view, and not written in place
                    old.copy_(new)

    def pool(self) -> Any:
        return self.shared_pool or self


class FakeStream:
    made = 0

    def __init__(self) -> None:
        FakeStream.made += 1

    def wait_stream(self, other: FakeStream) -> None:
        pass


@contextlib.contextmanager
def recording(graph: Tape, pool: Any = None, stream: FakeStream | None = None) -> Iterator[None]:
    assert stream is not None, "a stream of its own for each capture"
    graph.shared_pool = pool
    with graph:
        yield


@pytest.fixture
def fake_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Let this process capture on the CPU; `streams()` returns the number of side streams."""
    main = FakeStream()
    doubles = {
        "CUDAGraph": Tape, "graph": recording, "Stream": FakeStream,
        "current_stream": lambda: main, "stream": lambda _: contextlib.nullcontext(),
        "set_stream": lambda _: None, "empty_cache": lambda: None,
    }
    for name, double in doubles.items():
        monkeypatch.setattr(acceleration.torch.cuda, name, double)
    before = FakeStream.made
    return SimpleNamespace(streams=lambda: FakeStream.made - before)


class StrictStep(TorchDispatchMode):
    """Fails on a wait for the device, a host-device copy, a random draw, or two devices."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if name_of(operation) == "prim::device":  # half of all calls under FakeTensorMode
            return operation(*args)
        assert not waits_for_the_device(operation), f"{operation} waits for the device"
        assert not draws(operation), f"{operation} draws"
        result = operation(*args, **kwargs)
        found = {x.device.type for x in tensors(args, kwargs, result)}
        assert found <= {self.device}, f"{operation} is of {sorted(found)}"
        return result
