"""Where settings come from: a YAML recipe under flags under ``--set``, read strictly.

No tags (so no Python objects), no duplicate keys, no aliases (a few bytes of them can stand for gigabytes), and only what
looks like a number to everyone is one: ``1e-4`` is, ``1:30`` and ``0x10`` are text, and so are dates, ``no`` and ``off``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mopefuse.config.messages import near_setting
from mopefuse.config.schema import Data, RunConfig, build_config, known_keys, new_name
from mopefuse.config.setting_paths import flat, merge, nested
from mopefuse.core.regular_files import read_regular
from mopefuse.errors import CheckpointError, ConfigError, did_you_mean

_HERE = Path(__file__).parents[1]
RECIPES = (_HERE / "recipes", _HERE.parent / "recipes")
"""Where recipes are: in an installed package, and in a clone of the repository."""


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
                raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_StrictLoader` would read as a number, beside what others would."""


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
    """`text` as plain values.

    Raises:
        ConfigError: not YAML, or YAML that is not plain data; where is file:line:column.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        problem = error.problem or "it cannot be read"
        if "'\\t'" in problem:
            problem = "a tab where only spaces may indent"
        raise ConfigError(2, f"not a valid recipe: {problem}", where=where, fix="correct that line") from None
    except yaml.reader.ReaderError as error:
        lines = text[: error.position].split("\n")
        raise ConfigError(
            2,
            f"not a valid recipe: the character {chr(error.character)!r} is not allowed",
            where=f"{source}:{len(lines)}:{len(lines[-1]) + 1}",
            fix="remove it",
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(2, f"not a valid recipe: {error}", where=source, fix="write plain YAML") from None


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a recipe file.

    Raises:
        ConfigError: no such file, not a regular one, not UTF-8, not YAML, or not a mapping.
    """
    try:
        text = read_regular(path).decode("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(3, f"the recipe cannot be read: {error}", where=str(path), fix="name a readable UTF-8 file") from None
    return _settings(text, path)


def _settings(text: str, path: Path) -> dict[str, Any]:
    values = read_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            4, f"a recipe is a mapping of settings, this is a {type(values).__name__}", where=str(path), fix="see recipes/"
        )
    return values


