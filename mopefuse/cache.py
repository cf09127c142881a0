"""Where things are kept that cost time to compute and cannot change: indexes of data, features, decoded images,
models fetched from the hub.

``$MOPEFUSE_CACHE``, else ``mopefuse`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. An entry is a folder named by its kind and
a digest of everything that it depends on, published whole (`checkpoint.publish`) and verified when it is read; all runs
share it. Where nothing can be written, nothing is kept.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mopefuse.checkpoint import publish, read_json, sweep, verify
from mopefuse.errors import CheckpointError, ResourceError

KINDS = ("index", "features", "images", "models")


def root() -> Path | None:
    """The folder of the cache; None where there is none and none can be made."""
    named = os.environ.get("MOPEFUSE_CACHE")
    try:
        base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mopefuse"
        base.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home
        return None
    return base if os.access(base, os.W_OK) else None


def key_of(*parts: object) -> str:
    """A digest of `parts`: the name of an entry that depends on them and on nothing else."""
    return hashlib.sha256("\0".join(map(str, parts)).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def find(kind: str, key: str, *, thorough: bool = True) -> tuple[Path, dict[str, Any]] | None:
    """An entry's folder and its facts; None if there is none that is whole.

    Args:
        thorough: compare the digests of its files and not only their sizes.
    """
    base = root()
    folder = base / kind / key if base else None
    if folder is None or not folder.is_dir():
        return None
    try:
        facts = verify(folder, kind=kind, thorough=thorough)
    except CheckpointError:  # damaged: as if it were not there, and the next `keep` replaces it
        return None
    return folder, facts


def keep(kind: str, key: str, write: Callable[[Path], None], facts: Mapping[str, Any]) -> Path | None:
    """Publish an entry; its folder, or None where nothing can be kept (no cache folder, no space)."""
    base = root()
    if base is None:
        return None
    sweep(base / kind)
    try:
        publish(base / kind / key, write, {"kind": kind, **facts})
    except ResourceError:  # no space, or another process was faster
        return base / kind / key if find(kind, key, thorough=False) else None
    return base / kind / key


def entries() -> Iterator[tuple[str, Path, int, dict[str, Any]]]:
    """(kind, folder, bytes, facts) of every entry."""
    base = root()
    for kind in KINDS if base else ():
        assert base is not None
        for folder in sorted(path for path in (base / kind).glob("*") if path.is_dir()):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            try:
                facts = read_json(folder / "manifest.json")
            except CheckpointError:
                facts = {}
            yield kind, folder, size, facts


def clear() -> int:
    """Remove every entry; how many bytes that freed."""
    freed = 0
    for _, folder, size, _ in list(entries()):
        shutil.rmtree(folder, ignore_errors=True)
        freed += 0 if folder.exists() else size
    return freed
