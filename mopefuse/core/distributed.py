"""Collective operations for data parallelism; with one process they do nothing.

Every process computes its share of the global batch, with losses normalised by the size of the *global* batch, and the
gradients of trainable parameters are summed. The result is the gradient of one process on the whole batch, even if the last
batch cannot be divided evenly, for which averaging over processes would be wrong.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mopefuse.core import fresh_store
from mopefuse.core.launcher import end_with_launcher
from mopefuse.core.registry import redirect_stdout_to_stderr

_TIMEOUT = timedelta(minutes=10)  # for work that is divided evenly
_LONG_TIMEOUT = timedelta(days=365)  # for long work of one process; if a process dies, its connections close immediately
_PART = 64 * 2**20  # bytes of a process's rows that are sent at once
_patient_group: dist.ProcessGroup | None = None  # all processes, over separate connections with `_LONG_TIMEOUT`


def start() -> tuple[int, int]:
    """Initialise the process group if torchrun started this process, and return (rank, number of processes)."""
    global _patient_group
    world = int(os.environ.get("WORLD_SIZE", "1"))
    end_with_launcher()
    if world > 1 and not dist.is_initialized():
        # Objects and CPU tensors are sent over gloo even if gradients are sent over NCCL.
        gpus = torch.cuda.is_available() and torch.cuda.device_count() >= local_world()
        if gpus:
            torch.cuda.set_device(local_rank())
        with redirect_stdout_to_stderr():  # where Gloo of older versions of torch prints its connections
            options: dict[str, Any] = {}
            if fresh_store.is_reused():
                options = dict(zip(("store", "rank", "world_size"), fresh_store.join(_TIMEOUT), strict=True))
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_TIMEOUT, **options)
            everyone = dist.new_group(backend="gloo", timeout=_LONG_TIMEOUT)
        assert isinstance(everyone, dist.ProcessGroup)
        _patient_group = everyone
    return rank(), world_size()


@contextmanager
def process_group() -> Iterator[None]:
    """Keep the process group initialised within the context; contexts may be nested."""
    outermost = not dist.is_initialized()
    start()
    try:
        yield
    finally:
        if outermost and dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine, from 0: also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """Number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes files and prints messages."""
    return rank() == 0


def barrier() -> None:
    """Wait for every process, however long its work takes.

    Raises:
        RuntimeError: a process has died.
    """
    if dist.is_initialized():
        dist.barrier(group=_patient_group)


def sum_with_gradient(value: Tensor) -> Tensor:
    """Sum over processes; the gradient flows to this process's part only, so that gradients can be summed afterwards."""
    if not dist.is_initialized():
        return value
    summed = value.detach().clone()
    dist.all_reduce(summed)
    return value + (summed - value.detach())


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients of `parameters` over processes in one operation.

    A parameter without gradient is skipped; it must have none in any process.
    """
    if not dist.is_initialized():
        return
    used = [parameter for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in used if parameter.grad is not None])
    dist.all_reduce(flat)
    for parameter, gradient in zip(used, flat.split([parameter.numel() for parameter in used]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def sum_over_processes(value: Tensor) -> Tensor:
    """Sum a tensor without gradient over processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def max_over_processes(number: int, device: torch.device) -> int:
    """Maximum over processes, for example of a signal that only one of them received."""
    if not dist.is_initialized():
        return number
    value = torch.tensor([number], device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value.item())


def is_any(value: bool) -> bool:
    """Whether the value of any process is true, waiting for all of them however long they take."""
    if not dist.is_initialized():
        return value
    found = torch.tensor([int(value)])
    dist.all_reduce(found, dist.ReduceOp.MAX, group=_patient_group)
    return bool(found.item())


def gather(value: Any) -> list[Any]:
    """Collect the value of every process, ordered by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def gather_patiently(value: Any) -> list[Any]:
    """`gather`, waiting however long it takes."""
    values: list[Any] = [value]
    if dist.is_initialized():
        values *= world_size()
        dist.all_gather_object(values, value, group=_patient_group)
    return values


def gather_rows(own_RX: Tensor, count: int) -> Tensor:
    """Assemble a tensor (count, ...) in every process from the rows of each: rank, rank + world size, and so on.

    Rows are sent as tensors in parts of bounded size.
    """
    if not dist.is_initialized():
        return own_RX
    world, shape = world_size(), own_RX.shape[1:]
    found = own_RX.new_empty(count, *shape)
    at_once = max(1, _PART // max(1, own_RX.element_size() * shape.numel()))
    for first in range(0, -(-count // world), at_once):
        mine = own_RX[first : first + at_once]
        part = own_RX.new_zeros(at_once, *shape)
        part[: len(mine)] = mine
        parts = [torch.empty_like(part) for _ in range(world)]
        dist.all_gather(parts, part)
        for rank_, theirs in enumerate(parts):
            place = found[first * world + rank_ : (first + at_once) * world : world]
            place[:] = theirs[: len(place)]
    return found


def send_to_main(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Send tensors to the main process.

    Args:
        tensors: one-dimensional, on the CPU; their number and types must be equal in all processes, lengths may differ.

    Returns:
        The tensors of every process, ordered by rank, in the main process; an empty list in the others.
    """
    if not dist.is_initialized():
        return [tuple(tensors)]
    sizes = torch.tensor([len(tensor) for tensor in tensors])
    if not is_main():
        dist.send(sizes, 0)
        for tensor in tensors:
            if len(tensor):
                dist.send(tensor.contiguous(), 0)
        return []
    found = [tuple(tensors)]
    for source in range(1, world_size()):
        dist.recv(sizes, source)
        theirs = tuple(tensor.new_empty(int(size)) for tensor, size in zip(tensors, sizes, strict=True))
        for tensor in theirs:
            if len(tensor):
                dist.recv(tensor, source)
        found.append(theirs)
    return found


def broadcast_from_main(value: Any) -> Any:
    """Broadcast the main process's value, waiting for it however long it takes.

    Raises:
        RuntimeError: the main process has died.
    """
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, group=_patient_group)
    return values[0]


def in_turns(action: Callable[[], Any]) -> Any:
    """Run `action` in every process, one after another on each machine, and return its result.

    `action` must not exchange anything with other processes.
    """
    result = None
    for turn in range(max(gather(local_world()))):
        if turn == local_rank():
            result = action()
        barrier()
    return result


def run_on_all(action: Callable[[], Any]) -> list[Any]:
    """Run `action` in every process, however long it takes; returns the results of all, ordered by rank.

    Raises:
        Exception: what `action` raised in the first process in which it failed, in every process.
    """
    outcomes = gather_patiently(_attempt(action))
    for done, value in outcomes:
        if not done:
            raise value
    return [value for _, value in outcomes]


def run_on_each_node(action: Callable[[], Any]) -> None:
    """Run `action` in the first process of each machine while its others wait, see `run_on_all`.

    Use this to write files to caches that the processes of a machine read afterwards.
    """
    run_on_all(lambda: action() and None if local_rank() == 0 else None)


def run_on_main(action: Callable[[], Any]) -> Any:
    """Run `action` in the main process, however long it takes, and return its result or raise its error in every process.

    Use this to write files that other processes read afterwards.
    """
    done, value = broadcast_from_main(_attempt(action) if is_main() else None)
    if not done:
        raise value
    return value


def _attempt(action: Callable[[], Any]) -> tuple[bool, Any]:
    """Run `action`; returns whether it succeeded, and its result or its error, which a single process raises at once."""
    try:
        return True, action()
    except Exception as error:
        if world_size() == 1:
            raise
        return False, error
