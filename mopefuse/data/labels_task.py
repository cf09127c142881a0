"""The task of a data set: given, or inferred from how its labels are written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from unicodedata import category

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.error_codes import DataCode
from mopefuse.core.formatting import several
from mopefuse.data.base import Problem
from mopefuse.data.findings import Finding, finding_at
from mopefuse.data.index import Index
from mopefuse.data.label_cells import LIST
from mopefuse.data.labels import Labels
from mopefuse.data.split_rows import Numbers
from mopefuse.errors import DataError
from mopefuse.modalities.base import digest
from mopefuse.modalities.masks import SUFFIX, any_png
from mopefuse.tasks.base import Task, get_task
from mopefuse.tasks.regression import parse_number

_CODES, _AMOUNTS = 20, 10  # numbers of distinct integers, and of other numbers, that can be classes
_DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")
_LEADING_ZERO = re.compile(r"0\d+")  # found in codes, not in quantities
_YEARS = 1500, 2100
_NEARLY_ALL = 0.95  # share of distinct labels that are numbers if the others are mistakes
_MISTAKES = 0.1  # share of rows without a number that can be mistakes


def infer_task(indexes: Mapping[str, Index], config: DataConfig, *, classes_are_listed: bool = False) -> Task:
    """Return the task that `data.task` names, or else the one that the labels of train look like.

    Labels that are lists are multi-label, unless they are lists of quantities of one length; quantities are regression; all
    others are single-label.

    Args:
        classes_are_listed: whether a file lists the labels, which are then classes.

    Raises:
        ConfigError: there is no such task. DataError: the labels are not of the task, or some are lists and some strings.
    """
    parts = {name: (index, index.good()) for name, index in indexes.items()}
    lists = are_lists(parts)
    if config.task is None and _are_masks(parts):
        return get_task("segmentation")
    if config.task is not None:
        task = get_task(config.task)
        if task == "single-label" and lists:
            place = next(index.place(int(rows[0])) for index, rows in parts.values() if len(rows))
            fix = "use --task multi-label" + (", or remove --label-sep" if config.label_sep else "")
            raise DataError(DataCode.MIXED_LABELS, "labels are lists, and the task is single-label", where=place, fix=fix)
        return task
    if classes_are_listed:
        return get_task("multi-label" if lists else "single-label")
    index, rows = parts["train"] if "train" in parts else next(iter(parts.values()), (None, np.zeros(0, np.int64)))
    if index is not None and config.label_sep in (None, LIST) and _are_quantities(index, rows):
        return get_task("regression")
    return get_task("multi-label" if lists else "single-label")


def are_lists(parts: Mapping[str, tuple[Index, Numbers]]) -> bool:
    """Whether labels are written as lists.

    Raises:
        DataError: some are lists and some are strings.
    """
    place_of: dict[bool, str] = {}  # position of the first row whose labels are a list, or are not
    for index, rows in parts.values():
        lists = index.list_S[rows]
        for is_list in (False, True):
            if (lists == is_list).any():
                place_of[is_list] = index.place(rows[lists == is_list][0])
    if len(place_of) == 2:
        what = "some labels are strings and some are lists"
        raise DataError(DataCode.MIXED_LABELS, what, where=place_of[True], fix="write all labels as strings, or all as lists")
    return True in place_of


def _are_masks(parts: Mapping[str, tuple[Index, Numbers]]) -> bool:
    """Whether the labels of train, or of the first split with rows, are paths of masks.

    Raises:
        DataError: they are, and those of another split are not.
    """
    found = [index for index, rows in parts.values() if len(rows) or len(index.labels)]
    found.sort(key=lambda index: index.split != "train")
    if not found or found[0].masks is None:
        return False
    for index in found:
        if index.masks is None:
            odd = next(iter(name for name in index.labels.names if not name.lower().endswith(SUFFIX)), "")
            example = f", such as {odd!r:.60}" if odd else ""
            what = f"the labels of {index.split} are not paths of masks, as those of {found[0].split} are{example}"
            place = index.place(index.labels.first_rows().get(odd, 0))
            raise DataError(DataCode.MIXED_LABELS, what, where=place, fix="write the path of a mask as each label")
    return True


def _are_quantities(index: Index, rows: Numbers) -> bool:
    """Whether the labels of nearly all of some rows are quantities, the same number in each."""
    lengths = np.diff(index.labels.start_S1)[rows]
    usual = _most_common(lengths)
    rows = rows[lengths == usual]
    same = usual > 0 and len(rows) >= _NEARLY_ALL * len(lengths)
    return same and look_like_quantities(index.labels.take(rows).counts(), len(rows))


def _most_common(lengths: NDArray[np.int64]) -> int:
    """The most common length; of several, that of the first row if it is among them."""
    if not len(lengths):
        return 0
    counts = np.bincount(lengths)
    return int(lengths[0]) if counts[lengths[0]] == counts.max() else int(counts.argmax())


def look_like_quantities(labels: Collection[str], rows: int) -> bool:
    """Whether labels are numbers that are not codes, years or ratings: with fractions, or far apart.

    Args:
        rows: number of rows that have these labels; few rows can have few quantities.
    """
    numbers = [value for label in labels if (value := parse_number(label)) is not None]
    if len(numbers) < _NEARLY_ALL * len(labels) or len(numbers) < 3 or any(map(_LEADING_ZERO.fullmatch, labels)):
        return False
    lowest, highest = min(numbers), max(numbers)
    if all(value.is_integer() for value in numbers):
        is_years = _YEARS[0] <= lowest <= highest <= _YEARS[1]
        return highest - lowest >= 2 * len(numbers) and len(numbers) > _CODES and not is_years
    is_rating = all((2 * value).is_integer() for value in numbers) and highest - lowest < len(numbers) <= 2 * _CODES
    return not is_rating and (len(numbers) > _AMOUNTS or 2 * len(numbers) >= rows)


def require_numbers(parts: Mapping[str, tuple[Index, Numbers]], config: DataConfig) -> int:
    """Check that every row has the same number of labels, all of them numbers; returns how many.

    Raises:
        DataError: a row has not; it names the first.
    """
    in_order = sorted(parts.items(), key=lambda part: part[0] != "train")
    count = next((_most_common(np.diff(index.labels.start_S1)[rows]) for _, (index, rows) in in_order if len(rows)), 0)
    for index, rows in parts.values():
        labels = index.labels.take(rows)
        wrong = {name: rows_of for name, rows_of in labels.counts().items() if parse_number(name) is None}
        if wrong:
            name, total = next(iter(wrong)), sum(wrong.values())
            row = int(rows[labels.first_rows()[name]])
            others = f", nor are those of {total - 1} other rows" if total > 1 else ""
            what = f"the label {name!r:.60} is not a number{others}"
            fix = _fix_of_odd_rows(index, [*wrong], config)
            raise DataError(DataCode.NOT_A_NUMBER, what, where=index.place(row), fix=fix)
        lengths = np.diff(labels.start_S1)
        odd = np.flatnonzero(lengths != max(count, 1))
        if len(odd):
            what = f"the label is a list of length {int(lengths[odd[0]])}, and that of other rows of length {max(count, 1)}"
            place = index.place(int(rows[odd[0]]))
            raise DataError(
                DataCode.NOT_A_NUMBER, what, where=place, fix=f"write {several(max(count, 1), 'number')} in every row"
            )
    return max(count, 1)


def _odd_rows(index: Index) -> NDArray[np.bool_]:
    """Whether a label of a row is not a number (S,)."""
    odd_U = np.isnan(_values(index.labels))
    odd_S = np.zeros(len(index.lines_S), dtype=bool)
    rows = np.repeat(np.arange(len(odd_S)), np.diff(index.labels.start_S1))
    odd_S[rows[odd_U[index.labels.code_Z]]] = True
    return odd_S


def _fix_of_odd_rows(index: Index, wrong: Sequence[str], config: DataConfig) -> str:
    """What to do about rows whose label is not a number.

    Args:
        wrong: these labels.
    """
    share = _odd_rows(index).mean()
    if fix := fix_of_decimal_commas(wrong):
        return fix
    if share > _NEARLY_ALL and config.task is not None:
        of_masks = ", or use --task segmentation" if any_png(wrong[:1]) else ""
        return f"name the column of the numbers with --label-col{of_masks}"
    if share > _MISTAKES:
        return "use --task single-label" if config.task is None else "correct or remove the rows"
    if share <= config.max_bad_fraction:
        return "correct or remove the rows, or add --on-bad skip"
    skip = "" if config.on_bad == "skip" else "add --on-bad skip and "
    return f"correct or remove the rows, or {skip}raise data.max_bad_fraction, which is {config.max_bad_fraction:g}"


def fix_of_decimal_commas(labels: Collection[str]) -> str:
    """What to do if most labels are numbers with a decimal comma; empty if they are not."""
    found = [label for label in labels if _DECIMAL_COMMA.fullmatch(label.strip())]
    return f"write a decimal point: {found[0].strip().replace(',', '.')}" if 2 * len(found) > len(labels) else ""


def without_bad_numbers(indexes: dict[str, Index], config: DataConfig) -> tuple[dict[str, Index], dict[str, list[Problem]]]:
    """Leave out the rows whose label is not a number, if `data.on_bad` is skip and they are few.

    Returns:
        The indexes, and the problems of the rows that are left out.
    """
    if config.on_bad != "skip":
        return indexes, {}
    found, problems = {}, {}
    for name, index in indexes.items():
        odd_S = _odd_rows(index)
        few = 0 < odd_S.sum() <= config.max_bad_fraction * len(odd_S)
        found[name] = replace(index, left_out_S=odd_S) if few else index
        if few:
            code, what = DataCode.NOT_A_NUMBER.text, "the label is not a number"
            places = (f"{index.place(row)}, id {index.ids[row]}" for row in np.flatnonzero(odd_S).tolist())
            problems[name] = [Problem(code=code, where=place, what=what) for place in places]
    return found, problems


def odd_numbers(indexes: Mapping[str, Index]) -> Iterator[Finding]:
    """Yield a finding for each label that is not a number, at its first row."""
    for index in indexes.values():
        first = index.labels.first_rows()
        for name, count in index.labels.counts().items():
            if parse_number(name) is None:
                message = f"the label {name!r:.60} is not a number"
                code = DataCode.NOT_A_NUMBER.text
                yield finding_at(index, first[name], "label-not-a-number", message, code=code, rows=count)


def summarize_numbers(labels: Labels, config: DataConfig) -> dict[str, dict[str, float]]:
    """Lowest and highest number of each target, quartiles and mean, each row counted; targets without a number are left out.

    Rows that have more or fewer numbers than most rows are not counted.
    """
    lengths = np.diff(labels.start_S1)
    count = _most_common(lengths)
    places_ST = labels.start_S1[:-1][lengths == count][:, None] + np.arange(count)
    summaries: dict[str, dict[str, float]] = {}
    for name, value_S in zip(target_names(config, count), _values(labels)[labels.code_Z][places_ST].T, strict=True):
        value_S = value_S[~np.isnan(value_S)]
        if len(value_S):
            quantiles = np.quantile(value_S, (0, 0.25, 0.5, 0.75, 1)).tolist()
            found = dict(zip(("lowest", "quarter", "median", "three_quarters", "highest"), quantiles, strict=True))
            summaries[name] = {**found, "mean": float(value_S.mean())}
    return summaries


def constant_numbers(train: Index, config: DataConfig) -> Iterator[Finding]:
    """Yield a finding for each target whose number is the same in all rows of train."""
    for name, found in summarize_numbers(train.labels, config).items():
        if found["lowest"] == found["highest"]:
            message, code = f"{name} is {found['lowest']:g} in all rows, so there is nothing to learn", DataCode.ONE_CLASS.text
            hint = "specify the label column with --label-col"
            yield Finding(kind="one-class", split="train", where=train.file, message=message, hint=hint, code=code)


def mixed_currencies(train: Index) -> Iterator[Finding]:
    """Yield a finding if numbers have several currencies, at the first row with the rarest; amounts are not converted."""
    first_of: dict[str, str] = {}  # the first label with each sign
    rows_of: Counter[str] = Counter()
    for label, rows in train.labels.counts().items():
        for sign in {character for character in label if category(character) == "Sc"}:
            first_of.setdefault(sign, label)
            rows_of[sign] += rows
    if len(rows_of) > 1:
        listed = " and ".join(f"{sign} ({several(rows, 'row')})" for sign, rows in rows_of.most_common())
        rarest = rows_of.most_common()[-1][0]
        row = train.labels.first_rows()[first_of[rarest]]
        message = f"numbers are in several currencies, and are not converted: {listed}"
        yield finding_at(train, row, "mixed-currencies", message, rows=rows_of[rarest])


def _values(labels: Labels) -> NDArray[np.float64]:
    """The number that each distinct label is (U,), NaN for those that are none."""
    parsed = map(parse_number, labels.names)
    return np.array([np.nan if value is None else value for value in parsed], dtype=np.float64)


def pair_labels(index: Index, rows: Numbers) -> Labels:
    """The labels of rows that are pairs: a name for each value, the same for equal values (in texts, up to case and spacing).

    A missing value equals no other.
    """
    keys = {name: values.loose_keys()[rows].tolist() for name, values in index.values.items()}
    own = [digest(index.ids[row]) for row in rows.tolist()]
    names = ([f"{name} {(key or one).hex()}" for key, one in zip(each, own, strict=True)] for name, each in keys.items())
    return Labels.from_rows(zip(*names, strict=True))


def target_names(config: DataConfig, count: int) -> tuple[str, ...]:
    """Names of the targets of a regression: the column of the label, with a number if there are several."""
    return (config.label_col,) if count == 1 else tuple(f"{config.label_col}_{number}" for number in range(count))


def describe_task(task: Task, labels: tuple[str, ...], config: DataConfig) -> str:
    """Describe the task in a line for the user, and how to change one that was inferred."""
    text = f"{task}, {task.describe(labels)}"
    if config.task is not None:
        return text
    if task == "regression":
        return f"{text} (inferred from the labels; for classes, add --task single-label)"
    if task == "single-label" and len(labels) > 2 and all(parse_number(label) is not None for label in labels):
        return f"{text} (they are numbers; to predict a number, add --task regression)"
    return text
