"""Descriptions of settings and of invalid values, for error messages and command-line help."""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mopefuse.config.section import is_section
from mopefuse.core.error_codes import ConfigCode
from mopefuse.errors import ConfigError, did_you_mean, similar_names

Model = type[BaseModel]
Path = tuple[str, ...]

_LARGEST_SHOWN = 4096  # larger upper bounds exist only to catch typos
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_NEEDS = {  # type of a pydantic error to what the setting needs
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "literal_error": "{expected}",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_short": "at least {min_length} value",
    "dict_type": "a mapping",
    "model_type": "a mapping of its settings",
}


# -- one setting


def field_at(model: Model, path: Path) -> FieldInfo:
    """The field of the setting at `path`."""
    section: Any = model
    for part in path[:-1]:
        section = section.model_fields[part].annotation
    field: FieldInfo = section.model_fields[path[-1]]
    return field


def help_text(field: FieldInfo, *, default: bool = True, of_method: Any = None) -> str:
    """The description of a setting as a sentence, with its example, its default (if wanted) and its bounds.

    Args:
        of_method: the default of the method conditional, if it has its own.
    """
    text = field.description or ""
    value = field.get_default() if of_method is None else "on" if of_method is True else of_method
    shown = default and isinstance(value, int | float | str) and not isinstance(value, bool) and value != ""
    facts = [f"example: {example}" for example in (field.examples or [])[:1]]
    facts += [*([f"default: {value}"] if shown else []), *bounds(field)]
    if command_line_type(field) == list[str]:
        facts.append("repeatable")
    stop = "" if text.endswith(".") else "."
    return f"{text[:1].upper()}{text[1:]}{stop}{_bracketed(facts)}"


def _bracketed(facts: list[str]) -> str:
    return f" [{'; '.join(facts)}]" if facts else ""


def bounds(field: FieldInfo) -> list[str]:
    """The bounds of a number that are worth showing: ``["at least 0", "below 1"]``."""
    found = []
    for constraint in field.metadata:
        for name, words in _BOUNDS.items():
            bound = getattr(constraint, name, None)
            if bound is not None and bound < _LARGEST_SHOWN:
                found.append(f"{words} {bound}")
    return found


def choices(field: FieldInfo) -> list[str]:
    """The values that a setting may have, if these are a small set of texts."""
    members = _members(field.annotation)
    if not all(get_origin(member) is Literal for member in members):
        return []
    return [str(value) for member in members for value in get_args(member)]


def command_line_type(field: FieldInfo) -> Any:
    """The type of the option that sets a setting; other types are parsed from text by the schema."""
    members = _members(field.annotation)
    if len(members) == 1 and members[0] in (bool, int, float):
        return members[0]
    repeatable = any(get_origin(member) is dict or get_args(member) == (str, ...) for member in members)
    return list[str] if repeatable else str


