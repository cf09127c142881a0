"""The validated index of a split: where its rows are, what they hold, and what is wrong with which.

It is built once, in one pass over the table and one over the images, and kept in the cache under a digest of all that
it depends on. When it is read again, the images' sizes and times are compared with those that were seen, and only what
changed is looked at.

Shapes: S rows that are rows, I images, 16 bytes of a digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopefuse import cache
from mopefuse.checkpoint import read_json
from mopefuse.config import Data as DataConfig
from mopefuse.data._base import SPLITS, Problem
from mopefuse.data.images import Look, look_at
from mopefuse.data.rows import NoRow, check_row, columns_of
from mopefuse.data.tables import Found, Table

VERSION = 2
Array = NDArray[Any]
Advance = Callable[[int, int], None]
_NO_ROW = "MF-DATA-03"
_SAME_SPLIT = {"dev": "val", "valid": "val", "validation": "val", "training": "train", "testing": "test"}


@dataclass
class Index:
    """What is known of a split before any of it is read again."""

    split: str
    file: str
    digest: str  # of the table and of how it is read
    content: bytes  # JSON lines
    rewritten: bool  # `content` is ours, made from another format
    places_S2: Array  # first byte and end of each row in `content`
    lines_S: Array
    image_S: Array  # number of the row's image
    text_S: Array  # digest of its text, S16
    alike_S: Array  # the same without upper case and with single spaces: equal where two texts say the same
    labels: list[tuple[str, ...]]
    list_S: Array  # whether a row's labels are written as a list
    ids: list[str]
    images: list[str]
    looks: list[Look]
    row_problems: list[Problem]
    fresh: bool = False  # something of it was not in the cache

    def problems(self) -> list[Problem]:
        """Every bad row, by line."""
        bad = {number for number, look in enumerate(self.looks) if look.code}
        found = list(self.row_problems)
        for row in np.flatnonzero(np.isin(self.image_S, list(bad))) if bad else ():
            look = self.looks[self.image_S[row]]
            where = f"{self.file}:{self.lines_S[row]}, id {self.ids[row]}"
            found.append(Problem(look.code, where, look.what, look.fix, self.images[self.image_S[row]]))
        return sorted(found, key=lambda problem: (_line(problem), problem.what))

    def good(self) -> Array:
        """The rows that have no problem, by number."""
        bad = np.array([bool(look.code) for look in self.looks], dtype=bool)
        return np.flatnonzero(~bad[self.image_S]) if len(bad) else np.arange(len(self.image_S))

    def image_keys(self) -> Array:
        """Digest of each row's image (S,), S16."""
        keys_I = np.array([look.digest.ljust(16, b"\0") for look in self.looks] or [b""], dtype="S16")
        return keys_I[self.image_S]


def _line(problem: Problem) -> int:
    return int(problem.where.partition(":")[2].partition(",")[0] or 0)


def build(
    table: Table, split: str, roots: Sequence[Path], config: DataConfig,
    *, fresh: bool = False, advance: Advance = lambda done, total: None,
) -> Index:
    """The index of a split, from the cache where it is there.

    Args:
        split: rows of a single table that names the split in a column are those of this one.
        roots: folders that images may be in, the data root first.
        fresh: read everything again, and replace what is in the cache.
        advance: told of (images looked at, images to look at).
    """
    how = (config.allow_missing_text, config.label_sep, config.split_col, config.max_pixels)
    digest = cache.key_of(VERSION, table.digest, split, table.file, *columns_of(config).values(), *how)
    key = cache.key_of(digest, *(root.resolve() for root in roots))
    index = (None if fresh else _load(key, table)) or read_rows(table, split, config, digest)
    known = dict(zip(index.images, index.looks, strict=True))
    seen = look_at(roots, index.images, max_pixels=config.max_pixels, known=known, advance=advance)
    looks = [seen[name] for name in index.images]
    if index.fresh or looks != index.looks:
        index = replace(index, looks=looks, fresh=True)
        cache.keep("index", key, lambda folder: _save(index, folder), _facts(index, roots))
    return index


