"""Run the graph of a bundle: ONNX with onnxruntime, pt2 with torch. Neither is imported before a graph is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mopefuse.core.error_codes import CheckpointCode, ConfigCode, PackageCode
from mopefuse.errors import CheckpointError, ConfigError, PackageError

EXPORT_AGAIN = "export the run again"
Array = NDArray[Any]
Runner = Callable[[dict[str, Array]], Sequence[Array]]
"""Maps the inputs of a graph, by name, to its outputs, in order."""


def load_runner(file: Path, device: str, threads: int | None) -> Runner:
    """Load the graph in a file.

    Args:
        device: see `mopefuse.inference.bundle.Bundle`. threads: threads of onnxruntime; None for its default.

    Raises:
        CheckpointError: the graph cannot be loaded. PackageError: a missing package. ConfigError: there is no such device.
    """
    return (_onnx if file.suffix == ".onnx" else _pt2)(file, device, threads)


def _onnx(file: Path, device: str, threads: int | None) -> Runner:
    try:
        import onnxruntime
    except ImportError as error:
        raise PackageError(
            PackageCode.PACKAGE_MISSING,
            f"onnxruntime cannot be imported: {error}",
            where=str(file),
            fix='pip install "mopefuse[runtime]"',
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = threads
    providers = _providers(device)
    try:
        session = onnxruntime.InferenceSession(file, options, providers=providers)
    except Exception as error:  # onnxruntime's own errors have no common class
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            CheckpointCode.BUNDLE_UNREADABLE,
            f"onnxruntime cannot load {file.name}: {reason}",
            where=str(file),
            fix=EXPORT_AGAIN,
        ) from None
    used = {value.name for value in session.get_inputs()}  # a graph may not use a mask
    return lambda inputs: session.run(None, {name: array for name, array in inputs.items() if name in used})


def _providers(device: str) -> list[Any]:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    kind, _, number = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (kind == "cuda" and "CUDAExecutionProvider" not in available):
        names = ", ".join(available)
        raise ConfigError(
            ConfigCode.NO_SUCH_DEVICE,
            f"onnxruntime has no device {device} (it has {names})",
            where="device",
            fix="use --device auto or cpu",
        )
    cuda = [("CUDAExecutionProvider", {"device_id": int(number or 0)})]
    return [*(cuda if kind != "cpu" and "CUDAExecutionProvider" in available else []), "CPUExecutionProvider"]


def _pt2(file: Path, device: str, threads: int | None) -> Runner:
    try:
        import torch
    except ImportError:
        raise PackageError(
            PackageCode.PACKAGE_MISSING,
            "a pt2 bundle needs torch",
            where=str(file),
            fix="pip install torch, or export with --format onnx",
        ) from None
    from mopefuse.core import device as devices
    from mopefuse.inference.pt2 import load_pt2

    target = devices.resolve(device)
    module = load_pt2(file, target)

    def run(inputs: dict[str, Array]) -> list[Array]:
        devices.flush_denormals(target)
        with torch.no_grad():
            outputs = module({name: torch.from_numpy(array).to(target) for name, array in inputs.items()})
        return [output.cpu().numpy() for output in outputs]

    return run
