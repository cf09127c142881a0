"""What can be wrong with a data set: kinds of findings, and those that rows, images and texts show by themselves.

An error is what training would refuse; a warning is what it accepts, but somebody should know.

Shapes: S rows of a split, I images.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mopefuse.core.formatting import several
from mopefuse.data.index import Index
from mopefuse.modalities.base import of
from mopefuse.modalities.files import Files, root_to_name


class Kind(NamedTuple):
    """One kind of finding."""

    severity: str  # error or warning
    todo: str


KINDS = {  # in the order of a report
    "unsafe-path": Kind("error", "use paths inside the data folder, or allow their folder with --image-root"),
    "missing-split": Kind("error", "provide it, or hold some rows of train out"),
    "unreadable-table": Kind("error", "mend or convert the file"),
    "empty-split": Kind("error", "provide at least one row"),
    "bad-labels-file": Kind("error", "write each label once, one a line, in UTF-8"),
    "bad-json": Kind("error", "correct the line"),
    "bad-encoding": Kind("error", "convert the file with iconv -t utf-8"),
    "bad-csv": Kind("error", "close quotes, and give each row the fields of the header"),
    "not-an-object": Kind("error", "write one JSON object a line"),
    "missing-column": Kind("error", "add it, or name the column that has it: --text-col, --image-col, --label-col"),
    "missing-text": Kind("error", "give the row a text, or say what a row without is: --on-missing absent or skip"),
    "nothing": Kind("error", "give the row a value, or say what a row without does: --on-missing skip or absent"),
    "wrong-type": Kind("error", "write strings, and labels as a string or a list of strings"),
    "empty-label": Kind("error", "give the row a label, or remove it"),
    "half-character": Kind("error", "correct the character"),
    "bad-split-name": Kind("error", "write train, val or test"),
    "duplicate-id": Kind("error", "give each row of a split its own id"),
    "bad-row": Kind("error", "correct or remove it"),
    "mixed-labels": Kind("error", "write all labels as strings, or all as lists"),
    "one-class": Kind("error", "add rows of another class"),
    "unknown-label": Kind("error", "correct it, or list all labels in labels.txt"),
    "list-label": Kind("error", "read lists with --label-sep list"),
    "many-labels": Kind("error", "name the column with the class with --label-col, or separate labels with --label-sep"),
    "missing-image": Kind("error", "add the file"),
    "missing-file": Kind("error", "add the file"),
    "not-a-file": Kind("error", "name a file"),
    "empty-image": Kind("error", "replace or remove it"),
    "truncated-image": Kind("error", "replace it with a whole one"),
    "wrong-format-image": Kind("error", "convert it to JPEG, PNG, WEBP, GIF or BMP"),
    "unreadable-image": Kind("error", "replace or remove it"),
    "unreadable-file": Kind("error", "replace or remove it"),
    "huge-image": Kind("error", "shrink it, or raise --max-pixels"),
    "missing-test": Kind("warning", "provide it, or hold some rows of train out"),
    "leaked-image": Kind("warning", "remove the row from one of the splits"),
    "leaked-text": Kind("warning", "remove the row from one of the splits"),
    "leaked-file": Kind("warning", "remove the row from one of the splits"),
    "leaked-value": Kind("warning", "remove the row from one of the splits"),
    "id-in-two-splits": Kind("warning", "give each row its own id"),
    "absent-label": Kind("warning", "add rows of it; its F1 cannot be measured"),
    "joined-labels": Kind("warning", "separate them with --label-sep, if they are several labels"),
    "label-variants": Kind("warning", "make them one with --fold-labels, or write each label one way"),
    "misspelt-label": Kind("warning", "correct it, if it is a misspelling"),
    "numeric-labels": Kind("warning", "name the column with the class with --label-col, if they are amounts"),
    "rare-labels": Kind("warning", "join or remove rare classes, or name another column with --label-col"),
    "missing-value": Kind("warning", "nothing, if they may be without"),
    "empty-text": Kind("warning", "give the row a text, or take it as missing: --on-missing absent"),
    "replaced-characters": Kind("warning", "remove them; they are read as U+FFFD"),
    "tiny-image": Kind("warning", "use the original; it is enlarged"),
    "strip-image": Kind("warning", "crop it; of a long strip only the middle is seen"),
    "animated-image": Kind("warning", "nothing, if its first frame is meant; only that is read"),
    "slow-image": Kind("warning", "shrink it, or train with --cache-images"),
}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a row, an image or a split."""

    kind: str  # of `KINDS`
    split: str
    where: str  # file:line, or a file; of the first row where it is an image that several rows show
    message: str
    hint: str = ""
    code: str = ""  # of the error that training would raise; empty for a warning
    id: str = ""
    image: str = ""  # or another file that a row names
    rows: int = 1  # that it concerns
    row: int = -1  # number of the row in its index
    twin: int = -1  # number of a row in the index of train, that it has something in common with

    @property
    def severity(self) -> str:
        """error or warning."""
        return KINDS[self.kind].severity

    @property
    def place(self) -> str:
        """Where it is, with the id."""
        return f"{self.where}, id {self.id}" if self.id else self.where

    @property
    def todo(self) -> str:
        """What to do about it."""
        return self.hint or KINDS[self.kind].todo

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "code": self.code,
            "split": self.split,
            "where": self.where,
            "id": self.id,
            "image": self.image,
            "rows": self.rows,
            "message": self.message,
            "hint": self.todo,
        }


