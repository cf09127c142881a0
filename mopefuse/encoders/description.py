"""Descriptions of encoders: plain values that, with the weights, determine the features; used in runs and cache keys.

A description has three sections: ``model`` (resolved configuration and pooling), ``preprocess`` (sizes, statistics, digests
of the tokenizer) and ``libraries`` (versions). It contains no paths, so it does not depend on where an encoder is stored.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from importlib import metadata
from typing import Any

SOURCES = frozenset({"pretrained", "weights"})  # options of a spec that select weights and do not affect the architecture
_NAMES = ("tokenizer", "name")  # fields of a preprocess that name it, possibly by a path
_INTERNAL = ("preprocess.tokenizer.state",)  # fields whose format depends on the library version
_PLAIN = (bool, int, float, str, tuple, list, type(None))


def get_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Installed versions of `distributions`; those that are not installed are omitted."""
    found = {name: _installed(name) for name in sorted(set(distributions))}
    return {name: version for name, version in found.items() if version is not None}


@functools.cache  # it parses a long file
def _installed(distribution: str) -> str | None:
    """The installed version of a distribution, None if there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def preprocess_values(preprocess: Any) -> dict[str, Any]:
    """Collect `describe`, every plain field of a preprocess that is a dataclass, and the digests of its tokenizer."""
    values = dict(preprocess.describe())
    if is_dataclass(preprocess):
        attributes = {one.name: getattr(preprocess, one.name) for one in fields(preprocess)}
        values |= {name: value for name, value in attributes.items() if isinstance(value, _PLAIN)}
    values = {name: value for name, value in values.items() if name not in _NAMES}
    digests = getattr(preprocess, "digests", None)
    return values if digests is None else {**values, "tokenizer": digests()}


def to_json_values(value: Any) -> Any:
    """Convert a value to what JSON can hold: lists for tuples, text for anything else."""
    return json.loads(json.dumps(value, default=str, sort_keys=True))


def digest(description: Mapping[str, Any]) -> str:
    """Hash of a description: 16 hex digits."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the fields that differ, as ``model.hidden_act: was "gelu", is "relu"``, except library versions.

    If library versions differ, only fields that both descriptions have are compared, without `_INTERNAL` ones: another
    version may name fields or serialise tokenizers differently.
    """
    both = flatten(before), flatten(now)
    skipped = set(both[0].keys() ^ both[1].keys()) | set(_INTERNAL) if other_versions(before, now) else set()
    found = []
    for name in sorted(both[0].keys() | both[1].keys()):
        was, is_ = (json.dumps(values[name]) if name in values else "absent" for values in both)
        if was != is_ and name not in skipped and not name.startswith("libraries."):
            found.append(f"{name}: was {was}, is {is_}")
    return found


def other_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the libraries whose versions differ, as ``transformers 5.1.0, now 5.2.0``."""
    was, is_ = (values.get("libraries") or {} for values in (before, now))
    names = sorted(name for name in was.keys() | is_.keys() if was.get(name) != is_.get(name))
    return [f"{name} {was.get(name, 'absent')}, now {is_.get(name, 'absent')}" for name in names]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested values to dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
