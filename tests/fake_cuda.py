"""A GPU that does not exist: models of fake tensors, which have shapes, types and a device but no values.

Every operation is checked as it would be on CUDA, autocast included. The one thing that needs a real device is the autograd
engine, so its work is done here: the graph is walked and each node called.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mopefuse.data.base import Batch

torch.ones(1, requires_grad=True).sum().backward()  # a first backward below would start a thread, after which forks fail
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
"""One for all: libraries keep tensors in caches, and those of one mode are refused in another."""


def on_fake_cuda(tensor: Tensor) -> Tensor:
    """Return a tensor of the same shape and type on the device; only within `FAKE`."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


def move(model: nn.Module) -> None:
    """Move all parameters and buffers of a model to the device, in place; only within `FAKE`."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(on_fake_cuda(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = on_fake_cuda(buffer)


def moved(batch: Batch) -> Batch:
    """Move a batch to the device."""
    inputs = {side: {name: on_fake_cuda(t) for name, t in own.items()} for side, own in batch.inputs.items()}
    return replace(batch, inputs=inputs, index=on_fake_cuda(batch.index))


@contextmanager
def autocast(dtype: torch.dtype) -> Iterator[None]:
    """Enable ``torch.autocast("cuda", dtype)``, which disables itself if there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def backward(loss: Tensor) -> None:
    """Do what ``loss.backward()`` does, one node after another, and check the type of each gradient."""
    order: list[Any] = []
    seen: set[Any] = set()

    def visit(node: Any) -> None:
        stack = [(node, iter(node.next_functions))]
        seen.add(node)
        while stack:
            after = next((one for one, _ in stack[-1][1] if one is not None and one not in seen), None)
            if after is None:
                order.append(stack.pop()[0])
            else:
                seen.add(after)
                stack.append((after, iter(after.next_functions)))

    visit(loss.grad_fn)
    gradients: dict[Any, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    for node in reversed(order):
        given = gradients.pop(node, {})
        if not given:
            continue
        run = node if callable(node) else node.apply  # a Python function's
        with torch.no_grad():
            found = run(*(_fitting(given.get(number), like) for number, like in enumerate(node._input_metadata)))
        found = found if isinstance(found, tuple) else (found,)
        assert all(gradient is None for gradient in found[len(node.next_functions) :]), "of arguments that are not tensors"
        for gradient, (after, number) in zip(found, node.next_functions, strict=False):
            if after is not None and gradient is not None:
                sums = gradients.setdefault(after, {})
                gradient = _fitting(gradient, after._input_metadata[number])
                sums[number] = sums[number] + gradient if number in sums else gradient


def _fitting(gradient: Tensor | None, like: Any) -> Tensor | None:
    """Convert a gradient's type like the engine does; its shape must match."""
    if gradient is None:
        return None
    assert gradient.device == like.device, f"a gradient on {gradient.device}, expected {like.device}"
    if tuple(gradient.shape) != tuple(like.shape):
        gradient = gradient.sum_to_size(*like.shape)
    return gradient.to(like.dtype)
