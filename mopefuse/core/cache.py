"""The cache: indexes of data, contents of shards, copies of remote files, features of encoders, outputs of early and last
layers, decoded images, models of the hub, scripts of charts.

Its folder is ``$MOPEFUSE_CACHE``, else ``mopefuse`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. An entry is a folder named by its
kind and a digest of everything that it depends on; it is published atomically (`artifact.publish`) and verified when it is
read. If the folder is not writable, nothing is cached.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mopefuse.core.artifact import publish, read_json, verify
from mopefuse.core.atomic_files import TEMPORARY, remove_leftovers, sync
from mopefuse.errors import CheckpointError, ResourceError

KINDS = ("index", "features", "prefixes", "tokens", "images", "models", "charts", "galleries", "shards", "remote")


_HEX_AT_ONCE = 1 << 20  # bytes


def root() -> Path | None:
    """Folder of the cache; None if it does not exist and cannot be created, or is not writable."""
    configured = os.environ.get("MOPEFUSE_CACHE")
    try:
        base = Path(configured) if configured else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mopefuse"
        base.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home folder
        return None
    return base if os.access(base, os.W_OK) else None


def make_key(*parts: object) -> str:
    """Digest of the given values, used as the name of an entry that depends on them: 32 hex digits.

    Args:
        parts: bytes stand for their hex digits, which are never all in memory; other values for their text.
    """
    found = hashlib.sha256()
    for number, part in enumerate(parts):
        found.update(b"\0" if number else b"")
        if not isinstance(part, memoryview):
            found.update(str(part).encode("utf-8", "surrogatepass"))
            continue
        for start in range(0, len(part), _HEX_AT_ONCE):
            found.update(part[start : start + _HEX_AT_ONCE].hex().encode())
    return found.hexdigest()[:32]


def find(kind: str, key: str, *, thorough: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """Find an entry: its folder and its facts; None if it does not exist or is damaged.

    Args:
        thorough: compare the digests of its files and not only their sizes.
    """
    base = root()
    folder = base / kind / key if base else None
    if folder is None or not folder.is_dir():
        return None
    facts = verify_entry(folder, kind, thorough=thorough)  # a damaged entry is replaced by the next `store`
    return None if facts is None else (folder, facts)


def verify_entry(folder: Path, kind: str, *, thorough: bool = True) -> dict[str, Any] | None:
    """Verify a published folder and return its facts; None if it is damaged."""
    try:
        return verify(folder, kind=kind, thorough=thorough)
    except (CheckpointError, OSError):
        return None


def store(kind: str, key: str, write: Callable[[Path], None], facts: Mapping[str, Any]) -> Path | None:
    """Publish an entry and return its folder; None if it cannot be stored (no cache folder, no space)."""
    base = root()
    if base is None:
        return None
    remove_leftovers(base / kind)
    try:
        publish(base / kind / key, write, {"kind": kind, **facts})
    except ResourceError:  # no space, or another process was faster
        return base / kind / key if find(kind, key, thorough=False) else None
    return base / kind / key


def list_parts(kind: str, key: str) -> list[Path]:
    """Folders that `append` has published below an entry, in order, without verifying them."""
    base = root()
    try:
        folders = [path for path in (base / kind / key).iterdir() if path.name.isdecimal()] if base else []
    except OSError:
        return []
    return sorted(folders, key=lambda path: int(path.name))


def append(kind: str, key: str, write: Callable[[Path], None], facts: Mapping[str, Any]) -> Path | None:
    """Publish another part of an entry, under the next number, and return its folder; None if it cannot be stored.

    Several processes may append at once: each gets its own number, since a rename to an existing folder fails.
    """
    base = root()
    if base is None:
        return None
    entry = base / kind / key
    unnumbered = entry / f"part{TEMPORARY}{uuid.uuid4().hex}-{os.getpid()}"  # a leftover if this process is killed
    try:
        remove_leftovers(entry)
        publish(unnumbered, write, {"kind": kind, **facts})
        while True:
            last = max((int(path.name) for path in list_parts(kind, key)), default=-1)
            try:
                unnumbered.rename(entry / f"{last + 1:06d}")
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                continue  # another process was faster
            sync(entry)
            return entry / f"{last + 1:06d}"
    except (OSError, ResourceError):
        return None
    finally:
        shutil.rmtree(unnumbered, ignore_errors=True)


def entries() -> Iterator[tuple[str, Path, int, dict[str, Any]]]:
    """Iterate over all entries: kind, folder, size in bytes, facts."""
    base = root()
    for kind in KINDS if base else ():
        assert base is not None
        for folder in sorted(path for path in (base / kind).glob("*") if path.is_dir()):
            size = sum(_size(path) for path in folder.rglob("*"))
            found = [_facts(part) for part in list_parts(kind, folder.name)]
            facts = {**found[-1], "rows": sum(part.get("rows", 0) for part in found)} if found else _facts(folder)
            yield kind, folder, size, facts


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:  # removed since it was listed
        return 0


def _facts(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "manifest.json")
    except CheckpointError:
        return {}


def clear() -> int:
    """Remove every entry and return the number of bytes freed."""
    freed = 0
    for _, folder, size, _ in list(entries()):
        shutil.rmtree(folder, ignore_errors=True)
        freed += 0 if folder.exists() else size
    return freed
