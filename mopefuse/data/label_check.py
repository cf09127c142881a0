"""Labels that are probably not what was meant: lists in cells, spellings of one label, numbers, a class for every row.

Everything is computed from how often each label occurs in training, without comparing labels pairwise: 10,000 labels of
a million rows take seconds. A list of labels (``labels.txt``, ``--labels``) says which are meant, so then nothing
is doubted.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.formatting import several
from mopefuse.data.findings import Finding, at
from mopefuse.data.index import Index
from mopefuse.data.label_cells import normalised, parse_list
from mopefuse.errors import DataError

_FEW = 10  # classes that any number of rows may have
_MOST_NOTICES = 8
_ROWS_PER_CLASS = 3  # on average; fewer cannot be meant
_SEPARATORS = "|;,/"
_NUMBER = re.compile(r"[$€£¥]?\s*[-+]?(?:\d+|\d{1,3}(?:[, ]\d{3})+)(?:[.,]\d+)?(?:[eE][-+]?\d+)?\s*[%$€£¥]?")
_CODES, _AMOUNTS = 20, 10  # most whole and most other numbers that pass for classes whatever they are
_LEADING_ZERO = re.compile(r"0\d+")  # of codes, never of amounts
_YEARS = 1500, 2100
_ANCHORS = 20_000  # most frequent labels that rare ones are compared with
_SHORTEST, _LONGEST = 4, 100  # characters of labels that are compared
_COLUMN = "name the column with the class with --label-col"
_MEANT = "if they are meant, add --allow-odd-labels or list them in labels.txt"


class Doubt(NamedTuple):
    """Why labels are probably not what was meant, and what to do."""

    kind: str  # of `mopefuse.data.findings.KINDS`
    message: str
    fix: str
    label: str  # whose first row shows it
    rows: int  # that have such a label


REFUSED = {"list-label": "MF-DATA-231", "many-labels": "MF-DATA-232"}
"""The kinds that training refuses unless `data.allow_odd_labels` is set, and the codes of the errors."""


def check_labels(index: Index, root: Path, config: DataConfig) -> list[Finding]:
    """Doubts about the labels of the training split, each at the first row that gives rise to it."""
    if config.labels or (root / "labels.txt").exists():
        return []
    counts = index.labels.counts()
    found = [doubt for doubt in doubts(counts, len(index.labels)) if doubt.kind not in REFUSED or not config.allow_odd_labels]
    first = index.labels.first_rows() if found else {}
    return [
        replace(
            at(index, first[doubt.label], doubt.kind, doubt.message, code=REFUSED.get(doubt.kind, ""), rows=doubt.rows),
            hint=doubt.fix,
        )
        for doubt in found
    ]


def refuse_labels(index: Index, root: Path, config: DataConfig) -> list[Finding]:
    """Doubts about the labels of the training split, none of which training refuses.

    Raises:
        DataError: the labels cannot be meant, and `data.allow_odd_labels` is not set.
    """
    found = check_labels(index, root, config)
    for finding in found:
        if finding.kind == "list-label":
            raise DataError(231, finding.message, where=finding.place, fix=finding.hint)
        if finding.kind == "many-labels":
            raise DataError(232, finding.message, where=finding.place, fix=finding.hint)
    return found


def notices(found: list[Finding]) -> tuple[str, ...]:
    """Doubts as lines for whoever trains on the labels."""
    shown = [f"labels: {finding.message}, first in {finding.where}: {finding.hint}" for finding in found[:_MOST_NOTICES]]
    more = len(found) - len(shown)
    rest = f"labels: {several(more, 'more doubt', 'more doubts')}; mopefuse data check lists all"
    return (*shown, rest) if more else tuple(shown)


def doubts(counts: Mapping[str, int], rows: int) -> list[Doubt]:
    """What is doubtful about labels.

    Args:
        counts: training rows of each label. rows: in training; fewer than all counts where a row has several labels.
    """
    lists = _lists(counts)
    joined = [] if lists else [*_joined(counts)]
    amounts = [*_amounts(counts)]
    causes = [*joined, *amounts]
    many = [] if lists else [*_many(counts, rows, causes)]
    found = [*lists, *many, *causes, *_variants(counts), *_misspelt(counts)]
    return [*found, *([] if found else _rare(counts))]


def _named(label: str) -> str:
    return repr(label if len(label) <= 60 else f"{label[:60]}…")


def _most_frequent(labels: Iterable[str], counts: Mapping[str, int]) -> str:
    return min(labels, key=lambda label: (-counts[label], label))


def _lists(counts: Mapping[str, int]) -> list[Doubt]:
    """Cells that are lists, and were taken for one label each."""
    lists = [label for label in counts if label[0] in "[({" and parse_list(label) is not None]
    if not lists:
        return []
    rows, first = sum(counts[label] for label in lists), _most_frequent(lists, counts)
    what = f"{several(rows, 'label is', 'labels are')} written as a list, such as {_named(first)}, and taken for one class"
    return [Doubt("list-label", what, f"read lists with --label-sep list; {_MEANT}", first, rows)]


def _joined(counts: Mapping[str, int]) -> Iterator[Doubt]:
    """Labels that join others by a separator: their parts recur in other labels, or few labels lack the separator."""
    for separator in _SEPARATORS:
        joined = {label: parts for label in counts if len(parts := _parts(label, separator)) > 1}
        if len(joined) < 2 and not any(part in counts for parts in joined.values() for part in parts):
            continue
        having = Counter(part for parts in joined.values() for part in parts)
        known = {label.strip() for label in counts}
        recurring = sum(all(having[part] > 1 or part in known for part in parts) for parts in joined.values())
        obvious = separator in "|;" and 2 * len(joined) >= len(counts)
        if 2 * recurring >= len(joined) or obvious:
            rows, first = sum(counts[label] for label in joined), _most_frequent(joined, counts)
            what = f"{len(joined):,} of {len(counts):,} labels join others with {separator!r}, such as {_named(first)}"
            yield Doubt("joined-labels", what, f'if they are several labels, add --label-sep "{separator}"', first, rows)
            return


def _parts(label: str, separator: str) -> set[str]:
    return {part.strip() for part in label.split(separator)} - {""} if separator in label else set()


def _amounts(counts: Mapping[str, int]) -> Iterator[Doubt]:
    """Numbers that are no codes, years or ratings: with fractions, or far apart."""
    numbers = [value for label in counts if (value := _number(label)) is not None]
    if len(numbers) < 0.95 * len(counts) or len(numbers) <= _AMOUNTS or any(map(_LEADING_ZERO.fullmatch, counts)):
        return
    lowest, highest = min(numbers), max(numbers)
    whole = all(value.is_integer() for value in numbers)
    if whole and (highest - lowest < 2 * len(numbers) or len(numbers) <= _CODES or _YEARS[0] <= lowest <= highest <= _YEARS[1]):
        return
    halves = all((2 * value).is_integer() for value in numbers)
    if halves and highest - lowest < len(numbers) <= 2 * _CODES:  # ratings
        return
    first = _most_frequent(counts, counts)
    what = f"labels are numbers, such as {_named(first)}: each of {len(counts):,} is a class of its own"
    yield Doubt("numeric-labels", what, f"if they are amounts, {_COLUMN}", first, sum(counts.values()))


def _number(label: str) -> float | None:
    text = label.strip()
    if not _NUMBER.fullmatch(text):
        return None
    digits = re.sub(r"[^\d.,eE+-]|[, ](?=\d{3}(?!\d))", "", text)
    value = float(digits.replace(",", "."))
    return value if abs(value) < 1e300 else None


def _many(counts: Mapping[str, int], rows: int, causes: Iterable[Doubt]) -> Iterator[Doubt]:
    """More classes than a third of the rows, or where rows have several labels, of how often any is given."""
    given = sum(counts.values())
    if len(counts) <= _FEW or _ROWS_PER_CLASS * len(counts) <= given:
        return
    first = _most_frequent(counts, counts)
    times = f" that are given {given:,} times" if given > rows else ""
    what = f"{len(counts):,} different labels in {rows:,} training rows{times}, such as {_named(first)}: more than a third"
    fix = next((cause.fix for cause in causes), _COLUMN)
    yield Doubt("many-labels", what, f"{fix}; {_MEANT}", first, rows)


def _variants(counts: Mapping[str, int]) -> Iterator[Doubt]:
    """Labels that differ only in what nobody means to tell classes apart by."""
    alike: defaultdict[str, list[str]] = defaultdict(list)
    for label in counts:
        alike[normalised(label)].append(label)
    for labels in alike.values():
        if len(labels) > 1:
            labels.sort(key=lambda label: (-counts[label], label))
            shown = ", ".join(f"{_named(label)} ({counts[label]:,})" for label in labels[:6])
            what = f"{shown} differ only in case, spaces or Unicode form, and are {len(labels)} classes"
            fix = f"make them one with --fold-labels, or write them alike, as {_named(labels[0].strip())}"
            yield Doubt("label-variants", what, fix, labels[-1], sum(counts[label] for label in labels[1:]))


def _misspelt(counts: Mapping[str, int]) -> Iterator[Doubt]:
    """Rare labels that are one edit away from a frequent one.

    Two texts that are one edit apart have a text in common that is either of them with at most one character left out.
    """
    spelling: dict[str, str] = {}
    rows: Counter[str] = Counter()
    for label, count in counts.items():
        key = normalised(label)
        rows[key] += count
        if key not in spelling or counts[spelling[key]] < count:
            spelling[key] = label
    anchors: defaultdict[str, list[str]] = defaultdict(list)
    for key, count in islice(rows.most_common(), _ANCHORS):
        if count >= 5 and _SHORTEST <= len(key) <= _LONGEST:
            for shorter in _one_left_out(key):
                anchors[shorter].append(key)
    for key, count in rows.items() if anchors else ():
        if not _SHORTEST <= len(key) <= _LONGEST:
            continue
        near = {other for shorter in _one_left_out(key) for other in anchors.get(shorter, ())}
        meant = [other for other in near if _is_rare(count, rows[other]) and _one_edit(key, other)]
        if meant:
            other = min(meant, key=lambda name: (-rows[name], name))
            beside = f"{_named(spelling[other])} ({rows[other]:,} rows)"
            what = f"{_named(spelling[key])} ({several(count, 'row')}) is nearly {beside}"
            yield Doubt("misspelt-label", what, "correct it, if it is a misspelling", spelling[key], count)


def _is_rare(count: int, beside: int) -> bool:
    return beside >= (5 if count == 1 else 10 if count <= 5 else 100) * count


def _one_left_out(text: str) -> set[str]:
    return {text, *(text[:i] + text[i + 1 :] for i in range(len(text)))}


def _one_edit(one: str, other: str) -> bool:
    """Whether a character was left out, put in or replaced, or two swapped; digits tell classes apart."""
    shortest = min(len(one), len(other))
    start = next((i for i in range(shortest) if one[i] != other[i]), shortest)
    one, other = one[start:], other[start:]
    shortest = min(len(one), len(other))
    end = next((i for i in range(shortest) if one[-1 - i] != other[-1 - i]), shortest)
    one, other = one[: len(one) - end], other[: len(other) - end]
    if any(character.isdigit() for character in one + other):
        return False
    return max(len(one), len(other)) == 1 or (len(one) == 2 and one == other[::-1])


def _rare(counts: Mapping[str, int]) -> Iterator[Doubt]:
    """Classes that nearly all have a single row."""
    single = [label for label, count in counts.items() if count == 1]
    if len(counts) > _FEW and 2 * len(single) > len(counts):
        what = f"{len(single):,} of {len(counts):,} labels have a single training row, such as {_named(min(single))}"
        yield Doubt("rare-labels", what, f"join or remove rare classes, or {_COLUMN}", min(single), len(single))
