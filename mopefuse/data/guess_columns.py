"""Guess which column of a table has each modality, the label and the split, from names and from the first rows.

A file is recognised by its existence, a text by its length, a label by having few distinct values, or else by being a
quantity. Columns that settings name, and columns with a default name, are taken as they are.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from mopefuse.config.flags import flag_of
from mopefuse.config.schema import COLUMN_SETTINGS
from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import DataCode
from mopefuse.data.columns import COMMON_LABELS, EXPECTED, flag_for, get_column, has_labels
from mopefuse.data.label_cells import parse_list
from mopefuse.data.labels_task import fix_of_decimal_commas, look_like_quantities
from mopefuse.data.storage.paths import data_folder, data_path
from mopefuse.data.storage.shards import open_files
from mopefuse.data.tables import IMAGE_SUFFIXES, find_tables, split_column
from mopefuse.errors import DataError
from mopefuse.modalities.base import get_modality
from mopefuse.modalities.file_source import FileSource, Folders

_ROWS = 2000  # first rows that are looked at
_PATHS = 50  # of these, paths that are looked for on disk
_MAX_FOLDERS = 200  # folders below the data that may have the files
_NEARLY_ALL = 0.9
_CLEARLY_LONGER = 1.5  # ratio of mean lengths
_ROWS_PER_LABEL = 3  # on average; a column with more distinct values is not a label

Rows = Sequence[Mapping[str, Any]]


@dataclass
class Guess:
    """The columns of a table.

    Args:
        settings: settings of the section `data` that differ from the configuration.
        reasons: a line for each column, for the user.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


def guess_columns(config: DataConfig) -> Guess:
    """Guess the columns that `config` leaves at a default name that the data do not have.

    Raises:
        DataError: there is no table, or a column cannot be guessed or is ambiguous; the message names the flag.
    """
    path = data_path(config.path or "")
    tables = find_tables(path, config)
    rows = [row.value for table in tables.values() for row in islice(table.rows(), _ROWS) if isinstance(row.value, dict)]
    guesser = _Guesser(rows, data_folder(path), open_files(path, config, [*tables.values()]), config)
    if "" in tables and config.split_col is None and (column := split_column(tables[""], config)) is not None:
        guesser.take("split_col", column, "split", "its cells name splits")
    for name in sorted(EXPECTED, key=lambda name: not get_modality(name).is_file):  # files first: they are certain
        guesser.guess_modality(name)
    if has_labels(config):
        guesser.guess_label()
    return guesser.guess


def suggest_columns(config: DataConfig) -> str:
    """Suggest the flags of the columns that `guess_columns` finds, ``add --text-col title``; empty if it finds none."""
    try:
        found = guess_columns(config).settings
    except DataError:
        return ""
    flags = [
        f"{flag_of(f'data.{setting}')} {shlex.quote(value if isinstance(value, str) else value[-1])}"
        for setting, value in found.items()
    ]
    return f"add {' '.join(flags)}" if flags else ""


