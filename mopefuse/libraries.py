"""Errors of torch, torchvision and the system that a user can mend, as errors of mopefuse; optional packages."""

from __future__ import annotations

import errno
import os
import sys
from importlib.metadata import version

from mopefuse.errors import ConfigError, MopefuseError, PackageError, ResourceError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def require(*packages: str, extra: str, what: str) -> None:
    """Refuse to go on without packages that `what` needs and the extra of that name installs. Imports none.

    Raises:
        PackageError: one of them is not installed.
    """
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise PackageError(1, f"{what} needs {' and '.join(missing)}", fix=f'pip install "mopefuse[{extra}]"')


def not_installed(error: ImportError) -> PackageError | None:
    """What to do about a package that mopefuse needs and is not there; None if it is a module of our own."""
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package in ("", "mopefuse"):
        return None
    return PackageError(1, f"{package} is not installed", fix="pip install mopefuse")


def mendable(error: Exception) -> MopefuseError | None:
    """What a user can do about an error of a library; None if it is a bug."""
    if isinstance(error, ImportError):
        return not_installed(error)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return ResourceError(
            5, "out of GPU memory", where=str(error).split(".")[0], fix="use a smaller --batch, or --set train.accumulate=2"
        )
    if isinstance(error, RuntimeError) and int(os.environ.get("WORLD_SIZE", "1")) > 1 and _from_collective(error):
        return ResourceError(
            8, "another process failed", where=f"rank {os.environ.get('RANK')}", fix="see what that process said"
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return ResourceError(
            7, "a data worker was killed; usually host memory", where="data.workers", fix="lower data.workers"
        )
    if isinstance(error, RuntimeError) and "operator torchvision::" in str(error):
        what = f"torchvision {version('torchvision')} does not match torch {version('torch')}"
        return PackageError(2, what, fix="pip install --upgrade torch torchvision, both from one index")
    if isinstance(error, MemoryError):
        return ResourceError(6, "out of memory", fix="use a smaller --batch, or --set train.accumulate=2")
    if isinstance(error, OSError) and error.errno in _FULL:
        return ResourceError(1, f"{error.strerror}", where=str(error.filename or ""), fix="free space, memory or open files")
    if isinstance(error, OSError) and error.filename is not None:
        return ConfigError(9, f"{error.strerror}: {error.filename}", fix="name a path that can be used")
    return None


def _from_collective(error: RuntimeError) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    return any(word in text for word in ("dist", "gloo", "nccl", "connection closed by peer"))