def _members(annotation: Any) -> list[Any]:
    """The types that a union has, without None."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [member for part in get_args(annotation) for member in _members(part)]
    return [] if annotation is type(None) else [annotation]


# -- names of settings


def keys_in(model: Model, path: Path) -> list[str]:
    """The keys of the section at `path`; empty if it is not a section."""
    section: Any = model
    for part in path:
        section = section.model_fields[part].annotation if part in section.model_fields else None
        if not is_section(section):
            return []
    return list(section.model_fields)


def near_setting(model: Model, path: Path) -> str:
    """``did you mean train.lr?`` for a path whose last part is not a key, or that lacks its section."""
    *section, key = path
    keys = keys_in(model, tuple(section))
    near = [".".join((*section, name)) for name in similar_names(key, keys)]
    if not section:
        inner = list(_in_sections(model))
        near = [path for path in inner if _last(path) == key] or near
        near = near or [path for name in similar_names(key, {*map(_last, inner)}) for path in inner if _last(path) == name]
    return f"did you mean {', '.join(near)}?" if near else did_you_mean(key, keys)


def _in_sections(model: Model) -> Iterator[str]:
    for section in keys_in(model, ()):
        yield from (f"{section}.{key}" for key in keys_in(model, (section,)))


def _last(path: str) -> str:
    return path.rpartition(".")[2]


# -- what is wrong


def invalid_settings_error(
    error: ValidationError, model: Model, values: dict[str, Any], source: str, names: Mapping[str, str]
) -> ConfigError:
    """The error for everything that pydantic found, each problem with its path, or with the flag that set it.

    Args:
        names: path to flag, of settings that flags set, or that are set nowhere and have a flag.
    """
    details = error.errors(include_url=False)
    chosen = [near for detail in details for near in _near_choice(detail)]
    fix = f"did you mean {', '.join(chosen)}?" if len(chosen) == len(details) else "correct these settings"
    if all(detail["type"] == "missing" for detail in details):
        fix = f"add {' '.join(_example(detail, model, names) for detail in details)}"
    return ConfigError(ConfigCode.INVALID_SETTINGS, "; ".join(_problems(details, model, values, names)), where=source, fix=fix)


def _problems(details: list[Any], model: Model, values: dict[str, Any], names: Mapping[str, str]) -> list[str]:
    """One text for each setting that is wrong: ``--experts: got 0; needs at least 1``."""
    problems: list[str] = []
    needs: dict[str, list[str]] = {}  # start of a problem to what the branches of a union need
    for detail in details:
        path = _path(detail, model)
        name = names.get(".".join(path), ".".join(path))
        got: Any = detail.get("input", values)
        if detail["type"] == "extra_forbidden":
            problems.append(f"unknown setting {'.'.join(path)} ({near_setting(model, path)})")
        elif detail["type"] == "missing":
            problems.append(f"{name} is missing ({field_at(model, path).description})")
        elif not path:
            problems.append(detail["msg"].removeprefix("Value error, "))
        elif isinstance(got, dict):
            problems.append(f"{name}: {_lower(detail['msg'].removeprefix('Value error, '))}")
        else:
            start = f"{name}: got {shortened(got)}; needs"
            problems += [] if start in needs else [start]
            needs.setdefault(start, []).append(_describe_need(detail, model, path))
    return [f"{text} {' or '.join(dict.fromkeys(needs[text]))}" if text in needs else text for text in problems]


def _path(detail: Any, model: Model) -> Path:
    """The path of the setting that a problem is about, without the branch of a union or the place in a list."""
    path = tuple(str(part) for part in detail["loc"])
    while path and detail["type"] != "extra_forbidden" and path[-1] not in keys_in(model, path[:-1]):
        path = path[:-1]
    return path


def _describe_need(detail: Any, model: Model, path: Path) -> str:
    """Describe the valid values of a setting, as a phrase to follow the word "needs"."""
    if detail["type"] == "string_pattern_mismatch":
        return str(field_at(model, path).description).rpartition(": ")[2]
    return need(detail)


def need(detail: Any) -> str:
    """Describe a valid value in place of the one that a pydantic error is about, as a phrase to follow "needs"."""
    context = {key: f"{value:g}" if isinstance(value, float) else value for key, value in detail.get("ctx", {}).items()}
    if detail["type"] in _NEEDS:
        return _NEEDS[detail["type"]].format(**context)
    return _lower(detail["msg"].removeprefix("Value error, "))


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _example(detail: Any, model: Model, names: Mapping[str, str]) -> str:
    """How a missing setting could be given: ``--comp hf:bert-base``, or ``comp: hf:bert-base`` if there is no flag."""
    name = ".".join(map(str, detail["loc"]))
    value = next(iter(field_at(model, detail["loc"]).examples or ()), "VALUE")
    return f"{names[name]} {value}" if name in names else f"{name}: {value}"


def _near_choice(detail: Any) -> list[str]:
    """The most similar of the values that a setting may have, if these are a small set."""
    if detail["type"] != "literal_error":
        return []
    return similar_names(str(detail["input"]), re.findall("'([^']*)'", detail["ctx"]["expected"]), most=1)


def shortened(value: Any) -> str:
    """A value as Python writes it, cut after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
