"""Artefacts that exist whole or not at all, and are never pickles.

An artefact is a folder with a ``manifest.json`` that names the sha256 and size of each of its files. It is written beside
its place, synced, and renamed into it; without a valid manifest it does not exist.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopefuse.core.formatting import json_text
from mopefuse.core.regular_files import open_regular, read_regular
from mopefuse.errors import CheckpointError, ConfigError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1  # of every artefact; raised when an older reader could not read a newer one
MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""How a manifest of format N becomes one of N + 1, in memory, for every N that was released and is not `FORMAT`."""

MANIFEST = "manifest.json"
FREE_SPACE = "free space, and run the command again"
_CHUNK = 1 << 20  # bytes
_WEIGHTS = (".safetensors", ".onnx", ".pt2", ".data")
TEMPORARY, _OLD = ".tmp-", ".tmp-old-"  # before a number and that of the process that writes
_numbers = itertools.count()
_writing: set[Path] = set()  # names that this process uses now


def publish(target: Path, write: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
    """Make the folder `target` appear, whole, with what `write` puts into the folder it is given.

    Raises:
        ResourceError: the disk is full or cannot be written; `target` is as it was before.
    """
    with _temporary(target) as temporary, _temporary(target, _OLD) as old:
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            mode = temporary.stat().st_mode & 0o666  # as the umask has it, also of what a library wrote for the owner alone
            for path in files:
                path.chmod(mode)
                sync(path)
            listed = {str(path.relative_to(temporary)): {"sha256": sha256(path), "size": path.stat().st_size} for path in files}
            manifest = {"format": FORMAT, **facts, "files": listed}
            (temporary / MANIFEST).write_text(dump_json(manifest), encoding="utf-8")
            sync(temporary / MANIFEST)
            sync(temporary)
            if target.exists():
                target.rename(old)  # `sweep` brings it back should the next line not be reached
            temporary.rename(target)
            sync(target.parent)
        except OSError as error:
            raise disk_error(error, target) from error


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file, whole or not at all."""
    write_lines(path, [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Replace a text file by pieces as they come, whole or not at all; its folder is made if it is not there."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        file.writelines(lines)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path`: what is written there takes the place of `path` at the end, whole or not at all.

    Raises:
        ResourceError: the disk is full or cannot be written; `path` is as it was before.
    """
    with _temporary(path) as temporary:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            temporary.replace(path)
            sync(path.parent)
        except OSError as error:
            raise disk_error(error, path) from error


@contextmanager
def _temporary(target: Path, kind: str = TEMPORARY) -> Iterator[Path]:
    """A name beside `target` that no other process or thread uses; what has it at the end is removed.

    What earlier writers of `target` left when they were killed is swept first.
    """
    with suppress(OSError):
        sweep(target.parent, target.name)
    path = target.with_name(f"{target.name}{kind}{next(_numbers)}-{os.getpid()}")
    _writing.add(path.absolute())
    try:
        yield path
    finally:
        _remove(path)
        _writing.discard(path.absolute())


def _remove(path: Path) -> None:
    """Another process may be removing it as well."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_parent(path: Path, where: str = "--out") -> None:
    """Refuse, before any work, a file or folder that cannot be made because something above it is no folder.

    Raises:
        ConfigError: it names what is in the way.
    """
    nearest = next(parent for parent in path.absolute().parents if parent.exists() or parent.is_symlink())
    if not nearest.is_dir():
        raise ConfigError(54, f"{nearest} is not a folder", where=where, fix="name another place")


def check_file(path: Path, where: str = "--out") -> None:
    """Refuse, before any work, a file that cannot be made because a folder is there, or as `check_parent`."""
    check_parent(path, where)
    if path.is_dir():
        raise ConfigError(303, f"{path} is a folder", where=where, fix="name a file")


def verify(folder: Path, *, kind: str, thorough: bool = True) -> dict[str, Any]:
    """The manifest of a folder whose files are exactly as they were published.

    Args:
        thorough: compare the digests of files and not only their sizes.

    Raises:
        CheckpointError: no manifest, another kind or a newer format, a path out of the folder, a changed file.
    """
    manifest = read_json(folder / MANIFEST)
    manifest = understood(manifest, kind, str(folder))
    files = listed_files(manifest, folder)
    for name, facts in files.items():
        if not isinstance(facts, dict) or not _as_published(folder / name, facts, thorough):
            raise CheckpointError(
                2, f"{name} is not what was published (sha256 differs)", where=str(folder), fix="use another checkpoint"
            )
    extra = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS and path.name not in files)
    if extra:
        raise CheckpointError(
            2, f"{extra[0]} is not in the manifest, so nobody vouches for it", where=str(folder), fix="use another checkpoint"
        )
    return manifest


def understood(manifest: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """A manifest of a kind as this version writes it, whichever released version wrote it.

    Raises:
        CheckpointError: of another kind, or of a newer format.
    """
    if manifest.get("kind") != kind or type(manifest.get("format")) is not int or manifest["format"] < 1:
        raise CheckpointError(1, f"this is not a {kind} of mopefuse", where=where, fix="name one")
    made = manifest["format"]
    if made > FORMAT:
        by = f" {manifest['mopefuse']}" if isinstance(manifest.get("mopefuse"), str) else ""
        what = f"made by a newer mopefuse{by} (format {made}), this one reads up to {FORMAT}"
        raise CheckpointError(7, what, where=where, fix="upgrade mopefuse")
    for older in range(made, FORMAT):
        manifest = MIGRATIONS[older](manifest) | {"format": older + 1}
    return manifest


def listed_files(manifest: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The files that a manifest names and what it says of them; not yet whether they are there.

    Raises:
        CheckpointError: it names none, or one outside its folder.
    """
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(3, "the manifest names no files", where=str(folder), fix="use another checkpoint")
    for name in files:
        if "\0" in name or "\\" in name or not _inside(folder, name):
            raise CheckpointError(3, f"the manifest names {name!r}, outside its folder", where=str(folder), fix="do not use it")
    return files


def _inside(folder: Path, name: str) -> bool:
    """Whether a file is in a folder by its name alone: no way up, no absolute path, no link on the way."""
    parts = Path(name).parts
    try:
        links = [folder.joinpath(*parts[: depth + 1]).is_symlink() for depth in range(len(parts))]
    except (OSError, ValueError):  # no path at all
        return False
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts and not any(links)


def _as_published(path: Path, facts: Mapping[str, Any], thorough: bool) -> bool:
    try:
        there = path.is_file() and path.stat().st_size == facts.get("size")
        return there and (not thorough or sha256(path) == facts.get("sha256"))
    except OSError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that mopefuse wrote.

    Raises:
        CheckpointError: no such file, not a regular one, or no JSON object in it.
    """
    try:
        value = json.loads(read_regular(path).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(4, f"there is no {path.name}", where=str(path.parent), fix="name a finished run") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(3, f"{path.name} is damaged: {error}", where=str(path), fix="use another copy") from None
    if not isinstance(value, dict):
        raise CheckpointError(3, f"{path.name} is damaged: it is no object", where=str(path), fix="use another copy")
    return value


def read_text(path: Path) -> str:
    """The text of a file that mopefuse wrote; empty if there is none.

    Raises:
        CheckpointError: it cannot be read, or is not a regular file.
    """
    try:
        return read_regular(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        what = f"{path.name} cannot be read: {error.strerror}"
        raise CheckpointError(3, what, where=str(path), fix="restore that file, or use another copy") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        CheckpointError: not a safetensors file (a pickle is refused before anything of it is read), or a damaged one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_tensors(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, OverflowError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            2, f"{path.name} is damaged: {error}", where=str(path), fix="use another copy or checkpoint"
        ) from None


def check_tensors(path: Path) -> None:
    """Refuse, by its first bytes and whatever its name, a file that is not safetensors. Nothing of it is executed.

    Raises:
        CheckpointError: no such file, a pickle (or an archive that may hold one), or not safetensors.
    """
    try:
        with open_regular(path) as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(
            4, f"the weights cannot be read: {error.strerror}", where=str(path), fix="name an existing file"
        ) from None
    if head[8:] == b"{":  # after eight bytes of length, which may be anything
        return
    if head.startswith((b"PK\x03\x04", b"\x80", b"\x1f\x8b")):
        raise CheckpointError(
            6, "this is a pickle, which could run code when loaded", where=str(path), fix="convert it to safetensors"
        )
    raise CheckpointError(
        2, f"{path.name} is damaged: it does not begin as safetensors", where=str(path), fix="use another copy or checkpoint"
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Save tensors as safetensors, on the CPU and contiguous.

    Raises:
        OSError: the disk is full or cannot be written; `publish` tells it by the name of what it publishes.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error


def sweep(folder: Path, name: str | None = None) -> int:
    """Remove what a killed process left half-written; how many. What a living process writes stays.

    Args:
        name: only what was to become this file or folder; None for all in `folder`.
    """
    swept = 0
    pattern = f"{'*' if name is None else glob.escape(name)}{TEMPORARY}*"
    for orphan in sorted(folder.glob(pattern)) if folder.is_dir() else []:
        pid = orphan.name.rpartition("-")[2]
        if not pid.isdecimal() or (alive(int(pid)) and int(pid) != os.getpid()) or orphan.absolute() in _writing:
            continue
        target = orphan.with_name(orphan.name.partition(TEMPORARY)[0])
        if orphan.name.startswith(f"{target.name}{_OLD}") and not target.exists():
            with suppress(FileNotFoundError):  # another process was faster
                orphan.rename(target)  # killed between the two renames of `publish`
            continue
        _remove(orphan)
        swept += 1
    return swept


def alive(pid: int) -> bool:
    """Whether a process of this machine is still running: one that was killed and that nobody has waited for is not."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return _stat(pid)[:1] not in (["Z"], ["X"])


def born(pid: int) -> str:
    """When a process began, in ticks since the machine did: tells it from a later one of its number. "" if unknown."""
    return "".join(_stat(pid)[19:20])


def _stat(pid: int) -> list[str]:
    """State and what follows it in Linux's /proc/<pid>/stat; empty on other systems."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def dump_json(value: Any) -> str:
    """Readable JSON; what is not a number becomes null (`finite`)."""
    return json_text(finite(value), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """`value` with null for every NaN and infinity in it."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def sha256(path: Path) -> str:
    """Of a file of any size, in hex."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def disk_error(error: OSError, path: Path) -> ResourceError:
    """What the user can do about a write that failed."""
    free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.exists())).free / 1e6
    reason = error.strerror or str(error)
    reason = reason.rpartition("I/O error: ")[2].partition(" (os error")[0]  # of safetensors
    full = "No space" in reason or error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = FREE_SPACE if full else "make the folder writable, or name another"
    return ResourceError(1, f"cannot write {path.name}: {reason} (free {free:.1f} MB)", where=str(path.parent), fix=fix)


def sync(path: Path) -> None:
    """Have a file or folder on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
