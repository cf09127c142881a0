"""Settings as nested dictionaries and by dotted path: ``{"train": {"lr": 1}}`` and ``train.lr``."""

from __future__ import annotations

from typing import Any, cast

MAPPINGS = frozenset({"data.columns"})
"""Settings whose value is itself a mapping."""


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries, `over` winning."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def nested(path: str, value: Any) -> dict[str, Any]:
    """``a.b`` and a value as ``{"a": {"b": value}}``."""
    for part in reversed(path.split(".")):
        value = {part: value}
    return cast(dict[str, Any], value)


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, by dotted path: the inverse of `nested` and `merge`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        found |= flat(value, f"{path}.") if isinstance(value, dict) and path not in MAPPINGS else {path: value}
    return found
