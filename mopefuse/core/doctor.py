"""Diagnosis of an installation; imports that may fail are tried in other processes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import EntryPoint, PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mopefuse.core import registry

_CORE = "torch torchvision timm transformers open_clip_torch typer rich pydantic pyyaml safetensors huggingface_hub".split()
_CORE += "scikit-learn pillow numpy jinja2".split()
_EXTRAS = {"onnx": "export", "onnxruntime": "export", "altair": "report", "vl-convert-python": "report", "tensorboard": "track"}
_EXTRAS |= {"peft": "lora", "torchao": "quantize", "optuna": "search"}
_CHECKS = {
    "torch and torchvision": ("import torchvision", "torch and torchvision do not match; pip install -U torch torchvision"),
    "timm": ("import timm", "timm cannot be imported; pip install -U timm"),
    "transformers": ("import transformers", "transformers cannot be imported; pip install -U transformers"),
    "open_clip": ("import open_clip", "open_clip cannot be imported; pip install -U open_clip_torch"),
}
_TIMEOUT = 120  # seconds for one import
_DEVICES = """
import torch
print("cpu,", torch.get_num_threads(), "threads")
for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
    p = torch.cuda.get_device_properties(i)
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    print(f"cuda:{i}, {p.name}, {p.total_memory / 2**30:.0f} GiB, bf16 {bf16}")
if torch.backends.mps.is_available():
    print("mps")
"""


@dataclass
class Examination:
    """Result of a diagnosis."""

    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    plugins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values."""
        return asdict(self)


def examine() -> Examination:
    """Check versions, devices, caches and plugins, trying each import in a separate process."""
    found = Examination()
    found.versions = {"python": platform.python_version()} | {name: _version(name) for name in ("mopefuse", *_CORE)}
    for name, extra in _EXTRAS.items():
        found.versions[name] = _version(name).replace("missing", f'not installed (pip install "mopefuse[{extra}]")')
    found.problems += [f"{name} is missing; pip install {name}" for name in _CORE if found.versions[name] == "missing"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each import takes seconds
        *checks, devices = pool.map(_try, [*(code for code, _ in _CHECKS.values()), _DEVICES])
    for (name, (_, problem)), (_, error) in zip(_CHECKS.items(), checks, strict=True):
        found.machine[name] = error or "works"
        if error:
            found.problems.append(f"{problem} ({error})")
    found.machine["devices"] = "; ".join(devices[0].splitlines()) or "none"
    home = Path(os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser())
    found.machine["hub cache"] = f"{home} ({'exists' if home.is_dir() else 'does not exist yet'})"
    found.machine["offline"] = "yes (HF_HUB_OFFLINE)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else "no"
    found.machine["shared memory"] = _shared_memory()
    for group in registry.KINDS:
        for name, point in registry.shortest_names(group).items():
            owner = registry.distribution(point)
            found.plugins[f"{group.partition('.')[2]}: {name}"] = owner
            if owner != registry.OURS:
                found.problems += _problems_of(group, name, point)
    return found


def _problems_of(group: str, name: str, point: EntryPoint) -> list[str]:
    """List the problems of a plugin's entry point, importing it in a separate process."""
    place = f"{point.name} = {point.value} of {registry.distribution(point)}"
    clash = []
    if registry.resolution_status(point) == "clash":
        clash = [f"other plugins also provide the name of {place}; write {name}"]
    error = _try(f"from mopefuse.core.registry import load; load({group!r}, {name!r})")[1]
    return [*clash, f"{place}: {error}"] if error else clash


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _try(code: str) -> tuple[str, str]:
    """Run Python code in a new process and return its stdout and the last line of its error, empty on success."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        return "", f"no result within {_TIMEOUT} seconds"
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return done.stdout, lines[-1] if done.returncode else ""


def _shared_memory() -> str:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return "not used on this system"
    stats = os.statvfs(folder)
    return f"{stats.f_frsize * stats.f_blocks / 2**30:.1f} GiB"
