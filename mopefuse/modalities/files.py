"""Files that rows name: they lie inside a root, are checked when the index is built, and are read when a sample is used.

A modality whose values are files is a subclass of `Files`, which defines how a file is decoded and checked.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from mopefuse.core.error_codes import DataCode, PathCode
from mopefuse.errors import DataError, MopefuseError, UnsafePathError
from mopefuse.modalities.base import Modality

if TYPE_CHECKING:  # bundles run without pydantic
    from mopefuse.config.schema import Data as DataConfig

MISSING = DataCode.FILE_NOT_FOUND.text
_MAX_FOLDERS = 100  # in which missing files are looked for
_KINDS = {PathCode.OUTSIDE_ROOT.text: "unsafe-path", MISSING: "missing-file", DataCode.NOT_A_REGULAR_FILE.text: "not-a-file"}


class FileInfo(NamedTuple):
    """The result of checking a file.

    Args:
        size: in bytes; -1 if there is no file. mtime: in nanoseconds.
        width, height: size of a picture, in pixels.
        milliseconds: time that decoding took.
        digest: digest of its content, 16 bytes.
        ids: of a mask, which ids occur: 256 bits.
        code, what, fix: parts of the error; empty if the file can be read.
    """

    size: int = -1
    mtime: int = 0
    width: int = 0
    height: int = 0
    animated: bool = False
    milliseconds: int = 0
    digest: bytes = b""
    ids: bytes = b""
    code: str = ""
    what: str = ""
    fix: str = ""


class Files(Modality):
    """A modality whose values are files, named by paths relative to the data root."""

    is_file: ClassVar[bool] = True
    leak_kind: ClassVar[str] = "leaked-file"

    @abstractmethod
    def decode(self, content: bytes, name: str, *, where: str, config: DataConfig) -> Any:
        """Decode the content of a file for an encoder's preprocessing.

        Args:
            name: name of the file in the row, for messages. where: file, line and id of the row.

        Raises:
            DataError: the file is damaged, of another format, or too large.
        """

    def inspect(self, content: bytes, name: str, config: DataConfig) -> FileInfo:
        """Check, as cheaply as possible, whether `decode` can read a file; size, times and digest are filled in later.

        Raises:
            DataError: `decode` cannot read it.
        """
        self.decode(content, name, where="", config=config)
        return FileInfo()

    def limits(self, config: DataConfig) -> tuple[object, ...]:
        """The settings that decide the result of `inspect`."""
        return ()

    def findings(self, name: str, info: FileInfo) -> Iterator[tuple[str, str, str]]:
        """Yield the findings of a data check about a file, as (kind, message, hint); see `mopefuse.data.findings.KINDS`."""
        if info.code:
            yield _KINDS.get(info.code, "unreadable-file"), info.what, info.fix

    def read(self, value: str, roots: Sequence[Path], *, where: str, config: DataConfig) -> Any:
        """See `Modality.read`."""
        content = read_content(resolve_inside(roots, value, where=where, what=self.name), value, where)
        return self.decode(content, value, where=where, config=config)


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


# -- paths


def resolve_inside(roots: Sequence[Path], relative: str, *, where: str, what: str) -> Path:
    """Find the file of a path: relative to the first of `roots` that has it, or absolute inside another of them.

    Args:
        what: the modality, for messages.

    Raises:
        UnsafePathError: the path is a URL or leads outside all roots. DataError: it is not a regular file.
    """
    return regular_file(_place(roots, relative, where, what), relative, where=where, what=what)


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
        fix = _case_hint(path) or "add the file"
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


def _case_hint(path: Path) -> str:
    """Suggest a file whose name differs only in case."""
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return ""
    similar = [name for name in names if name.lower() == path.name.lower()]
    return f"the folder has {similar[0]}: check upper and lower case" if similar else ""


def root_to_name(roots: Sequence[Path], names: Sequence[str]) -> str:
    """Suggest the root of files that do not exist, from folders nearby."""
    nearby = [roots[0].parent, *(folder for parent in (roots[0], roots[0].parent) for folder in _folders(parent))]
    for folder in nearby:
        if all(os.path.isfile(folder / name) for name in names[:3]):
            return f"add --image-root {folder}"
    return "add --image-root DIR, the folder that contains them"


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(item for item in parent.iterdir() if item.is_dir())[:_MAX_FOLDERS]
    except OSError:
        return []


# -- checking many files


def inspect_files(
    modality: Files,
    roots: Sequence[Path],
    names: Sequence[str],
    config: DataConfig,
    *,
    known: Mapping[str, FileInfo] | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, FileInfo]:
    """Check files with all processors.

    Args:
        known: earlier results; unchanged files are not read again.
        advance: called with (files checked, files to check).
    """
    known = known or {}
    infos = {name: known[name] for name in names if name in known and _unchanged(roots, name, known[name])}
    rest = [name for name in names if name not in infos]
    with ThreadPoolExecutor(processor_count()) as pool:  # decoding releases the GIL
        for start in range(0, len(rest), 512):
            futures = [pool.submit(_look, modality, roots, name, config) for name in rest[start : start + 512]]
            for done, future in enumerate(as_completed(futures), start=start + 1):
                name, info = future.result()
                infos[name] = info
                advance(done, len(rest))
    return infos


def processor_count() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unchanged(roots: Iterable[Path], name: str, info: FileInfo) -> bool:
    for root in roots:
        try:
            now = os.stat(f"{root}/{name}" if not name.startswith("/") else name)
        except (OSError, ValueError):
            continue
        return now.st_size == info.size and now.st_mtime_ns == info.mtime
    return False


def _look(modality: Files, roots: Sequence[Path], name: str, config: DataConfig) -> tuple[str, FileInfo]:
    info = FileInfo()
    try:
        path = resolve_inside(roots, name, where="", what=modality.name)
        status = path.stat()
        info = info._replace(size=status.st_size, mtime=status.st_mtime_ns)
        content = read_content(path, name, "")
        info = info._replace(digest=hashlib.blake2b(content, digest_size=16).digest())
        began = time.perf_counter()
        seen = modality.inspect(content, name, config)
        took = round(1000 * (time.perf_counter() - began))
        return name, seen._replace(size=info.size, mtime=info.mtime, digest=info.digest, milliseconds=took)
    except MopefuseError as error:
        return name, info._replace(code=error.code, what=error.what, fix=error.fix)
