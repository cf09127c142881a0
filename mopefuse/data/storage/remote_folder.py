"""Files in a remote folder, which are fetched when they are used, and kept in a cache of limited size."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

from mopefuse.core import cache
from mopefuse.core.error_codes import DataCode, PathCode
from mopefuse.data.storage.byte_cache import ByteCache
from mopefuse.data.storage.paths import file_system, read_range, remote_errors, remote_stamp
from mopefuse.errors import DataError, UnsafePathError
from mopefuse.modalities.file_source import FileSource, Stamp


class RemoteFolder(FileSource):
    """Files below a remote folder; each of its folders is listed once.

    Args:
        root: a remote path, see `mopefuse.data.storage.paths.data_path`. kept: where copies are kept.
    """

    at_once = 32

    def __init__(self, root: Path, kept: ByteCache) -> None:
        self.root, self._cache = root, kept
        self._listed: dict[str, dict[str, Stamp]] = {}
        self._lock = threading.Lock()

    def stamp(self, name: str, *, where: str, what: str) -> Stamp:
        """See `FileSource.stamp`."""
        parts = name.split("/")
        if name.startswith("/") or ".." in parts or "://" in name or "\\" in name or "\0" in name:
            message, fix = f"the {what} path is outside the data folder", "use a path relative to the data folder"
            raise UnsafePathError(PathCode.OUTSIDE_ROOT, message, where=where, fix=fix)
        parts = [part for part in parts if part not in ("", ".")]
        found = self._list("/".join(parts[:-1])).get(parts[-1]) if parts else None
        if found is None:
            raise DataError(DataCode.FILE_NOT_FOUND, f"{what} not found: {name}", where=where, fix="add the file")
        return found

    def read(self, name: str, *, where: str, what: str) -> bytes:
        """See `FileSource.read`."""
        stamp = self.stamp(name, where=where, what=what)
        file = self.root / name
        return self._cache.get(cache.make_key(str(file), *stamp), lambda: read_range(file))

    def identity(self) -> tuple[str, ...]:
        """See `FileSource.identity`."""
        return (str(self.root),)

    def _list(self, folder: str) -> dict[str, Stamp]:
        """The stamps of the files of a folder, by name."""
        with self._lock:
            if folder not in self._listed:
                self._listed[folder] = _list(self.root / folder if folder else self.root)
            return self._listed[folder]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def _list(folder: Path) -> dict[str, Stamp]:
    with remote_errors(folder):
        try:
            items = file_system(folder).ls(cast(Any, folder).path, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {item["name"].rpartition("/")[2]: remote_stamp(item) for item in items if item["type"] == "file"}
