"""The file of a study: one YAML file that describes many runs. All their settings are known before the first one starts.

```yaml
recipe: digit-questions/demo            # optional
settings: {train: {epochs: 2}}          # for all cells; they override the recipe
seeds: [0, 1, 2]
grid:                                   # every combination of these values ...
  prompts.experts: [1, 4, 16]
cells:                                  # ... with each of these named settings
  static only: {prompts.dynamic: 0, prompts.mapped: 0}
baseline: static only, experts=1        # the row that the others are compared with
metric: accuracy
```

Instead of grid and cells, a section `search` (`mopefuse.studies.search_space`) lets a sampler propose the cells
(`mopefuse.studies.search`).
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from mopefuse.config.messages import need, shortened
from mopefuse.config.recipe import find_recipe, find_study, parse_set, read_recipe
from mopefuse.config.schema import WITHOUT_EFFECT, RunConfig, build_config
from mopefuse.config.section import Section
from mopefuse.config.setting_paths import flatten, merge, nest
from mopefuse.core.cache import make_key
from mopefuse.core.error_codes import ConfigCode
from mopefuse.errors import ConfigError, did_you_mean
from mopefuse.metrics.names import LOWER_IS_BETTER
from mopefuse.studies.search_space import Range, Search
from mopefuse.tasks.base import all_metrics

STUDY_FILE, KIND = "study.json", "study"

Settings = dict[str, Any]



def _known_metric(name: str) -> str:
    if name not in all_metrics():
        raise ValueError(f"there is no metric {name!r}: {did_you_mean(name, all_metrics())}")
    return name


Metric = Annotated[str, AfterValidator(_known_metric)]

class StudyFile(Section):
    """The schema of the file."""

    recipe: str | None = Field(None, description="name or file of the recipe to start from")
    settings: Settings = Field({}, description="settings of all cells, nested or by path; they override the recipe")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1, description="random seeds of each cell")
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field({}, description="values of settings, by path")
    cells: dict[str, Settings | None] = Field({}, description="settings of each cell, by label; they override `settings`")
    search: Search | None = Field(None, description="settings to search, instead of grid and cells")
    baseline: str | None = Field(None, description="label of the row that the others are compared with")
    metric: Metric | None = Field(
        None, description="metric to compare by; default accuracy, or macro-F1 of multi-label data, or R² of a regression"
    )

    @model_validator(mode="after")
    def _search_raises_a_score(self) -> StudyFile:
        if self.search is not None and self.metric in LOWER_IS_BETTER:
            raise ValueError(f"metric: a search maximises, and {self.metric} is an error; use r2 or spearman")
        return self

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("must be distinct numbers")
        return value


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Args:
        label: label of its row; the runs of a row differ in their seed only.
        changes: its settings by path, without those of all cells.
        folder: run folder, relative to that of the study; determined by the label and the settings, not by the order of
            the file.
    """

    label: str
    seed: int
    changes: Settings
    config: RunConfig
    folder: str


@dataclass(frozen=True)
class Study:
    """A study that was read from its file.

    Args:
        cells: ordered by row, then by seed; empty for a search, whose cells are not known yet.
        base: settings of all cells, nested.
    """

    name: str
    file: StudyFile
    cells: tuple[Cell, ...]
    base: Settings = field(default_factory=dict)

    @property
    def runs(self) -> int:
        """The number of runs; of a search the maximum, as the same settings can be proposed twice."""
        return len(self.cells) if self.file.search is None else self.file.search.trials * len(self.file.seeds)

    def trial(self, number: int, chosen: Settings) -> list[Cell]:
        """The cells of a trial of a search, one for each seed. `chosen`: settings by path."""
        short = _short_names(chosen)
        what = ", ".join(f"{short[path]}={_format_rounded(value)}" for path, value in chosen.items())
        cells = []
        for seed in self.file.seeds:
            config = build_config(merge(self.base, _nest(chosen)) | {"seed": seed}, source=f"trial {number}")
            folder = _folder(what, config)
            cells.append(Cell(label=f"trial {number}: {what}", seed=seed, changes=chosen, config=config, folder=folder))
        return cells

    @property
    def labels(self) -> list[str]:
        """The labels of the rows, in order."""
        return list(dict.fromkeys(cell.label for cell in self.cells))


