"""Settings by their dotted paths: which there are, which is nearest to a wrong one, and what is wrong with a value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from mopefuse.errors import ConfigError, did_you_mean, nearest

Model = type[BaseModel]
Path = tuple[str, ...]


def keys_in(model: Model, path: Path) -> list[str]:
    """The keys of the section at `path`; empty if it is no section."""
    section: Any = model
    for part in path:
        section = section.model_fields[part].annotation if part in section.model_fields else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return []
    return list(section.model_fields)


def describe(model: Model, path: Path) -> str:
    """One line on a setting: its type and description."""
    field = _field(model, path)
    kind = getattr(field.annotation, "__name__", None)
    return f"{kind if kind and kind != 'Optional' else str(field.annotation).replace('typing.', '')}: {field.description}"


def _field(model: Model, path: Path) -> Any:
    section: Any = model
    for part in path[:-1]:
        section = section.model_fields[part].annotation
    return section.model_fields[path[-1]]


def near_setting(model: Model, path: Path) -> str:
    """``did you mean train.lr?`` for a path whose last part is no key; one without a section may lack its section."""
    *section, key = path
    keys = keys_in(model, tuple(section))
    near = [".".join((*section, name)) for name in nearest(key, keys)]
    if not section:
        inner = list(_in_sections(model))
        near = [path for path in inner if _last(path) == key] or near
        near = near or [path for name in nearest(key, {*map(_last, inner)}) for path in inner if _last(path) == name]
    return f"did you mean {', '.join(near)}?" if near else did_you_mean(key, keys)


def _in_sections(model: Model) -> Iterator[str]:
    for section in keys_in(model, ()):
        yield from (f"{section}.{key}" for key in keys_in(model, (section,)))


def _last(path: str) -> str:
    return path.rpartition(".")[2]


def invalid(error: ValidationError, model: Model, values: dict[str, Any], source: str, names: Mapping[str, str]) -> ConfigError:
    """All that pydantic found, each with its path, or with the flag that set it.

    Args:
        names: path to flag, of settings that flags set, or that are set nowhere and have a flag.
    """
    details = error.errors(include_url=False)
    problems = [_explain(detail, model, values, names) for detail in details]
    chosen = [near for detail in details for near in _near_choice(detail)]
    fix = f"did you mean {', '.join(chosen)}?" if len(chosen) == len(details) else "correct the settings named"
    if all(detail["type"] == "missing" for detail in details):
        fix = f"add {' '.join(_example(detail, model, names) for detail in details)}"
    return ConfigError(1, "; ".join(problems), where=source, fix=fix)


def _explain(detail: Any, model: Model, values: dict[str, Any], names: Mapping[str, str]) -> str:
    path = tuple(str(part) for part in detail["loc"])
    while path and detail["type"] != "extra_forbidden" and path[-1] not in keys_in(model, path[:-1]):
        path = path[:-1]  # the branch of a union, or the place in a list
    name = ".".join(path)
    if detail["type"] == "extra_forbidden":
        return f"unknown setting {name} ({near_setting(model, path)})"
    if detail["type"] == "missing":
        return f"{names.get(name, name)} is missing ({_field(model, path).description})"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "string_pattern_mismatch":
        message = f"should be {describe(model, path).partition(': ')[2]}"
    if not path:
        return str(message)
    got: Any = detail.get("input", values)
    said = f"{names.get(name, name)}: {message[0].lower()}{message[1:]}"
    return said if isinstance(got, dict) else f"{said}, got {_short(got)}"


def _example(detail: Any, model: Model, names: Mapping[str, str]) -> str:
    """How a missing setting could be given: ``--comp hf:bert-base``, or ``comp: hf:bert-base`` where there is no flag."""
    name = ".".join(map(str, detail["loc"]))
    value = next(iter(_field(model, detail["loc"]).examples or ()), "VALUE")
    return f"{names[name]} {value}" if name in names else f"{name}: {value}"


def _near_choice(detail: Any) -> list[str]:
    """The nearest of the values that a setting may have, where it has a few."""
    if detail["type"] != "literal_error":
        return []
    return nearest(str(detail["input"]), re.findall("'([^']*)'", detail["ctx"]["expected"]), most=1)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