class _Guesser:
    """The columns of some rows, of which fewer and fewer are free."""

    def __init__(self, rows: Rows, root: Path, files: FileSource, config: DataConfig) -> None:
        self.rows, self.root, self.files, self.config, self.guess = rows, root, files, config, Guess()
        self.cells: dict[str, list[str]] = {}
        for row in rows:
            for name, value in row.items():
                cells = self.cells.setdefault(str(name), [])
                if isinstance(value, str | int | float | bool) and str(value).strip():
                    cells.append(str(value).strip())
        named = {config.id_col, config.split_col, *config.columns.values()}
        own = [get_column(name, config) for name in EXPECTED] + [config.label_col]
        self.free = [name for name in self.cells if name not in named and name not in own and self.cells[name]]

    def take(self, setting: str, column: str, what: str, why: str) -> None:
        """Use a column."""
        self.guess.settings[setting] = column
        self.guess.reasons.append(f"{what}: column {column} ({why})")
        self.free = [name for name in self.free if name != column]

    def _is_settled(self, column: str, default: str, what: str) -> bool:
        """Whether a column needs no guess: the rows have it, or the user named it and loading reports that it is absent."""
        has_lists = any(column in row for row in self.rows)
        if has_lists:
            self.guess.reasons.append(f"{what}: column {column}")
        return has_lists or column != default

    def guess_modality(self, name: str) -> None:
        """Guess the column of a modality."""
        setting = COLUMN_SETTINGS[name]
        if self._is_settled(get_column(name, self.config), DataConfig.model_fields[setting].default, name):
            return
        if get_modality(name).is_file:
            self._guess_files(name, setting)
        else:
            self._guess_text(name, setting)

    def _guess_files(self, name: str, setting: str) -> None:
        found = [column for column in self.free if self._share_of_files(column, self.files) >= _NEARLY_ALL]
        if found:
            column = self._only(found, name, get_modality(name).common_columns)
            self.take(setting, column, name, "its cells are paths of files")
            return
        paths = [column for column in self.free if self._looks_like_paths(column)]
        if not paths:
            self._refuse(f"no column has the paths of {get_modality(name).plural}", name)
        column = self._only(paths, name, get_modality(name).common_columns)
        folders = [folder for folder in self._folders() if self._share_of_files(column, Folders([folder])) >= _NEARLY_ALL]
        if len(folders) != 1:
            what = f"the files in column {column}, such as {self.cells[column][0]}, are not in {self.root}"
            hint = f"one of {', '.join(map(str, folders[:3]))}" if folders else "DIR"
            fix = f"specify the folder that the paths start from with --image-root {hint}"
            raise DataError(DataCode.COLUMN_NOT_GUESSED, what, where=str(self.config.path), fix=fix)
        self.guess.settings["image_roots"] = (*self.config.image_roots, str(folders[0]))
        self.take(setting, column, name, f"its cells are paths of files in {folders[0]}")

    def _share_of_files(self, column: str, files: FileSource) -> float:
        """The fraction of the first cells of a column that are relative paths of files."""
        cells = self.cells[column][:_PATHS]
        return sum(not cell.startswith("/") and files.has(cell) for cell in cells) / len(cells)

    def _looks_like_paths(self, column: str) -> bool:
        cells = self.cells[column][:_PATHS]
        return sum(cell.lower().endswith(IMAGE_SUFFIXES) for cell in cells) >= _NEARLY_ALL * len(cells)

    def _folders(self) -> list[Path]:
        return [item for item in islice(sorted(self.root.iterdir()), _MAX_FOLDERS) if item.is_dir()]

    def _guess_text(self, name: str, setting: str) -> None:
        """Guess the column with the longest texts."""
        length = {column: _mean(len(cell) for cell in self.cells[column]) for column in self.free if self._is_text(column)}
        if not length:
            self._refuse(f"no column has a {name} of several words", name)
        longest = max(length, key=lambda column: length[column])
        close = [column for column in length if length[column] * _CLEARLY_LONGER > length[longest]]
        column = self._only(close, name, get_modality(name).common_columns)
        one_of_several = f"the longest; {flag_for(name, 'NAME')} selects another"
        self.take(setting, column, name, one_of_several if len(length) > 1 else "the only one of several words")

    def _is_text(self, column: str) -> bool:
        cells = self.cells[column]
        return _mean(len(cell.split()) for cell in cells) >= 2 and _mean(map(_is_number, cells)) < 1 - _NEARLY_ALL

    def guess_label(self) -> None:
        """Guess the column of the label."""
        default = DataConfig.model_fields["label_col"].default
        if self._is_settled(self.config.label_col, default, "label"):
            return
        lists = [str(name) for row in self.rows[:1] for name, value in row.items() if isinstance(value, list)]
        found = [column for column in [*self.free, *lists] if column in lists or self._is_label(column)]
        found = found or self._quantities()
        named = [column for column in found if column.lower() in COMMON_LABELS]
        in_words = [column for column in found if column in lists or not all(map(_is_number, self.cells[column]))]
        with_commas = {column: fix for column in self.free if (fix := fix_of_decimal_commas(dict.fromkeys(self.cells[column])))}
        if not found and len(with_commas) == 1:
            (column, fix), where = next(iter(with_commas.items())), str(self.config.path)
            raise DataError(
                DataCode.COLUMN_NOT_GUESSED, f"the numbers of column {column} have decimal commas", where=where, fix=fix
            )
        if not found:
            self._refuse("no column has few enough distinct values to be a class, or numbers that are quantities", "")
        column = self._only(named or in_words or found, "", COMMON_LABELS)
        if column in lists:
            self.take("label_col", column, "label", "its cells are lists")
        elif not self._is_label(column):
            self.take("label_col", column, "label", "its cells are numbers, and no column has classes")
        else:
            self.take("label_col", column, "label", f"{len(set(self.cells[column])):,} distinct values in the first rows")

    def _is_label(self, column: str) -> bool:
        cells = self.cells[column]
        distinct = set(cells)
        if parse_list(cells[0]) is not None and cells[0][0] in "[({":
            return False
        few = len(distinct) >= 2 and _ROWS_PER_LABEL * len(distinct) <= len(cells)
        return few and not any("." in cell and _is_number(cell) for cell in distinct)

    def _quantities(self) -> list[str]:
        """The columns of quantities: those with fractions, or else those of whole numbers, of which some occur twice."""
        found = [column for column in self.free if look_like_quantities({*self.cells[column]}, len(self.cells[column]))]
        with_fractions = [column for column in found if any("." in cell for cell in self.cells[column])]
        return with_fractions or [column for column in found if len({*self.cells[column]}) < len(self.cells[column])]

    def _only(self, found: Sequence[str], modality: str, common: Collection[str]) -> str:
        """The only column of some, or the only one with a common name.

        Args:
            modality: what it would be used as; empty for the label.
        """
        named = [column for column in found if column.lower() in common]
        if len(found) > 1 and len(named) != 1:
            what = f"each of the columns {', '.join(named or found)} could be the {modality or 'label'}"
            fix = f"specify one with {_flag(modality)}"
            raise DataError(DataCode.COLUMN_AMBIGUOUS, what, where=str(self.config.path), fix=fix)
        return found[0] if len(found) == 1 else named[0]

    def _refuse(self, what: str, modality: str) -> NoReturn:
        columns, fix = ", ".join(list(self.cells)[:12]), f"specify it with {_flag(modality)}"
        where = str(self.config.path)
        raise DataError(DataCode.COLUMN_NOT_GUESSED, f"{what}; columns: {columns}", where=where, fix=fix)


def _flag(modality: str) -> str:
    return flag_for(modality, "NAME") if modality else "--label-col NAME"


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace(",", "."))
    except ValueError:
        return False
    return True


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / max(1, len(listed))
