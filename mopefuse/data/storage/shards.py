"""Tables of several shards: tar files, Parquet files or Arrow files, and where the shards of a split are in a folder."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core import cache
from mopefuse.core.error_codes import DataCode
from mopefuse.core.formatting import several
from mopefuse.data.storage.arrow_files import ArrowCells
from mopefuse.data.storage.arrow_shards import ArrowFile
from mopefuse.data.storage.byte_cache import ByteCache
from mopefuse.data.storage.paths import (
    SHARD_SUFFIXES,
    TAR,
    data_folder,
    expand,
    is_remote,
    remote_errors,
    stamp_of,
)
from mopefuse.data.storage.remote_folder import RemoteFolder
from mopefuse.data.storage.table import Table, TableRow
from mopefuse.data.storage.tar_files import TarFiles
from mopefuse.data.storage.tar_shards import open_shard, shard_rows
from mopefuse.errors import DataError, Notice
from mopefuse.modalities.file_source import FileSource, Folders, Joined, Stamp

_SPLIT_NAMES = {"train": "train|training", "val": "val|valid|validation|dev", "test": "test|testing"}
_COMPRESSED = (".gz", ".tgz", ".zst", ".bz2", ".xz")
_ANY_SHARD = re.compile(r".+\.(?:tar|parquet|arrow)")
_UNNAMED = re.compile(r"data-\d+-of-\d+\.arrow")
_COUNTED = re.compile(r"(\d+)-of-(\d+)\.\w+$")
_NUMBERED = re.compile(r"(\d+)$")
_FOLDERS = ("", "data")  # of a data set, in which shards may be; data is that of the Hugging Face hub
_HASHED_AT_ONCE = 1 << 24  # bytes
_ALWAYS_HASHED = 64 << 20  # bytes; the digest of a larger file is kept in the cache


def kept_files(config: DataConfig) -> ByteCache:
    """Where copies of remote files are kept."""
    return ByteCache(int(config.cache_remote_limit * 2**30))


def open_files(path: Path, config: DataConfig, tables: Sequence[Table]) -> FileSource:
    """Where the files of a data set are: in its shards, its folder, or `data.image_roots`."""
    folder, others = data_folder(path), [Path(root) for root in config.image_roots]
    if not is_remote(folder):
        plain: list[FileSource] = [Folders([folder, *others])]
    else:
        plain = [RemoteFolder(folder, kept_files(config)), *([Folders(others)] if others else [])]
    sources = [*(table.files for table in tables if table.files is not None), *plain]
    return sources[0] if len(sources) == 1 else Joined(sources)


def find_shards(folder: Path, split: str) -> list[Path]:
    """The shards of a split in a data folder: ``train-000000.tar``, ``train.tar``, or all those in the folder ``train``."""
    named = re.compile(rf"(?:{_SPLIT_NAMES[split]})(?:[-_.]\d.*)?\.(?:tar|parquet|arrow)", re.IGNORECASE)
    with remote_errors(folder):
        for place in (folder / name if name else folder for name in _FOLDERS):
            found = _items(place, named)
            if found:
                return found
        for name in _SPLIT_NAMES[split].split("|"):
            found = _items(folder / name, _ANY_SHARD)
            if found:
                return found
    return []


def unnamed_shards(folder: Path) -> list[Path]:
    """The shards of a folder without splits: Arrow files with the names that Hugging Face gives them."""
    with remote_errors(folder):
        return _items(folder, _UNNAMED)


def _items(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of a folder whose name matches, sorted; the folder may also have a million others."""
    if not folder.is_dir():
        return []
    names = (item.name for item in folder.iterdir()) if is_remote(folder) else os.listdir(folder)
    return [folder / name for name in sorted(filter(pattern.fullmatch, names))]


def pattern_shards(pattern: Path) -> tuple[list[Path], Path]:
    """The shards that a pattern stands for, and the folder that contains all of them.

    Raises:
        DataError: there are none, or one of them does not exist or is not a shard.
    """
    found = expand(pattern)
    if not found:
        fix = "check the pattern; in a shell, put it in quotes"
        raise DataError(DataCode.NO_DATA_FOLDER, f"no file matches {pattern}", where=str(pattern), fix=fix)
    odd = next((path for path in found if path.suffix not in SHARD_SUFFIXES), None)
    if odd is not None:
        fix = f"use a pattern for {', '.join(SHARD_SUFFIXES)} files, or pass one table"
        fix = "decompress it" if odd.suffix in _COMPRESSED else fix
        raise DataError(DataCode.NOT_A_TABLE, f"{odd.name} is not a shard", where=str(pattern), fix=fix)
    root = found[0].parent
    while not all(root in path.parents for path in found):
        root = root.parent
    return found, root