def read_study(name: str, sets: Iterable[str] = ()) -> Study:
    """Read a study from its file, or by the name of one that comes with mopefuse.

    Args:
        sets: ``a.b=c``, settings of all cells that override all others.

    Raises:
        ConfigError: no such file, an unknown key or setting, a setting out of bounds in any cell, two equal cells, or an
            unknown baseline.
    """
    path = find_study(name)
    file = _checked(read_recipe(path), str(path))
    overrides = parse_set(sets)
    common = read_recipe(find_recipe(file.recipe)) if file.recipe is not None else {}
    common = merge(common, _nest(file.settings))
    for where, settings in (("settings", _nest(file.settings)), ("--set", overrides)):
        _refuse_seed(settings, f"{path}, {where}")
    base = merge(common, overrides)
    if file.search is not None:
        _check_search(file, file.search, base, overrides, str(path))
        return Study(path.stem, file, (), base)
    cells: list[Cell] = []
    for label, changes in _rows(file, path.stem):
        where = f"{path}, cell {label!r}"
        _refuse_seed(_nest(changes), where)
        for seed in file.seeds:
            values = merge(merge(common, _nest(changes)), overrides) | {"seed": seed}
            config = build_config(values, source=where)
            folder, nested_changes = _folder(label, config), flatten(_nest(changes))
            cells.append(Cell(label=label, seed=seed, changes=nested_changes, config=config, folder=folder))
    _refuse_same(cells, str(path))
    study = Study(path.stem, file, tuple(cells), base)
    if file.baseline is not None and file.baseline not in study.labels:
        raise unknown_label(file.baseline, study.labels, f"{path}, baseline")
    return study


def unknown_label(label: str, labels: Iterable[str], where: str) -> ConfigError:
    """The error for a label that no row has."""
    return ConfigError(ConfigCode.NO_SUCH_STUDY_ROW, f"unknown row {label!r}", where=where, fix=did_you_mean(label, labels))


def distinguishing_settings(config: RunConfig) -> Settings:
    """The settings that distinguish a run from others, without its seed, by path."""
    settings = flatten(config.model_dump(mode="json"))
    return {key: value for key, value in settings.items() if key != "seed" and key not in WITHOUT_EFFECT}


def _checked(values: Settings, source: str) -> StudyFile:
    try:
        return StudyFile.model_validate(values)
    except ValidationError as error:
        problems: dict[str, list[str]] = {}  # start of a problem to what the value could be instead
        for detail in error.errors(include_url=False):
            start, needed = _explain(detail, values)
            problems.setdefault(start, []).append(needed)
        text = "; ".join(start + " or ".join(filter(None, needs)) for start, needs in problems.items())
        fix = "correct the file; see recipes/studies for examples"
        raise ConfigError(ConfigCode.BAD_STUDY_FILE, f"not a valid study: {text}", where=source, fix=fix) from None


def _explain(detail: Any, values: Settings) -> tuple[str, str]:
    """The start of the text about an error, and what the value needs, if it has the wrong type."""
    path = _path_in_file(detail, values)
    name = ".".join(path)
    if detail["type"] == "extra_forbidden":
        known = StudyFile if len(path) == 1 else Search if len(path) == 2 else Range
        return f"unknown key {name} ({did_you_mean(path[-1], known.model_fields)})", ""
    if detail["type"] == "missing":
        return f"{name} is missing", ""
    if detail["type"] == "value_error":
        return f"{name}: {need(detail)}", ""
    return f"{name}: got {shortened(detail['input'])}; needs ", need(detail)


def _path_in_file(detail: Any, values: Settings) -> list[str]:
    """The path of an error as far as the file has it, without the types that pydantic tried for a value."""
    path, found = [], values
    for part in detail["loc"]:
        if part in found if isinstance(found, dict) else isinstance(found, list) and isinstance(part, int):
            path.append(str(part))
            found = found[part]
    return [*path, str(detail["loc"][-1])] if detail["type"] == "missing" else path


