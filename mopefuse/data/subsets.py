"""Seeded, class-balanced parts of a split: what is held out, and few-shot subsets.

Which rows are chosen depends on the seed and on the rows themselves, by a hash of each, so another order of the file or
another machine chooses the same.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

_UNLABELLED = ("",)  # the class of rows without a label; no label is empty


def order_of(names: Sequence[str], seed: int) -> list[int]:
    """The numbers of `names` in an order that only they and `seed` decide."""
    keys = [hashlib.blake2b(f"{seed}:{name}".encode("utf-8", "surrogatepass")).digest() for name in names]
    return sorted(range(len(names)), key=lambda number: (keys[number], number))


def shares(counts: Sequence[int], total: int) -> list[int]:
    """`total` split in proportion to `counts`, by largest remainder; earlier ones win ties.

    Each keeps at least one of its own, so the shares can add up to less than `total`.
    """
    everything = sum(counts)
    whole = [min(count * total // everything, count - 1) for count in counts]
    left = total - sum(whole)
    for i in sorted(range(len(counts)), key=lambda i: (-(counts[i] * total % everything), i)):
        if left > 0 and whole[i] < counts[i] - 1:
            whole[i], left = whole[i] + 1, left - 1
    return whole


def hold_out(
    groups: Sequence[str], labels: Sequence[tuple[str, ...]], count: int, seed: int
) -> tuple[list[int], list[int]]:
    """Rows to keep and about `count` rows to hold out, in proportion to the classes, each in the order of the file.

    Args:
        groups: rows of a group (those of one image) stay together, so that nothing is on both sides.
        labels: of each row; one with several counts for the rarest of them.
    """
    members: defaultdict[str, list[int]] = defaultdict(list)
    for row, group in enumerate(groups):
        members[group].append(row)
    frequency = Counter(label for row in labels for label in row)
    by_class: defaultdict[str, list[str]] = defaultdict(list)
    for group, rows in members.items():
        mine = {label for row in rows for label in labels[row]}
        by_class[min(mine, key=lambda label: (frequency[label], label), default=_UNLABELLED[0])].append(group)
    classes = sorted(by_class)
    sizes = [sum(len(members[group]) for group in by_class[name]) for name in classes]
    held: list[int] = []
    for name, wanted in zip(classes, shares(sizes, count), strict=True):
        taken: list[int] = []
        for number in order_of(by_class[name], seed)[:-1]:  # one group of each class stays, for training to know it
            rows = members[by_class[name][number]]
            if len(taken) + len(rows) <= wanted or (not taken and wanted):
                taken += rows
        held += taken
    out = set(held)
    return [row for row in range(len(groups)) if row not in out], sorted(held)


def few(
    ids: Sequence[str], labels: Sequence[tuple[str, ...]], seed: int, *, shots: int | None, fraction: float | None
) -> list[int]:
    """Rows to train on, in the order of the file.

    Rows without any label are a class of their own, as in `hold_out`.

    Args:
        shots: rows of each class; where rows have several labels, rows are taken until each label has so many (or all
            of its rows are taken), rarest label first.
        fraction: share of each class, at least one row of it; 1 takes every row.
    """
    have = Counter(label for row in labels for label in row or _UNLABELLED)
    wanted = {name: min(count, shots) if shots else max(1, round(count * (fraction or 1))) for name, count in have.items()}
    by_label: defaultdict[str, list[int]] = defaultdict(list)
    for row in order_of(ids, seed):
        for name in labels[row] or _UNLABELLED:
            by_label[name].append(row)
    chosen: set[int] = set()
    taken: Counter[str] = Counter()
    for name in sorted(have, key=lambda label: (have[label], label)):
        for row in by_label[name]:
            if taken[name] >= wanted[name]:
                break
            if row not in chosen:
                chosen.add(row)
                taken.update(labels[row] or _UNLABELLED)
    return sorted(chosen)
