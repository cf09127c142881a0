"""Check the JSON files of a bundle before anything relies on them.

The checks are written by hand, as pydantic need not be installed where bundles are run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from mopefuse.core.artifact import read_json
from mopefuse.core.error_codes import CheckpointCode
from mopefuse.errors import CheckpointError
from mopefuse.modalities.pixels import INTERPOLATIONS
from mopefuse.tasks.base import Task, task_from_facts, with_task

Check = Callable[[Any], bool]

_LARGEST_SIDE = 8192  # pixels
_MAX_TOKENS = 1_000_000
_MAX_IDS = 2**31
_FIX = "export the run again"


class Labels(NamedTuple):
    """The content of ``labels.json``; `thresholds` has one for each label."""

    labels: tuple[str, ...]
    task: Task
    thresholds: tuple[float, ...]


def read_labels(folder: Path) -> Labels:
    """Read ``labels.json`` of a bundle.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    found = with_task(read_json(folder / "labels.json"))
    _require(found, {"labels": _is_names, "task": _is_object, "thresholds": _is_numbers}, folder, "labels.json")
    if len(found["thresholds"]) != len(found["labels"]):
        raise _damaged(folder, "labels.json", f"{len(found['thresholds'])} thresholds of {len(found['labels'])} labels")
    return Labels(tuple(found["labels"]), task_from_facts(found["task"]), tuple(map(float, found["thresholds"])))


def read_preprocess(folder: Path) -> tuple[dict[str, dict[str, Any]], bool]:
    """Read ``preprocess.json`` of a bundle: the preprocessing of each side, and whether an empty value counts as missing.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    file = "preprocess.json"
    found = {"empty_is_missing": False, **read_json(folder / file)}
    _require(found, {"sides": _is_object, "empty_is_missing": _is_bool}, folder, file)
    for side, how in found["sides"].items():
        _require_side(how, folder, f"{file}: {side}")
    return found["sides"], found["empty_is_missing"]


def _require_side(how: Any, folder: Path, where: str) -> None:
    _require(how, {"modality": lambda value: value in ("image", "text")}, folder, where)
    _require({"optional": False, **how}, {"optional": _is_bool}, folder, where)
    if how["modality"] == "image":
        _require(how, _IMAGE, folder, where)
        return
    _require({"length": None, **how}, _TEXT, folder, where)
    tokenizer = how["tokenizer"]
    _require(tokenizer, {"kind": lambda value: isinstance(value, str), "pad_id": _is_id}, folder, f"{where}: tokenizer")
    defaults: dict[str, Any] = {"end_id": None, "clean": None}
    own = _TOKENIZERS.get(tokenizer["kind"])
    if own is None:
        _require({**defaults, **tokenizer}, _SAVED, folder, f"{where}: tokenizer")
    else:
        _require(tokenizer, own, folder, f"{where}: tokenizer")
        extra = tokenizer.keys() - own.keys() - {"kind", "pad_id"}
        if extra:
            raise _damaged(folder, f"{where}: tokenizer", f"{min(extra)} is unknown")


def _require(values: Any, fields: Mapping[str, Check], folder: Path, where: str) -> None:
    if not isinstance(values, dict):
        raise _damaged(folder, where, "it is not a JSON object")
    for name, holds in fields.items():
        if name not in values:
            raise _damaged(folder, where, f"it has no {name}")
        if not holds(values[name]):
            raise _damaged(folder, where, f"{name} has a wrong value")


def _damaged(folder: Path, where: str, why: str) -> CheckpointError:
    return CheckpointError(CheckpointCode.CONTENT_DAMAGED, f"{where} is damaged: {why}", where=str(folder), fix=_FIX)


# -- kinds of values


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) in (int, float) and abs(one) < 1e300 and isfinite(one) for one in value)


def _from_to(minimum: int, maximum: int) -> Check:
    return lambda value: type(value) is int and minimum <= value <= maximum


_is_side, _is_id, _is_count = _from_to(1, _LARGEST_SIDE), _from_to(0, _MAX_IDS), _from_to(1, _MAX_TOKENS)


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_side, value))


_IMAGE: Mapping[str, Check] = {
    "size": _is_size,
    "resize": lambda value: _is_side(value) or _is_size(value),
    "interpolation": lambda value: isinstance(value, str) and value in INTERPOLATIONS,
}
_TEXT: Mapping[str, Check] = {
    "max_tokens": _is_count,
    "vocabulary": _is_id,
    "length": lambda value: value is None or _is_count(value),
    "tokenizer": _is_object,
}
_TOKENIZERS: Mapping[str, Mapping[str, Check]] = {
    "words": {"words": _is_names, "begin_id": _is_id, "unknown_id": _is_id},
    "hashing": {"vocabulary": _from_to(4, _MAX_IDS), "begin_id": _is_id, "end_id": _is_id},
}
_SAVED: Mapping[str, Check] = {
    "file": lambda value: isinstance(value, str) and value not in ("", ".", "..") and not {"/", "\\", "\0"} & set(value),
    "cut": lambda value: value in ("left", "right"),
    "end_id": lambda value: value is None or _is_id(value),
    "clean": lambda value: value is None or isinstance(value, str),
}
