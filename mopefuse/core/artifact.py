"""Artefacts: folders with a manifest, published atomically and verified when they are read.

``manifest.json`` lists the sha256 and size of each file of the folder; a folder without a valid manifest is not an artifact.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mopefuse.core import atomic_files
from mopefuse.core.atomic_files import (
    OLD,
    disk_error,
    temporary_name,
)
from mopefuse.core.error_codes import CheckpointCode
from mopefuse.core.formatting import json_text
from mopefuse.core.regular_files import open_regular, read_regular
from mopefuse.errors import CheckpointError

FORMAT = 2  # format version of every artifact
MANIFEST = "manifest.json"
_CHUNK = 1 << 20  # bytes
_WEIGHTS = (".safetensors", ".onnx", ".pt2", ".data")


def publish(target: Path, write: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
    """Create or replace the folder `target` atomically.

    Args:
        write: writes the files into the folder that it is given.
        facts: further entries of the manifest.

    Raises:
        ResourceError: the disk is full or not writable; `target` is unchanged.
    """
    with temporary_name(target) as temporary, temporary_name(target, OLD) as old:
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            mode = temporary.stat().st_mode & 0o666  # follow the umask, even if a library made the file private
            for path in files:
                path.chmod(mode)
                atomic_files.sync(path)
            listed = {str(path.relative_to(temporary)): {"sha256": sha256(path), "size": path.stat().st_size} for path in files}
            manifest = {"format": FORMAT, **facts, "files": listed}
            (temporary / MANIFEST).write_text(dump_json(manifest), encoding="utf-8")
            atomic_files.sync(temporary / MANIFEST)
            atomic_files.sync(temporary)
            if target.exists():
                target.rename(old)  # `sweep` restores it if the process is killed before the next line
            temporary.rename(target)
            atomic_files.sync(target.parent)
        except OSError as error:
            raise disk_error(error, target) from error


def verify(folder: Path, *, kind: str, thorough: bool = True) -> dict[str, Any]:
    """Verify that the files of an artifact are as published, and return its manifest.

    Args:
        kind: ``run``, ``checkpoint``, ``adapter``, ...
        thorough: compare the digests of files and not only their sizes.

    Raises:
        CheckpointError: no manifest, a different kind or a newer format, a path outside the folder, a changed file, or weights
            that the manifest does not list.
    """
    manifest = check_manifest(read_json(folder / MANIFEST), kind, str(folder))
    files = listed_files(manifest, folder)
    for name, facts in files.items():
        if not isinstance(facts, dict) or not _as_published(folder / name, facts, thorough):
            raise CheckpointError(
                CheckpointCode.FILE_DAMAGED,
                f"{name} has changed since it was written (sha256 differs)",
                where=str(folder),
                fix="restore the original file, or use a different checkpoint",
            )
    extra = sorted(path.name for path in folder.iterdir() if path.suffix in _WEIGHTS and path.name not in files)
    if extra:
        raise CheckpointError(
            CheckpointCode.FILE_DAMAGED,
            f"{extra[0]} is not listed in the manifest",
            where=str(folder),
            fix="restore the original file, or use a different checkpoint",
        )
    return manifest


def check_manifest(manifest: dict[str, Any], kind: str, where: str) -> dict[str, Any]:
    """Check that a manifest is of a kind and of a format that this version reads, and return it.

    Raises:
        CheckpointError: another kind, or a newer format.
    """
    if manifest.get("kind") != kind or type(manifest.get("format")) is not int or manifest["format"] < 1:
        raise CheckpointError(
            CheckpointCode.NOT_OURS, f"this is not a mopefuse {kind}", where=where, fix=f"pass the folder of a mopefuse {kind}"
        )
    if manifest["format"] > FORMAT:
        by = f" {manifest['mopefuse']}" if isinstance(manifest.get("mopefuse"), str) else ""
        found = manifest["format"]
        what = f"written by a newer version of mopefuse{by} (format {found}); this version reads formats up to {FORMAT}"
        raise CheckpointError(CheckpointCode.NEWER_FORMAT, what, where=where, fix="upgrade mopefuse")
    return manifest


def listed_files(manifest: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the files that a manifest lists, with their digests and sizes; their existence is not checked.

    Raises:
        CheckpointError: no list of files, or a file outside the folder.
    """
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(
            CheckpointCode.CONTENT_DAMAGED,
            "the manifest lists no files",
            where=str(folder),
            fix="restore the original file, or use a different checkpoint",
        )
    for name in files:
        if "\0" in name or "\\" in name or not _inside(folder, name):
            raise CheckpointError(
                CheckpointCode.CONTENT_DAMAGED,
                f"the manifest lists {name!r}, which is outside its folder",
                where=str(folder),
                fix="do not load this folder; ask its author for a correct one",
            )
    return files


def _inside(folder: Path, name: str) -> bool:
    """Whether a relative name stays within a folder: no ``..``, no absolute path, no symbolic link in between."""
    parts = Path(name).parts
    try:
        links = [folder.joinpath(*parts[: depth + 1]).is_symlink() for depth in range(len(parts))]
    except (OSError, ValueError):  # not a valid path
        return False
    return bool(parts) and not Path(name).is_absolute() and ".." not in parts and not any(links)


def _as_published(path: Path, facts: Mapping[str, Any], thorough: bool) -> bool:
    try:
        same_size = path.is_file() and path.stat().st_size == facts.get("size")
        return same_size and (not thorough or sha256(path) == facts.get("sha256"))
    except OSError:
        return False


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file that mopefuse wrote.

    Raises:
        CheckpointError: no such file, not a regular file, or not a JSON object.
    """
    try:
        value = json.loads(read_regular(path).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            CheckpointCode.NOT_FOUND,
            f"file not found: {path.name}",
            where=str(path.parent),
            fix="pass the folder of a finished run",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            CheckpointCode.CONTENT_DAMAGED, f"{path.name} is damaged: {error}", where=str(path), fix="restore the original file"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(
            CheckpointCode.CONTENT_DAMAGED,
            f"{path.name} is damaged: not a JSON object",
            where=str(path),
            fix="restore the original file",
        )
    return value


def read_text(path: Path) -> str:
    """Read the text of a file that mopefuse wrote; empty if there is no such file.

    Raises:
        CheckpointError: the file cannot be read, or is not a regular file.
    """
    try:
        return read_regular(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        what = f"{path.name} cannot be read: {error.strerror}"
        raise CheckpointError(
            CheckpointCode.CONTENT_DAMAGED, what, where=str(path), fix="restore the original file"
        ) from None


def dump_json(value: Any) -> str:
    """Serialise to indented JSON; NaN and infinity become null."""
    return json_text(finite(value), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Replace every NaN and infinity in a nested value by None."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def sha256(path: Path) -> str:
    """SHA-256 digest of a file, in hex."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
