"""A data set from what `data` of a configuration says: splits, labels, what is held out, drawn or skipped."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core import cache
from mopefuse.core.formatting import several
from mopefuse.data import label_check
from mopefuse.data.base import SPLITS, DataSet, Problem, Split
from mopefuse.data.columns import Layout, modalities_of
from mopefuse.data.findings import KINDS, Finding, kind_of_row, lacks, left_out
from mopefuse.data.index import Advance, Index, build
from mopefuse.data.label_cells import is_blank, normalised
from mopefuse.data.leaks import leak
from mopefuse.data.rows import Rows
from mopefuse.data.subsets import few, hold_out
from mopefuse.data.tables import SUFFIXES, Table, columns_in, find_tables, read_bytes, split_column
from mopefuse.errors import ConfigError, DataError, Notice, data_error, nearest
from mopefuse.modalities.base import of
from mopefuse.modalities.files import root_to_name

_MOST_LISTED = 20
Numbers = NDArray[np.int64]
Parts = dict[str, tuple[Index, Numbers]]  # split to the index that has its rows, and which of them they are


def load_data(
    config: DataConfig,
    *,
    require: tuple[str, ...] = ("train", "val"),
    advance: Advance = lambda done, total: None,
) -> DataSet:
    """The data set that `config` describes, validated: every row is one, every image or other file can be decoded.

    Args:
        require: splits that must be there; others are read if they are.
        advance: told of (files looked at, files to look at) where the index is built.

    Raises:
        DataError: no such folder or split, bad rows or files (all are found, the first twenty kinds listed), labels that
            training does not define. UnsafePathError: a path out of its root. ConfigError: no data were named.
    """
    if config.path is None:
        raise ConfigError(8, "no data set was named", where="data.path", fix="add --data DIR")
    path = Path(config.path)
    roots = roots_of(path, config)
    root = roots[0]
    indexes = read_indexes(config, require, advance=advance)
    skipped = {name: _refuse_bad(index, roots, config) for name, index in indexes.items()}
    doubts = label_check.refuse_labels(indexes["train"], root, config) if "train" in require and "train" in indexes else []
    parts = parts_of(indexes, path, config, require)
    splits = {name: _split(name, index, rows, skipped.get(name, ()), config) for name, (index, rows) in parts.items()}
    multi = _is_multi_label(parts)
    labels = _labels(root, splits, config, doubts)
    return DataSet(root, splits, labels, multi, roots, (*_notices(splits, indexes, config), *label_check.notices(doubts)))


def roots_of(path: Path, config: DataConfig) -> tuple[Path, ...]:
    """Folders that images and other files may be in: that of the data first."""
    return (path.parent if path.is_file() else path, *map(Path, config.image_roots))


def read_indexes(
    config: DataConfig, require: Sequence[str] = (), *, advance: Advance = lambda done, total: None
) -> dict[str, Index]:
    """The index of each split that has rows of its own (not held out of another).

    Args:
        require: splits that must be there; a table that says nothing of splits is train, or the only one that must.

    Raises:
        DataError: no such folder, or a file that is no table.
    """
    path = Path(config.path or "")
    tables = find_tables(path, config)
    roots = roots_of(path, config)
    modalities = modalities_of(tables.values(), config)
    if "" in tables:
        notice_splits(tables, config)
        whole = require[0] if len(require) == 1 and not (config.val_fraction or config.test_fraction) else "train"
        names = SPLITS if config.split_col else (whole,)
        found = {name: build(tables[""], name, roots, modalities, config, advance=advance) for name in names}
        return {name: index for name, index in found.items() if name == whole or len(index.lines_S) or index.row_problems}
    config = config.model_copy(update={"split_col": None})  # each split has a table of its own
    return {name: build(table, name, roots, modalities, config, advance=advance) for name, table in tables.items()}


def names_splits(path: Path, config: DataConfig) -> bool:
    """Whether the table at `path` has the column that `data.split_col` names; a folder says by its files."""
    if not config.split_col or not path.is_file():
        return False
    return bool(columns_in(find_tables(path, config)[""], {config.split_col}))


def notice_splits(tables: Mapping[str, Table], config: DataConfig) -> None:
    """Tell of a table whose rows name their splits, where nobody said that they count."""
    named = None
    with suppress(DataError):  # a table that cannot be read, which whoever reads it says
        named = split_column(tables[""], config) if "" in tables and not config.split_col else None
    if named is not None:
        what = f"the column {named} of {tables[''].file} names splits, and is not looked at: to use it, add --split-col {named}"
        warnings.warn(what, Notice, stacklevel=2)


def to_have(name: str, path: Path, config: DataConfig) -> str:
    """What to do for a data set to have a split, before training."""
    hold = f"hold some rows of train out with --{name}-fraction 0.1"
    if path.is_file():
        if path.stem in SPLITS and any((path.parent / f"{name}{suffix}").is_file() for suffix in SUFFIXES):
            return f"name the folder that has the other splits, too: {path.parent}"
        named = split_column(find_tables(path, config)[""], config)
        if named is not None and named != config.split_col:
            return f"add --split-col {named}, the column that names the split of each row, or {hold}"
        return f"{hold}, or name the column that says the split with --split-col"
    found = [item.name for item in path.iterdir() if item.suffix in SUFFIXES or item.is_dir()]
    tables = [item for item in path.iterdir() if item.suffix in SUFFIXES and item.is_file()]
    if len(tables) == 1 and tables[0].stem not in SPLITS:
        return f"name the table itself: {tables[0]}"
    files = sum(1 for _ in path.iterdir())
    nothing = f"no table, but {several(files, 'file')}" if files else "nothing"
    there = f"(there is {', '.join(sorted(found)[:8]) or nothing})"
    return f"provide {name}.jsonl{f', or {hold}' if name != 'train' else ''} {there}"


def parts_of(indexes: dict[str, Index], path: Path, config: DataConfig, require: Sequence[str] = ()) -> Parts:
    """The rows of each split, with what is held out of train, and of train what is drawn.

    Args:
        require: splits that must be there.

    Raises:
        DataError: one is not, or a split has no rows. ConfigError: a split that is there is to be held out.
    """
    parts: Parts = {name: (index, index.good()) for name, index in indexes.items()}
    for name, fraction in (("test", config.test_fraction), ("val", config.val_fraction)):
        if fraction is None:
            continue
        if name in parts:
            what = f"data.{name}_fraction is set, but there is a {name} split"
            raise ConfigError(43, what, where=str(path), fix=f"unset it, or remove the {name} split")
        if "train" in parts:
            index, rows = parts["train"]
            every = index.groups()
            groups = [every[row] for row in rows]
            labels = index.labels.take(rows)
            count = round(fraction * len(index.good()))
            kept, held = hold_out(groups, labels, count, config.seed)
            if len(rows) and not held:
                what = f"no row of train can be held out as {name}: a row (or image) of each label stays in train"
                fix = f"raise --{name}-fraction, provide a {name} split, or join rare labels"
                raise DataError(4, what, where=str(path), fix=fix)
            parts["train"], parts[name] = (index, rows[kept]), (index, rows[held])
    for name in require:
        if name not in parts:
            other = f"add --split {next(iter(parts), '')}, which is there"
            fix = to_have(name, path, config) if "train" in require or not parts else other
            raise DataError(2, f"the {name} split is missing", where=str(path), fix=fix)
    for name, (index, rows) in parts.items():
        if not len(rows):
            where = str(path / index.file if path.is_dir() else path)
            raise DataError(4, f"the {name} split has no rows", where=where, fix="provide at least one row")
    if (config.shots or config.fraction) and "train" in parts:
        index, rows = parts["train"]
        labels, ids = index.labels.take(rows), [index.ids[row] for row in rows]
        parts["train"] = (index, rows[few(ids, labels, config.seed, shots=config.shots, fraction=config.fraction)])
    return parts


def _split(name: str, index: Index, rows: Numbers, skipped: tuple[Problem, ...], config: DataConfig) -> Split:
    labels = index.labels.take(rows)
    keys = {modality: each.keys()[rows] for modality, each in index.values.items()}
    alike = {modality: each.alike()[rows] for modality, each in index.values.items()}
    told = [f"{problem.code} {problem}" for problem in skipped]
    files = [keys[modality].tobytes().hex() for modality in index.files]
    lacks = {modality: each.lacks()[rows] for modality, each in index.values.items()}
    lacking = [f"{modality} {lacks_S.tobytes().hex()}" for modality, lacks_S in lacks.items() if lacks_S.any()]
    digest = cache.key_of(index.digest, name, *told, rows.tobytes().hex(), *files, *lacking, *index.left_out)
    layout = Layout.of([*keys], config)
    read = Rows(index.content, index.places_S2[rows], index.lines_S[rows], labels, index.split, layout)
    return Split(name, index.file, read, labels, keys, alike, digest, skipped)


def _refuse_bad(index: Index, roots: Sequence[Path], config: DataConfig) -> tuple[Problem, ...]:
    """The bad rows that may be skipped.

    Raises:
        DataError: there are some, and they may not be, or are too many. UnsafePathError: one of them leaves its root.
    """
    problems = index.problems()
    if not problems:
        return ()
    unsafe = [problem for problem in problems if problem.code.startswith("MF-SEC")]
    root, total = roots[0], len(index.lines_S) + len(index.row_problems)
    for modality, each in index.files.items() if not unsafe else ():
        if each.all_missing():
            what = f"none of {len(each.names):,} {of(modality).plural} is found, such as {each.names[0]}"
            raise DataError(11, what, where=str(root / index.file), fix=root_to_name(roots, each.names))
    if config.on_bad == "skip" and not unsafe:
        if len(problems) <= config.max_bad_fraction * total:
            return tuple(problems)
        what = f"{len(problems)} of {total} rows are bad, more than the share {config.max_bad_fraction:g} that may be skipped"
        fix = "correct them, or raise data.max_bad_fraction"
        raise DataError(26, f"{what}: {_listed(problems)}", where=str(root / index.file), fix=fix)
    shown = unsafe or problems
    first = shown[0]
    if len(problems) == 1 and first.file:
        raise data_error(first.code, first.what, where=first.where, fix=first.fix)
    code = first.code if len({problem.code for problem in shown}) == 1 else "MF-DATA-03"
    fix = first.fix if unsafe else f"{_todo(problems)}; mopefuse data check --json lists all"
    raise data_error(code, f"{several(len(shown), 'bad row')}: {_listed(shown)}", where=str(root / index.file), fix=fix)


def _listed(problems: Sequence[Problem]) -> str:
    """Problems in one line: those of the same words once, at the first of them, with how many more there are."""
    alike: dict[str, list[Problem]] = {}
    for problem in problems:
        alike.setdefault(problem.what, []).append(problem)
    shown = list(alike.values())[:_MOST_LISTED]
    listed = [f"{same[0]}" + (f" (and {len(same) - 1:,} more like it)" if len(same) > 1 else "") for same in shown]
    rest = len(problems) - sum(map(len, shown))
    return "; ".join([*listed, *([f"and {rest:,} more"] if rest else [])])


def _todo(problems: Sequence[Problem]) -> str:
    """What mends them, where that is the same for all."""
    fixes = {problem.fix or KINDS[kind_of_row(problem.what)].todo for problem in problems}
    return fixes.pop() if len(fixes) == 1 else "correct or remove them"


def _is_multi_label(parts: Parts) -> bool:
    kinds: dict[bool, str] = {}
    for index, rows in parts.values():
        lists = index.list_S[rows]
        for kind in (False, True):
            if (lists == kind).any():
                kinds[kind] = f"{index.file}:{index.lines_S[rows][lists == kind][0]}"
    if len(kinds) == 2:
        what = "some labels are strings and some are lists"
        raise DataError(5, what, where=kinds[True], fix="write all one way")
    return True in kinds


def _labels(root: Path, splits: dict[str, Split], config: DataConfig, doubts: Sequence[Finding]) -> tuple[str, ...]:
    listed = Path(config.labels) if config.labels else root / "labels.txt"
    if config.labels or listed.exists():
        labels = listed_labels(listed, fold=config.fold_labels)
    else:
        labels = tuple(sorted(splits["train"].labels.counts())) if "train" in splits else ()
    known = set(labels)
    for split in splits.values() if labels else ():
        unknown = Counter({label: count for label, count in split.labels.counts().items() if label not in known})
        if unknown:
            raise _unknown(unknown, split, labels, doubts)
    if "train" in splits and len(labels) < 2:
        found = f"only the label {labels[0]!r}" if labels else "no label at all"
        raise DataError(7, f"{found}: there is nothing to learn", where=splits["train"].file, fix="add another class")
    return labels


def _unknown(unknown: Counter[str], split: Split, labels: Sequence[str], doubts: Sequence[Finding]) -> DataError:
    """The error for labels that are not known, at the first row that has one."""
    shown = []
    for label, count in unknown.most_common(_MOST_LISTED):
        near = nearest(label, labels, most=1)
        shown.append(f"{label} ({count}{f'; did you mean {near[0]}?' if near else ''})")
    rest = len(unknown) - len(shown)
    what = f"labels that training does not know: {', '.join(shown)}{f', and {rest} more' if rest else ''}"
    first = min(row for label, row in split.labels.first_rows().items() if label in unknown)
    fix = "correct it, or, if it is a label, list all labels in labels.txt or in a file that --labels names"
    fix = next((f"{doubt.hint}; else {fix}" for doubt in doubts if doubt.kind == "joined-labels"), fix)
    return DataError(6, what, where=split.where(split.rows[first]), fix=fix)


def listed_labels(path: Path, *, fold: bool = False) -> tuple[str, ...]:
    """The labels that a file lists, one a line, in its order.

    Args:
        fold: see `data.fold_labels`.

    Raises:
        DataError: it cannot be read, is not UTF-8, or has a label twice.
    """
    try:
        lines = read_bytes(path).decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        fix = "convert it with iconv -t utf-8"
        raise DataError(10, f"{path.name} is not UTF-8: {error}", where=str(path), fix=fix) from None
    labels = [line.rstrip("\r") for line in lines if not is_blank(line)]
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise DataError(10, f"{path.name} has {twice[0]!r} twice", where=str(path), fix="list each label once")
    return tuple(dict.fromkeys(map(normalised, labels))) if fold else tuple(labels)


def _notices(splits: dict[str, Split], indexes: dict[str, Index], config: DataConfig) -> tuple[str, ...]:
    found = [
        f"{split.name}: {several(len(split.skipped), 'bad row is', 'bad rows are')} skipped, as {split.skipped[0]}"
        for split in splits.values()
        if split.skipped
    ]
    for index in indexes.values():
        of_whom = index.split if config.split_col else index.file  # rows of train that are held out count, too
        found += [f"{of_whom}: {left_out(count, what)}" for what, count in index.left_out.items()]
    for split in splits.values():
        lacking = {modality: int(split.lacks(modality).sum()) for modality in split.keys}
        found += [f"{split.name}: {lacks(count, modality)}" for modality, count in lacking.items() if count]
        empty = {modality: int(split.empties(modality).sum()) for modality in split.keys}
        for modality, count in empty.items():
            if count:
                said = f"{split.name}: {several(count, f'{modality} is', f'{of(modality).plural} are')} empty"
                hint = f"; --on-missing absent takes {'it' if count == 1 else 'them'} as missing"
                found.append(said if config.on_missing != "error" else said + hint)
    each = [files for index in indexes.values() for files in index.files.values()]
    moving = [name for files in each for name, look in zip(files.names, files.looks, strict=True) if look.animated]
    if moving:
        said = several(len(moving), "image is an animation", "images are animations")
        found.append(f"{said}, as {moving[0]}: {'its' if len(moving) == 1 else 'their'} first frame is read")
    leaks = []
    for name in ("val", "test"):
        if name in splits and "train" in splits:
            shared = leak(splits["train"], splits[name])
            both = ((several(len(rows), kind, of(kind).plural), len(rows)) for kind, rows in shared.items())
            leaks += [f"{said} of {name} {'is' if count == 1 else 'are'} also in train" for said, count in both if count]
    if leaks and config.strict:
        fix = "remove them from train, or leave --strict out"
        raise DataError(27, "; ".join(leaks), where=str(config.path), fix=fix)
    return (*found, *(f"{text}; metrics on it may be too good" for text in leaks))
