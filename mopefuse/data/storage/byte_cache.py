"""Copies of remote files, or of parts of them, in the cache folder; the least recently used are removed beyond a limit.

Each copy is a file that starts with the digest of its content, so that a damaged copy is fetched again. Processes may share the
folder: a copy is written to a temporary name and renamed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from mopefuse.core import cache

_DIGEST = 16  # bytes
_FREE_SHARE = 0.5  # of the free space that copies may take
_KEPT = 0.9  # of the limit, when copies are removed


class ByteCache:
    """Copies by key, up to `limit` bytes in all, and half of the free space; without a cache folder, nothing is kept."""

    def __init__(self, limit: int) -> None:
        base = cache.root()
        self._folder = base / "remote" if base else None
        self._limit, self._size, self._lock = limit, -1, threading.Lock()

    def get(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """The content of a key: its copy, or what `fetch` returns, which is then kept."""
        path = None if self._folder is None else self._folder / key[:2] / key
        if path is not None and (found := _read(path)) is not None:
            return found
        content = fetch()
        if path is not None:
            self._keep(path, content)
        return content

    def _keep(self, path: Path, content: bytes) -> None:
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(_digest(content) + content)
            temporary.replace(path)
        except OSError:  # no space, not writable
            temporary.unlink(missing_ok=True)
            return
        with self._lock:
            if self._size < 0:
                self._size = sum(size for _, size, _ in self._files())
            else:
                self._size += len(content)
            if self._size > self._allowed(path.parent):
                self._remove_oldest(int(_KEPT * self._allowed(path.parent)))

    def _allowed(self, folder: Path) -> int:
        return min(self._limit, int(_FREE_SHARE * (shutil.disk_usage(folder).free + max(self._size, 0))))

    def _remove_oldest(self, allowed: int) -> None:
        files = sorted(self._files())
        self._size = sum(size for _, size, _ in files)
        for _, size, file in files:
            if self._size <= allowed:
                return
            file.unlink(missing_ok=True)
            self._size -= size

    def _files(self) -> list[tuple[float, int, Path]]:
        """Time of last use, size and path of each copy."""
        assert self._folder is not None
        found = []
        for file in self._folder.glob("*/*"):
            try:
                status = file.stat()
            except OSError:  # removed by another process
                continue
            found.append((status.st_mtime, status.st_size, file))
        return found


def _read(path: Path) -> bytes | None:
    """The content of a copy, which becomes the one last used; None if there is none or it is damaged."""
    try:
        stored = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    content = stored[_DIGEST:]
    return content if _digest(content) == stored[:_DIGEST] else None


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()
