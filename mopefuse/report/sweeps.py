"""Sweeps: rows that differ in a single number, and a metric against that setting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from mopefuse.studies.compare import Row

_LEAST = 3  # distinct values that make a line


@dataclass(frozen=True)
class Series:
    """Rows by the value of a setting, ascending; nothing else differs between them."""

    name: str
    rows: tuple[tuple[float, Row], ...]


@dataclass(frozen=True)
class Sweep:
    """All series of a setting."""

    path: str
    series: tuple[Series, ...]


def sweeps(rows: Sequence[Row]) -> list[Sweep]:
    """The settings that rows sweep over with at least three values, in the order of the settings."""
    found = []
    for path in dict.fromkeys(path for row in rows for path in row.settings):
        groups: dict[str, list[tuple[float, Row]]] = {}
        for row in rows:
            value = row.settings.get(path)
            if isinstance(value, int | float) and not isinstance(value, bool):
                others = {key: _own(path, key, row) for key in row.settings if key != path}
                groups.setdefault(json.dumps(others, sort_keys=True), []).append((float(value), row))
        series = [_series(path, group) for group in groups.values() if len(group) >= _LEAST]
        if series:
            found.append(Sweep(path, tuple(series)))
    return found


def _own(path: str, key: str, row: Row) -> object:
    """A setting other than the swept one; a learning rate that depends on the swept one is given by its ratio."""
    value, swept = row.settings[key], row.settings[path]
    if path == "train.lr" and key in ("train.lr_comp", "train.lr_head") and isinstance(value, int | float):
        return f"{value / swept:.6g} of it"
    return value


def _series(path: str, group: Sequence[tuple[float, Row]]) -> Series:
    ordered = tuple(sorted(group, key=lambda pair: pair[0]))
    names = list(dict.fromkeys(_without(path, row.label) for _, row in ordered))
    name = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
    return Series(name or path, ordered)


def _without(path: str, label: str) -> str:
    """``conditional`` for the label ``conditional, fraction=0.1`` of a sweep over data.fraction."""
    parts = [part for part in label.split(", ") if part.partition("=")[0] not in (path, path.rpartition(".")[2])]
    return ", ".join(parts)