def read_saved(path: Path) -> dict[str, Any]:
    """The settings of a run, an adapter or a bundle; where they are of a version that knew no other modalities, with those.

    Raises:
        CheckpointError: the file cannot be read. ConfigError: not YAML, or not a mapping.
    """
    try:
        text = read_regular(path).decode("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise CheckpointError(3, f"{path.name} is damaged: {error}", where=str(path), fix="use another copy") from None
    values = _settings(text, path)
    if isinstance(values.get("data"), dict):
        values["data"].setdefault("modalities", ["text", "image"])
    return values


def parse_set(assignments: Iterable[str]) -> dict[str, Any]:
    """``--set a.b=c`` arguments as nested settings; values are read as YAML.

    Raises:
        ConfigError: no ``=``, or a path that is no setting; the nearest keys are offered.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        path = tuple(new_name(name.strip(), "--set").split("."))
        _check_path(path)
        if not equals or not value.strip():
            raise ConfigError(5, f"--set {name} has no value", where=name, fix=f"write --set {name}=VALUE")
        values = merge(values, nested(".".join(path), read_yaml(value, f"--set {name}")))
    return values



def _check_path(path: tuple[str, ...]) -> None:
    for depth, part in enumerate(path):
        if part not in known_keys(path[:depth]):
            where = ".".join(path[: depth + 1])
            fix = near_setting(RunConfig, path[: depth + 1])
            raise ConfigError(6, f"there is no setting {where}", where=f"--set {'.'.join(path)}", fix=fix)
    if known_keys(path):
        raise ConfigError(
            6, f"{'.'.join(path)} is a section", where="--set", fix=f"set one of its keys: {', '.join(known_keys(path))}"
        )


def resolve(
    *,
    recipe: str | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Iterable[str] = (),
    saved: RunConfig | None = None,
) -> RunConfig:
    """The configuration of a run: defaults under `saved` (of a run to resume) under the recipe, flags and ``--set``.

    Args:
        recipe: a file, or the name of a recipe that comes with mopefuse, such as ``digit-questions/conditional``.
        flags: settings by dotted path; those that are None are not given.
    """
    path = find_recipe(recipe) if recipe is not None else None
    values = saved.model_dump(mode="json") if saved is not None else {}
    values = merge(values, read_recipe(path) if path is not None else {})
    for name, value in (flags or {}).items():
        if value is not None:
            values = merge(values, nested(name, value))
    last = parse_set(sets)
    unset = (flags or {}).keys() - flat(values).keys()
    given = {name for name, value in (flags or {}).items() if value is not None}
    names = {name: flag_of(name) for name in unset | given if name not in flat(last)}
    return build_config(merge(values, last), source=str(path or ""), names=names)


_FLAGS = {
    "data.path": "--data",
    "data.img_col": "--image-col",
    "data.columns": "--column",
    "data.image_roots": "--image-root",
    "train.max_steps": "--steps",
    "train.batch_size": "--batch",
    "router.kind": "--router",
    "comp_tuning.mode": "--comp-tuning",
}


def flag_of(path: str) -> str:
    """The flag of ``mopefuse train`` that sets the setting at `path`, where there is one."""
    return _FLAGS.get(path, f"--{path.rpartition('.')[2].replace('_', '-')}")


def find_recipe(name: str) -> Path:
    """The file that `name` stands for: itself, or one of the recipes that come with mopefuse."""
    path = Path(name)
    if path.exists():
        return path
    found, known = _named(name, "**/*.yaml")
    fix = did_you_mean(name, [other for other in known if not other.startswith("studies/")]) or "name a YAML file"
    if found is None:
        raise ConfigError(3, f"there is no recipe {name}", where="--recipe", fix=fix)
    return found


def find_study(name: str) -> Path:
    """The file that the `name` of a study stands for: itself, or one of those that come with mopefuse.

    Raises:
        ConfigError: neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    found, known = _named(f"studies/{name}", "studies/*.yaml")
    if found is None:
        fix = did_you_mean(name, [other.removeprefix("studies/") for other in known]) or "name a YAML file"
        raise ConfigError(3, f"there is no study {name}", where="FILE", fix=fix)
    return found


def _named(name: str, pattern: str) -> tuple[Path | None, list[str]]:
    """The recipe of a name, and the names of all that there are."""
    folders = [folder for folder in RECIPES if folder.is_dir()]
    found = next((file for folder in folders if (file := folder / f"{name}.yaml").is_file()), None)
    return found, sorted({str(p.relative_to(f).with_suffix("")) for f in folders for p in f.glob(pattern)})


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, every setting written out; `read_recipe` gives the same configuration back."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, width=120)


def data_settings(flags: Mapping[str, Any], sets: Iterable[str] = ()) -> Data:
    """The section `data` by itself, of settings by path and ``--set`` assignments; see `resolve`.

    Raises:
        ConfigError: one that there is not, or of another kind.
    """
    encoders = {"main": "tiny:vision", "comp": "tiny:text"}  # that a run needs and its data do not
    return resolve(flags={**encoders, **flags}, sets=sets).data


def changed_data(saved: Data, changes: Mapping[str, Any]) -> Data:
    """The settings of data of a trained model, with changes for other data of the same kind.

    Args:
        changes: by name; those that are None are not given. In `columns`, modalities that are not named keep their column.

    Raises:
        ConfigError: one that there is not, or of another kind.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if "columns" in given:
        given["columns"] = {**saved.columns, **given["columns"]}
    return data_settings({f"data.{name}": value for name, value in {**saved.model_dump(mode="json"), **given}.items()})
