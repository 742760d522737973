"""Several processes on one run, as `torchrun` starts them; one process needs nothing of it."""

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

from run.program import UserError, launched_processes, one_line

Result = TypeVar("Result")
TIMEOUT_SECONDS = 10_800  # one process packs a data set while the others wait


class ProcessLost(UserError):
    """Another process of the run has ended, or does not answer within `TIMEOUT_SECONDS`."""

    met_by_all = False


@contextlib.contextmanager
def _meeting() -> Iterator[None]:
    """Raise ProcessLost for what a backend raises where processes do not meet."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # gloo's have no class of their own
        raise ProcessLost(
            f"the processes of this run no longer meet ({one_line(error, 120)}); what the others "
            "say tells why, --resume goes on from the last checkpoint"
        ) from error


class FirstProcessFailed(UserError):
    """The first process met an error and says which; the others only end."""


@dataclass(frozen=True)
class Processes:
    """This process's place among those of the run."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one process that writes files and to the terminal."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all processes, in place."""
        if self.world_size > 1:
            _reduce(values)
        return values

    def largest(self, value: int) -> int:
        """The largest `value` of all processes."""
        values = torch.tensor(value)
        if self.world_size > 1:
            _reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def barrier(self) -> None:
        if self.world_size > 1:
            with _meeting():
                dist.barrier()

    def average_gradients(self, parameters: Sequence[Tensor], extra: Tensor) -> Tensor:
        """Replace every gradient by its mean over the processes, in one reduction.

        Args:
            parameters: all with a gradient, the same ones in every process.
            extra: (k,) values that travel with them.
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
        """Call `work` in the first process, then in the others, which find what it left.

        Raises:
            FirstProcessFailed: in the others, when `work` failed in the first.
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
        with _meeting():
            dist.broadcast_object_list(failed, src=0)
        if failure is not None:
            raise failure
        if failed[0]:
            raise FirstProcessFailed
        return result if self.is_first else work()


@_meeting()
def _reduce(values: Tensor, operation: dist.ReduceOp = dist.ReduceOp.SUM) -> None:
    """Reduce `values` over all processes, in place."""
    dist.all_reduce(values, operation)


ALONE = Processes()


def current_processes() -> Processes:
    """Those that `joined_processes` joined; one alone outside of it."""
    return Processes(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else ALONE


@contextlib.contextmanager
def joined_processes() -> Iterator[None]:
    """Join the processes that `torchrun` started: NCCL for CUDA tensors, gloo for the CPU's.

    Raises:
        ProcessLost: they do not meet.
    """
    launched = launched_processes()
    if launched.world_size == 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(launched.local_rank % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    # Its functions keep the default group of the moment of their import as a default argument.
    # Imported later (by the optimizer), they would keep the group and its threads alive past
    # `destroy_process_group`, and a thread that outlives the interpreter aborts the process.
    importlib.import_module("torch.distributed.nn.functional")

    with _meeting():
        dist.init_process_group(backend, timeout=timedelta(seconds=TIMEOUT_SECONDS))
    yield
    dist.destroy_process_group()  # not after an error: it would wait for the others
