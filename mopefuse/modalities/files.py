"""Files that rows name: inside their root, looked at once when the index is built, read when a sample is asked for.

A modality whose values are files is a subclass of `Files`: it says what a whole file is, and what to make of one.
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

from mopefuse.errors import DataError, MopefuseError, UnsafePathError
from mopefuse.modalities.base import Modality

if TYPE_CHECKING:  # a bundle is asked where there is no pydantic
    from mopefuse.config.schema import Data as DataConfig

MISSING = "MF-DATA-11"
_MOST_FOLDERS = 100  # that are looked into for files that are elsewhere
_KINDS = {"MF-SEC-01": "unsafe-path", MISSING: "missing-file", "MF-DATA-15": "not-a-file"}


class Look(NamedTuple):
    """What is known of a file."""

    size: int = -1  # bytes; -1 for what is no file
    mtime: int = 0  # ns
    width: int = 0  # pixels, of a picture
    height: int = 0
    animated: bool = False
    milliseconds: int = 0  # that decoding took
    digest: bytes = b""  # of its content, 16 bytes
    code: str = ""  # of the error that it is, if it is one
    what: str = ""
    fix: str = ""


class Files(Modality):
    """A modality whose values are files, named by paths relative to the data root."""

    is_file: ClassVar[bool] = True
    leaked: ClassVar[str] = "leaked-file"

    @abstractmethod
    def decode(self, content: bytes, name: str, *, where: str, config: DataConfig) -> Any:
        """What an encoder's preprocessing takes, of what a file holds.

        Args:
            name: as the row says it, for messages. where: file, line and id of the row.

        Raises:
            DataError: it is damaged, of another format, or too large.
        """

    def look(self, content: bytes, name: str, config: DataConfig) -> Look:
        """Whether `decode` can read a file, as cheaply as it can be known; size, times and digest are filled in later.

        Raises:
            DataError: as `decode`.
        """
        self.decode(content, name, where="", config=config)
        return Look()

    def limits(self, config: DataConfig) -> tuple[object, ...]:
        """The settings that decide what `look` says."""
        return ()

    def findings(self, name: str, look: Look) -> Iterator[tuple[str, str, str]]:
        """What a data check says of a file: (kind, message, what to do or empty); see `mopefuse.data.findings.KINDS`."""
        if look.code:
            yield _KINDS.get(look.code, "unreadable-file"), look.what, look.fix

    def read(self, value: str, roots: Sequence[Path], *, where: str, config: DataConfig) -> Any:
        """See `Modality.read`."""
        content = content_of(contained(roots, value, where=where, what=self.name), value, where)
        return self.decode(content, value, where=where, config=config)


def content_of(path: Path, name: str, where: str) -> bytes:
    """What a file holds."""
    try:
        return path.read_bytes()
    except OSError as error:
        fix = "make it readable"
        raise DataError(13, f"{name} cannot be read: {error.strerror}", where=where, fix=fix) from None


# -- where a path leads


def contained(roots: Sequence[Path], relative: str, *, where: str, what: str) -> Path:
    """The file that a path means: relative to the first of `roots` that has it, or absolute inside one of the others.

    Args:
        what: the modality, for messages.

    Raises:
        UnsafePathError: the path is a URL or leads out of every root. DataError: it is not a regular file.
    """
    return regular_file(_place(roots, relative, where, what), relative, where=where, what=what)


def regular_file(path: Path, name: str, *, where: str, what: str) -> Path:
    """The same path, if it leads to a file.

    Args:
        name: of the file, for messages. what: the modality, for messages.

    Raises:
        DataError: there is none, or it is a folder, a pipe or a device.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        fix = _other_case(path) or "add the file"
        raise DataError(11, f"{what} not found: {name}", where=where, fix=fix) from None
    if not stat.S_ISREG(mode):
        article = "an" if what[:1] in "aeiou" else "a"
        raise DataError(15, f"{name} is not a regular file", where=where, fix=f"name {article} {what} file")
    return path


