"""Weight files given by the user, loaded strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mopefuse.core.error_codes import CheckpointCode
from mopefuse.core.tensor_files import read_tensors
from mopefuse.errors import CheckpointError

_MAX_NAMES = 4  # in a message


def read_float(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; half precision is converted to float32.

    Raises:
        CheckpointError: the file is missing, a pickle, or damaged.
    """
    halves = (torch.float16, torch.bfloat16)
    return {name: tensor.float() if tensor.dtype in halves else tensor for name, tensor in read_tensors(path).items()}


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], *, where: str, unused_prefixes: Iterable[str] = ()
) -> None:
    """Load a state whose tensors must be exactly those of `module`.

    Args:
        unused_prefixes: prefixes of tensors in the file that are ignored, such as a classifier's.

    Raises:
        CheckpointError: tensors are missing, unexpected or of a different shape.
    """
    prefixes = tuple(unused_prefixes)
    given = {name: tensor for name, tensor in state.items() if not (prefixes and name.startswith(prefixes))}
    expected = module.state_dict()
    faults = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "of a different shape": [
            f"{name} ({_shape(given[name])}, expected {_shape(expected[name])})"
            for name in expected
            if name in given and given[name].shape != expected[name].shape
        ],
    }
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise CheckpointError(
            CheckpointCode.ENCODER_WEIGHTS_MISMATCH,
            f"the weights do not fit {type(module).__name__}: {found}",
            where=where,
            fix="use weights of this encoder, with the same options",
        )
    module.load_state_dict(given)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (", …" if len(names) > _MAX_NAMES else "")
