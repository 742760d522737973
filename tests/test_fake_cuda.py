"""The CUDA path on tensors without data: one device, no wait for it, no random draw.

`FakeTensorMode` runs every operation on shapes, types and devices alone. A training step on fake
CUDA tensors fails at the operation that a GPU would refuse.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_config
from tape import StrictStep, name_of, tensors
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from dataloader import Batch
from lra_config import Config, make_config, read_mapping
from model import RMAAT, build_model
from train import amrb_backward, bptt_backward
from training.optimizer import build_optimizers

CONFIGS = ROOT / "configs"
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SYSTEMS = sorted(path.stem for path in (CONFIGS / "tables").glob("*.yaml"))
COMBINATIONS = [(True, "float32"), (True, "bfloat16"), (False, "float32"), (False, "bfloat16")]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Operations(TorchDispatchMode):
    """Lists the operations of a step.

    It also moves to CUDA what C++ code, which sees CPU tensors, allocates for autograd or as a
    further result of an operation.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.names: list[str] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name, kwargs = name_of(operation), dict(kwargs or {})
        if name == "prim::device":
            return operation(*args)
        is_in_cpp = name in ("empty", "scalar_tensor") or torch._C._current_graph_task_id() != -1
        if is_in_cpp and kwargs.get("device") == CPU:
            kwargs["device"] = torch.device(self.device)
        result = operation(*args, **kwargs)
        self.names.append(name)
        is_copy = name == "_to_copy" and not is_in_cpp
        if is_copy or not any(x.device.type == self.device for x in tensors(args)):
            return result
        return tree_map_only(
            torch.Tensor, lambda x: x if x.device.type == self.device
            else torch.empty_like(x, device=self.device), result,
        )


@pytest.fixture
def fake_cuda(monkeypatch) -> None:
    """Let fake CUDA tensors pass through autograd where torch is built without CUDA.

    Its C++ code sees CPU tensors, and autocast follows the CPU's rules. Python and the checks for
    mixed devices see CUDA.
    """
    make, autocast = torch.Tensor._make_subclass, torch.autocast

    def make_cpu(*args: Any, device_for_backend_keys: Any = None, **keys: Any) -> Any:
        return make(*args, device_for_backend_keys=CPU, **keys)

    def device_in_cpp(args: Any) -> torch.device:
        return torch.device("meta") if args[0].fake_mode.in_kernel_invocation else CPU

    handlers = fake_tensor._DISPATCH_META_HANDLERS
    monkeypatch.setattr(torch.Tensor, "_make_subclass", make_cpu)
    monkeypatch.setitem(handlers, torch.ops.prim.device.default, device_in_cpp)
    monkeypatch.setattr(torch, "autocast", lambda _, **keys: autocast("cpu", **keys))


@contextlib.contextmanager
def fake_step(config: Config, device: str) -> Iterator[tuple[Any, Batch, torch.Tensor, Operations]]:
    """Return a model, a padded batch of two segments and a seed, all without data."""
    model = build_model(config)
    model.fixed_shapes = True  # on devices other than the CPU, all samples run every segment
    length = 2 * config.segment_len * config.num_sequences
    if config.segments_per_sequence == 1:
        length //= 2
    shape = (2, length)
    with FakeTensorMode(allow_non_fake_inputs=True), Operations(device) as operations:
        model._apply(lambda x: torch.empty_like(x, device=device))
        batch = Batch(
            torch.ones(shape, dtype=torch.long, device=device),
            torch.ones(shape, dtype=torch.bool, device=device),
            torch.ones(2, dtype=torch.long, device=device),
        )
        yield model, batch, torch.ones((), dtype=torch.long, device=device), operations


def check_step(config: Config) -> list[str]:
    """Run one optimizer step that fails on two devices, a wait for the device, or a draw.

    Returns:
        The operations of its gradient.
    """
    backward = amrb_backward if config.memory_replay_backprop else bptt_backward
    with fake_step(config, "cuda") as (model, batch, seed, operations):
        optimizers = build_optimizers(model, config).values()
        with StrictStep("cuda"):
            operations.names.clear()
            result = backward(model, batch, 1.0, seed)
            names = list(operations.names)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
        assert result.loss.device.type == "cuda"
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.device.type == "cuda", name
    return names


def shipped(name: str, **changes: Any) -> Config:
    # Dropout is half of the operations; the tests of the other systems include it.
    changes = {"device": "cuda", "num_layers": 1, **changes, "dropout": 0.0}
    return make_config({**read_mapping(CONFIGS / f"{name}.yaml"), **changes})


def system(name: str, **changes: Any) -> Config:
    keys = read_mapping(CONFIGS / "tables" / f"{name}.yaml")
    changes = {"device": "cuda", "dropout": 0.1, "num_layers": 1, **changes}
    return tiny_config(**{**keys, **changes})


@pytest.mark.parametrize("build", [
    *(pytest.param(functools.partial(shipped, name), id=name) for name in SHIPPED),
    *(pytest.param(functools.partial(system, name), id=f"system {name}") for name in SYSTEMS),
])
@pytest.mark.parametrize(("replay", "precision"), COMBINATIONS)
def test_a_step_stays_on_the_device(fake_cuda, build, replay, precision):
    changes = {} if replay else {"replay_segments": "all"}
    is_first = (replay, precision) == COMBINATIONS[0]
    dropout = 0.1 if is_first else 0.0
    config = build(
        memory_replay_backprop=replay, precision=precision, dropout=dropout, **changes
    )
    names = check_step(config)
    if is_first:
        with fake_step(config, "cpu") as (model, batch, seed, operations):
            operations.names.clear()
            amrb_backward(model, batch, 1.0, seed)
        assert names == operations.names and len(names) > 50


def test_a_tensor_on_the_host_is_found(fake_cuda):
    config = tiny_config(device="cuda", precision="float32")
    with fake_step(config, "cuda") as (model, batch, seed, _):
        model.retention_factors = torch.ones(4)
        with pytest.raises((AssertionError, RuntimeError)), StrictStep("cuda"):
            amrb_backward(model, batch, 1.0, seed)


def test_a_wait_for_the_device_is_found(fake_cuda, monkeypatch):
    combine = RMAAT.combine
    monkeypatch.setattr(
        RMAAT, "combine", lambda *args: combine(*args) * args[1][0].sum().item()
    )
    with pytest.raises((AssertionError, RuntimeError)):
        check_step(system("rmaat", precision="float32"))
