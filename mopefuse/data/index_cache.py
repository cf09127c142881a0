"""Indexes in the cache: rows.npz with arrays, index.json with texts, and rows.jsonl where rows were converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core import cache
from mopefuse.core.artifact import read_json
from mopefuse.data.base import Problem
from mopefuse.data.index import Array, FileValues, Index, InlineValues
from mopefuse.data.labels import Labels
from mopefuse.data.storage.table import Table
from mopefuse.modalities.file_source import FileSource
from mopefuse.modalities.files import FileInfo
from mopefuse.modalities.masks import NAME as MASK

VERSION = 7  # version of the format
_LOOK_ARRAYS = ("size", "mtime", "side", "animated", "milliseconds", "digest", "ids")


def make_key(digest: str, files: FileSource, config: DataConfig) -> str:
    """The key of an index.

    Args:
        digest: see `Index.digest`. files: where the files are.
    """
    masks = config.task if config.task in (None, "segmentation") else ""  # whether labels can be masks
    return cache.make_key(VERSION, digest, config.on_missing, masks, *files.identity())


def save(key: str, index: Index, files: FileSource) -> None:
    """Keep an index in the cache, if possible."""
    facts = {"digest": index.digest, "split": index.split, "root": files.identity()[0], "rows": len(index.lines_S)}
    cache.store("index", key, lambda folder: _write(index, folder), facts)


def _write(index: Index, folder: Path) -> None:
    arrays: dict[str, Any] = {
        "places": index.byte_ranges_S2,
        "lines": index.lines_S,
        "list": index.list_S,
        "label_starts": index.labels.start_S1,
        "labels": index.labels.code_Z,
    }
    for name, values in {**index.values, **index.files}.items():
        found = _arrays(values) if isinstance(values, FileValues) else {"key": values.key_S, "alike": values.loose_key_S}
        arrays |= {f"{name}.{part}": array for part, array in found.items()}
    np.savez(folder / "rows.npz", **arrays)
    texts = {
        "labels": index.labels.names,
        "ids": index.ids,
        "modalities": list(index.values),
        "files": {name: files.names for name, files in index.files.items()},
        "bad_files": {
            name: {str(i): [info.code, info.what, info.fix] for i, info in enumerate(files.infos) if info.code}
            for name, files in index.files.items()
        },
        "row_problems": [[problem.code, problem.where, problem.what] for problem in index.row_problems],
        "left_out": index.left_out,
    }
    (folder / "index.json").write_text(json.dumps(texts), encoding="utf-8")
    if index.rewritten:
        (folder / "rows.jsonl").write_bytes(index.content)


def _arrays(files: FileValues) -> dict[str, Array]:
    infos = files.infos
    return {
        "number": files.number_S,
        "size": np.array([info.size for info in infos], dtype=np.int64),
        "mtime": np.array([info.mtime for info in infos], dtype=np.int64),
        "side": np.array([(info.width, info.height) for info in infos], dtype=np.int64).reshape(-1, 2),
        "animated": np.array([info.animated for info in infos], dtype=bool),
        "milliseconds": np.array([info.milliseconds for info in infos], dtype=np.int64),
        "digest": np.array([info.digest.ljust(16, b"\0") for info in infos], dtype="S16"),
        "ids": np.array([np.frombuffer(info.ids.ljust(32, b"\0"), np.uint8) for info in infos]).reshape(-1, 32),
    }


def _files(arrays: dict[str, Array], names: list[str], bad: dict[str, list[str]]) -> FileValues:
    """Rebuild the files of a modality.

    Args:
        arrays: as `_arrays` returns them. bad: code, what and fix of each bad file, by its number.
    """
    infos = []
    columns = (arrays[name].tolist() for name in _LOOK_ARRAYS)
    for i, (size, mtime, (width, height), animated, milliseconds, digest, ids) in enumerate(zip(*columns, strict=True)):
        code, what, fix = bad.get(str(i), ("", "", ""))
        infos.append(
            FileInfo(
                size=size,
                mtime=mtime,
                width=width,
                height=height,
                animated=animated,
                milliseconds=milliseconds,
                digest=digest,
                ids=bytes(ids),
                code=code,
                what=what,
                fix=fix,
            )
        )
    return FileValues(arrays["number"], names, infos)


def load(key: str, table: Table) -> Index | None:
    """Read an index from the cache; None if it has none.

    Args:
        table: the table that the index was built from.
    """
    found = cache.find("index", key)
    if found is None:
        return None
    folder, facts = found
    texts = read_json(folder / "index.json")
    with np.load(folder / "rows.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    values: dict[str, InlineValues | FileValues] = {}

    def own(name: str) -> dict[str, Array]:
        return {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}

    for name in texts["modalities"]:
        if name in texts["files"]:
            values[name] = _files(own(name), texts["files"][name], texts["bad_files"][name])
        else:
            values[name] = InlineValues(own(name)["key"], own(name)["alike"])
    return Index(
        split=facts["split"],
        file=table.file,
        digest=facts["digest"],
        content=(folder / "rows.jsonl").read_bytes() if table.content is None else table.content,
        rewritten=table.content is None,
        byte_ranges_S2=arrays["places"],
        lines_S=arrays["lines"],
        values=values,
        masks=_files(masks, texts["files"][MASK], texts["bad_files"][MASK]) if (masks := own(MASK)) else None,
        labels=Labels(texts["labels"], arrays["label_starts"], arrays["labels"]),
        list_S=arrays["list"],
        ids=texts["ids"],
        row_problems=[Problem(code=code, where=where, what=what) for code, where, what in texts["row_problems"]],
        left_out=texts["left_out"],
    )
