"""Where a model runs and in which precision."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mopefuse.core import distributed
from mopefuse.errors import ConfigError

FLUSH = "MOPEFUSE_FLUSH_DENORMALS"  # "1": on CPUs; the command line sets it, in Python the caller's process is left as it is


def resolve(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` stands for, per process under torchrun.

    Raises:
        ConfigError: no such device.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name, re.ASCII):
        raise ConfigError(41, f"there is no device {name!r}", where="device", fix="write auto, cpu, cuda, cuda:N or mps")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and distributed.local_world() > 1:
        name = f"cuda:{distributed.local_rank()}"
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing = (device.type == "cuda" and (device.index or 0) >= count) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        there = f"{count} CUDA device{'s' if count != 1 else ''}"
        raise ConfigError(41, f"there is no device {name} (this machine has {there})", where="device", fix="use --device auto")
    flush_denormals(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def flush_denormals(device: torch.device) -> None:
    """Where `FLUSH` asks for it on a CPU, let the calling thread, which has a setting of its own, take tiny numbers for 0."""
    if device.type == "cpu" and os.environ.get(FLUSH) == "1":
        # Masked attention leaves weights below 1e-38, and with them products take a hundred times as long.
        torch.set_flush_denormal(True)


def precision(name: str, device: torch.device) -> str:
    """``fp32`` or ``bf16``, which is also what ``auto`` stands for on a GPU that has it."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return name


def autocast(name: str, device: torch.device) -> AbstractContextManager[object]:
    """In bf16 where `precision` says so; else plain float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision(name, device) == "bf16" else nullcontext()


def place(model: nn.Module, device: torch.device) -> None:
    """Move a model. On a GPU frozen convolutions get the memory format that its kernels want, `channels_last`."""
    model.to(device)
    for module in model.modules() if device.type == "cuda" else ():
        if isinstance(module, nn.Conv2d) and not module.weight.requires_grad:
            module.to(memory_format=torch.channels_last)


def compiled(call: Callable[..., Any]) -> Any:
    """A model or function compiled by torch, its forward pass as one graph."""
    # In a graph, a block that is computed again needs no second look into where its prompt waits.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    return torch.compile(call)


def free_memory(device: torch.device) -> int | None:
    """Bytes that one more process could have: on the GPU, or of this machine's or container's memory; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    try:
        most, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="ascii") for name in ("max", "current"))
        free += [int(most) - int(used)]
    except (OSError, ValueError):  # no container, or no limit
        pass
    return min(free, default=None)


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the CUDA allocator, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
