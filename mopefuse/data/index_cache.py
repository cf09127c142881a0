"""Indexes in the cache: arrays, index.json with texts, and the rows where they were converted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core import cache
from mopefuse.core.artifact import read_json
from mopefuse.data.base import Problem
from mopefuse.data.index import Array, FileValues, Index, InlineValues
from mopefuse.data.labels import Labels
from mopefuse.data.row_store import ArrowRows, JsonRows, RowStore, StoredStrings, place_file
from mopefuse.data.storage.table import Table
from mopefuse.data.strings import Strings
from mopefuse.modalities.file_infos import COLUMNS, FileInfos
from mopefuse.modalities.file_source import FileSource
from mopefuse.modalities.masks import NAME as MASK

VERSION = 8  # version of the format
_ROWS, _LINES = "rows.arrow", "rows.jsonl"
_MAPPED = 1 << 20  # bytes from which an array stays on disk
_VERIFIED = 64 << 20  # bytes up to which the digests of an entry are compared, and not only its sizes


def make_key(digest: str, files: FileSource, config: DataConfig) -> str:
    """The key of an index.

    Args:
        digest: see `Index.digest`. files: where the files are.
    """
    masks = config.task if config.task in (None, "segmentation") else ""  # whether labels can be masks
    return cache.make_key(VERSION, digest, config.on_missing, masks, *files.identity())


def save(key: str, index: Index, files: FileSource) -> None:
    """Keep an index in the cache, if possible; rows in a temporary file are moved there."""
    facts = {"digest": index.digest, "split": index.split, "root": files.identity()[0], "rows": len(index.lines_S)}
    cache.store("index", key, lambda folder: _write(index, folder), facts)


def _write(index: Index, folder: Path) -> None:
    arrays: dict[str, Array] = {
        "lines": index.lines_S,
        "list": index.list_S,
        "label_starts": index.labels.start_S1,
        "labels": index.labels.code_Z,
        **_strings("ids", index.ids),
    }
    for name, values in {**index.values, **index.files}.items():
        if isinstance(values, FileValues):
            infos = FileInfos.of(values.infos)
            columns = {**infos.known_columns, "number": values.number_S, **_strings("names", values.names)}
        else:
            columns = {"key": values.key_S, "alike": values.loose_key_S}
        arrays |= {f"{name}.{part}": array for part, array in columns.items()}
    if isinstance(index.store, JsonRows):
        arrays["places"] = index.store.byte_ranges_S2
        if index.store.converted:
            (folder / _LINES).write_bytes(index.store.content)
    elif isinstance(index.store, ArrowRows):
        place_file(index.store.path, folder / _ROWS)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)
    texts = {
        "labels": index.labels.names,
        "modalities": list(index.values),
        "files": {name: FileInfos.of(values.infos).problems for name, values in index.files.items()},
        "row_problems": [[problem.code, problem.where, problem.what] for problem in index.row_problems],
        "left_out": index.left_out,
        "stored": _stored_columns(index),
    }
    (folder / "index.json").write_text(json.dumps(texts), encoding="utf-8")


def _strings(name: str, strings: Sequence[str]) -> dict[str, Array]:
    if isinstance(strings, StoredStrings):
        return {f"{name}.rows": np.arange(0) if strings.rows_N is None else strings.rows_N}
    found = strings if isinstance(strings, Strings) else Strings.of(strings)
    return {f"{name}.start": found.start_N1, f"{name}.content": found.content_Z}


def _stored_columns(index: Index) -> dict[str, str]:
    """The columns of the stored rows that have the ids or the names of files."""
    listed = {"ids": index.ids, **{f"{name}.names": values.names for name, values in index.files.items()}}
    return {name: strings.column for name, strings in listed.items() if isinstance(strings, StoredStrings)}


def load(key: str, table: Table) -> Index | None:
    """Read an index from the cache; None if it has none. Large arrays stay on disk.

    Args:
        table: the table that the index was built from.
    """
    found = cache.find("index", key, thorough=False)
    if found is None:
        return None
    folder, facts = found
    if sum(file["size"] for file in facts["files"].values()) <= _VERIFIED and cache.verify_entry(folder, "index") is None:
        return None
    texts = read_json(folder / "index.json")

    def array(name: str) -> Array:
        path = folder / f"{name}.npy"
        mapped: Array = np.load(path, mmap_mode="r" if path.stat().st_size > _MAPPED else None, allow_pickle=False)
        return mapped

    store = _store(folder, table, array)

    def strings(name: str) -> Sequence[str]:
        if name not in texts["stored"]:
            return Strings(array(f"{name}.start"), array(f"{name}.content"))
        assert isinstance(store, ArrowRows)
        rows = array(f"{name}.rows")
        return StoredStrings(store, texts["stored"][name], rows if len(rows) else None)

    def files(name: str) -> FileValues:
        problems = {int(number): tuple(problem) for number, problem in texts["files"][name].items()}
        names = strings(f"{name}.names")
        known = {column: array(f"{name}.{column}") for column in COLUMNS if (folder / f"{name}.{column}.npy").exists()}
        infos = FileInfos({**FileInfos.unknown(len(names)).columns, **known}, problems)
        return FileValues(array(f"{name}.number"), names, infos)

    values: dict[str, InlineValues | FileValues] = {}
    for name in texts["modalities"]:
        is_file = name in texts["files"]
        values[name] = files(name) if is_file else InlineValues(array(f"{name}.key"), array(f"{name}.alike"))
    return Index(
        split=facts["split"],
        file=table.file,
        digest=facts["digest"],
        store=store,
        lines_S=array("lines"),
        values=values,
        masks=files(MASK) if MASK in texts["files"] else None,
        labels=Labels(texts["labels"], array("label_starts"), array("labels")),
        list_S=array("list"),
        ids=strings("ids"),
        row_problems=[Problem(code=code, where=where, what=what) for code, where, what in texts["row_problems"]],
        left_out=texts["left_out"],
    )


def _store(folder: Path, table: Table, array: Callable[[str], Array]) -> RowStore:
    if (folder / _ROWS).exists():
        return ArrowRows(folder / _ROWS)
    converted = table.content is None
    content = (folder / _LINES).read_bytes() if table.content is None else table.content
    return JsonRows(content, array("places"), converted)
