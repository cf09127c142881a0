"""Files of weights that a user names, loaded strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mopefuse.core import error_numbers as _numbers
from mopefuse.core.artifact import read_tensors
from mopefuse.errors import CheckpointError

_SHOWN = 4  # names in a message


def read_float(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, half precision raised to float32.

    Raises:
        CheckpointError: no such file, a pickle, damaged.
    """
    halves = (torch.float16, torch.bfloat16)
    return {name: tensor.float() if tensor.dtype in halves else tensor for name, tensor in read_tensors(path).items()}


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], *, where: str, unused_prefixes: Iterable[str] = ()
) -> None:
    """Load exactly the tensors that `module` has.

    Args:
        unused_prefixes: tensors of the file that may be there and are not used, such as a classifier's.

    Raises:
        CheckpointError: names that are missing, not expected, or of another shape, with examples.
    """
    prefixes = tuple(unused_prefixes)
    given = {name: tensor for name, tensor in state.items() if not (prefixes and name.startswith(prefixes))}
    wanted = module.state_dict()
    faults = {
        "missing": [name for name in wanted if name not in given],
        "unexpected": [name for name in given if name not in wanted],
        "of another shape": [
            f"{name} ({_shape(given[name])}, need {_shape(wanted[name])})"
            for name in wanted
            if name in given and given[name].shape != wanted[name].shape
        ],
    }
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {fault}: {_some(names)}" for fault, names in faults.items() if names)
        raise CheckpointError(
            _numbers.KEYS_DIFFER,
            f"the weights do not fit {type(module).__name__}: {found}",
            where=where,
            fix="use the weights of this very encoder, with the same options",
        )
    module.load_state_dict(given)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
