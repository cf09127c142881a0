"""Paths of data: local, remote (``s3://bucket/folder``), or patterns that stand for several shards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from typing import Any, BinaryIO, cast

from mopefuse.core.dependencies import require
from mopefuse.core.error_codes import DataCode
from mopefuse.errors import DataError, MopefuseError, did_you_mean
from mopefuse.modalities.base import digest
from mopefuse.modalities.file_source import Stamp

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub", "memory": "fsspec"}
"""By scheme of a remote path, the package that reads it."""
TAR, PARQUET, ARROW = ".tar", ".parquet", ".arrow"
SHARD_SUFFIXES = (TAR, PARQUET, ARROW)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}")
_MOST_SHARDS = 1_000_000  # that a range may stand for
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "xet_hash", "blob_id", "LastModified", "last_modified", "created")


def data_path(text: str | Path) -> Path:
    """The path of data. A remote one has the interface of `pathlib.Path` (from the package universal_pathlib).

    ``hf:OWNER/NAME`` stands for ``hf://datasets/OWNER/NAME``, a data set of the Hugging Face hub.

    Raises:
        DataError: the scheme is unknown. PackageError: its package is not installed.
    """
    if not isinstance(text, str):
        return text
    if text.startswith("hf:") and not text.startswith("hf://") and not Path(text).exists():
        text = f"hf://datasets/{text.removeprefix('hf:')}"
    scheme = _SCHEME.match(text)
    if scheme is None:
        return Path(text)
    name = scheme[1].lower()
    if name not in PACKAGES:
        fix = did_you_mean(name, PACKAGES) or f"use a local path, or one that starts with {', '.join(PACKAGES)}"
        raise DataError(DataCode.UNKNOWN_SCHEME, f"data cannot be read from {name}://", where=text, fix=fix)
    require("upath", PACKAGES[name], extra="remote", what=f"reading {name}:// paths")
    from upath import UPath

    path = UPath(text)
    with remote_errors(cast(Path, path)):
        path.fs.invalidate_cache()  # listings of earlier reading
    return cast(Path, path)


def is_remote(path: Path) -> bool:
    """Whether a path is not on this machine."""
    return hasattr(path, "fs")


def data_folder(path: Path) -> Path:
    """The folder that names in rows are relative to: `path`, or the folder of a table or of shards."""
    with remote_errors(path):
        return path if path.is_dir() else path.parent


@contextmanager
def remote_errors(path: Path) -> Iterator[None]:
    """Turn the errors of a remote file system into a DataError; those of local paths pass."""
    try:
        yield
    except (MopefuseError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # each file system has its own
        if not is_remote(path):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = "check the address, your credentials and the connection"
        raise DataError(DataCode.REMOTE_UNREADABLE, f"{path} cannot be read: {reason}", where=str(path), fix=fix) from None


def read_range(path: Path, start: int | None = None, stop: int | None = None) -> bytes:
    """Read a local or remote file, or its bytes from `start` up to but not including `stop`.

    Raises:
        OSError: a local file cannot be read. DataError: a remote one cannot.
    """
    if is_remote(path):
        with remote_errors(path):
            content: bytes = file_system(path).cat_file(cast(Any, path).path, start=start, end=stop)
            return content
    with path.open("rb") as file:
        file.seek(start or 0)
        return file.read() if stop is None else file.read(stop - (start or 0))


def open_remote(path: Path, **options: Any) -> BinaryIO:
    """Open a remote file for reading.

    Args:
        options: those of fsspec for reading ahead.

    Raises:
        DataError: it cannot be opened.
    """
    with remote_errors(path):
        opened: BinaryIO = file_system(path).open(cast(Any, path).path, "rb", **options)
        return opened


def file_system(path: Path) -> Any:
    """The fsspec file system of a remote path, one that works in this process even if it was forked."""
    remote = cast(Any, path)
    if getattr(remote.fs, "_pid", os.getpid()) == os.getpid():
        return remote.fs
    return type(remote)(str(remote), **remote.storage_options).fs


def stamp_of(path: Path) -> Stamp:
    """The stamp of a local or remote file.

    Raises:
        OSError: it does not exist.
    """
    if not is_remote(path):
        status = path.stat()
        return Stamp(status.st_size, status.st_mtime_ns)
    return remote_stamp(file_system(path).info(cast(Any, path).path))


def remote_stamp(facts: Mapping[str, Any]) -> Stamp:
    """The stamp of a remote file, from what fsspec says about it."""
    version = next((f"{key} {facts[key]}" for key in _VERSIONS if facts.get(key)), "")
    return Stamp(int(facts.get("size") or 0), int.from_bytes(digest(version)[:7], "big"))


def exists(path: Path) -> bool:
    """Whether there is such a file or folder.

    Raises:
        DataError: a remote path cannot be reached, which `Path.exists` does not tell from a missing one.
    """
    if not is_remote(path):
        return path.exists()
    with remote_errors(path):
        try:
            file_system(path).info(cast(Any, path).path)
        except FileNotFoundError:
            return False
        return True


# -- patterns


def is_pattern(path: Path) -> bool:
    """Whether a path stands for several files: it has wildcards, or ranges such as ``{000..099}``."""
    return has_magic(str(path)) or _RANGE.search(str(path)) is not None


def expand(path: Path) -> list[Path]:
    """The files that a pattern stands for: ranges and lists in braces in their order, those of a wildcard sorted.

    Raises:
        DataError: a range has too many numbers.
    """
    found: list[Path] = []
    for text in expand_braces(str(path)):
        one = data_path(text)
        found += _wildcards(one) if has_magic(text) else [one]
    return found


def expand_braces(text: str) -> Iterator[str]:
    """The texts that ranges and lists in braces stand for, in their order.

    Raises:
        DataError: a range has too many numbers.
    """
    match = _RANGE.search(text)
    if match is None:
        yield text
        return
    if match[3] is not None:
        choices: Sequence[str] = match[3].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        if abs(last - first) >= _MOST_SHARDS:
            what = f"{match[0]} stands for more than {_MOST_SHARDS:,} files"
            raise DataError(DataCode.NO_DATA_FOLDER, what, where=text, fix="correct the range")
        step = 1 if last >= first else -1
        choices = [str(number).zfill(len(match[1])) for number in range(first, last + step, step)]
    for choice in choices:
        yield from expand_braces(text[: match.start()] + choice + text[match.end() :])


def _wildcards(path: Path) -> list[Path]:
    anchor = next(parent for parent in path.parents if not has_magic(str(parent)))
    pattern = str(path)[len(str(anchor)) :].lstrip("/\\") if str(anchor) != "." else str(path)
    with remote_errors(path):
        return sorted(item for item in anchor.glob(pattern) if item.is_file())
