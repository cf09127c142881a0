"""The kinds of findings of a data check, and the findings about single rows and files.

An error is something that training refuses; a warning is something that it accepts but the user should know.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mopefuse.core.formatting import several
from mopefuse.data.columns import flag_for
from mopefuse.data.index import FileValues, Index
from mopefuse.errors import DataError
from mopefuse.modalities.file_source import FileSource
from mopefuse.modalities.files import Files
from mopefuse.modalities.masks import NAME as MASK
from mopefuse.modalities.masks import any_png, file_kind

_TEXT = re.compile(r"(?!.*\.\w{2,5}$)[^/\\]* [^/\\]*", re.DOTALL)  # words, not the name of a file or a path
_LOOKED_AT = 20  # names of files


class Kind(NamedTuple):
    """One kind of finding."""

    severity: str  # error or warning
    fix: str


KINDS = {  # in the order of the report
    "unsafe-path": Kind("error", "use paths inside the data folder, or allow their folder with --image-root"),
    "missing-split": Kind("error", "add val.jsonl, or use --val-fraction 0.1; to check one table, pass its path"),
    "unreadable-table": Kind("error", "repair the file, or convert it to UTF-8 JSON lines or CSV"),
    "empty-split": Kind("error", "add at least one row"),
    "bad-labels-file": Kind("error", "write each label once, one per line, in UTF-8"),
    "bad-json": Kind("error", "correct the line"),
    "bad-encoding": Kind("error", "convert the file with iconv -t utf-8"),
    "bad-csv": Kind("error", "close all quotes, and write as many fields in each row as in the header"),
    "not-an-object": Kind("error", "write one JSON object per line"),
    "missing-column": Kind("error", "add the column, or specify the right one with --text-col, --image-col or --label-col"),
    "missing-text": Kind("error", "add a text, or accept rows without one with --on-missing skip or absent"),
    "nothing": Kind("error", "add a value, or accept rows without one with --on-missing skip or absent"),
    "wrong-type": Kind("error", "write strings, and labels as a string or a list of strings"),
    "empty-label": Kind("error", "add a label, or remove the row"),
    "half-character": Kind("error", "replace the character"),
    "bad-split-name": Kind("error", "write train, val or test"),
    "duplicate-id": Kind("error", "give each row of a split a unique id"),
    "bad-row": Kind("error", "correct or remove the row"),
    "mixed-labels": Kind("error", "write all labels as strings, or all as lists"),
    "one-class": Kind("error", "add rows of a second class"),
    "unknown-label": Kind("error", "correct the label, or list all labels in labels.txt"),
    "list-label": Kind("error", "read lists with --label-sep list"),
    "many-labels": Kind("error", "specify the label column with --label-col, or split labels with --label-sep"),
    "missing-image": Kind("error", "add the file"),
    "missing-file": Kind("error", "add the file"),
    "not-a-file": Kind("error", "use the path of a regular file"),
    "empty-image": Kind("error", "replace or remove the file"),
    "truncated-image": Kind("error", "replace the file with a complete one"),
    "wrong-format-image": Kind("error", "convert the file to JPEG, PNG, WEBP, GIF or BMP"),
    "unreadable-image": Kind("error", "replace or remove the file"),
    "unreadable-file": Kind("error", "replace or remove the file"),
    "missing-mask": Kind("error", "add the file"),
    "unreadable-mask": Kind("error", "save class ids as a PNG with one channel"),
    "unlisted-class": Kind("error", "add its name to the file of names, or set data.ignore_index if such pixels do not count"),
    "unintended-ids": Kind("error", "correct the masks, or name the classes in labels.txt"),
    "unused-class-ids": Kind("warning", "correct the masks, or name the classes in labels.txt"),
    "mask-of-other-shape": Kind("warning", "check that the mask belongs to the image; it is stretched to fit"),
    "huge-image": Kind("error", "shrink the image, or raise --max-pixels"),
    "missing-test": Kind("warning", "add test.jsonl, or hold out rows of train with --test-fraction 0.1"),
    "leaked-image": Kind("warning", "remove the row from one of the splits"),
    "leaked-text": Kind("warning", "remove the row from one of the splits"),
    "leaked-file": Kind("warning", "remove the row from one of the splits"),
    "leaked-value": Kind("warning", "remove the row from one of the splits"),
    "contradicting-labels": Kind("warning", "correct the wrong label, or remove one of the rows"),
    "repeated-row": Kind("warning", "remove the repeated row, or nothing if it should count twice"),
    "id-in-two-splits": Kind("warning", "give each row a unique id"),
    "absent-label": Kind("warning", "add rows with this label; its F1 cannot be measured"),
    "joined-labels": Kind("warning", "if they are several labels, split them with --label-sep"),
    "label-variants": Kind("warning", "merge them with --fold-labels, or spell each label one way"),
    "misspelt-label": Kind("warning", "correct the label if it is misspelt"),
    "placeholder-label": Kind("warning", "if it stands for a missing label, remove the rows"),
    "label-not-a-number": Kind("error", "correct or remove the row, or use --task single-label"),
    "mixed-currencies": Kind("warning", "convert the amounts to one currency"),
    "numeric-labels": Kind("warning", "if they are quantities, specify the label column with --label-col"),
    "rare-labels": Kind("warning", "merge or remove rare classes, or choose a different column with --label-col"),
    "missing-value": Kind("warning", "nothing, if the value is optional"),
    "empty-text": Kind("warning", "add a text, or treat it as missing with --on-missing absent"),
    "replaced-characters": Kind("warning", "remove these characters; encoders replace them with U+FFFD"),
    "tiny-image": Kind("warning", "use the original image; this one is enlarged"),
    "strip-image": Kind("warning", "crop the image; only the middle of a long strip is used"),
    "animated-image": Kind("warning", "nothing, if the first frame is the right one; the others are ignored"),
    "slow-image": Kind("warning", "shrink the image, or train with --cache-images"),
}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a row, a file or a split.

    Args:
        kind: one of `KINDS`.
        where: file:line, or a file; of the first row if several rows name the same file.
        hint: what to do, if it differs from that of the kind.
        code: code of the error that training would raise; empty for a warning.
        image: the image or other file that the row names, if the finding is about it.
        rows: number of rows that it concerns.
        row: number of the (first) row in its index; -1 if the finding is not about a row.
        twin: number of a row in the index of train that has the same value; -1 if there is none.
    """

    kind: str
    split: str
    where: str
    message: str
    hint: str = ""
    code: str = ""
    id: str = ""
    image: str = ""
    rows: int = 1
    row: int = -1
    twin: int = -1

    @property
    def severity(self) -> str:
        """Either error or warning."""
        return KINDS[self.kind].severity

    @property
    def place(self) -> str:
        """File, line and id."""
        return f"{self.where}, id {self.id}" if self.id else self.where

    @property
    def fix(self) -> str:
        """The hint of the finding, or else that of its kind."""
        return self.hint or KINDS[self.kind].fix

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values."""
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
            "hint": self.fix,
        }


def finding_at(
    index: Index,
    row: int,
    kind: str,
    message: str,
    *,
    hint: str = "",
    code: str = "",
    image: str = "",
    rows: int = 1,
    twin: int = -1,
) -> Finding:
    """Make a finding about a row; the arguments are those of `Finding`."""
    return Finding(
        kind=kind,
        split=index.split,
        where=index.place(row),
        message=message,
        hint=hint,
        code=code,
        id=index.ids[row],
        image=image,
        rows=rows,
        row=row,
        twin=twin,
    )


def finding_of(error: DataError, kind: str, split: str = "") -> Finding:
    """Make a finding of an error."""
    return Finding(kind=kind, split=split, where=error.where, message=error.what, hint=error.fix, code=error.code)


_PATTERNS = {  # patterns of messages about bad rows, by kind
    "bad-split-name": r".* is none of train, val, test$",
    "nothing": r"has none of .*; found |(has no .*; found .*|.* is (null|empty), expected a string) \(to accept such rows, ",
    "missing-column": r"has no .*; found ",
    "missing-text": r"\(.*\) has no text: |.* is null, expected a string \(to treat it as empty, ",
    "bad-encoding": r"is not UTF-8 |\(.*\) has a caption that is not UTF-8$",
    "bad-csv": r"is not CSV |has \d+ fields, the header has |has an unclosed quote|is inside a quoted cell ",
    "not-an-object": r"is a \w+, expected an object$",
    "bad-json": r"is not JSON |is nested too deeply|has a number with too many|has a key twice|has -?\w+, which is not JSON",
    "duplicate-id": r"duplicate id .*, first used on line \d+$",
    "empty-label": r".* is empty$|.* has an empty label$|.* is null: the row has no label$",
    "half-character": r".* contains a lone surrogate",
    "wrong-type": r".* is (null|a \w+|an object), expected a string",
}


def row_findings(index: Index) -> Iterator[Finding]:
    """Yield a finding for each row that is not valid."""
    for problem in index.row_problems:
        kind = kind_of_row(problem.what)
        identity = ""
        if kind == "duplicate-id":
            identity = ast.literal_eval(problem.what.removeprefix("duplicate id ").rpartition(", first used on line ")[0])
        elif index.file.endswith("/") and problem.what.startswith("("):  # in an image folder, files are the ids
            identity = problem.what[1:].rpartition(") has ")[0]
        yield Finding(kind=kind, split=index.split, where=problem.where, message=problem.what, code=problem.code, id=identity)


def lack_columns(index: Index) -> bool:
    """Whether all rows lack a column, so that it probably has another name."""
    lacking = [kind_of_row(problem.what) == "missing-column" for problem in index.row_problems]
    return bool(lacking) and all(lacking) and not len(index.lines_S)


def kind_of_row(what: str) -> str:
    """The kind of finding of a bad row, by the message about it."""
    return next((kind for kind, pattern in _PATTERNS.items() if re.match(pattern, what, re.DOTALL)), "bad-row")


def file_findings(index: Index, source: FileSource) -> Iterator[Finding]:
    """Yield the findings about files, once for each file, at the first row that names it."""
    for name, files in index.files.items():
        modality = file_kind(name)
        assert isinstance(modality, Files)
        present = np.flatnonzero(files.number_S >= 0)
        root_hint = fix_of_missing(name, source, files) if files.all_missing() else ""
        numbers, first, counts = np.unique(files.number_S[present], return_index=True, return_counts=True)
        for number, row, rows in zip(numbers.tolist(), present[first].tolist(), counts.tolist(), strict=True):
            file, info = files.names[number], files.infos[number]
            for kind, message, hint in modality.findings(file, info):
                text = f"{message}; used by {rows} rows" if rows > 1 else message
                yield finding_at(index, row, kind, text, hint=root_hint or hint, code=info.code, image=file, rows=rows)


def fix_of_missing(name: str, source: FileSource, files: FileValues) -> str:
    """What to do if no file of a modality, or no mask, exists."""
    if name == MASK and not any_png(files.names):
        return "name the column of the masks with --label-col"
    if all(map(_TEXT.fullmatch, files.names[:_LOOKED_AT])):
        return f"these are texts, not paths; name the column of the paths with {flag_for(name, 'NAME')}"
    return source.hint(files.names)


def missing_findings(index: Index) -> Iterator[Finding]:
    """Yield a finding for each modality that rows lack, at the first of them, if settings allow this."""
    for modality, values in index.values.items():
        lacking = np.flatnonzero(values.is_missing())
        if len(lacking):
            message = lacking_message(len(lacking), modality)
            yield finding_at(index, int(lacking[0]), "missing-value", message, rows=len(lacking))
    for modalities, count in index.left_out.items():
        message = left_out_message(count, modalities)
        yield Finding(kind="missing-value", split=index.split, where=index.file, message=message, rows=count)


def lacking_message(count: int, modality: str) -> str:
    """Format the message that rows lack a modality."""
    return f"{several(count, 'row has', 'rows have')} no {modality}"


def left_out_message(count: int, modalities: str) -> str:
    """Format the message that rows are skipped because they lack modalities."""
    return f"{several(count, f'row without {modalities} is', f'rows without {modalities} are')} left out"
