"""Tar shards in the format of WebDataset: members whose names are equal up to the first dot make a row.

A shard is read once, from start to end; the cache keeps its rows and where its files are, so that rows can then be read in any
order. The parts of a row, by the end of the name:

* ``json``: an object whose keys are columns; ``txt``: the text; ``cls``: the label;
* an image (``jpg``, ``png``, ...): the image; another file, such as ``wav``: the column of that name;
* ``COLUMN.txt``, ``COLUMN.cls``, ``COLUMN.png``, ...: that column.

Shapes: M files of a shard.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core import cache
from mopefuse.core.regular_files import open_regular
from mopefuse.data.storage.name_table import name_key
from mopefuse.data.storage.paths import is_remote, open_remote
from mopefuse.data.storage.table import TableRow, parse_json_line
from mopefuse.modalities.file_source import Stamp

VERSION = 1
NAMES = "__files__"
"""Key of a row that `mopefuse data pack` wrote: by part of the name, the name of each file in the data set, which is also in
the row. Equal names stand for equal files."""
_ROWS, _FILES = "rows.jsonl", "files.npz"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
TEXTS = ("json", "txt", "cls", "id")
"""Parts of a row that are texts, not files."""
_MAX_TEXT = 64 << 20  # bytes
_READ_AHEAD = 8 << 20  # bytes of a remote shard that are read at once


@dataclass
class Shard:
    """What a tar file contains.

    Args:
        name: its name in the data set, before those of its files.
        digest: digest of its rows, and of the names and sizes of its files.
        problem: why it could not be read to its end; empty if it could.
        key_M, start_M, size_M: `name_key` of the name in rows, first byte and size of each file.
        lines: the samples as JSON; empty if they are in `folder`.
        folder: the entry of the cache.
    """

    path: Path
    name: str
    stamp: Stamp
    digest: str
    problem: str
    key_M: NDArray[np.uint64]
    start_M: NDArray[np.int64]
    size_M: NDArray[np.int64]
    lines: list[str] = field(default_factory=list)
    folder: Path | None = None

    def samples(self) -> Iterator[dict[str, Any]]:
        """Of each row: "key"; "texts", and "files", names in rows, by their part of the name; "named", whether the row gives
        these names; "problem", what is wrong with it."""
        if self.folder is None:
            yield from map(json.loads, self.lines)
            return
        with (self.folder / _ROWS).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def open_shard(path: Path, name: str, stamp: Stamp) -> Shard:
    """Read what a tar file contains, or find it in the cache.

    Args:
        name: its name in the data set.

    Raises:
        OSError: a local file cannot be read. DataError: a remote one cannot.
    """
    key = cache.make_key(VERSION, path.resolve(), name, *stamp)
    found = cache.find("shards", key)
    if found is not None:
        folder, facts = found
        with np.load(folder / _FILES, allow_pickle=False) as arrays:
            key_M, start_M, size_M = (arrays[name] for name in ("key", "start", "size"))
        return Shard(path, name, stamp, facts["digest"], facts["problem"], key_M, start_M, size_M, folder=folder)
    shard = _scan(path, name, stamp)

    def write(folder: Path) -> None:
        (folder / _ROWS).write_text("".join(f"{line}\n" for line in shard.lines), encoding="utf-8")
        np.savez(folder / _FILES, key=shard.key_M, start=shard.start_M, size=shard.size_M)

    facts = {"digest": shard.digest, "problem": shard.problem, "rows": len(shard.lines), "root": str(path)}
    cache.store("shards", key, write, facts)
    return shard


# -- reading a tar file


class _Sample:
    """The members of a row, collected one after another."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.texts: dict[str, str] = {}
        self.members: dict[str, tuple[str, int, int]] = {}  # name, first byte and size of each file
        self.problem = ""

    def add_text(self, part: str, content: bytes) -> None:
        """Add a member that is text."""
        try:
            self.texts[part] = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            self.problem = f"({self.key}) has the part {part}, which is not UTF-8"

    def names(self, shard: str) -> tuple[dict[str, str], bool]:
        """The name in rows of each file, and whether it is the one in `NAMES`, not that of the member in the shard."""
        with suppress(ValueError, AttributeError, RecursionError):
            given = json.loads(self.texts.get("json", "{}")).get(NAMES)
            if isinstance(given, dict) and all(isinstance(given.get(part), str) for part in self.members):
                return {part: given[part] for part in self.members}, True
        return {part: f"{shard}/{name}" for part, (name, _, _) in self.members.items()}, False


