"""Hold out a validation split: stratified, and a function of the seed and the ids alone."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

from mopefuse.errors import DataError


def hold_out(rows: Sequence[tuple[str, str]], number: int, seed: int) -> set[str]:
    """The ids of `number` of `rows`, which are (id, label).

    Each class gives in proportion to its size, by the largest remainder (of equal remainders the first label by name), and
    keeps at least one row. Within a class the rows go whose blake2b hash of "<seed> <id>" is smallest, so that neither the
    order of the rows nor the other classes matter.

    Raises:
        DataError: `number` is not positive, or more than a quarter of the rows.
    """
    sizes = Counter(label for _, label in rows)
    shares = _shares(sizes, number) if 0 < 4 * number <= len(rows) else {}
    if sum(shares.values()) != number or number < 1:
        raise DataError(
            67,
            f"{number:,} validation pairs cannot be held out of {len(rows):,} training pairs of {len(sizes)} classes",
            where="--val",
            fix=f"pass --val {max(1, len(rows) // 5)}" if len(rows) > 4 else "provide more training pairs",
        )
    of_class: dict[str, list[str]] = defaultdict(list)
    for identity, label in rows:
        of_class[label].append(identity)
    chosen: set[str] = set()
    for label, share in shares.items():
        chosen.update(sorted(of_class[label], key=lambda identity: (_hash(seed, identity), identity))[:share])
    return chosen


def _shares(sizes: Counter[str], number: int) -> dict[str, int]:
    """How many of `number` each class gives."""
    total = sum(sizes.values())
    shares = {label: number * size // total for label, size in sizes.items()}
    left = number - sum(shares.values())
    for label in sorted(sizes, key=lambda label: (-(number * sizes[label] % total), label)):
        if left and shares[label] < sizes[label] - 1:
            shares[label] += 1
            left -= 1
    return shares


def _hash(seed: int, identity: str) -> bytes:
    return hashlib.blake2b(f"{seed} {identity}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
