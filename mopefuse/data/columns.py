"""Which modalities the rows of a data set have, and in which column of a table each stands."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from mopefuse.config.schema import Data as DataConfig
from mopefuse.data.tables import Table, columns_in, some_columns
from mopefuse.errors import ConfigError, DataError, did_you_mean, nearest
from mopefuse.modalities import base as modality

EXPECTED = ("text", "image")
"""What a row of the papers' data has: expected where a table has the columns of fewer than two modalities."""
_FLAGS = dict(zip(EXPECTED, ("--text-col", "--image-col"), strict=True))  # others have --column
_LABELS = ("labels", "category", "class", "target", "genre", "genres", "y")  # what a label's column is called elsewhere


def column_of(name: str, config: DataConfig) -> str:
    """The column of a modality."""
    own = dict(zip(EXPECTED, (config.text_col, config.img_col), strict=True))
    return config.columns.get(name) or own.get(name, name)


def flag_for(name: str, column: str) -> str:
    """What to write on the command line for a column to be that of a modality."""
    return f"{_FLAGS[name]} {column}" if name in _FLAGS else f"--column {name}={column}"


def in_order(found: Collection[str]) -> tuple[str, ...]:
    """Modalities in the order of messages: `EXPECTED` first, then by name."""
    return (*(name for name in EXPECTED if name in found), *sorted(set(found) - set(EXPECTED)))


def modalities_of(tables: Iterable[Table], config: DataConfig, *, lenient: bool = False) -> tuple[str, ...]:
    """The modalities that rows have: those that `data.modalities` names, else those that have a column in some table.

    Args:
        lenient: look at other tables where one cannot be read.

    Raises:
        ConfigError: a setting names a modality that is not installed, or the label's column as that of a modality.
        DataError: a table cannot be read, or a setting names a column that none has.
    """
    known = modality.names()
    for where, said in (("data.modalities", config.modalities or ()), ("data.columns", config.columns)):
        for name in said:
            if name not in known:
                what = f"no modality {name!r} is installed"
                raise ConfigError(133, what, where=where, fix=did_you_mean(name, known))
    if config.modalities is not None:
        return _apart_from_label(in_order(config.modalities), config)
    columns = {name: column_of(name, config) for name in known}
    named = _named(config)
    there: set[str] = set()
    read: list[Table] = []
    for table in (tables := list(tables)):
        with suppress(DataError) if lenient else nullcontext():
            there |= columns_in(table, {*columns.values(), *named})
            read.append(table)
    absent = [column for column in named if column not in there]
    if absent and len(read) == len(tables):
        _refuse(absent, tables)
    found = {name for name, column in columns.items() if column in there}
    return _apart_from_label(in_order(found) if len(found) > 1 else EXPECTED, config)


def _apart_from_label(modalities: tuple[str, ...], config: DataConfig) -> tuple[str, ...]:
    """`modalities`, unless the label is read as one of them: a model would only learn to copy it."""
    for name in modalities:
        if column_of(name, config) == config.label_col:
            what = f"the column {config.label_col} is read as the label and as {name}"
            fix = f"name another with --label-col or {flag_for(name, 'NAME')}"
            raise ConfigError(231, what, where="data.label_col", fix=fix)
    return modalities


def _named(config: DataConfig) -> list[str]:
    """The columns that settings name otherwise than by default."""
    settings = ("text_col", "img_col", "label_col", "id_col")
    own = [getattr(config, name) for name in settings if getattr(config, name) != DataConfig.model_fields[name].default]
    return [*dict.fromkeys([*own, *config.columns.values()])]


def _refuse(absent: Sequence[str], tables: Sequence[Table]) -> None:
    """Refuse columns that no row of any table has; where there are no rows, others say so."""
    there = {column for table in tables for column in some_columns(table)}
    if not there:
        return
    near = [other for column in absent for other in nearest(column, there, most=1)]
    fix = f"did you mean {', '.join(near)}?" if near else did_you_mean("", there)
    raise DataError(102, f"there is no column {' or '.join(absent)}", where=", ".join(t.file for t in tables), fix=fix)


def require_column(who: str, name: str, modalities: Sequence[str], *, where: str) -> None:
    """Refuse what reads a modality that rows do not have.

    Args:
        who: that reads it. modalities: that rows have.
    """
    if name not in modalities:
        what = f"{who} reads {name}; a row has {' and '.join(modalities)}"
        fix = f"name the column that has it, {flag_for(name, 'NAME')}, or use what reads one of these"
        raise ConfigError(132, what, where=where, fix=fix)


def _like(column: str, free: Collection[str], elsewhere: Sequence[str]) -> list[str]:
    """The one column that may be meant: of the nearest name, or of one that it has elsewhere; or none."""
    return [*nearest(column, free, most=1), *(other for other in elsewhere if other in free)][:1]


@dataclass(frozen=True)
class Layout:
    """How rows are read: made once for a table.

    Args:
        columns: modality to the name of its column, in order. in_rows: those whose values are in the rows themselves.
        identity, label: names of columns. separator: of labels in a cell. fold_labels: see `data.fold_labels`.
        on_missing: see `data.on_missing`. null_is_empty: whether a null in a row is a value, an empty one.
        empty_is_missing: whether an empty value in a row is none; of a file it always is.
    """

    columns: Mapping[str, str]
    in_rows: frozenset[str]
    identity: str
    label: str
    separator: str | None
    fold_labels: bool
    on_missing: str
    null_is_empty: bool
    empty_is_missing: bool

    @classmethod
    def of(cls, modalities: Sequence[str], config: DataConfig) -> Layout:
        """That of rows with these modalities."""
        return cls(
            {name: column_of(name, config) for name in modalities},
            frozenset(name for name in modalities if not modality.of(name).is_file),
            config.id_col,
            config.label_col,
            config.label_sep,
            config.fold_labels,
            config.on_missing,
            config.allow_missing_text,
            config.on_missing != "error",
        )

    def said(self, name: str, row: Mapping[str, Any]) -> Any:
        """What a row says of a modality: a string where it is well, None where there is nothing."""
        value = row.get(self.columns[name])
        takes_empty = self.null_is_empty and name in self.in_rows
        if value is None:
            return "" if takes_empty and self.columns[name] in row else None
        may_be_empty = takes_empty or (name in self.in_rows and not self.empty_is_missing)
        if isinstance(value, str) and not may_be_empty and not value.strip():
            return None
        return value

    def hints(self, missing: Sequence[str], with_label: bool, row: Mapping[str, Any]) -> list[str]:
        """Flags that may be meant, where columns are not there: for each the nearest name, or what it is called elsewhere."""
        free = [other for other in row if other not in {*self.columns.values(), self.identity, self.label}]
        found = []
        for name in missing:
            near = _like(self.columns[name], free, modality.of(name).meant)
            found += [flag_for(name, other) for other in near]
            free = [other for other in free if other not in near]
        if with_label:
            found += [f"--label-col {other}" for other in _like(self.label, free, _LABELS)]
        return found

    def describe(self) -> tuple[object, ...]:
        """Everything about it that a digest must know, but `on_missing`: where nothing is missing, it changes nothing.

        Rows of text and image are described as before there were others, so that runs of that time know their data.
        """
        names = () if tuple(self.columns) == EXPECTED else tuple(self.columns)
        folded = ("folded",) if self.fold_labels else ()
        return (*names, self.identity, *self.columns.values(), self.label, self.null_is_empty, self.separator, *folded)