def _scan(path: Path, name: str, stamp: Stamp) -> Shard:
    samples: list[_Sample] = []
    problem = ""
    with _open(path) as file:
        try:
            archive = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the file is closed)
            for member in archive:
                _add(member, archive, samples)
            _require_end(file, archive.offset)
        except tarfile.TarError as error:
            problem = _describe(file, error, samples)
    files: list[tuple[int, int, int]] = []
    lines, content = [], hashlib.sha256(problem.encode())
    for sample in samples:
        names, named = sample.names(name)
        facts = {"key": sample.key, "texts": sample.texts, "files": names, "named": named, "problem": sample.problem}
        lines.append(json.dumps(facts))
        content.update(json.dumps([sample.key, sample.texts, sample.members]).encode())
        files += [(name_key(names[part]), start, size) for part, (_, start, size) in sample.members.items()]
    keys, starts, sizes = zip(*files, strict=True) if files else ((), (), ())
    return Shard(
        path=path,
        name=name,
        stamp=stamp,
        digest=content.hexdigest(),
        problem=problem,
        key_M=np.array(keys, dtype=np.uint64),
        start_M=np.array(starts, dtype=np.int64),
        size_M=np.array(sizes, dtype=np.int64),
        lines=lines,
    )


def _add(member: tarfile.TarInfo, archive: tarfile.TarFile, samples: list[_Sample]) -> None:
    """Add a member to the last sample, or start the next one; hidden files do not count."""
    if member.isdir() or member.name.rpartition("/")[2].startswith("."):
        return
    key, part = _split_name(member.name)
    if not samples or samples[-1].key != key:
        samples.append(_Sample(key))
    if member.islnk() and member.linkname in archive.getnames():  # tar stores a file with two names once
        member = archive.getmember(member.linkname)
    if not member.isreg():
        samples[-1].problem = f"({key}) has the part {part}, which is a link or a device; store the file itself"
    elif part.rpartition(".")[2] in TEXTS and member.size <= _MAX_TEXT:
        samples[-1].add_text(part, cast(BinaryIO, archive.extractfile(member)).read())
    elif part:
        samples[-1].members[part] = (member.name, member.offset_data, member.size)


def _describe(file: BinaryIO, error: tarfile.TarError, samples: Sequence[_Sample]) -> str:
    """What is wrong with a file, and how to fix it."""
    file.seek(0)
    if not samples and file.read(4)[:2] in (b"\x1f\x8b", b"\x28\xb5", b"BZ", b"\xfd7"):
        return "is compressed, so that its files cannot be read one by one; decompress it"
    after = f" after {samples[-1].key}" if samples else ""
    return f"is damaged{after}: {error}; replace it with the complete file"


def _require_end(file: BinaryIO, offset: int) -> None:
    """Require that an archive ends where its last member does.

    Raises:
        TarError: the end is missing, or something else follows.
    """
    file.seek(offset)
    end = file.read(tarfile.BLOCKSIZE)
    if not end:
        raise tarfile.ReadError("the end of the archive is missing")
    if end.strip(b"\0"):
        raise tarfile.ReadError("a header is damaged")
    while more := file.read(tarfile.RECORDSIZE):
        if more.strip(b"\0"):
            raise tarfile.ReadError("another archive follows its end")


def _open(path: Path) -> BinaryIO:
    if not is_remote(path):
        return open_regular(path)
    return open_remote(path, cache_type="readahead", block_size=_READ_AHEAD)


def _split_name(name: str) -> tuple[str, str]:
    """Split the name of a member: the key of its row, and the part, in lower case."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    stem, _, part = last.partition(".")
    return f"{folder}{slash}{stem}", part.lower()


# -- rows


def shard_rows(shard: Shard, first_line: int, config: DataConfig) -> Iterator[TableRow]:
    """The rows of a shard, with the columns of `config`.

    Args:
        first_line: number of the first row.
    """
    line = first_line
    for sample in shard.samples():
        yield TableRow(line, sample["problem"] or _row(sample, shard, config))
        line += 1
    if shard.problem:
        yield TableRow(line, f"({shard.name}) {shard.problem}")


def _row(sample: dict[str, Any], shard: Shard, config: DataConfig) -> dict[str, Any] | str:
    cells: list[tuple[str, dict[str, Any]]] = []
    for part, text in sample["texts"].items():
        column, _, kind = part.rpartition(".")
        if kind == "json":
            value = parse_json_line(text.encode())
            if isinstance(value, str):
                return f"({sample['key']}) has the part {part}, which {value}"
            cells.append((part, {column: value} if column else value))
        else:
            default = {"cls": config.label_col, "id": config.id_col}.get(kind, config.text_col)
            cells.append((part, {column or default: text.strip() if kind in ("cls", "id") else text}))
    row: dict[str, Any] = {}
    for part, found in cells:
        if repeated := [column for column in found if row.get(column, found[column]) != found[column]]:
            return f"({sample['key']}) has {repeated[0]} twice, the second time in the part {part}"
        row |= found
    files: dict[str, str] = {}
    for part, name in sample["files"].items() if not sample["named"] else ():
        column, _, kind = part.rpartition(".")
        column = column or (config.img_col if f".{kind}" in IMAGE_SUFFIXES else kind)
        if column in files:
            return f"({sample['key']}) has two files for {column}: {files[column]} and {name}"
        files[column] = name
    row |= files
    row.pop(NAMES, None)
    row.setdefault(config.id_col, f"{PurePosixPath(shard.name).with_suffix('')}/{sample['key']}")
    return row
