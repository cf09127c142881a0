"""Where settings come from: a YAML recipe, overridden by flags, overridden by ``--set``. YAML is read strictly.

No tags (so no Python objects), no duplicate keys, no aliases (a few bytes of them can expand to gigabytes), and a value is a
number only if it is unambiguous: ``1e-4`` is, ``1:30``, ``0x10``, dates, ``no`` and ``off`` are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mopefuse.config.flags import FLAGS
from mopefuse.config.messages import near_setting
from mopefuse.config.schema import Data, RunConfig, build_config, known_keys
from mopefuse.config.setting_paths import flatten, merge, nest
from mopefuse.core.error_codes import CheckpointCode, ConfigCode
from mopefuse.core.regular_files import read_regular
from mopefuse.errors import CheckpointError, ConfigError, did_you_mean, similar_names

_HERE = Path(__file__).parents[1]
RECIPES = (_HERE / "recipes", _HERE.parent / "recipes")
"""Folders of the recipes: in an installed package, and in a clone of the repository."""


class _StrictLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (as the base class has it)

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        refused = "aliases" if isinstance(event, yaml.AliasEvent) else "tags" if getattr(event, "tag", None) else ""
        if refused:
            raise yaml.MarkedYAMLError(None, None, f"{refused} are not allowed, only plain values", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(None, None, "a key must be a word", key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} appears twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # PyYAML may lack its C part
    """Also quotes strings that `_StrictLoader`, unlike other loaders, would read as a number."""


_PLAIN = {
    "null": (r"~|null|", [*"~n", ""]),
    "bool": (r"true|false", [*"tf"]),
    "int": (r"[-+]?(?:0|[1-9]\d*)", [*"-+0123456789"]),
    "float": (
        r"[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|nan))",
        [*"-+0123456789."],
    ),
}
for _name, (_regex, _first) in _PLAIN.items():
    _tag, _pattern = f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_regex})$", re.ASCII)
    _StrictLoader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


def read_yaml(text: str, source: str) -> Any:
    """Parse YAML into plain values.

    Raises:
        ConfigError: not YAML, or YAML that is not plain data; its place is file:line:column.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        problem = error.problem or "cannot be parsed"
        if "'\\t'" in problem:
            problem = "a tab; indent with spaces only"
        raise ConfigError(
            ConfigCode.RECIPE_NOT_YAML, f"not a valid recipe: {problem}", where=where, fix="correct that line"
        ) from None
    except yaml.reader.ReaderError as error:
        lines = text[: error.position].split("\n")
        raise ConfigError(
            ConfigCode.RECIPE_NOT_YAML,
            f"not a valid recipe: the character {chr(error.character)!r} is not allowed",
            where=f"{source}:{len(lines)}:{len(lines[-1]) + 1}",
            fix="remove the character",
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            ConfigCode.RECIPE_NOT_YAML, f"not a valid recipe: {error}", where=source, fix="write plain YAML"
        ) from None


def read_recipe(path: Path, *, saved: bool = False) -> dict[str, Any]:
    """Read the settings of a recipe file, or those that were saved with a run, an adapter or a bundle.

    Raises:
        ConfigError: no such file, not a regular one, not UTF-8, not YAML, or not a mapping.
        CheckpointError: a `saved` file cannot be read.
    """
    try:
        text = read_regular(path).decode("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        if saved:
            what = f"{path.name} is damaged: {error}"
            raise CheckpointError(
                CheckpointCode.CONTENT_DAMAGED, what, where=str(path), fix="restore the original file"
            ) from None
        raise ConfigError(
            ConfigCode.RECIPE_UNREADABLE, f"cannot read the recipe: {error}", where=str(path), fix="pass a readable UTF-8 file"
        ) from None
    values = read_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            ConfigCode.RECIPE_NOT_A_MAPPING,
            f"a recipe must be a mapping of settings, got a {type(values).__name__}",
            where=str(path),
            fix="write NAME: VALUE lines",
        )
    return values


def saved_config(path: Path) -> RunConfig:
    """The configuration that was saved with a run, an adapter or a bundle.

    Raises:
        CheckpointError: the file cannot be read. ConfigError: not YAML, or settings that are invalid.
    """
    return build_config(read_recipe(path, saved=True), source=str(path), saved=True)