def _place(roots: Sequence[Path], relative: str, where: str, what: str) -> Path:
    if "\0" in relative or "://" in relative or relative.startswith(("\\", "~")) or relative[1:2] == ":":
        raise _leaves_root(where, what)
    bases = [root.resolve() for root in roots]
    absolute = relative.startswith("/")
    allowed = bases[1:] if absolute else bases
    try:
        places = [path.resolve() for path in ([Path(relative)] if absolute else [base / relative for base in bases])]
    except (OSError, RuntimeError, ValueError):  # links that go round in circles, half a character
        raise DataError(11, f"{what} not found: {relative}", where=where, fix="add the file") from None
    if not all(any(path.is_relative_to(base) for base in allowed) for path in places):
        raise _leaves_root(where, what)
    return next((path for path in places[:-1] if os.path.exists(path)), places[-1])


def _leaves_root(where: str, what: str) -> UnsafePathError:
    fix = "use a path relative to the data folder, or allow its folder with --image-root"
    return UnsafePathError(1, f"the {what} path leaves the {what} root", where=where, fix=fix)


def _other_case(path: Path) -> str:
    try:
        there = os.listdir(path.parent)
    except (OSError, ValueError):
        return ""
    alike = [name for name in there if name.lower() == path.name.lower()]
    return f"the folder has {alike[0]}: mind upper and lower case" if alike else ""


def root_to_name(roots: Sequence[Path], names: Sequence[str]) -> str:
    """What to do where none of many files is found: name the folder that they are in, which may be near."""
    near = [roots[0].parent, *(folder for parent in (roots[0], roots[0].parent) for folder in _folders(parent))]
    for folder in near:
        if all(os.path.isfile(folder / name) for name in names[:3]):
            return f"add --image-root {folder}"
    return "name the folder that they are in with --image-root DIR"


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(item for item in parent.iterdir() if item.is_dir())[:_MOST_FOLDERS]
    except OSError:
        return []


# -- looking at many, without keeping any


def look_at(
    modality: Files,
    roots: Sequence[Path],
    names: Sequence[str],
    config: DataConfig,
    *,
    known: Mapping[str, Look] | None = None,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Look]:
    """Look at files with all processors; those that did not change since they were `known` are not read again.

    Args:
        advance: told of (files looked at, files to look at).
    """
    known = known or {}
    looks = {name: known[name] for name in names if name in known and _unchanged(roots, name, known[name])}
    rest = [name for name in names if name not in looks]
    with ThreadPoolExecutor(processors()) as pool:  # decoders let other threads run
        for start in range(0, len(rest), 512):
            futures = [pool.submit(_look, modality, roots, name, config) for name in rest[start : start + 512]]
            for done, future in enumerate(as_completed(futures), start=start + 1):
                name, look = future.result()
                looks[name] = look
                advance(done, len(rest))
    return looks


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _unchanged(roots: Iterable[Path], name: str, look: Look) -> bool:
    for root in roots:
        try:
            now = os.stat(f"{root}/{name}" if not name.startswith("/") else name)
        except (OSError, ValueError):
            continue
        return now.st_size == look.size and now.st_mtime_ns == look.mtime
    return False


def _look(modality: Files, roots: Sequence[Path], name: str, config: DataConfig) -> tuple[str, Look]:
    look = Look()
    try:
        path = contained(roots, name, where="", what=modality.name)
        status = path.stat()
        look = look._replace(size=status.st_size, mtime=status.st_mtime_ns)
        content = content_of(path, name, "")
        look = look._replace(digest=hashlib.blake2b(content, digest_size=16).digest())
        began = time.perf_counter()
        seen = modality.look(content, name, config)
        took = round(1000 * (time.perf_counter() - began))
        return name, seen._replace(size=look.size, mtime=look.mtime, digest=look.digest, milliseconds=took)
    except MopefuseError as error:
        return name, look._replace(code=error.code, what=error.what, fix=error.fix)