def shards_table(
    paths: Sequence[Path],
    config: DataConfig,
    root: Path,
    *,
    complete: bool = True,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Table:
    """The rows of some shards, one after another.

    Args:
        root: the folder that the names of shards are relative to.
        complete: whether they have to be all of those that their names count.
        advance: called with (shards opened, shards).

    Raises:
        DataError: a shard cannot be read, or they have several formats.
    """
    kinds = {path.suffix.lower() for path in paths}
    if len(kinds) > 1:
        what = f"shards have several formats: {', '.join(sorted(kinds))}"
        raise DataError(DataCode.NOT_A_TABLE, what, where=str(paths[0].parent), fix="use shards of one format")
    if complete:
        _require_all(paths)
    named = {path.relative_to(root).as_posix(): path for path in paths}
    return _tar_table(named, config, advance) if kinds == {TAR} else _arrow_table(named, config, advance)


def _tar_table(paths: Mapping[str, Path], config: DataConfig, advance: Callable[[int, int], None]) -> Table:
    shards = []
    for name, path in paths.items():
        with remote_errors(path):
            shards.append(open_shard(path, name, _stamp(path)))
        advance(len(shards), len(paths))

    def rows() -> Iterator[TableRow]:
        line = 0
        for shard in shards:
            for row in shard_rows(shard, line + 1, config):
                yield row
                line = row.line

    digest = cache.make_key(*(shard.digest for shard in shards))
    return Table(_name([*paths]), digest, rows, files=TarFiles(shards, kept_files(config)))


def _arrow_table(paths: Mapping[str, Path], config: DataConfig, advance: Callable[[int, int], None]) -> Table:
    digests, shards = [], []
    for name, path in paths.items():
        stamp = _stamp(path)
        digests.append(_digest(path, stamp))
        shards.append(ArrowFile(path, name, stamp))
        advance(len(shards), len(paths))

    def rows() -> Iterator[TableRow]:
        line = 0
        for shard in shards:
            yield from shard.rows(line + 1)
            line += int(shard.starts_G1[-1])

    digest = digests[0] if len(digests) == 1 else cache.make_key(*digests)
    files = ArrowCells(shards, kept_files(config)) if any(shard.file_columns for shard in shards) else None
    batches = lambda: (batch for shard in shards for batch in shard.batches())  # noqa: E731
    return Table(_name([*paths]), digest, rows, files=files, batches=batches)


def _require_all(paths: Sequence[Path]) -> None:
    """Require shards of which all others are there; gives a notice if the numbers of others have a gap.

    Raises:
        DataError: a name such as ``train-00000-of-00004.parquet`` shows that some are missing.
    """
    counted = [match for path in paths if (match := _COUNTED.search(path.name)) is not None]
    if counted and len(counted) == len(paths) and len({match[2] for match in counted}) == 1:
        missing = sorted({*range(int(counted[0][2]))} - {int(match[1]) for match in counted})
        if missing and {int(match[1]) for match in counted} <= {*range(int(counted[0][2]))}:
            what = f"{several(len(missing), 'shard')} of {int(counted[0][2])} missing, such as number {missing[0]}"
            raise DataError(DataCode.NO_DATA_FOLDER, what, where=str(paths[0].parent), fix="add it, or use a pattern in --data")
        return
    numbers = sorted(int(match[1]) for path in paths if (match := _NUMBERED.search(path.stem)) is not None)
    if len(numbers) == len(paths) and numbers[-1] - numbers[0] >= len(paths):
        missing = sorted({*range(numbers[0], numbers[-1])} - {*numbers})
        what = f"the numbers of the shards {paths[0].name} to {paths[-1].name} have a gap: {missing[0]} is missing"
        warnings.warn(what, Notice, stacklevel=2)


def _name(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {several(len(names) - 1, 'other shard')}"


def _stamp(path: Path) -> Stamp:
    try:
        with remote_errors(path):
            if not is_remote(path) and not path.is_file() and path.exists():
                what = f"{path.name} is not a regular file"
                raise DataError(DataCode.TABLE_UNREADABLE, what, where=str(path), fix="pass a regular file")
            return stamp_of(path)
    except FileNotFoundError:
        raise DataError(DataCode.NO_DATA_FOLDER, f"shard not found: {path}", fix="add it, or correct the pattern") from None


def _digest(path: Path, stamp: Stamp) -> str:
    """The sha256 of a local file, or the digest of what the server says about a remote one."""
    if is_remote(path):
        return cache.make_key(path.name, *stamp)
    key = cache.make_key("sha256", path.resolve(), *stamp)
    found = cache.find("shards", key) if stamp.size > _ALWAYS_HASHED else None
    if found is not None:
        return str(found[1]["sha256"])
    content = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_HASHED_AT_ONCE):
            content.update(part)
    if stamp.size > _ALWAYS_HASHED:
        cache.store("shards", key, lambda folder: None, {"sha256": content.hexdigest(), "root": str(path)})
    return content.hexdigest()
