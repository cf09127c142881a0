"""Convert settings between nested dictionaries and dotted paths: ``{"train": {"lr": 1}}`` and ``train.lr``."""

from __future__ import annotations

from typing import Any, cast

MAPPINGS = frozenset({"data.columns"})
"""Settings whose value is itself a mapping."""


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries; values of `over` replace those of `under`."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def nest(path: str, value: Any) -> dict[str, Any]:
    """``a.b`` and a value as ``{"a": {"b": value}}``."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return cast(dict[str, Any], value)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted paths: the inverse of `nest` and `merge`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        found |= flatten(value, f"{path}.") if isinstance(value, dict) and path not in MAPPINGS else {path: value}
    return found
