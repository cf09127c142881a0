"""Devices: selection, precision, placement, compilation and memory."""

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
from mopefuse.core.error_codes import ConfigCode
from mopefuse.errors import ConfigError

FLUSH = "MOPEFUSE_FLUSH_DENORMALS"  # "1" enables it on CPUs; set by the command line, not by the Python interface


def resolve(name: str) -> torch.device:
    """Resolve ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` to a device, for this process under torchrun.

    Raises:
        ConfigError: no such device.
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name, re.ASCII):
        raise ConfigError(
            ConfigCode.NO_SUCH_DEVICE,
            f"unknown device {name!r}",
            where="device",
            fix="write auto, cpu, cuda, cuda:N or mps",
        )
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
        found = f"{count} CUDA device{'s' if count != 1 else ''}"
        raise ConfigError(
            ConfigCode.NO_SUCH_DEVICE,
            f"device not found: {name} (this machine has {found})",
            where="device",
            fix="use --device auto",
        )
    flush_denormals(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def flush_denormals(device: torch.device) -> None:
    """Make the calling thread flush denormal numbers to 0 on a CPU, if the environment variable `FLUSH` is set."""
    if device.type == "cpu" and os.environ.get(FLUSH) == "1":
        # Masked attention produces weights below 1e-38, with which products take a hundred times as long.
        torch.set_flush_denormal(True)


def precision(name: str, device: torch.device) -> str:
    """Resolve ``auto``, ``fp32`` or ``bf16``; ``auto`` is ``bf16`` on GPUs that support it."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return name


def autocast(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Context of mixed precision in bf16 if `precision` resolves to it; no-op for float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision(name, device) == "bf16" else nullcontext()


def move_to_device(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device; on a GPU, frozen convolutions get the memory format `channels_last`, which is faster."""
    model.to(device)
    for module in model.modules() if device.type == "cuda" else ():
        whole = isinstance(module, nn.Conv2d) and type(module.weight) is nn.Parameter  # the weight of a sharded encoder is not
        if whole and not module.weight.requires_grad:
            module.to(memory_format=torch.channels_last)


def compile_as_one_graph(call: Callable[..., Any]) -> Any:
    """Compile a model or function with torch, its forward pass as one graph."""
    # A recomputed block must not take its prompt from the slot a second time.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    return torch.compile(call)


def free_memory(device: torch.device) -> int | None:
    """Free memory in bytes: of the GPU, or of this machine or container; None if unknown."""
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
    """Peak memory in bytes so far: of the CUDA allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
