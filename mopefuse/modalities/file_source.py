"""Where the files that rows name are stored: in folders on this machine, in archives, or on other machines.

Names in rows are relative to the data folder. Nothing outside the folders of a source is opened.
"""

from __future__ import annotations

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mopefuse.core.error_codes import DataCode, PathCode
from mopefuse.errors import DataError, UnsafePathError

_MAX_FOLDERS = 100  # in which missing files are looked for


class Stamp(NamedTuple):
    """What changes whenever a file does, without reading it.

    Args:
        size: in bytes. version: its modification time in nanoseconds, or another number that stands for its content.
    """

    size: int
    version: int


class FileSource(ABC):
    """Files by the names that rows use. Subclasses decide where they are.

    Attributes:
        at_once: number of files to read at once if many are needed; 0 for as many as there are processors.
    """

    at_once: int = 0

    @abstractmethod
    def stamp(self, name: str, *, where: str, what: str) -> Stamp:
        """The stamp of a file.

        Args:
            where: file, line and id of the row. what: the modality, for messages.

        Raises:
            DataError: there is no such file. UnsafePathError: the name leads outside the source.
        """

    @abstractmethod
    def read(self, name: str, *, where: str, what: str) -> bytes:
        """Read a file; arguments and errors as for `stamp`, and a DataError if it cannot be read."""

    @abstractmethod
    def identity(self) -> tuple[str, ...]:
        """What tells this source from others, for the keys of caches."""

    def is_unchanged(self, name: str, stamp: Stamp) -> bool:
        """Whether a file still has a stamp; a cheap answer, without the checks of `stamp`."""
        try:
            return self.stamp(name, where="", what="file") == stamp
        except (DataError, UnsafePathError):
            return False

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        try:
            self.stamp(name, where="", what="file")
        except (DataError, UnsafePathError):
            return False
        return True

    def hint(self, names: Sequence[str]) -> str:
        """How to fix that none of the files `names` exists."""
        return "add the files"


class Folders(FileSource):
    """Files in folders on this machine.

    Args:
        roots: the data folder, then other folders that may contain files.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots = tuple(map(Path, roots))

    def stamp(self, name: str, *, where: str, what: str) -> Stamp:
        """See `FileSource.stamp`."""
        status = self.path(name, where=where, what=what).stat()
        return Stamp(status.st_size, status.st_mtime_ns)

    def read(self, name: str, *, where: str, what: str) -> bytes:
        """See `FileSource.read`."""
        return read_content(self.path(name, where=where, what=what), name, where)

    def identity(self) -> tuple[str, ...]:
        """See `FileSource.identity`."""
        return tuple(str(root.resolve()) for root in self.roots)

    def is_unchanged(self, name: str, stamp: Stamp) -> bool:
        """See `FileSource.is_unchanged`."""
        for root in self.roots:
            try:
                now = os.stat(f"{root}/{name}" if not name.startswith("/") else name)
            except (OSError, ValueError):
                continue
            return (now.st_size, now.st_mtime_ns) == stamp
        return False

    def hint(self, names: Sequence[str]) -> str:
        """See `FileSource.hint`; suggests a folder nearby that has the files."""
        data = self.roots[0]
        if similar := _spelling_hint(data / names[0], names[0]):
            return similar
        nearby = [data.parent, *(folder for parent in (data, data.parent) for folder in _folders(parent))]
        for folder in nearby:
            if all(os.path.isfile(folder / name) for name in names[:3]):
                return f"add --image-root {folder}"
        return "add --image-root DIR, the folder that contains them"

    def path(self, name: str, *, where: str, what: str) -> Path:
        """Find the file of a name: relative to the first folder that has it, or absolute inside one that is not the first.

        Raises:
            UnsafePathError: the name is a URL or leads outside all folders. DataError: it is not a regular file.
        """
        return regular_file(_place(self.roots, name, where, what), name, where=where, what=what)


class Joined(FileSource):
    """Several sources, of which the first that has a file provides it; the last one answers for files that none has."""

    def __init__(self, sources: Sequence[FileSource]) -> None:
        self.sources = tuple(sources)
        self.at_once = max(source.at_once for source in sources)

    def stamp(self, name: str, *, where: str, what: str) -> Stamp:
        """See `FileSource.stamp`."""
        return self._of(name).stamp(name, where=where, what=what)

    def read(self, name: str, *, where: str, what: str) -> bytes:
        """See `FileSource.read`."""
        return self._of(name).read(name, where=where, what=what)

    def identity(self) -> tuple[str, ...]:
        """See `FileSource.identity`."""
        return tuple(part for source in self.sources for part in source.identity())

    def is_unchanged(self, name: str, stamp: Stamp) -> bool:
        """See `FileSource.is_unchanged`."""
        return self._of(name).is_unchanged(name, stamp)

    def hint(self, names: Sequence[str]) -> str:
        """See `FileSource.hint`."""
        return self.sources[-1].hint(names)

    def _of(self, name: str) -> FileSource:
        return next((source for source in self.sources[:-1] if source.has(name)), self.sources[-1])


def as_source(files: FileSource | Sequence[Path]) -> FileSource:
    """A source of files; a list of folders becomes `Folders`."""
    return files if isinstance(files, FileSource) else Folders(files)


def read_content(path: Path, name: str, where: str) -> bytes:
    """Read a file.

    Args:
        name: name of the file in the row. where: file, line and id of the row.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        fix = "make it readable"
        raise DataError(DataCode.FILE_UNREADABLE, f"{name} cannot be read: {error.strerror}", where=where, fix=fix) from None


