"""The modalities of a data set, and the column of each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import ConfigCode, DataCode
from mopefuse.data.storage.table import Table
from mopefuse.data.tables import columns_in, some_columns
from mopefuse.errors import ConfigError, DataError, did_you_mean, similar_names
from mopefuse.modalities import base as modality
from mopefuse.tasks.base import get_task
from mopefuse.tasks.regression import parse_number

EXPECTED = ("text", "image")
"""The modalities that are expected if a table has columns of fewer than two."""
_FLAGS = dict(zip(EXPECTED, ("--text-col", "--image-col"), strict=True))  # other modalities have --column
COMMON_LABELS = ("labels", "category", "class", "target", "genre", "genres", "y")  # common names of the label column


def get_column(name: str, config: DataConfig) -> str:
    """The name of the column of a modality."""
    defaults = dict(zip(EXPECTED, (config.text_col, config.img_col), strict=True))
    return config.columns.get(name) or defaults.get(name, name)


def has_labels(config: DataConfig) -> bool:
    """Whether rows have labels; not if the task of `data.task` learns from pairs."""
    return config.task is None or get_task(config.task).label_kind != "pair"


def flag_for(name: str, column: str) -> str:
    """The flag that names the column of a modality."""
    return f"{_FLAGS[name]} {column}" if name in _FLAGS else f"--column {name}={column}"


def sort_modalities(found: Collection[str]) -> tuple[str, ...]:
    """Sort modalities: `EXPECTED` first, then by name."""
    return (*(name for name in EXPECTED if name in found), *sorted(set(found) - set(EXPECTED)))


def modalities_of(tables: Iterable[Table], config: DataConfig, *, lenient: bool = False) -> tuple[str, ...]:
    """Find the modalities of the rows: those of `data.modalities`, or else those with a column in some table.

    Args:
        lenient: ignore tables that cannot be read.

    Raises:
        ConfigError: a setting names a modality that is not installed, or the column of the label is also that of a modality.
        DataError: a table cannot be read, or a setting names a column that no table has.
    """
    known = modality.modality_names()
    for where, setting in (("data.modalities", config.modalities or ()), ("data.columns", config.columns)):
        for name in setting:
            if name not in known:
                what = f"the modality {name!r} is not installed"
                raise ConfigError(ConfigCode.MODALITY_NOT_INSTALLED, what, where=where, fix=did_you_mean(name, known))
    if config.modalities is not None:
        return _check_label_column(sort_modalities(config.modalities), config)
    columns = {name: get_column(name, config) for name in known}
    named = _named_columns(config)
    present: set[str] = set()
    readable: list[Table] = []
    for table in (tables := list(tables)):
        with suppress(DataError) if lenient else nullcontext():
            present |= columns_in(table, {*columns.values(), *named})
            readable.append(table)
    absent = [column for column in named if column not in present]
    if absent and len(readable) == len(tables):
        _refuse_absent_columns(absent, tables, config)
    found = {name for name, column in columns.items() if column in present}
    return _check_label_column(sort_modalities(found) if len(found) > 1 else EXPECTED, config)


def _check_label_column(modalities: tuple[str, ...], config: DataConfig) -> tuple[str, ...]:
    """Return `modalities`, unless one of them has the column of the label: a model would only learn to copy it."""
    for name in modalities:
        if has_labels(config) and get_column(name, config) == config.label_col:
            what = f"the column {config.label_col} is used both as the label and as {name}"
            fix = f"choose a different column with --label-col or {flag_for(name, 'NAME')}"
            raise ConfigError(ConfigCode.LABEL_COLUMN_IS_INPUT, what, where="data.label_col", fix=fix)
    return modalities


def _named_columns(config: DataConfig) -> list[str]:
    """The columns that settings name, other than the defaults."""
    settings = ("text_col", "img_col", "label_col", "id_col")
    named = [getattr(config, name) for name in settings if getattr(config, name) != DataConfig.model_fields[name].default]
    return [*dict.fromkeys([*named, *config.columns.values()])]


def _refuse_absent_columns(absent: Sequence[str], tables: Sequence[Table], config: DataConfig) -> None:
    """Refuse columns that no row of any table has; tables without rows are reported elsewhere."""
    present = {column for table in tables for column in some_columns(table)}
    if not present:
        return
    near = [other for column in absent for other in similar_names(column, present, most=1)]
    fix = f"did you mean {', '.join(near)}?" if near else did_you_mean("", present)
    if config.label_col in absent and present.issuperset(part.strip() for part in config.label_col.split(",")):
        fix = "name one column; several numbers are a list in it, such as [1.5, 2], in a CSV file with --label-sep list"
    raise DataError(
        DataCode.NO_COLUMN, f"column not found: {' or '.join(absent)}", where=", ".join(t.file for t in tables), fix=fix
    )


def require_column(consumer: str, name: str, modalities: Sequence[str], *, where: str) -> None:
    """Require that rows have a modality.

    Args:
        consumer: the encoder that reads it, for the message. name: the modality that is required.
        modalities: modalities of the rows.

    Raises:
        ConfigError: they do not have it.
    """
    if name not in modalities:
        what = f"{consumer} reads {name}, but rows have {' and '.join(modalities)}"
        fix = f"specify the column of {name} with {flag_for(name, 'NAME')}, or use an encoder of a different modality"
        raise ConfigError(ConfigCode.MODALITY_NOT_IN_DATA, what, where=where, fix=fix)


def _similar(column: str, free: Collection[str], common: Sequence[str]) -> list[str]:
    """At most one column that may be meant: the one with the most similar name, or else with a common name."""
    return [*similar_names(column, free, most=1), *(other for other in common if other in free)][:1]


@dataclass(frozen=True)
class Layout:
    """How the rows of a table are read.

    Args:
        columns: name of the column of each modality, in order.
        in_rows: the modalities whose values are stored in the rows, not in files.
        identity, label: names of columns; "" for rows that need no label. separator: separator of labels in a cell.
        fold_labels: see `data.fold_labels`.
        on_missing: see `data.on_missing`.
        null_is_empty: whether a null in a row counts as an empty value rather than a missing one.
        empty_is_missing: whether an empty value in a row counts as missing; an empty file name always does.
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
    def from_config(cls, modalities: Sequence[str], config: DataConfig) -> Layout:
        """The layout of rows with these modalities."""
        return cls(
            columns={name: get_column(name, config) for name in modalities},
            in_rows=frozenset(name for name in modalities if not modality.get_modality(name).is_file),
            identity=config.id_col,
            label=config.label_col if has_labels(config) else "",
            separator=config.label_sep,
            fold_labels=config.fold_labels,
            on_missing=config.on_missing,
            null_is_empty=config.allow_missing_text,
            empty_is_missing=config.on_missing != "error",
        )

    def value_of(self, name: str, row: Mapping[str, Any]) -> Any:
        """The value of a modality in a row: a string if the row is valid, None if it is missing."""
        value = row.get(self.columns[name])
        takes_empty = self.null_is_empty and name in self.in_rows
        if value is None:
            return "" if takes_empty and self.columns[name] in row else None
        may_be_empty = takes_empty or (name in self.in_rows and not self.empty_is_missing)
        if isinstance(value, str) and not may_be_empty and not value.strip():
            return None
        return value

    def suggest_flags(self, missing: Sequence[str], with_label: bool, row: Mapping[str, Any]) -> list[str]:
        """Suggest a flag for each missing column, if another column has a similar or a common name."""
        free = [other for other in row if other not in {*self.columns.values(), self.identity, self.label}]
        found = []
        for name in missing:
            similar = _similar(self.columns[name], free, modality.get_modality(name).common_columns)
            found += [flag_for(name, other) for other in similar]
            free = [other for other in free if other not in similar]
        if with_label:
            numbers = [other for other in free if parse_number(str(row[other])) is not None]
            similar = _similar(self.label, free, COMMON_LABELS) or (numbers if len(numbers) == 1 and not missing else [])
            found += [f"--label-col {other}" for other in similar]
        return found

    def describe(self) -> tuple[object, ...]:
        """What decides how rows are read, for a digest; without `on_missing`, which matters only for missing values."""
        names = () if tuple(self.columns) == EXPECTED else tuple(self.columns)  # fingerprints depend on this form
        folded = ("folded",) if self.fold_labels else ()
        return (*names, self.identity, *self.columns.values(), self.label, self.null_is_empty, self.separator, *folded)
