"""Read the records of a CSV file, each of one or more lines, so that an unclosed quote does not spoil other rows.

A quoted cell may contain line breaks, so an unclosed quote swallows the lines up to the next quote or the end of the file. A
record that cannot be parsed, or that has the wrong number of cells, counts as such a quote if it swallowed lines that are
complete rows by themselves; reading then continues at the line after the quote.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

_RESCANS = 8  # limit on rereading swallowed lines, in lengths of the file; without it, reading could take quadratic time
_HEAD = 65_536  # bytes in which the header is searched
_MIN_COLUMNS = 3  # columns that a table must have for swallowed lines to be recognised as rows
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical-bar"}


def delimiter_of(content: bytes, default: str, wanted: Collection[str]) -> str:
    """Detect the delimiter of a table from its header: the one that gives most of the `wanted` columns.

    If several give as many, it is `default` if the header contains it, else the one that gives most columns.
    """
    lines = re.split("[\r\n]", content[:_HEAD].decode("utf-8-sig", "replace"))
    header = next((line.replace("\0", "") for line in lines if line.strip()), "")  # the csv module of Python 3.10 refuses NUL

    def rank(delimiter: str) -> tuple[int, bool, int]:
        cells = [cell.strip() for cell in next(csv.reader([header], delimiter=delimiter), [])]
        return len(set(wanted) & set(cells)), delimiter == default and len(cells) > 1, len(cells)

    return max((default, *_DELIMITERS), key=rank)


def name_of(delimiter: str) -> str:
    """The name of a delimiter, as in comma-separated."""
    return _DELIMITERS[delimiter]


class Record(NamedTuple):
    """The cells of one record, or its problem.

    Args:
        line: its first, from 1.
    """

    line: int
    cells: list[str]
    problem: str = ""


class Records:
    """Iterates over the records of a text, without empty lines.

    Attributes:
        width: number of cells of a complete row; 0 until the header is known.
    """

    def __init__(self, text: str, delimiter: str) -> None:
        self.width = 0
        self._delimiter = delimiter
        self._budget = _RESCANS * len(text) + 1_000_000  # characters
        self._seek(io.StringIO(text, newline=""), 0, 0)

    def _seek(self, file: io.StringIO, place: int, lines: int) -> None:
        """Continue at a place of the text; `lines` is the number of lines before it."""
        file.seek(place)
        self._file, self._before = file, lines
        self._reader = csv.reader(file, delimiter=self._delimiter, strict=True)

    def __iter__(self) -> Iterator[Record]:
        while True:
            start, line = self._file.tell(), self._before + self._reader.line_num + 1
            problem, cells = "", None
            try:
                cells = next(self._reader, None)
            except csv.Error as error:
                problem = f"is not CSV ({error}); look for an unclosed quote"
            if cells is None and not problem:
                return
            last = self._before + self._reader.line_num
            if last > line and self._swallows_rows(start, cells):
                yield from self._recover(start, line, last)
            elif cells is None or any(cells):
                yield Record(line, cells or [], problem)

    def _swallows_rows(self, start: int, cells: list[str] | None) -> bool:
        """Whether the lines after the first line of a record are rows by themselves, and so not the content of a cell.

        If the record has the wrong number of cells, one such line is enough; if it cannot be parsed, so is a line with as
        many delimiters as a row. The cells of a good record may contain anything, even sentences with as many commas as a
        row: then all lines but the last must be rows without a space after a delimiter, and at least two lines in all.
        """
        if not self.width:
            return cells is None
        bad = cells is None or len(cells) != self.width
        if not bad and self.width < _MIN_COLUMNS:
            return False
        end = self._file.tell()
        self._file.seek(start)
        self._file.readline()
        inside = io.StringIO(self._file.read(end - self._file.tell()), newline="")
        if bad:
            return any(self._is_row(line) or (cells is None and self._has_delimiters(line)) for line in inside)
        *lines, last = inside
        return all(map(self._is_dense_row, lines)) and len(lines) + self._is_dense_row(last) >= 2

    def _is_row(self, line: str) -> bool:
        return len(self._cells(line)) == self.width

    def _is_dense_row(self, line: str) -> bool:
        cells = self._cells(line)
        return len(cells) == self.width and not any(cell.startswith(" ") for cell in cells[1:])

    def _cells(self, line: str) -> list[str]:
        """The cells of a line by itself; none if it is not CSV."""
        try:
            return next(csv.reader([line], delimiter=self._delimiter, strict=True), [])
        except csv.Error:
            return []

    def _has_delimiters(self, line: str) -> bool:
        return line.count(self._delimiter) >= max(1, self.width - 1)

    def _recover(self, start: int, line: int, last: int) -> Iterator[Record]:
        """Report the line with the quote and continue after it; if that happened too often, report all swallowed lines."""
        end, count = self._file.tell(), last - line
        lines = f"the {count:,} lines" if count > 1 else "the line"
        problem = f"has an unclosed quote, which would swallow {lines} after it, up to line {last}"
        yield Record(line, [], problem)
        self._budget -= end - start
        if self._budget < 0:
            inside = f"is inside a quoted cell that line {line} opens and does not close"
            yield from (Record(number, [], inside) for number in range(line + 1, last + 1))
            return
        self._file.seek(start)
        self._file.readline()
        self._seek(self._file, self._file.tell(), line)
