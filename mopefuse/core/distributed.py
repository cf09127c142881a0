"""The few collectives that data parallelism needs; with one process they do nothing.

Every process computes its share of the global batch, with losses normalised by the size of the *global* batch, and the
gradients of what is trainable are summed. That is the gradient of one process on the whole batch, also when the last
batch does not divide, which averaging over processes would get wrong.
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

_TIMEOUT = timedelta(minutes=10)  # for work that all processes share equally
_PATIENCE = timedelta(days=365)  # for long work, as of the main process alone: if a process dies, its connections close at once
_PART = 64 * 2**20  # bytes of a process's rows that travel at once
_waiting: dist.ProcessGroup | None = None  # all processes, over connections of their own with `_PATIENCE`


def start() -> tuple[int, int]:
    """Join the processes that torchrun started, if it did; (rank, number of processes)."""
    global _waiting
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1 and not dist.is_initialized():
        # Objects and CPU tensors travel over gloo also where gradients travel over NCCL.
        gpus = torch.cuda.is_available() and torch.cuda.device_count() >= local_world()
        if gpus:
            torch.cuda.set_device(local_rank())
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=_TIMEOUT)
        everyone = dist.new_group(backend="gloo", timeout=_PATIENCE)
        assert isinstance(everyone, dist.ProcessGroup)
        _waiting = everyone
    return rank(), world_size()


@contextmanager
def joined() -> Iterator[None]:
    """A part of the program in which the processes that torchrun started work together; it may be inside another."""
    mine = not dist.is_initialized()
    start()
    try:
        yield
    finally:
        if mine and dist.is_initialized():
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
    """Whether this process writes files and speaks to the user."""
    return rank() == 0


def barrier() -> None:
    """Wait for every process, as long as it lives: shares of long work do not take equally long.

    Raises:
        RuntimeError: a process is gone.
    """
    if dist.is_initialized():
        dist.barrier(group=_waiting)


def total(value: Tensor) -> Tensor:
    """Sum over processes. The gradient of this process's part is kept, so that summed gradients come out right."""
    if not dist.is_initialized():
        return value
    summed = value.detach().clone()
    dist.all_reduce(summed)
    return value + (summed - value.detach())


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients of `parameters` over processes, in one message.

    A parameter that the model does not use has no gradient in any process, and keeps none.
    """
    if not dist.is_initialized():
        return
    used = [parameter for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([parameter.grad.reshape(-1) for parameter in used if parameter.grad is not None])
    dist.all_reduce(flat)
    for parameter, gradient in zip(used, flat.split([parameter.numel() for parameter in used]), strict=True):
        parameter.grad = gradient.view_as(parameter)


def summed(value: Tensor) -> Tensor:
    """Sum over processes of a tensor without gradient."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def largest(number: int, device: torch.device) -> int:
    """Maximum over processes, as of a signal that may have reached only one of them."""
    if not dist.is_initialized():
        return number
    value = torch.tensor([number], device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value.item())


def gather(value: Any) -> list[Any]:
    """`value` of every process, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def whole(own_RX: Tensor, count: int) -> Tensor:
    """A tensor (count, ...) in every process from each one's own rows: rank, rank + world size, and so on.

    It travels in parts of bounded size, as numbers and not as objects.
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


def to_main(tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """The tensors of every process by rank, in the main process, and nothing in the others.

    Args:
        tensors: on the CPU, of one dimension; as many and of the same types in every process, their lengths may differ.
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


def from_main(value: Any) -> Any:
    """The main process's `value`, in every process; they wait for it as long as the main process lives.

    Raises:
        RuntimeError: the main process is gone.
    """
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, group=_waiting)
    return values[0]


def on_main(action: Callable[[], Any]) -> Any:
    """Run `action`, however long it takes, in the main process; what it returns or raises, every process returns or raises.

    What the main process writes and others read belongs here: none of them goes on before it is written.
    """
    outcome: Any = None
    if is_main():
        try:
            outcome = (True, action())
        except Exception as error:
            if world_size() == 1:
                raise
            outcome = (False, error)
    done, value = from_main(outcome)
    if not done:
        raise value
    return value
