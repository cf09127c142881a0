"""Find labels that are probably a mistake: lists in cells, several spellings of a label, numbers, missing values, a class for
every row.

Everything is computed from the frequency of labels in training, without comparing labels pairwise: 10,000 labels of a million
rows take seconds. Labels that are listed (``labels.txt``, ``--labels``) are taken as they are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import DataCode
from mopefuse.core.formatting import several
from mopefuse.data.findings import Finding, finding_at
from mopefuse.data.index import Index
from mopefuse.data.known_labels import labels_file
from mopefuse.data.label_cells import normalise, parse_list
from mopefuse.data.labels_task import fix_of_decimal_commas, look_like_quantities
from mopefuse.errors import DataError
from mopefuse.modalities.masks import SUFFIX
from mopefuse.tasks.regression import parse_number

_FEW = 10  # number of classes that is always accepted
_MAX_NOTICES = 8
_ROWS_PER_CLASS = 3  # on average; fewer are a mistake
_SEPARATORS = "|;,/"
_ANCHORS = 20_000  # number of frequent labels that rare ones are compared with
_PLACEHOLDERS = {"nan", "n/a", "#n/a", "na", "<na>", "null", "nil", "undefined", "missing", "?", "-", "--"}
_MIN_LENGTH, _MAX_LENGTH = 4, 100  # length in characters of labels that are compared
_COLUMN = "specify the label column with --label-col"
_INTENDED = "if they are correct, add --allow-odd-labels or list them in labels.txt"


class SuspiciousLabels(NamedTuple):
    """Why labels are probably a mistake, and what to do.

    Args:
        kind: one of `mopefuse.data.findings.KINDS`. label: an example.
        rows: number of rows with such a label.
    """

    kind: str
    message: str
    fix: str
    label: str
    rows: int


REFUSED = {"list-label": DataCode.LIST_LABELS.text, "many-labels": DataCode.TOO_MANY_LABELS.text}
"""The kinds that training refuses unless `data.allow_odd_labels` is set, with their error codes."""


def locate_suspicious_labels(index: Index, root: Path, config: DataConfig) -> list[Finding]:
    """Find doubtful labels of the training split; each finding is at the first row that has its example."""
    if labels_file(root, config) is not None:
        return []
    counts = index.labels.counts()
    found = find_suspicious_labels(counts, len(index.labels))
    if config.allow_odd_labels:
        found = [issue for issue in found if issue.kind not in REFUSED]
    first = index.labels.first_rows() if found else {}
    return [
        finding_at(
            index,
            first[issue.label],
            issue.kind,
            issue.message,
            hint=issue.fix,
            code=REFUSED.get(issue.kind, ""),
            rows=issue.rows,
        )
        for issue in found
    ]


def check_labels(index: Index, root: Path, config: DataConfig) -> list[Finding]:
    """Find doubtful labels of the training split that training accepts.

    Raises:
        DataError: the labels are certainly a mistake, and `data.allow_odd_labels` is not set.
    """
    found = locate_suspicious_labels(index, root, config)
    for finding in found:
        if finding.kind == "list-label":
            raise DataError(DataCode.LIST_LABELS, finding.message, where=finding.place, fix=finding.hint)
        if finding.kind == "many-labels":
            raise DataError(DataCode.TOO_MANY_LABELS, finding.message, where=finding.place, fix=finding.hint)
    return found


def notices(found: list[Finding]) -> tuple[str, ...]:
    """Format findings as notices, for training."""
    shown = [f"labels: {finding.message}, first in {finding.where}: {finding.hint}" for finding in found[:_MAX_NOTICES]]
    more = len(found) - len(shown)
    rest = f"labels: {several(more, 'more warning', 'more warnings')}; mopefuse data check lists all"
    return (*shown, rest) if more else tuple(shown)


def find_suspicious_labels(counts: Mapping[str, int], rows: int) -> list[SuspiciousLabels]:
    """Find doubtful labels.

    Args:
        counts: training rows of each label.
        rows: number of training rows; less than the sum of `counts` if rows have several labels.
    """
    lists = _lists(counts)
    joined = [] if lists else [*_joined(counts)]
    amounts = [*_amounts(counts, rows)]
    causes = [*joined, *amounts]
    many = [] if lists else [*_many(counts, rows, causes)]
    found = [*lists, *many, *causes, *_variants(counts), *_misspelt(counts), *_placeholders(counts)]
    return [*found, *([] if found else _rare(counts))]


def _quote(label: str) -> str:
    return repr(label if len(label) <= 60 else f"{label[:60]}…")


def _most_frequent(labels: Iterable[str], counts: Mapping[str, int]) -> str:
    return min(labels, key=lambda label: (-counts[label], label))


def _lists(counts: Mapping[str, int]) -> list[SuspiciousLabels]:
    """Labels that look like a list and are read as one label."""
    lists = [label for label in counts if label[0] in "[({" and parse_list(label) is not None]
    if not lists:
        return []
    rows, first = sum(counts[label] for label in lists), _most_frequent(lists, counts)
    what = f"{several(rows, 'label is', 'labels are')} written as a list, such as {_quote(first)}, and read as one class"
    fix = f"read lists with --label-sep list; {_INTENDED}"
    return [SuspiciousLabels(kind="list-label", message=what, fix=fix, label=first, rows=rows)]


def _joined(counts: Mapping[str, int]) -> Iterator[SuspiciousLabels]:
    """Labels that consist of several, joined by a separator: their parts recur in other labels, or most labels have it."""
    for separator in _SEPARATORS:
        joined = {label: parts for label in counts if len(parts := _parts(label, separator)) > 1}
        if len(joined) < 2 and not any(part in counts for parts in joined.values() for part in parts):
            continue
        labels_with = Counter(part for parts in joined.values() for part in parts)
        known = {label.strip() for label in counts}
        recurring = sum(all(labels_with[part] > 1 or part in known for part in parts) for parts in joined.values())
        obvious = separator in "|;" and 2 * len(joined) >= len(counts)
        if 2 * recurring >= len(joined) or obvious:
            rows, first = sum(counts[label] for label in joined), _most_frequent(joined, counts)
            what = f"{len(joined):,} of {len(counts):,} labels are joined with {separator!r}, such as {_quote(first)}"
            fix = f'if they are several labels, add --label-sep "{separator}"'
            yield SuspiciousLabels(kind="joined-labels", message=what, fix=fix, label=first, rows=rows)
            return


def _parts(label: str, separator: str) -> set[str]:
    return {part.strip() for part in label.split(separator)} - {""} if separator in label else set()


def _amounts(counts: Mapping[str, int], rows: int) -> Iterator[SuspiciousLabels]:
    """Numbers that are quantities."""
    if not look_like_quantities(counts, rows):
        return
    first = _most_frequent(counts, counts)
    what = (
        f"labels are numbers, such as {_quote(first)}, and each of the {len(counts):,} distinct values becomes a separate class"
    )
    fix = f"to predict numbers, use --task regression, or {_COLUMN}"
    yield SuspiciousLabels(kind="numeric-labels", message=what, fix=fix, label=first, rows=sum(counts.values()))


def _many(counts: Mapping[str, int], rows: int, causes: Iterable[SuspiciousLabels]) -> Iterator[SuspiciousLabels]:
    """More classes than a third of the rows; if rows have several labels, than a third of all their labels."""
    total = sum(counts.values())
    if len(counts) <= _FEW or _ROWS_PER_CLASS * len(counts) <= total:
        return
    first = _most_frequent(counts, counts)
    times = f", used {total:,} times in all" if total > rows else ""
    what = f"{len(counts):,} distinct labels in {rows:,} training rows{times}, such as {_quote(first)}: more than a third"
    numbers = sum(parse_number(label) is not None for label in counts)
    usual = f"to predict numbers, use --task regression, or {_COLUMN}" if 2 * numbers > len(counts) else _COLUMN
    if first.lower().endswith(SUFFIX):
        usual = f"if labels are masks, use --task segmentation, or {_COLUMN}"
    comma = fix_of_decimal_commas(counts)
    fix = f"if labels are numbers, {comma}" if comma else next((cause.fix for cause in causes), usual)
    yield SuspiciousLabels(kind="many-labels", message=what, fix=f"{fix}; {_INTENDED}", label=first, rows=rows)


def _variants(counts: Mapping[str, int]) -> Iterator[SuspiciousLabels]:
    """Labels that differ only in case, spaces or Unicode form."""
    variants: defaultdict[str, list[str]] = defaultdict(list)
    for label in counts:
        variants[normalise(label)].append(label)
    for labels in variants.values():
        if len(labels) > 1:
            labels.sort(key=lambda label: (-counts[label], label))
            shown = ", ".join(f"{_quote(label)} ({counts[label]:,})" for label in labels[:6])
            what = f"{shown} differ only in case, spaces or Unicode form, and are {len(labels)} classes"
            fix = f"merge them with --fold-labels, or write all as {_quote(labels[0].strip())}"
            rows = sum(counts[label] for label in labels[1:])
            yield SuspiciousLabels(kind="label-variants", message=what, fix=fix, label=labels[-1], rows=rows)


def _misspelt(counts: Mapping[str, int]) -> Iterator[SuspiciousLabels]:
    """Rare labels that are one edit away from a frequent one.

    Two texts that are one edit apart share a text that is each of them with at most one character removed.
    """
    spelling: dict[str, str] = {}
    rows: Counter[str] = Counter()
    for label, count in counts.items():
        key = normalise(label)
        rows[key] += count
        if key not in spelling or counts[spelling[key]] < count:
            spelling[key] = label
    anchors: defaultdict[str, list[str]] = defaultdict(list)
    for key, count in islice(rows.most_common(), _ANCHORS):
        if count >= 5 and _MIN_LENGTH <= len(key) <= _MAX_LENGTH:
            for shorter in _deletions(key):
                anchors[shorter].append(key)
    for key, count in rows.items() if anchors else ():
        if not _MIN_LENGTH <= len(key) <= _MAX_LENGTH:
            continue
        near = {other for shorter in _deletions(key) for other in anchors.get(shorter, ())}
        similar = [other for other in near if _is_rare(count, rows[other]) and _one_edit(key, other)]
        if similar:
            other = min(similar, key=lambda name: (-rows[name], name))
            beside = f"{_quote(spelling[other])} ({rows[other]:,} rows)"
            what = f"{_quote(spelling[key])} ({several(count, 'row')}) is similar to {beside}"
            fix = "correct the label if it is misspelt"
            yield SuspiciousLabels(kind="misspelt-label", message=what, fix=fix, label=spelling[key], rows=count)


def _is_rare(count: int, beside: int) -> bool:
    return beside >= (5 if count == 1 else 10 if count <= 5 else 100) * count


def _deletions(text: str) -> set[str]:
    return {text, *(text[:i] + text[i + 1 :] for i in range(len(text)))}


def _one_edit(one: str, other: str) -> bool:
    """Whether one character was removed, inserted or replaced, or two swapped; a digit never counts as a misspelling."""
    shortest = min(len(one), len(other))
    start = next((i for i in range(shortest) if one[i] != other[i]), shortest)
    one, other = one[start:], other[start:]
    shortest = min(len(one), len(other))
    end = next((i for i in range(shortest) if one[-1 - i] != other[-1 - i]), shortest)
    one, other = one[: len(one) - end], other[: len(other) - end]
    if any(character.isdigit() for character in one + other):
        return False
    return max(len(one), len(other)) == 1 or (len(one) == 2 and one == other[::-1])


def _placeholders(counts: Mapping[str, int]) -> Iterator[SuspiciousLabels]:
    """Labels that programs write in place of a missing value."""
    for label, count in counts.items():
        if label.strip().lower() in _PLACEHOLDERS:
            what = f"{_quote(label)} ({several(count, 'row')}) looks like a missing value, and is a class"
            fix = "empty these cells and add --on-bad skip, or remove the rows"
            yield SuspiciousLabels(kind="placeholder-label", message=what, fix=fix, label=label, rows=count)


def _rare(counts: Mapping[str, int]) -> Iterator[SuspiciousLabels]:
    """Classes of which most have a single row."""
    single = [label for label, count in counts.items() if count == 1]
    if len(counts) > _FEW and 2 * len(single) > len(counts):
        what = f"{len(single):,} of {len(counts):,} labels have a single training row, such as {_quote(min(single))}"
        fix = f"merge or remove rare classes, or {_COLUMN}"
        yield SuspiciousLabels(kind="rare-labels", message=what, fix=fix, label=min(single), rows=len(single))
