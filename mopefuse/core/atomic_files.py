"""Atomic writes: files and folders are written next to their destination, synced, and renamed into place."""

from __future__ import annotations

import errno
import glob
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mopefuse.core.error_codes import ConfigCode, ResourceCode
from mopefuse.errors import ConfigError, ResourceError

FREE_SPACE = "free space, and run the command again"
TEMPORARY, OLD = ".tmp-", ".tmp-old-"  # infixes of temporary names, ahead of a counter and the process id of the writer
_counter = itertools.count()
_in_use: set[Path] = set()  # temporary names that this process is writing to


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    write_lines(path, [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Replace a text file atomically with pieces written one by one; its folder is created if necessary."""
    with replace_atomically(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.writelines(lines)


@contextmanager
def replace_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path; on success the file written there atomically replaces `path`.

    Raises:
        ResourceError: the disk is full or not writable; `path` is unchanged.
    """
    with temporary_name(path) as temporary:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        except OSError as error:
            raise disk_error(error, path) from error


@contextmanager
def temporary_name(target: Path, kind: str = TEMPORARY) -> Iterator[Path]:
    """Yield a path beside `target` that no other process or thread uses; whatever is there at the end is removed.

    Leftovers of earlier writers of `target` that were killed are swept first.
    """
    with suppress(OSError):
        remove_leftovers(target.parent, target.name)
    path = target.with_name(f"{target.name}{kind}{next(_counter)}-{os.getpid()}")
    _in_use.add(path.absolute())
    try:
        yield path
    finally:
        _remove(path)
        _in_use.discard(path.absolute())


def lasting_temporary(target: Path) -> Path:
    """A path beside `target` that no other process or thread uses; a file that is still there is swept after this process."""
    with suppress(OSError):
        remove_leftovers(target.parent, target.name)
    path = target.with_name(f"{target.name}{TEMPORARY}{next(_counter)}-{os.getpid()}")
    _in_use.add(path.absolute())
    return path


def _remove(path: Path) -> None:
    """Remove a file or folder; another process may be removing it at the same time.

    A folder that was moved aside gets a name first under which `remove_leftovers` never restores it: it could be half removed.
    """
    if path.is_dir():
        if OLD in path.name:
            discarded = path.with_name(f"{path.name.partition(TEMPORARY)[0]}{TEMPORARY}{next(_counter)}-{os.getpid()}")
            try:
                path.rename(discarded)
            except FileNotFoundError:  # another process was faster
                return
            path = discarded
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_parent(path: Path, where: str = "--out") -> None:
    """Check that the closest existing ancestor of a new file or folder is a folder.

    Raises:
        ConfigError: it is not; the message names it.
    """
    nearest = next(parent for parent in path.absolute().parents if parent.exists() or parent.is_symlink())
    if not nearest.is_dir():
        raise ConfigError(ConfigCode.NOT_A_FOLDER, f"{nearest} is not a folder", where=where, fix="choose a different path")


def check_file(path: Path, where: str = "--out") -> None:
    """Check that a new file can be created: no folder has its name, and see `check_parent`.

    Raises:
        ConfigError: a folder has this name, or an ancestor is not a folder.
    """
    check_parent(path, where)
    if path.is_dir():
        raise ConfigError(
            ConfigCode.FILE_IS_A_FOLDER, f"{path} is a folder", where=where, fix="pass the path of a file, not of a folder"
        )


def remove_leftovers(folder: Path, name: str | None = None) -> int:
    """Remove temporary files of killed processes; those of running processes are kept.

    A folder that was moved aside by `publish` and never replaced is restored.

    Args:
        name: only temporary files of this file or folder; None for all in `folder`.

    Returns:
        How many files and folders were removed.
    """
    swept = 0
    pattern = f"{'*' if name is None else glob.escape(name)}{TEMPORARY}*"
    for orphan in sorted(folder.glob(pattern)) if folder.is_dir() else []:
        pid = orphan.name.rpartition("-")[2]
        if not pid.isdecimal() or (is_alive(int(pid)) and int(pid) != os.getpid()) or orphan.absolute() in _in_use:
            continue
        target = orphan.with_name(orphan.name.partition(TEMPORARY)[0])
        if orphan.name.startswith(f"{target.name}{OLD}") and not target.exists():
            with suppress(FileNotFoundError):  # another process was faster
                orphan.rename(target)  # killed between the two renames of `publish`
            continue
        _remove(orphan)
        swept += 1
    return swept


def is_alive(pid: int) -> bool:
    """Whether a process of this machine is running; zombies are not."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return _stat(pid)[:1] not in (["Z"], ["X"])


def start_time(pid: int) -> str:
    """Start time of a process in clock ticks since boot, which distinguishes it from a later process with the same id.

    Empty if unknown.
    """
    return "".join(_stat(pid)[19:20])


def _stat(pid: int) -> list[str]:
    """Fields of Linux's /proc/<pid>/stat from the state on; empty on other systems."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def disk_error(error: OSError, path: Path) -> ResourceError:
    """Build the error for a failed write, with the free space and a way to continue."""
    free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free / 1e6
    reason = error.strerror or str(error)
    reason = reason.rpartition("I/O error: ")[2].partition(" (os error")[0]  # the wording of safetensors
    full = "No space" in reason or error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = FREE_SPACE if full else "make the folder writable, or choose a different one"
    return ResourceError(
        ResourceCode.CANNOT_WRITE, f"cannot write {path.name}: {reason} (free {free:.1f} MB)", where=str(path.parent), fix=fix
    )


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