def _nest(settings: Mapping[str, Any] | None) -> Settings:
    """Nest settings whose keys may be paths, such as ``prompts.experts``."""
    values: Settings = {}
    for key, value in (settings or {}).items():
        values = merge(values, nest(key, _nest(value) if isinstance(value, dict) else value))
    return values


def _rows(file: StudyFile, name: str) -> Iterable[tuple[str, Settings]]:
    """Yield label and settings of each row: every named cell with every combination of the grid."""
    short = _short_names(file.grid)
    for cell, settings in file.cells.items() or [("", {})]:
        for values in itertools.product(*file.grid.values()):
            chosen = dict(zip(file.grid, values, strict=True))
            parts = ([cell] if cell else []) + [f"{short[path]}={_format(value)}" for path, value in chosen.items()]
            yield ", ".join(parts) or name, {**(settings or {}), **chosen}


def _short_names(paths: Iterable[str]) -> dict[str, str]:
    """Shorten each path to its last part, unless another path has the same."""
    paths = list(paths)
    last = Counter(path.rpartition(".")[2] for path in paths)
    return {path: path if last[path.rpartition(".")[2]] > 1 else path.rpartition(".")[2] for path in paths}


def _format_rounded(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _format(value)


def _check_search(file: StudyFile, search: Search, base: Settings, overrides: Settings, source: str) -> None:
    """Validate every setting at its bounds, alone and in pairs, so that no trial fails for an invalid setting.

    Raises:
        ConfigError: an invalid setting, or keys that a search cannot have.
    """
    unused = [key for key in ("grid", "cells", "baseline") if getattr(file, key)]
    if unused:
        what = f"a study with a search cannot have {unused[0]}"
        raise ConfigError(ConfigCode.INCOMPLETE_SEARCH, what, where=source, fix=f"remove {unused[0]}, or search")
    fixed = sorted(flatten(overrides).keys() & search.space.keys())
    if fixed:
        what = f"{fixed[0]} is both in search.space and set by --set"
        raise ConfigError(
            ConfigCode.SETTING_BOTH_SEARCHED_AND_FIXED, what, where=f"--set {fixed[0]}", fix=f"remove --set {fixed[0]}"
        )
    without = sorted(WITHOUT_EFFECT & search.space.keys())
    if without:
        what = f"{without[0]} has no effect on metrics"
        raise ConfigError(
            ConfigCode.SEARCHED_SETTING_WITHOUT_EFFECT, what, where=f"{source}, search.space", fix=f"remove {without[0]}"
        )
    _refuse_seed(_nest(search.space), f"{source}, search.space")
    needed = {side: search.first()[side] for side in search.space.keys() & {"main", "comp"}}
    for chosen in search.extremes():
        shown = ", ".join(f"{path}={_format_rounded(value)}" for path, value in chosen.items())
        build_config(merge(merge(base, needed), _nest(chosen)), source=f"{source}, search.space, {shown}")


def _format(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False).replace(", ", ",").replace('"', "")


def _folder(label: str, config: RunConfig) -> str:
    """The folder of a cell; it ignores settings at their default, so that new settings do not change the folders."""
    readable = re.sub(r"[^A-Za-z0-9=._+-]+", "-", label).strip("-.")[:48] or "cell"
    defaults = distinguishing_settings(RunConfig(main="", comp=""))
    settings = {key: value for key, value in distinguishing_settings(config).items() if value != defaults[key]}
    return f"cells/{readable}-{make_key(json.dumps(settings, sort_keys=True))[:8]}/seed-{config.seed}"


def _refuse_seed(settings: Settings, where: str) -> None:
    if "seed" in settings:
        raise ConfigError(
            ConfigCode.BAD_STUDY_FILE, "a study takes a list of seeds, not a seed", where=where, fix="write seeds: [0, 1, 2]"
        )


def _refuse_same(cells: Iterable[Cell], source: str) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        settings = json.dumps([distinguishing_settings(cell.config), cell.seed], sort_keys=True)
        for what in (f"label {cell.label} {cell.seed}", settings):
            other = seen.setdefault(what, cell)
            if other is not cell:
                both = f"the cells {other.label!r} and {cell.label!r} are the same"
                raise ConfigError(
                    ConfigCode.EQUAL_STUDY_CELLS, both, where=source, fix="remove one, or change one of its settings"
                )
