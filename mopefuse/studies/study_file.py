"""A study as a file: one YAML that stands for many runs, all settings of each known before the first begins.

```yaml
recipe: digit-questions/demo            # or nothing, and all settings below
settings: {train: {epochs: 2}}          # of all cells, over the recipe
seeds: [0, 1, 2]
grid:                                   # every combination of ...
  prompts.experts: [1, 4, 16]
cells:                                  # ... and of these, each with a name of its own
  static only: {prompts.dynamic: 0, prompts.mapped: 0}
baseline: static only, experts=1        # the row that others are compared with
metric: accuracy
```

In place of grid and cells, a section `search` (`mopefuse.studies.search_space`) makes its cells as it goes
(`mopefuse.studies.search`).
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from mopefuse.config.recipe import find_recipe, find_study, parse_set, read_recipe
from mopefuse.config.schema import WITHOUT_EFFECT, RunConfig, Section, build_config
from mopefuse.config.setting_paths import flat, merge, nested
from mopefuse.core.cache import key_of
from mopefuse.errors import ConfigError, did_you_mean
from mopefuse.studies.search_space import Search

STUDY_FILE, KIND = "study.json", "study"

Settings = dict[str, Any]


class StudyFile(Section):
    """What the file may say."""

    recipe: str | None = Field(None, description="settings to begin with: a recipe's name or file")
    settings: Settings = Field({}, description="settings of all cells, nested or by path, over the recipe")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1, description="of each cell")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field({}, description="path of a setting to its values")
    cells: dict[str, Settings | None] = Field({}, description="label to settings, over those of all")
    search: Search | None = Field(None, description="settings to find, in place of grid and cells")
    baseline: str | None = Field(None, description="label of the row that others are compared with")
    metric: Literal["accuracy", "f1_macro", "f1_micro", "f1_samples"] | None = Field(
        None, description="metric that is compared; default accuracy, or macro-F1 of multi-label data"
    )

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("must be different numbers")
        return value


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    label: of its row; runs of a row differ in their seed only.
    changes: by path, what it sets over what all cells have.
    folder: its run folder in that of the study: it depends on the label and the settings, not on the place in the file.
    """

    label: str
    seed: int
    changes: Settings
    config: RunConfig
    folder: str


@dataclass(frozen=True)
class Study:
    """A file that was read: its cells in the order of the rows, seeds within.

    base: settings of all cells, nested. Of a search, whose cells are not known before, `cells` is empty.
    """

    name: str
    file: StudyFile
    cells: tuple[Cell, ...]
    base: Settings = field(default_factory=dict)

    @property
    def runs(self) -> int:
        """How many there will be; of a search the most, as settings can be proposed again."""
        return len(self.cells) if self.file.search is None else self.file.search.trials * len(self.file.seeds)

    def trial(self, number: int, chosen: Settings) -> list[Cell]:
        """The cells of a trial of a search, one for each seed."""
        short = _short(chosen)
        what = ", ".join(f"{short[path]}={_rounded(value)}" for path, value in chosen.items())
        cells = []
        for seed in self.file.seeds:
            config = build_config(merge(self.base, _spread(chosen)) | {"seed": seed}, source=f"trial {number}")
            cells.append(Cell(f"trial {number}: {what}", seed, chosen, config, _folder(what, config)))
        return cells

    @property
    def labels(self) -> list[str]:
        """Of the rows, in order."""
        return list(dict.fromkeys(cell.label for cell in self.cells))


def read_study(name: str, sets: Iterable[str] = ()) -> Study:
    """A study from its file, or from the name of one that comes with mopefuse.

    Args:
        sets: ``a.b=c``, of all cells, over everything else.

    Raises:
        ConfigError: no such file, a key or setting that there is not, a setting out of bounds in any cell, cells that are
            the same, or a baseline that is none of them.
    """
    path = find_study(name)
    file = _checked(read_recipe(path), str(path))
    over = parse_set(sets)
    common = read_recipe(find_recipe(file.recipe)) if file.recipe is not None else {}
    common = merge(common, _spread(file.settings))
    for where, settings in (("settings", _spread(file.settings)), ("--set", over)):
        _refuse_seed(settings, f"{path}, {where}")
    base = merge(common, over)
    if file.search is not None:
        _check_search(file, file.search, base, over, str(path))
        return Study(path.stem, file, (), base)
    cells: list[Cell] = []
    for label, changes in _rows(file, path.stem):
        where = f"{path}, cell {label!r}"
        _refuse_seed(_spread(changes), where)
        for seed in file.seeds:
            values = merge(merge(common, _spread(changes)), over) | {"seed": seed}
            config = build_config(values, source=where)
            cells.append(Cell(label, seed, flat(_spread(changes)), config, _folder(label, config)))
    _refuse_same(cells, str(path))
    study = Study(path.stem, file, tuple(cells), base)
    if file.baseline is not None and file.baseline not in study.labels:
        raise unknown_label(file.baseline, study.labels, f"{path}, baseline")
    return study