def regular_file(path: Path, name: str, *, where: str, what: str) -> Path:
    """Check that a path is a regular file, and return it.

    Args:
        name: name of the file, for messages. what: the modality, for messages.

    Raises:
        DataError: it does not exist, or is a folder, a pipe or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        fix = _spelling_hint(path, name) or "add the file"
        raise DataError(DataCode.FILE_NOT_FOUND, f"{what} not found: {name}", where=where, fix=fix) from None
    if not stat.S_ISREG(mode):
        article = "an" if what[:1] in "aeiou" else "a"
        raise DataError(
            DataCode.NOT_A_REGULAR_FILE,
            f"{name} is not a regular file",
            where=where,
            fix=f"use the path of {article} {what} file",
        )
    return path


def _place(roots: Sequence[Path], relative: str, where: str, what: str) -> Path:
    if "://" in relative:
        fix = "download the file, and use its path relative to the data folder"
        raise UnsafePathError(PathCode.OUTSIDE_ROOT, f"the {what} path is a URL, outside the data folder", where=where, fix=fix)
    if "\0" in relative or relative.startswith(("\\", "~")) or relative[1:2] == ":":
        raise _outside_root(where, what)
    bases = [root.resolve() for root in roots]
    absolute = relative.startswith("/")
    allowed = bases[1:] if absolute else bases
    try:
        places = [path.resolve() for path in ([Path(relative)] if absolute else [base / relative for base in bases])]
    except (OSError, RuntimeError, ValueError):  # a cycle of links, a lone surrogate
        raise DataError(DataCode.FILE_NOT_FOUND, f"{what} not found: {relative}", where=where, fix="add the file") from None
    if absolute and places[0].is_relative_to(bases[0]) and bases[0] not in allowed:
        fix = f"write {places[0].relative_to(bases[0])}"
        what = f"the {what} path is absolute, but has to be relative to the data folder"
        raise UnsafePathError(PathCode.OUTSIDE_ROOT, what, where=where, fix=fix)
    if not all(any(path.is_relative_to(base) for base in allowed) for path in places):
        raise _outside_root(where, what)
    return next((path for path in places[:-1] if os.path.exists(path)), places[-1])


def _outside_root(where: str, what: str) -> UnsafePathError:
    fix = "use a path relative to the data folder, or add --image-root DIR"
    return UnsafePathError(PathCode.OUTSIDE_ROOT, f"the {what} path is outside the data folder", where=where, fix=fix)


def _spelling_hint(path: Path, name: str) -> str:
    """Suggest a file whose name differs only in case, or a path with other slashes."""
    backslash = "\\"
    if backslash in name and ".." not in name and os.path.isfile(str(path).replace(backslash, "/")):
        return f"write {name.replace(backslash, '/')}, with / in place of {backslash}"
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return ""
    similar = [name for name in names if name.lower() == path.name.lower()]
    return f"the folder has {similar[0]}: check upper and lower case" if similar else ""


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(item for item in parent.iterdir() if item.is_dir())[:_MAX_FOLDERS]
    except OSError:
        return []