def parse_set(assignments: Iterable[str]) -> dict[str, Any]:
    """Parse ``--set a.b=c`` arguments into nested settings; values are parsed as YAML.

    Raises:
        ConfigError: no ``=``, or a path that is not a setting, with the nearest names.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        path = tuple(name.strip().split("."))
        _check_path(path)
        if not equals or not value.strip():
            raise ConfigError(
                ConfigCode.SET_WITHOUT_VALUE, f"--set {name} has no value", where=name, fix=f"write --set {name}=VALUE"
            )
        values = merge(values, nest(".".join(path), read_yaml(value, f"--set {name}")))
    return values


def _check_path(path: tuple[str, ...]) -> None:
    for depth, part in enumerate(path):
        if part not in known_keys(path[:depth]):
            where = ".".join(path[: depth + 1])
            fix = near_setting(RunConfig, path[: depth + 1])
            raise ConfigError(
                ConfigCode.UNKNOWN_SETTING, f"unknown setting {where}", where=f"--set {'.'.join(path)}", fix=fix
            )
    if known_keys(path):
        raise ConfigError(
            ConfigCode.UNKNOWN_SETTING,
            f"{'.'.join(path)} is a section",
            where="--set",
            fix=f"set one of its keys: {', '.join(known_keys(path))}",
        )


def resolve(
    *,
    recipe: str | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
    saved: RunConfig | None = None,
) -> RunConfig:
    """Build the configuration of a run. Later sources win: defaults, `saved`, the recipe, flags, ``--set``.

    Args:
        recipe: a file, or the name of a recipe that comes with mopefuse, such as ``digit-questions/conditional``.
        flags: settings by dotted path; None if a flag was not given.
        saved: configuration of the run to resume.

    Raises:
        ConfigError: there is no such recipe, or settings are unknown, missing or invalid.
    """
    path = find_recipe(recipe) if recipe is not None else None
    values = saved.model_dump(mode="json") if saved is not None else {}
    values = merge(values, read_recipe(path) if path is not None else {})
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    for name, value in given.items():
        values = merge(values, nest(name, value))
    last = parse_set(sets)
    names = {} if flags is None else _names(given, flatten(values), flatten(last))
    return build_config(merge(values, last), source=str(path or ""), names=names)


def _names(given: Mapping[str, Any], known: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, str]:
    """Path to flag, of the settings that a flag set, and of those that are set nowhere.

    Args:
        given: settings of flags. known: settings of all sources but ``--set``. last: those of ``--set``.
    """
    return {
        flag.path: flag.name for flag in FLAGS if flag.path not in last and (flag.path in given or flag.path not in known)
    }


def find_recipe(name: str) -> Path:
    """The file of a recipe: `name` itself, or a recipe that comes with mopefuse."""
    path = Path(name)
    if path.exists():
        return path
    found, known = _named(name, "**/*.yaml")
    if found is None:
        files = [str(file) for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = similar_names(name, files, most=1) or [other for other in known if not other.startswith("studies/")]
        fix = did_you_mean(name, near) or "pass a YAML file"
        raise ConfigError(ConfigCode.RECIPE_UNREADABLE, f"recipe not found: {name}", where="--recipe", fix=fix)
    return found


def find_study(name: str) -> Path:
    """The file of a study: `name` itself, or a study that comes with mopefuse.

    Raises:
        ConfigError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    found, known = _named(f"studies/{name}", "studies/*.yaml")
    if found is None:
        fix = did_you_mean(name, [other.removeprefix("studies/") for other in known]) or "pass a YAML file"
        raise ConfigError(ConfigCode.RECIPE_UNREADABLE, f"study not found: {name}", where="FILE", fix=fix)
    return found


def _named(name: str, pattern: str) -> tuple[Path | None, list[str]]:
    """The file of the recipe called `name`, and the names of all recipes."""
    folders = [folder for folder in RECIPES if folder.is_dir()]
    found = next((file for folder in folders if (file := folder / f"{name}.yaml").is_file()), None)
    return found, sorted({str(p.relative_to(f).with_suffix("")) for f in folders for p in f.glob(pattern)})


def to_yaml(config: RunConfig) -> str:
    """The configuration as YAML, with every setting; `read_recipe` reads it back unchanged."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)


def data_settings(flags: Mapping[str, Any], sets: Iterable[str] = ()) -> Data:
    """Build the section `data` alone, from settings by path and ``--set`` assignments; see `resolve`.

    Raises:
        ConfigError: settings are unknown or invalid.
    """
    encoders = {"main": "tiny:vision", "comp": "tiny:text"}  # required in a run, irrelevant for its data
    return resolve(flags={**encoders, **flags}, sets=sets).data


def changed_data(saved: Data, changes: Mapping[str, Any]) -> Data:
    """The data settings of a trained model, changed for other data of the same kind.

    Args:
        changes: new values by name; None if not given. Modalities that `columns` does not name keep their column.

    Raises:
        ConfigError: settings are unknown or invalid.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if "columns" in given:
        given["columns"] = {**saved.columns, **given["columns"]}
    return data_settings({f"data.{name}": value for name, value in {**saved.model_dump(mode="json"), **given}.items()})
