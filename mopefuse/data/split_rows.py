"""The rows of each split: what is held out of train for val and test, and which rows of train are drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import ConfigCode, DataCode
from mopefuse.core.formatting import several
from mopefuse.data.base import SPLITS
from mopefuse.data.index import Index
from mopefuse.data.storage.shards import find_shards
from mopefuse.data.subsets import choose_few, hold_out
from mopefuse.data.tables import SUFFIXES, find_tables, split_column
from mopefuse.errors import ConfigError, DataError
from mopefuse.tasks.base import Task

Numbers = NDArray[np.int64]
Parts = dict[str, tuple[Index, Numbers]]
"""By split, the index that has its rows, and the numbers of these rows in it."""


def divide_rows(
    indexes: dict[str, Index], path: Path, config: DataConfig, require: Sequence[str] = (), *, task: Task
) -> Parts:
    """Assign rows to splits: hold rows out of train, then draw the rows of train that are used.

    Args:
        require: splits that must exist. task: in classification, classes keep their shares; else labels do not matter.

    Raises:
        DataError: a required split is missing, or a split has no rows.
        ConfigError: a split that exists is to be held out.
    """
    parts: Parts = {name: (index, index.good()) for name, index in indexes.items()}
    by_class = task.is_classification
    for name, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if fraction is not None:
            _hold_out(parts, name, fraction, path, config, by_class)
    for name in require:
        if name not in parts:
            other = f"add --split {next(iter(parts), '')}, which exists"
            fix = missing_split_hint(name, path, config) if "train" in require or not parts else other
            raise DataError(DataCode.NO_SPLIT, f"the {name} split is missing", where=str(path), fix=fix)
    for name, (index, rows) in parts.items():
        if not len(rows):
            where = str(path / index.file if path.is_dir() else path)
            raise DataError(DataCode.EMPTY_SPLIT, f"the {name} split has no rows", where=where, fix="add at least one row")
    if (config.shots or config.fraction) and "train" in parts:
        index, rows = parts["train"]
        if config.shots and not by_class:
            what = "labels are not classes, so there are none of which to take some rows each"
            raise ConfigError(ConfigCode.SETTING_OF_OTHER_TASK, what, where="--shots", fix="use --fraction")
        labels, ids = _classes(index, rows, by_class), [index.ids[row] for row in rows]
        parts["train"] = (index, rows[choose_few(ids, labels, config.seed, shots=config.shots, fraction=config.fraction)])
    return parts


def _classes(index: Index, rows: Numbers, by_class: bool) -> Sequence[tuple[str, ...]]:
    """The labels of some rows, or none, so that all rows are of one class."""
    return index.labels.take(rows) if by_class else [()] * len(rows)


def _hold_out(parts: Parts, name: str, fraction: float, path: Path, config: DataConfig, by_class: bool) -> None:
    """Move rows of train to the split `name`; without a train split nothing changes."""
    if name in parts:
        what = f"data.{name}_fraction is set, but there is a {name} split"
        raise ConfigError(
            ConfigCode.FRACTION_AND_SPLIT, what, where=str(path), fix=f"remove --{name}-fraction or the {name} split"
        )
    if "train" not in parts:
        return
    index, rows = parts["train"]
    all_groups = index.groups()
    groups = [all_groups[row] for row in rows]
    count = round(fraction * len(index.good()))
    kept, held = hold_out(groups, _classes(index, rows, by_class), count, config.seed)
    if len(rows) and not held:
        what = f"no row of train can be held out for {name}: each label must keep a row (or image) in train"
        fix = f"raise --{name}-fraction, add a {name} split, or merge rare labels"
        raise DataError(DataCode.EMPTY_SPLIT, what, where=str(path), fix=fix)
    parts["train"], parts[name] = (index, rows[kept]), (index, rows[held])


_PACKED = re.compile(r"(?:train|val|valid|test)[-_.](?:.*\.)?(?:(?:tar|jsonl|csv|tsv)\.(?:gz|zst|bz2|xz)|tgz)", re.IGNORECASE)
"""The name of a compressed table or shard of a split."""


def missing_split_hint(name: str, path: Path, config: DataConfig) -> str:
    """A hint on how to provide a missing split."""
    hold_out_rows = f"hold out some rows of train with --{name}-fraction 0.1"
    if not path.is_dir() and name == "train":
        return f"add rows of train to {path.name}"
    if not path.is_dir():
        if path.stem in SPLITS and any((path.parent / f"{name}{suffix}").is_file() for suffix in SUFFIXES):
            return f"pass the folder that also has the other splits: {path.parent}"
        column = split_column(find_tables(path, config)[""], config)
        if column is not None and column != config.split_col:
            return f"add --split-col {column}, the column that names the split of each row, or {hold_out_rows}"
        return f"{hold_out_rows}, or specify the split column with --split-col"
    found = [item.name for item in path.iterdir() if item.suffix in SUFFIXES or item.is_dir()]
    tables = [item for item in path.iterdir() if item.suffix in SUFFIXES and item.is_file()]
    if len(tables) == 1 and tables[0].stem not in SPLITS and not any(find_shards(path, split) for split in SPLITS):
        return f"pass the table itself: {tables[0]}"
    if packed := sorted(item.name for item in path.iterdir() if _PACKED.fullmatch(item.name)):
        return f"decompress {packed[0]}"
    files = sum(1 for _ in path.iterdir())
    no_tables = f"no table among {several(files, 'file')}" if files else "nothing"
    has = f"(the folder has {', '.join(sorted(found)[:8]) or no_tables})"
    return f"add {name}.jsonl{f', or {hold_out_rows}' if name != 'train' else ''} {has}"