def unknown_label(label: str, labels: Iterable[str], where: str) -> ConfigError:
    """The error of a row that is not there."""
    return ConfigError(85, f"there is no row {label!r}", where=where, fix=did_you_mean(label, labels))


def identity(config: RunConfig) -> Settings:
    """What makes a run another one, whatever its seed: settings by path."""
    settings = flat(config.model_dump(mode="json"))
    return {key: value for key, value in settings.items() if key != "seed" and key not in WITHOUT_EFFECT}


def _checked(values: Settings, source: str) -> StudyFile:
    try:
        return StudyFile.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_explain(detail) for detail in error.errors(include_url=False))
        raise ConfigError(80, f"not a valid study: {problems}", where=source, fix="correct that; see recipes/studies") from None


def _explain(detail: Any) -> str:
    name, message = ".".join(map(str, detail["loc"])), detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        return f"unknown key {name} ({did_you_mean(name, StudyFile.model_fields)})"
    return f"{name}: {message[0].lower()}{message[1:]}"


def _spread(settings: Mapping[str, Any] | None) -> Settings:
    """Settings whose keys may be paths (``prompts.experts``) as nested ones."""
    values: Settings = {}
    for key, value in (settings or {}).items():
        values = merge(values, nested(key, _spread(value) if isinstance(value, dict) else value))
    return values


def _rows(file: StudyFile, name: str) -> Iterable[tuple[str, Settings]]:
    """Label and settings of each row: named cells times the axes of the grid."""
    short = _short(file.grid)
    for cell, settings in file.cells.items() or [("", {})]:
        for values in itertools.product(*file.grid.values()):
            chosen = dict(zip(file.grid, values, strict=True))
            parts = ([cell] if cell else []) + [f"{short[path]}={_shown(value)}" for path, value in chosen.items()]
            yield ", ".join(parts) or name, {**(settings or {}), **chosen}


def _short(paths: Iterable[str]) -> dict[str, str]:
    """Paths of settings to their last parts, where these differ."""
    paths = list(paths)
    last = Counter(path.rpartition(".")[2] for path in paths)
    return {path: path if last[path.rpartition(".")[2]] > 1 else path.rpartition(".")[2] for path in paths}


def _rounded(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _shown(value)


def _check_search(file: StudyFile, search: Search, base: Settings, over: Settings, source: str) -> None:
    """Refuse what could only be found out by a trial: every setting at its bounds, alone and in pairs."""
    idle = [key for key in ("grid", "cells", "baseline") if getattr(file, key)]
    if idle:
        raise ConfigError(110, f"a search has no {idle[0]}", where=source, fix=f"leave {idle[0]} out, or search")
    fixed = sorted(flat(over).keys() & search.space.keys())
    if fixed:
        raise ConfigError(111, f"{fixed[0]} is searched, and set", where=f"--set {fixed[0]}", fix="leave --set out")
    without = sorted(WITHOUT_EFFECT & search.space.keys())
    if without:
        raise ConfigError(112, f"{without[0]} changes no metric", where=f"{source}, search.space", fix="leave it out")
    _refuse_seed(_spread(search.space), f"{source}, search.space")
    needed = {side: search.first()[side] for side in search.space.keys() & {"main", "comp"}}
    for chosen in search.extremes():
        shown = ", ".join(f"{path}={_rounded(value)}" for path, value in chosen.items())
        build_config(merge(merge(base, needed), _spread(chosen)), source=f"{source}, search.space, {shown}")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False).replace(", ", ",").replace('"', "")


def _folder(label: str, config: RunConfig) -> str:
    """Without defaults, so that a setting that comes with a later version leaves the folders of a study where they are."""
    readable = re.sub(r"[^A-Za-z0-9=._+-]+", "-", label).strip("-.")[:48] or "cell"
    defaults = identity(RunConfig(main="", comp=""))
    settings = {key: value for key, value in identity(config).items() if value != defaults[key]}
    return f"cells/{readable}-{key_of(json.dumps(settings, sort_keys=True))[:8]}/seed-{config.seed}"


def _refuse_seed(settings: Settings, where: str) -> None:
    if "seed" in settings:
        raise ConfigError(80, "a study has a list of seeds, not a seed", where=where, fix="write seeds: [0, 1, 2]")


def _refuse_same(cells: Iterable[Cell], source: str) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        for what in (f"label {cell.label} {cell.seed}", json.dumps([identity(cell.config), cell.seed], sort_keys=True)):
            other = seen.setdefault(what, cell)
            if other is not cell:
                both = f"{other.label!r} and {cell.label!r} of the study are the same"
                raise ConfigError(81, both, where=source, fix="leave one out, or let another setting differ")
