"""Choose subsets of a split at random, stratified by class: rows to hold out, and few-shot subsets.

The choice depends only on the seed and on a hash of each row, so that it is the same for another order of the file and on
another machine.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

_UNLABELLED = ("",)  # the class of rows without a label; labels are never empty


def random_order(names: Sequence[str], seed: int) -> list[int]:
    """Order the numbers of `names` at random, depending only on the names and `seed`."""
    keys = [hashlib.blake2b(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest() for name in names]
    return sorted(range(len(names)), key=lambda number: (keys[number], number))


def apportion(counts: Sequence[int], total: int) -> list[int]:
    """Divide `total` in proportion to `counts`, by largest remainder; earlier counts win ties.

    Each share is less than its count, so the shares can add up to less than `total`.
    """
    sum_of_counts = sum(counts)
    whole = [min(count * total // sum_of_counts, count - 1) for count in counts]
    left = total - sum(whole)
    for i in sorted(range(len(counts)), key=lambda i: (-(counts[i] * total % sum_of_counts), i)):
        if left > 0 and whole[i] < counts[i] - 1:
            whole[i], left = whole[i] + 1, left - 1
    return whole


def hold_out(
    groups: Sequence[str], labels: Sequence[tuple[str, ...]], count: int, seed: int
) -> tuple[list[int], list[int]]:
    """Choose about `count` rows to hold out, in proportion to the classes.

    Args:
        groups: group of each row; rows of a group (such as those of one image) stay together.
        labels: labels of each row; a row with several labels counts for the rarest of them.

    Returns:
        The rows to keep and the rows to hold out, each in the order of the file.
    """
    members: defaultdict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    frequency = Counter(label for row in labels for label in row)
    by_class: defaultdict[str, list[str]] = defaultdict(list)
    for group, rows in members.items():
        group_labels = {label for row in rows for label in labels[row]}
        by_class[min(group_labels, key=lambda label: (frequency[label], label), default=_UNLABELLED[0])].append(group)
    classes = sorted(by_class)
    sizes = [sum(len(members[group]) for group in by_class[name]) for name in classes]
    held: list[int] = []
    for name, wanted in zip(classes, apportion(sizes, count), strict=True):
        taken: list[int] = []
        for number in random_order(by_class[name], seed)[:-1]:  # one group of each class stays in training
            rows = members[by_class[name][number]]
            if len(taken) + len(rows) <= wanted or (not taken and wanted):
                taken += rows
        held += taken
    out = set(held)
    return [row for row in range(len(groups)) if row not in out], sorted(held)


def choose_few(
    ids: Sequence[str], labels: Sequence[tuple[str, ...]], seed: int, *, shots: int | None, fraction: float | None
) -> list[int]:
    """Choose rows to train on; returns them in the order of the file.

    Rows without a label form a separate class, as in `hold_out`.

    Args:
        shots: rows of each class; if rows have several labels, rows are taken, rarest label first, until each label has
            this many or all of its rows.
        fraction: fraction of the rows of each class, at least one row; 1 takes every row.
    """
    available = Counter(label for row in labels for label in row or _UNLABELLED)
    wanted = {name: min(count, shots) if shots else max(1, round(count * (fraction or 1))) for name, count in available.items()}
    by_label: defaultdict[str, list[int]] = defaultdict(list)
    for row in random_order(ids, seed):
        for name in labels[row] or _UNLABELLED:
            by_label[name].append(row)
    chosen: set[int] = set()
    taken: Counter[str] = Counter()
    for name in sorted(available, key=lambda label: (available[label], label)):
        for row in by_label[name]:
            if taken[name] >= wanted[name]:
                break
            if row not in chosen:
                chosen.add(row)
                taken.update(labels[row] or _UNLABELLED)
    return sorted(chosen)
