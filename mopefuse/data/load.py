"""Load a data set as the section `data` of a configuration describes it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core import cache
from mopefuse.core.error_codes import ConfigCode, DataCode
from mopefuse.core.formatting import several
from mopefuse.data import label_check
from mopefuse.data.bad_rows import skip_bad_rows
from mopefuse.data.base import SPLITS, DataSet, Problem, Split
from mopefuse.data.columns import Layout, has_labels, modalities_of
from mopefuse.data.findings import lacking_message, left_out_message
from mopefuse.data.index import Index
from mopefuse.data.index_build import Advance, build
from mopefuse.data.known_labels import known_labels, labels_file
from mopefuse.data.labels_task import (
    infer_task,
    mixed_currencies,
    pair_labels,
    require_numbers,
    target_names,
    without_bad_numbers,
)
from mopefuse.data.leaks import find_leaks
from mopefuse.data.masks import find_classes, mask_notices
from mopefuse.data.repeated_rows import notice_contradictions
from mopefuse.data.rows import Rows
from mopefuse.data.split_rows import Numbers, divide_rows
from mopefuse.data.storage.paths import data_folder, data_path
from mopefuse.data.storage.shards import open_files
from mopefuse.data.storage.table import Table
from mopefuse.data.tables import columns_in, find_tables, split_column
from mopefuse.errors import ConfigError, DataError, Notice
from mopefuse.modalities.base import get_modality
from mopefuse.modalities.file_source import FileSource


def load_data(
    config: DataConfig,
    *,
    require: tuple[str, ...] = ("train", "val"),
    may_skip: bool = True,
    advance: Advance = lambda done, total: None,
) -> DataSet:
    """Load and validate the data set that `config` describes: every row is valid, every image or other file can be decoded.

    Args:
        require: splits that must exist; others are read if they exist.
        may_skip: whether the user can set `data.on_bad`, for messages.
        advance: called with (files read, files to read) while the index is built.

    Raises:
        DataError: no such folder or split, bad rows or files (all are found, up to twenty kinds are listed), or labels
            that training does not know.
        UnsafePathError: a path leads outside its root.
        ConfigError: no data set is given.
    """
    if config.path is None:
        raise ConfigError(ConfigCode.NO_DATA_SET, "no data set was given", where="data.path", fix="add --data DIR")
    path = data_path(config.path)
    folder = data_folder(path)
    indexes, files = read_indexes(config, require, advance=advance)
    training = "train" in require and "train" in indexes
    skippable = training and may_skip
    skipped = {name: skip_bad_rows(index, files, folder, config, may_skip=skippable) for name, index in indexes.items()}
    task = infer_task(indexes, config, classes_are_listed=labels_file(folder, config) is not None)
    if task.label_kind == "number":
        indexes, odd = without_bad_numbers(indexes, config)
        skipped = {name: (*skipped[name], *odd.get(name, ())) for name in skipped}
    checked = training and task.is_classification
    label_warnings = label_check.check_labels(indexes["train"], folder, config) if checked else []
    contradictions = notice_contradictions(indexes.values()) if checked else []
    parts = divide_rows(indexes, path, config, require, task=task)
    splits = {name: _split(name, index, rows, skipped.get(name, ()), config) for name, (index, rows) in parts.items()}
    of_labels: tuple[str, ...] = ()
    if task.label_kind == "mask":
        task, labels = find_classes(parts, folder, config)
        of_labels = mask_notices(parts, task, labels, folder, config)
    elif task.label_kind == "number":
        labels = target_names(config, require_numbers(parts, config))
        mixed = mixed_currencies(indexes["train"]) if training else ()
        of_labels = tuple(f"{finding.where}: {finding.message}; {finding.fix}" for finding in mixed)
    elif task.label_kind == "pair":
        labels = task.ways
    else:
        labels = known_labels(folder, splits, config, label_warnings)
    return DataSet(
        root=folder,
        splits=splits,
        labels=labels,
        task=task,
        files=files,
        notices=(*_notices(splits, indexes, config), *label_check.notices(label_warnings), *contradictions, *of_labels),
    )


def read_indexes(
    config: DataConfig, require: Sequence[str] = (), *, advance: Advance = lambda done, total: None
) -> tuple[dict[str, Index], FileSource]:
    """Read the index of each split that has its own rows, not rows held out of another split.

    Args:
        require: splits that must exist; a table without a split column is train, or the only required split.

    Returns:
        The indexes, and where the files are that their rows name.

    Raises:
        DataError: no such folder, or a file that is not a table.
    """
    path = data_path(config.path or "")
    tables = find_tables(path, config, advance=advance)
    files = open_files(path, config, [*tables.values()])
    modalities = modalities_of(tables.values(), config)
    if "" in tables:
        notice_splits(tables, config)
        default = require[0] if len(require) == 1 and not (config.val_fraction or config.test_fraction) else "train"
        names = SPLITS if config.split_col else (default,)
        found = {name: build(tables[""], name, files, modalities, config, advance=advance) for name in names}
        kept = {name: index for name, index in found.items() if name == default or len(index.lines_S) or index.row_problems}
        return kept, files
    config = config.model_copy(update={"split_col": None})  # each split has its own table
    return {name: build(table, name, files, modalities, config, advance=advance) for name, table in tables.items()}, files


def has_split_column(path: Path, config: DataConfig) -> bool:
    """Whether `path` is a table with the column `data.split_col`; a folder names splits by its files."""
    if not config.split_col or path.is_dir():
        return False
    return bool(columns_in(find_tables(path, config)[""], {config.split_col}))


def notice_splits(tables: Mapping[str, Table], config: DataConfig) -> None:
    """Give a notice if a column of a single table seems to name splits, but `data.split_col` is not set."""
    column = None
    with suppress(DataError):  # an unreadable table is reported when it is read
        column = split_column(tables[""], config) if "" in tables and not config.split_col else None
    if column is not None:
        file = tables[""].file
        what = f"the column {column} of {file} seems to name splits and is ignored; to use it, add --split-col {column}"
        warnings.warn(what, Notice, stacklevel=2)


def _split(name: str, index: Index, rows: Numbers, skipped: tuple[Problem, ...], config: DataConfig) -> Split:
    labels = index.labels.take(rows) if has_labels(config) else pair_labels(index, rows)
    keys = {modality: values.keys()[rows] for modality, values in index.values.items()}
    layout = Layout.from_config([*keys], config)
    content = Rows(
        store=index.store.take(rows),
        lines_S=index.lines_S[rows],
        labels=labels,
        split=index.split,
        layout=layout,
    )
    return Split(
        name=name,
        file=index.file,
        rows=content,
        labels=labels,
        keys=keys,
        loose_keys={modality: values.loose_keys()[rows] for modality, values in index.values.items()},
        masks=None if index.masks is None else index.masks.take(rows),
        hash=_fingerprint(name, index, rows, skipped),
        skipped=skipped,
    )


def _fingerprint(name: str, index: Index, rows: Numbers, skipped: Sequence[Problem]) -> str:
    """Digest everything in a split: rows, contents of files, missing values, and what was skipped."""
    problems = [f"{problem.code} {problem.where} {problem.file}" for problem in skipped]
    files = [memoryview(values.keys()[rows].tobytes()) for values in index.files.values()]
    missing = {modality: values.is_missing()[rows] for modality, values in index.values.items()}
    lacking = [f"{modality} {missing_S.tobytes().hex()}" for modality, missing_S in missing.items() if missing_S.any()]
    return cache.make_key(index.digest, name, *problems, memoryview(rows.tobytes()), *files, *lacking, *index.left_out)


# -- notices


def _notices(splits: dict[str, Split], indexes: dict[str, Index], config: DataConfig) -> tuple[str, ...]:
    """Notices about the data for the user.

    Raises:
        DataError: val or test shares values with train, and `data.strict` is set.
    """
    leaks = _leak_notices(splits)
    if leaks and config.strict:
        fix = "remove them from train, or remove --strict"
        raise DataError(DataCode.LEAKED_ROWS, "; ".join(leaks), where=str(config.path), fix=fix)
    return (
        *_row_notices(splits, indexes, config),
        *_animation_notices(indexes),
        *(f"{text}; metrics on it may be too optimistic" for text in leaks),
    )


def _row_notices(splits: dict[str, Split], indexes: dict[str, Index], config: DataConfig) -> list[str]:
    """Rows that are skipped, or lack a value, or have an empty one."""
    found = [
        f"{split.name}: {several(len(split.skipped), 'bad row')} skipped; the first: {split.skipped[0]}"
        for split in splits.values()
        if split.skipped
    ]
    for index in indexes.values():
        place = index.split if config.split_col else index.file  # includes rows of train that are held out
        found += [f"{place}: {left_out_message(count, modalities)}" for modalities, count in index.left_out.items()]
    for split in splits.values():
        lacking = {modality: int(split.is_missing(modality).sum()) for modality in split.keys}
        found += [f"{split.name}: {lacking_message(count, modality)}" for modality, count in lacking.items() if count]
        empty = {modality: int(split.is_empty(modality).sum()) for modality in split.keys}
        for modality, count in empty.items():
            if count:
                text = f"{split.name}: {several(count, f'{modality} is', f'{get_modality(modality).plural} are')} empty"
                hint = f"; to treat {'it' if count == 1 else 'them'} as missing, add --on-missing absent"
                found.append(text if config.on_missing != "error" else text + hint)
    return found


def _animation_notices(indexes: dict[str, Index]) -> list[str]:
    all_files = [files for index in indexes.values() for files in index.files.values()]
    animated = [files.names[number] for files in all_files for number in files.animated()]
    if not animated:
        return []
    text = several(len(animated), "image is animated", "images are animated")
    return [f"{text}, such as {animated[0]}: only {'its' if len(animated) == 1 else 'their'} first frame is read"]


def _leak_notices(splits: dict[str, Split]) -> list[str]:
    found = []
    for name in ("val", "test"):
        if name in splits and "train" in splits:
            for modality, rows in find_leaks(splits["train"], splits[name]).items():
                text = several(len(rows), modality, get_modality(modality).plural)
                found += [f"{text} of {name} {'is' if len(rows) == 1 else 'are'} also in train"] if len(rows) else []
    return found
