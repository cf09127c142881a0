"""What determines an encoder's features besides its weights, as plain values: recorded in runs, and part of cache keys.

A description has three sections: ``model`` (resolved configuration and pooling), ``preprocess`` (sizes, statistics, digests of
the tokenizer) and ``libraries`` (versions). It holds no path, so that the same encoder is the same wherever it is stored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib import metadata
from typing import Any

SOURCES = frozenset({"pretrained", "weights"})  # options of a spec that say where weights are, not what is computed
_NAMES = ("tokenizer", "name")  # in a preprocess: what it is called, which may be a path
_INTERNAL = ("preprocess.tokenizer.state",)  # fields whose form belongs to a library version
_PLAIN = (bool, int, float, str, tuple, list, type(None))


def versions(distributions: Iterable[str]) -> dict[str, str]:
    """The installed versions of `distributions`; those not installed are left out."""
    found = {}
    for name in sorted(set(distributions)):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def preprocess_values(preprocess: Any) -> dict[str, Any]:
    """What `describe` says, and every plain field of a preprocess that is a dataclass; a tokenizer by its digests."""
    values = dict(preprocess.describe())
    if is_dataclass(preprocess):
        own = {one.name: getattr(preprocess, one.name) for one in fields(preprocess)}
        values |= {name: value for name, value in own.items() if isinstance(value, _PLAIN)}
    values = {name: value for name, value in values.items() if name not in _NAMES}
    digests = getattr(preprocess, "digests", None)
    return values if digests is None else {**values, "tokenizer": digests()}


def plain(value: Any) -> Any:
    """`value` as it is after a trip through JSON: with lists for tuples, and text for what JSON has no form for."""
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def digest(description: Mapping[str, Any]) -> str:
    """16 hex digits that change with any value of a description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The fields of two descriptions that differ, as ``model.hidden_act: was "gelu", is "relu"``; library versions aside.

    Other versions of a library name other fields and serialise tokenizers differently: then only fields that both
    descriptions have are compared.
    """
    both = flat(before), flat(now)
    skipped = set(both[0].keys() ^ both[1].keys()) | set(_INTERNAL) if other_versions(before, now) else set()
    found = []
    for name in sorted(both[0].keys() | both[1].keys()):
        was, is_ = (json.dumps(values[name]) if name in values else "absent" for values in both)
        if was != is_ and name not in skipped and not name.startswith("libraries."):
            found.append(f"{name}: was {was}, is {is_}")
    return found


def other_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The libraries whose versions differ, as ``transformers 5.1.0, now 5.2.0``."""
    was, is_ = (values.get("libraries") or {} for values in (before, now))
    names = sorted(name for name in was.keys() | is_.keys() if was.get(name) != is_.get(name))
    return [f"{name} {was.get(name, 'absent')}, now {is_.get(name, 'absent')}" for name in names]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by dotted name."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