def read_rows(table: Table, split: str, config: DataConfig, digest: str = "") -> Index:
    """One pass over the table; images are not looked at, and nothing is kept."""
    rewritten = bytearray()
    places, lines, image_of, labels, lists, ids = [], [], [], [], [], []
    texts, alike = bytearray(), bytearray()
    images: dict[str, int] = {}
    line_of: dict[str, int] = {}
    shared: dict[tuple[str, ...], tuple[str, ...]] = {}
    problems: list[Problem] = []
    for found in table.rows():
        belongs = _split_of(found, config)
        if belongs in SPLITS and belongs != split:
            continue
        try:
            if isinstance(found.value, str):
                raise NoRow(found.value)
            if belongs == "":
                raise NoRow(f"has no {config.split_col}; found {', '.join(sorted(map(str, found.value)))}")
            if belongs not in (None, split):
                raise NoRow(f"{config.split_col} is none of {', '.join(SPLITS)}")
            row = check_row(found.value, found.line, split, config)
            if row.id in line_of:
                raise NoRow(f"the id {row.id!r} is there already, in line {line_of[row.id]}")
        except NoRow as error:
            problems.append(Problem(_NO_ROW, f"{table.file}:{found.line}", str(error)))
            continue
        line_of[row.id] = found.line
        if table.content is None:
            places.append((len(rewritten), 0))
            rewritten += json.dumps(_native(found.value, config)).encode("utf-8") + b"\n"
            places[-1] = (places[-1][0], len(rewritten) - 1)
        else:
            places.append((found.start, found.stop))
        lines.append(found.line)
        image_of.append(images.setdefault(row.img, len(images)))
        texts += _digest(row.text)
        alike += _digest(" ".join(row.text.casefold().split()))
        labels.append(shared.setdefault(row.labels, row.labels))
        lists.append(row.is_list)
        ids.append(row.id)
    return Index(
        split,
        table.file,
        digest,
        bytes(rewritten) if table.content is None else table.content,
        table.content is None,
        np.array(places, dtype=np.int64).reshape(-1, 2),
        np.array(lines, dtype=np.int64),
        np.array(image_of, dtype=np.int64),
        np.frombuffer(bytes(texts), dtype="S16"),
        np.frombuffer(bytes(alike), dtype="S16"),
        labels,
        np.array(lists, dtype=bool),
        ids,
        list(images),
        [Look()] * len(images),
        problems,
        fresh=True,
    )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _split_of(found: Found, config: DataConfig) -> str | None:
    """The split that a row names in `data.split_col`; empty where it names none, None where it need not."""
    if config.split_col is None or not isinstance(found.value, dict):
        return None
    said = str(found.value.get(config.split_col) or "").strip().lower()
    return _SAME_SPLIT.get(said, said)


def _native(value: dict[str, Any], config: DataConfig) -> dict[str, Any]:
    return {name: value[name] for name in columns_of(config).values() if name in value}


# -- in the cache


def _save(index: Index, folder: Path) -> None:
    combinations = {row: number for number, row in enumerate(dict.fromkeys(index.labels))}
    np.savez(
        folder / "rows.npz",
        places=index.places_S2,
        lines=index.lines_S,
        image=index.image_S,
        text=index.text_S,
        alike=index.alike_S,
        list=index.list_S,
        labels=np.array([combinations[row] for row in index.labels], dtype=np.int64),
        size=np.array([look.size for look in index.looks], dtype=np.int64),
        mtime=np.array([look.mtime for look in index.looks], dtype=np.int64),
        side=np.array([(look.width, look.height) for look in index.looks], dtype=np.int64).reshape(-1, 2),
        animated=np.array([look.animated for look in index.looks], dtype=bool),
        milliseconds=np.array([look.milliseconds for look in index.looks], dtype=np.int64),
        digest=np.array([look.digest.ljust(16, b"\0") for look in index.looks], dtype="S16"),
    )
    about = {
        "labels": list(combinations),
        "ids": index.ids,
        "images": index.images,
        "bad_images": {str(i): [look.code, look.what, look.fix] for i, look in enumerate(index.looks) if look.code},
        "row_problems": [[problem.code, problem.where, problem.what] for problem in index.row_problems],
    }
    (folder / "index.json").write_text(json.dumps(about), encoding="utf-8")
    if index.rewritten:
        (folder / "rows.jsonl").write_bytes(index.content)


def _facts(index: Index, roots: Sequence[Path]) -> dict[str, Any]:
    return {"digest": index.digest, "split": index.split, "root": str(roots[0]), "rows": len(index.lines_S)}


def _load(key: str, table: Table) -> Index | None:
    found = cache.find("index", key)
    if found is None:
        return None
    folder, facts = found
    about = read_json(folder / "index.json")
    with np.load(folder / "rows.npz", allow_pickle=False) as arrays:
        part = {name: arrays[name] for name in arrays.files}
    looks = [
        Look(size, mtime, width, height, animated, took, digest, *about["bad_images"].get(str(i), ()))
        for i, (size, mtime, (width, height), animated, took, digest) in enumerate(
            zip(*(part[name].tolist() for name in ("size", "mtime", "side", "animated", "milliseconds", "digest")), strict=True)
        )
    ]
    combinations = [tuple(row) for row in about["labels"]]
    return Index(
        facts["split"],
        table.file,
        facts["digest"],
        (folder / "rows.jsonl").read_bytes() if table.content is None else table.content,
        table.content is None,
        part["places"],
        part["lines"],
        part["image"],
        part["text"],
        part["alike"],
        [combinations[number] for number in part["labels"].tolist()],
        part["list"],
        about["ids"],
        about["images"],
        looks,
        [Problem(*row) for row in about["row_problems"]],
    )
