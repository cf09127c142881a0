"""Read the files of a data set as its owners distribute them, inside their folder only, and hash them on the way."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mopefuse.core.error_codes import DataCode, PathCode
from mopefuse.errors import DataError, UnsafePathError

_THREADS, _BATCH, _CHUNK = 8, 512, 1 << 20  # threads that read images, images per round, bytes


class SourceFolder:
    """A folder that is only read. Names are relative to it, with ``/``.

    Attributes:
        root: the folder, links resolved.
        sums: sha256 in hex of every file that was read, by relative name.

    Every method raises a DataError if something cannot be read, and an UnsafePathError if a link, or a name with ``..``,
    leads outside the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).resolve()
        self.sums: dict[str, str] = {}
        self._folders: dict[str, Path] = {}
        if not self.root.is_dir():
            fix = "pass the folder with the files as they were distributed"
            raise DataError(DataCode.SOURCE_UNREADABLE, f"source folder not found: {root}", fix=fix)

    def names(self, folder: str = "") -> list[str]:
        """List a folder, sorted, without hidden names; empty if it is not a folder."""
        path = self._folder(folder)
        if not path.is_dir():
            return []
        with _readable(path):
            return sorted(name for name in os.listdir(path) if not name.startswith("."))

    def path(self, name: str) -> Path | None:
        """The path of a regular file, links resolved; None if there is none (a pipe, a device or a folder does not count)."""
        folder, _, last = name.rpartition("/")
        path = self._folder(folder) / last
        try:
            if path.is_symlink():
                path = self._inside(path.resolve(), name)
            return path if stat.S_ISREG(os.stat(path).st_mode) else None
        except (OSError, ValueError, RuntimeError):  # missing, not a valid name, or a cycle of links
            return None

    def read(self, name: str) -> bytes:
        """Read a file."""
        with self._open(name) as file, _readable(self.root / name):
            content = file.read()
        self.sums[name] = hashlib.sha256(content).hexdigest()
        return content

    def lines(self, name: str) -> Iterator[tuple[int, bytes]]:
        """Yield (number from 1, content without line end) of every line that is not blank; a byte order mark is dropped."""
        digest = hashlib.sha256()
        with self._open(name) as file, _readable(self.root / name):
            for number, line in enumerate(file, start=1):
                digest.update(line)
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if content.strip():
                    yield number, content.rstrip(b"\r\n")
        self.sums[name] = digest.hexdigest()

    def _open(self, name: str) -> BinaryIO:
        path = self.path(name)
        if path is None:
            raise DataError(DataCode.SOURCE_UNREADABLE, f"file not found: {name}", where=str(self.root), fix="add this file")
        with _readable(path):
            return path.open("rb")

    def _folder(self, name: str) -> Path:
        if name not in self._folders:
            try:
                path = (self.root / name).resolve()
            except (OSError, ValueError, RuntimeError):
                path = self.root / name
            self._folders[name] = self._inside(path, name)
        return self._folders[name]

    def _inside(self, path: Path, name: str) -> Path:
        if not path.is_relative_to(self.root):
            fix = "put the files themselves there, or pass the folder that contains them"
            raise UnsafePathError(
                PathCode.OUTSIDE_SOURCE, f"{name} leads outside the source folder", where=str(self.root), fix=fix
            )
        return path


class ImportedImages(NamedTuple):
    """Images that were linked or copied: sha256 by name, number of hard links (the others are copies), and size in bytes."""

    sums: dict[str, str]
    linked: int
    size: int


def import_images(images: Mapping[str, Path], target: Path, *, link: bool, advance: Callable[[int], None]) -> ImportedImages:
    """Link or copy images to a folder.

    Args:
        images: file of each relative name.
        link: use hard links, and copies where the file system does not allow links.
        advance: called with the number done.
    """
    for folder in sorted({name.rpartition("/")[0] for name in images}):
        (target / folder).mkdir(parents=True, exist_ok=True)
    placed: dict[str, tuple[str, bool, int]] = {}
    waiting = iter(images.items())
    with ThreadPoolExecutor(_THREADS) as pool:
        while batch := list(islice(waiting, _BATCH)):
            done = pool.map(lambda item: _place(item[1], target / item[0], link), batch)
            placed.update(zip((name for name, _ in batch), done, strict=True))
            advance(len(placed))
    return ImportedImages(
        {name: digest for name, (digest, _, _) in placed.items()},
        sum(linked for _, linked, _ in placed.values()),
        sum(size for _, _, size in placed.values()),
    )


def _place(source: Path, target: Path, link: bool) -> tuple[str, bool, int]:
    linked = link and _linked(source, target)
    digest, size = hashlib.sha256(), 0
    with _readable(source):
        reading = source.open("rb")
    with reading, open(os.devnull if linked else target, "wb") as writing:
        while True:
            with _readable(source):
                chunk = reading.read(_CHUNK)
            if not chunk:
                return digest.hexdigest(), linked, size
            digest.update(chunk)
            size += len(chunk)
            writing.write(chunk)


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # another file system, one without links, or files of another owner
        return False
    return True


def summarise_files(root: Path, tops: Iterable[str]) -> dict[str, Any]:
    """Summarise the files below some names of a folder: their number, bytes, and a sha256 of names and sizes.

    No file is opened, hidden files do not count, and links are not followed.
    """
    digest, files, size = hashlib.sha256(), 0, 0
    for path in _files(root, sorted(tops)):
        facts = os.lstat(path)
        digest.update(f"{os.path.relpath(path, root)}\0{facts.st_size}\n".encode("utf-8", "surrogateescape"))
        files, size = files + 1, size + facts.st_size
    return {"files": files, "bytes": size, "sha256": digest.hexdigest()}


def _files(root: Path, tops: Iterable[str]) -> Iterator[str]:
    for top in tops:
        path = os.path.join(root, top)
        if os.path.isfile(path):
            yield path
        for folder, folders, names in os.walk(path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (os.path.join(folder, name) for name in sorted(names) if not name.startswith("."))


def format_checksums(sums: Mapping[str, str]) -> str:
    """Format `sums` for ``sha256sum --check``, sorted by name."""
    lines = []
    for name in sorted(sums):
        shown = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
        lines.append(f"{'' if shown == name else chr(92)}{sums[name]}  {shown}\n")
    return "".join(lines)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors of the system into a DataError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            DataCode.SOURCE_UNREADABLE, f"{path.name} cannot be read: {reason}", where=str(path), fix="make it readable"
        ) from None
