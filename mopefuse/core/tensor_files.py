"""Tensors in safetensors files. Pickles are rejected before anything in them is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mopefuse.core.error_codes import CheckpointCode
from mopefuse.core.regular_files import open_regular
from mopefuse.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        CheckpointError: the file is missing, damaged, or not in safetensors format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_tensors(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, OverflowError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            CheckpointCode.FILE_DAMAGED,
            f"{path.name} is damaged: {error}",
            where=str(path),
            fix="restore the original file, or use a different checkpoint",
        ) from None


def check_tensors(path: Path) -> None:
    """Check by its first bytes, regardless of its name, that a file is in safetensors format.

    Raises:
        CheckpointError: no such file, a pickle (or an archive that may contain one), or another format.
    """
    try:
        with open_regular(path) as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(
            CheckpointCode.NOT_FOUND,
            f"the weights cannot be read: {error.strerror}",
            where=str(path),
            fix="pass an existing file",
        ) from None
    if head[8:] == b"{":  # after eight bytes of header length
        return
    if head.startswith((b"PK\x03\x04", b"\x80", b"\x1f\x8b")):
        raise CheckpointError(
            CheckpointCode.UNSAFE_CONTENT,
            "this is a pickle, which could run code when loaded",
            where=str(path),
            fix="convert it to safetensors",
        )
    raise CheckpointError(
        CheckpointCode.FILE_DAMAGED,
        f"{path.name} is damaged: not in safetensors format",
        where=str(path),
        fix="restore the original file, or use a different checkpoint",
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file.

    Raises:
        OSError: the disk is full or not writable; `publish` reports it with the name of the artifact.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
