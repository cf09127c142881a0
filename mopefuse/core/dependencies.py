"""Conversion of errors of torch, torchvision and the system to errors of mopefuse; checks for optional packages."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import ModuleType

from mopefuse.core.error_codes import ConfigCode, PackageCode, ResourceCode
from mopefuse.core.formatting import size
from mopefuse.errors import ConfigError, MopefuseError, PackageError, ResourceError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)

_UNMAPPED = re.compile("failed to map segment|cannot allocate memory|Cannot allocate memory")
_ALLOCATION = re.compile(
    r"can't allocate memory(?:: you tried to allocate (\d+) bytes)?|can't start new thread|std::bad_alloc()"
)
_LESS_MEMORY = "free memory or raise its limit, use a smaller --batch, or --set train.accumulate=2"
_SPARE = 256 * 2**20  # bytes needed besides PyTorch itself


def require(*packages: str, extra: str, what: str) -> None:
    """Check that packages are installed, without importing them.

    Args:
        extra: optional dependency group that installs them.
        what: what needs them, for the message.

    Raises:
        PackageError: one of them is not installed.
    """
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise PackageError(
            PackageCode.PACKAGE_MISSING, f"{what} needs {' and '.join(missing)}", fix=f'pip install "mopefuse[{extra}]"'
        )


def not_installed(error: ImportError) -> PackageError | None:
    """Convert the ImportError of a missing package; None if the missing module is mopefuse's own."""
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package in ("", "mopefuse"):
        return None
    return PackageError(PackageCode.PACKAGE_MISSING, f"{package} is not installed", fix="pip install mopefuse")


def convert_error(error: Exception) -> MopefuseError | None:
    """Convert an error of a library that a user can fix; None for any other error."""
    if isinstance(error, ModuleNotFoundError):
        return not_installed(error)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return ResourceError(
            ResourceCode.GPU_MEMORY,
            "out of GPU memory",
            where=str(error).split(".")[0],
            fix="use a smaller --batch, or --set train.accumulate=2",
        )
    if isinstance(error, RuntimeError) and int(os.environ.get("WORLD_SIZE", "1")) > 1 and _from_collective(error):
        return ResourceError(
            ResourceCode.OTHER_PROCESS_FAILED,
            "another process failed",
            where=f"rank {os.environ.get('RANK')}",
            fix="see the error of that process",
        )
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return ResourceError(
            ResourceCode.WORKER_KILLED,
            "a data worker was killed; usually the host ran out of memory",
            where="data.workers",
            fix="lower data.workers",
        )
    if isinstance(error, RuntimeError) and "operator torchvision::" in str(error):
        what = f"torchvision {version('torchvision')} does not match torch {version('torch')}"
        return PackageError(
            PackageCode.TORCHVISION_MISMATCH, what, fix="pip install --upgrade torch torchvision, both from the same index"
        )
    if (needed := out_of_memory(error)) is not None:
        return ResourceError(ResourceCode.HOST_MEMORY, f"out of memory{needed}", fix=_LESS_MEMORY)
    if isinstance(error, OSError) and error.errno in _FULL:
        return ResourceError(
            ResourceCode.CANNOT_WRITE,
            f"{error.strerror}",
            where=str(error.filename or ""),
            fix="free disk space or memory, or close some files",
        )
    if isinstance(error, OSError) and error.filename is not None:
        return ConfigError(
            ConfigCode.PATH_NOT_USABLE, f"{error.strerror}: {error.filename}", fix="use a valid path"
        )
    return None


def out_of_memory(error: BaseException) -> str | None:
    """Describe an error of running out of memory: text to append to a message, possibly empty; None for other errors."""
    for one in _chain(error):
        text = str(one)
        if isinstance(one, ImportError) and _UNMAPPED.search(text):
            return f" while {text.split(':')[0]} was loaded"
        if isinstance(one, RuntimeError) and (match := _ALLOCATION.search(text)):
            return f": tried to allocate {size(int(match[1]))}" if match[1] else ""
        if isinstance(one, MemoryError):
            return ""
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Iterate over an error and its causes."""
    seen: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in seen:
        seen.append(one)
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return iter(seen)


class _TorchInLittleMemory:
    """Import hook that first tries to import PyTorch in another process with the same limit of address space.

    If the limit is slightly too low, importing PyTorch does not raise an error but ends the process.
    """

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Check that torch can be imported; returns None, so that the next finder is used.

        Raises:
            ResourceError: torch cannot be imported within the limit.
        """
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        trial = f"import mmap, torch; mmap.mmap(-1, {_SPARE})"
        done = subprocess.run([sys.executable, "-c", trial], capture_output=True, text=True, errors="replace", check=False)
        if done.returncode and re.search(f"{_UNMAPPED.pattern}|bad_alloc|MemoryError", done.stderr):
            limit = size(_address_space())
            what = f"the address-space limit, {limit}, is too low to load PyTorch"
            raise ResourceError(
                ResourceCode.ADDRESS_SPACE_TOO_SMALL,
                what,
                where="ulimit -v",
                fix="raise the limit, for example by ulimit -v unlimited",
            )
        return None


def guard_imports() -> None:
    """Make the import of torch raise an error if the limit of address space is too low for it."""
    if _address_space() and "torch" not in sys.modules:
        sys.meta_path.insert(0, _TorchInLittleMemory())


def _address_space() -> int:
    """Limit of this process's address space in bytes; 0 without limit."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return 0 if limit == resource.RLIM_INFINITY else limit


def _from_collective(error: RuntimeError) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    return any(word in text for word in ("dist", "gloo", "nccl", "connection closed by peer"))
