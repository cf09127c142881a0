"""Files of weights: safetensors only, checked before anything of them is used, and loaded strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mopefuse.encoders import _numbers
from mopefuse.errors import CheckpointError

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x1f\x8b")  # torch.save, pickle, gzip
_SHOWN = 4  # names in a message


def check_safetensors(path: Path) -> None:
    """Refuse, by its first bytes and whatever its name, a file that is not safetensors. Nothing of it is executed.

    Raises:
        CheckpointError: no such file, a pickle, or not safetensors.
    """
    if not path.is_file():
        raise CheckpointError(_numbers.NO_FILE, f"there is no weights file {path}", fix="check the path")
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{":
        return
    if start.startswith(_PICKLES):
        raise CheckpointError(
            _numbers.PICKLE,
            f"{path} is a pickle (or an archive with one): loading it could run code",
            fix="convert it to .safetensors where you trust it",
        )
    raise CheckpointError(
        _numbers.DAMAGED_FILE, f"{path} is damaged: it does not begin as safetensors", fix="fetch the file again"
    )


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, half precision raised to float32.

    Raises:
        CheckpointError: no such file, a pickle, damaged.
    """
    check_safetensors(path)
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError, OverflowError, KeyError) as error:
        raise CheckpointError(
            _numbers.DAMAGED_FILE, f"{path} is damaged: {error}", fix="fetch the file again"
        ) from error
    halves = (torch.float16, torch.bfloat16)
    return {name: tensor.float() if tensor.dtype in halves else tensor for name, tensor in state.items()}


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