def at(index: Index, row: int, kind: str, message: str, *, code: str = "", rows: int = 1, twin: int = -1) -> Finding:
    """A finding at a row."""
    where = f"{index.file}:{index.lines_S[row]}"
    return Finding(kind, index.split, where, message, "", code, index.ids[row], "", rows, row, twin)


_ROWS = {  # how what is said of a bad row begins, or what it has
    "bad-split-name": r".* is none of train, val, test$",
    "nothing": r"has none of .*; found |(has no .*; found .*|.* is (null|empty), expected a string) \(use --on-missing",
    "missing-column": r"has no .*; found ",
    "missing-text": r"\(.*\) has no text: |.* is null, expected a string \(set data.allow_missing_text",
    "bad-encoding": r"is not UTF-8 |\(.*\) has a caption that is not UTF-8$",
    "bad-csv": r"is not CSV |has \d+ fields, the header has |has a quote that is not closed|is inside a quoted cell ",
    "not-an-object": r"is a \w+, expected an object$",
    "bad-json": r"is not JSON |is nested too deeply|has a number with too many|has a key twice|has -?\w+, which is not JSON",
    "duplicate-id": r"the id .* is there already, in line \d+$",
    "empty-label": r".* is empty$|.* has an empty label$",
    "half-character": r".* has half a character",
    "wrong-type": r".* is (null|a \w+|an object), expected a string",
}
def of_rows(index: Index) -> Iterator[Finding]:
    """Rows that are none."""
    for problem in index.row_problems:
        kind = kind_of_row(problem.what)
        identity = ""
        if kind == "duplicate-id":
            identity = ast.literal_eval(problem.what.removeprefix("the id ").rpartition(" is there already, in line ")[0])
        elif index.file.endswith("/") and problem.what.startswith("("):  # an image folder, where files are the ids
            identity = problem.what[1:].rpartition(") has ")[0]
        yield Finding(kind, index.split, problem.where, problem.what, code=problem.code, id=identity)


def kind_of_row(what: str) -> str:
    """The kind of finding that what is said of a bad row stands for."""
    return next((kind for kind, pattern in _ROWS.items() if re.match(pattern, what, re.DOTALL)), "bad-row")


def of_files(index: Index, roots: Sequence[Path]) -> Iterator[Finding]:
    """What is wrong with files, each once, at the first row that names it."""
    for modality, each in index.files.items():
        kind_of = of(modality)
        assert isinstance(kind_of, Files)
        has_one = np.flatnonzero(each.number_S >= 0)
        elsewhere = root_to_name(roots, each.names) if each.all_missing() else ""
        numbers, first, rows_of = np.unique(each.number_S[has_one], return_index=True, return_counts=True)
        for number, row, rows in zip(numbers.tolist(), has_one[first].tolist(), rows_of.tolist(), strict=True):
            name, look = each.names[number], each.looks[number]
            for kind, message, hint in kind_of.findings(name, look):
                told = f"{message}; {rows} rows show it" if rows > 1 else message
                where = f"{index.file}:{index.lines_S[row]}"
                yield Finding(kind, index.split, where, told, elsewhere or hint, look.code, index.ids[row], name, rows, row)


def of_missing(index: Index) -> Iterator[Finding]:
    """What rows have nothing of, where they may: at the first of them."""
    for modality, each in index.values.items():
        lacking = np.flatnonzero(each.lacks())
        if len(lacking):
            yield at(index, int(lacking[0]), "missing-value", lacks(len(lacking), modality), rows=len(lacking))
    for what, count in index.left_out.items():
        yield Finding("missing-value", index.split, index.file, left_out(count, what), rows=count)


def lacks(count: int, modality: str) -> str:
    """That rows have nothing of a modality."""
    return f"{several(count, 'row has', 'rows have')} no {modality}"


def left_out(count: int, what: str) -> str:
    """That rows are skipped as they have nothing of some modalities."""
    return f"{several(count, f'row without {what} is', f'rows without {what} are')} left out"
