"""Several processes on one run, as `torchrun` starts them."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from run.program import UserError, launcher_variable, one_line

Result = TypeVar("Result")
TIMEOUT_SECONDS = 10_800  # one process packs a data set while the others wait


@contextlib.contextmanager
def _communication() -> Iterator[None]:
    """Raise UserError where another process of the run has ended or does not answer."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # gloo has no error class of its own
        raise UserError(
            f"the processes of this run no longer meet ({one_line(error, 120)}); see the messages "
            "of the others, --resume goes on from the last checkpoint", alone=True,
        ) from error


@dataclass(frozen=True)
class Processes:
    """The rank of this process among the `world_size` processes of the run."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and to the terminal."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Add up `values` over all processes, in place."""
        if self.world_size > 1:
            _reduce(values)
        return values

    def largest(self, value: int) -> int:
        """Return the largest `value` of all processes."""
        values = torch.tensor(value)
        if self.world_size > 1:
            _reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            with _communication():
                dist.barrier()

    def average_gradients(self, parameters: Sequence[Tensor], extra: Tensor) -> Tensor:
        """Replace every gradient by its mean over the processes, in one reduction.

        Args:
            parameters: all with a gradient, the same ones in every process.
            extra: (k,) values that are averaged with them.
        Returns:
            The means (k,) of `extra`.
        """
        if self.world_size == 1:
            return extra
        parts = [*(p.grad for p in parameters), extra.to(parameters[0].grad)]
        flat = torch.cat([part.flatten() for part in parts])
        _reduce(flat)
        flat /= self.world_size
        means = flat.split([part.numel() for part in parts])
        for part, mean in zip(parts, means, strict=True):
            part.copy_(mean.view_as(part))
        return parts[-1]

    def first_alone(self, work: Callable[[], Result]) -> Result:
        """Call `work` in the first process, then in the others, which find its files.

        Raises:
            UserError: in the others, if `work` failed in the first, which reports it.
        """
        if self.world_size == 1:
            return work()
        failure, result = None, None
        if self.is_first:
            try:
                result = work()
            except Exception as error:
                failure = error
        failed = [failure is not None]
        with _communication():
            dist.broadcast_object_list(failed, src=0)
        if failure is not None:
            raise failure
        if failed[0]:
            raise UserError("the first process failed")
        return result if self.is_first else work()


@_communication()
def _reduce(values: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> None:
    dist.all_reduce(values, operation)


ALONE = Processes()


def current_processes() -> Processes:
    """Return the processes that `joined_processes` joined, or this one alone."""
    return Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE


@contextlib.contextmanager
def joined_processes() -> Iterator[None]:
    """Join the processes that `torchrun` started: NCCL for CUDA tensors, gloo for the CPU's.

    Raises:
        UserError: not all of them arrive.
    """
    if launcher_variable("WORLD_SIZE") == 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(launcher_variable("LOCAL_RANK") % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    # Its functions keep the default group of the moment of their import as a default argument.
    # Imported later (by the optimizer), they would keep the group and its threads alive past
    # `destroy_process_group`, and a thread that outlives the interpreter aborts the process.
    importlib.import_module("torch.distributed.nn.functional")

    with _communication():
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_SECONDS))
    yield
    dist.destroy_process_group()  # not after an error: it would wait for the others
