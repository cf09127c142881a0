"""A study file defines exactly the runs that it lists, and errors in it are reported before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mopefuse.errors import ConfigError
from mopefuse.studies.study_file import read_study

BASE: dict[str, Any] = {"settings": {"main": "tiny:vision", "comp": "tiny:text", "train.epochs": 2}}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(**values: Any) -> str:
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(BASE | values, sort_keys=False), encoding="utf-8")
        return str(tmp_path / "mine.yaml")

    return write


def test_rows_are_named_cells_times_the_grid_with_every_seed(write: Any) -> None:
    cells = {"full": None, "static only": {"prompts": {"dynamic": 0}, "prompts.mapped": 0}}
    study = read_study(write(seeds=[3, 5], grid={"prompts.experts": [1, 4], "router.top_m": [None]}, cells=cells))
    expected = [f"{cell}, experts={k}, top_m=null" for cell in cells for k in (1, 4)]
    assert study.labels == expected
    assert [(cell.label, cell.seed) for cell in study.cells] == [(label, seed) for label in expected for seed in (3, 5)]
    last = study.cells[-1].config
    assert (last.prompts.dynamic, last.prompts.mapped, last.prompts.experts, last.seed, last.train.epochs) == (0, 0, 4, 5, 2)


def test_a_study_without_axes_is_one_row(write: Any) -> None:
    study = read_study(write())
    assert [(cell.label, cell.seed) for cell in study.cells] == [("mine", 0)]


def test_settings_override_the_recipe_and_set_overrides_both(write: Any) -> None:
    file = write(recipe="digit-questions/demo", settings={"train": {"lr": 1.0, "epochs": 7}}, cells={"a": {"train.lr": 2.0}})
    config = read_study(file, ["train.epochs=9"]).cells[0].config
    assert (config.train.batch_size, config.train.lr, config.train.epochs) == (64, 2.0, 9)


def test_axes_are_named_by_the_last_part_of_their_path_unless_ambiguous(write: Any) -> None:
    assert read_study(write(grid={"train.lr": [0.1], "train.clip": [2.0]})).labels == ["lr=0.1, clip=2.0"]
    alike = read_study(write(grid={"prompts.layers": [[0, 1], "all"], "prompts.init": [0.1]}))
    assert alike.labels == ["layers=[0,1], init=0.1", "layers=all, init=0.1"]


def test_a_cell_folder_depends_only_on_the_settings(write: Any) -> None:
    def folders(**values: Any) -> dict[str, str]:
        return {cell.label: cell.folder for cell in read_study(write(**values)).cells}

    one = folders(grid={"prompts.experts": [1, 4]})
    more = folders(grid={"prompts.experts": [2, 4, 1]})
    assert one.items() <= more.items()
    assert len(set(more.values())) == 3
    other = folders(grid={"prompts.experts": [1, 4]}, settings=BASE["settings"] | {"train.epochs": 3})
    assert not set(other.values()) & set(one.values())
    with_workers = folders(grid={"prompts.experts": [1, 4]}, settings=BASE["settings"] | {"data.workers": 3})
    assert with_workers == one
    written_out = folders(grid={"prompts.experts": [1, 4]}, settings=BASE["settings"] | {"prompts.mapped": 1})
    assert written_out == one, "an explicit default, such as one that a later version adds"


@pytest.mark.parametrize("label", ["../../etc", "a/b", ".hidden", "ü — 漢字", "a" * 300, "con: 5 %", " "])
def test_no_label_leads_outside_the_study_folder(write: Any, label: str) -> None:
    (folder,) = [cell.folder for cell in read_study(write(cells={label: {}})).cells]
    cells, name, seed = folder.split("/")
    assert (cells, seed) == ("cells", "seed-0")
    assert name.isascii()
    assert not name.startswith(".")
    assert len(name) < 80


@pytest.mark.parametrize(
    ("values", "code", "message"),
    [
        ({"seed": [1]}, "MF-CFG-80", "unknown key seed (did you mean seeds?)"),
        ({"seeds": []}, "MF-CFG-80", "seeds"),
        ({"seeds": [1, 1]}, "MF-CFG-80", "distinct"),
        ({"seeds": [-1]}, "MF-CFG-80", "seeds.0"),
        ({"grid": {"prompts.experts": []}}, "MF-CFG-80", "grid.prompts.experts"),
        ({"grid": {"prompts.experts": 4}}, "MF-CFG-80", "list"),
        ({"metric": "f1"}, "MF-CFG-80", "metric"),
        ({"grid": {"prompts.expert": [1]}}, "MF-CFG-01", "did you mean prompts.experts?"),
        ({"cells": {"a": {"prompt": {"experts": 1}}}}, "MF-CFG-01", "did you mean prompts?"),
        ({"cells": {"a": {}, "b": {"prompts.experts": 0}}}, "MF-CFG-01", "cell 'b'"),
        ({"cells": {"a": {}, "b": {}}}, "MF-CFG-81", "'a' and 'b'"),
        ({"cells": {"a": {}, "b": {"data.workers": 2}}}, "MF-CFG-81", "'a' and 'b'"),
        ({"grid": {"prompts.experts": [1, 2, 1]}}, "MF-CFG-81", "experts=1"),
        ({"cells": {"a": {"seed": 4}}}, "MF-CFG-80", "seeds: [0, 1, 2]"),
        ({"settings": {**BASE["settings"], "seed": 4}}, "MF-CFG-80", "seeds: [0, 1, 2]"),
        ({"cells": {"full": {}}, "baseline": "ful"}, "MF-CFG-85", "did you mean full?"),
        ({"recipe": "digit-questions/dem"}, "MF-CFG-03", "digit-questions/demo"),
    ],
)
def test_errors_name_the_file(write: Any, values: dict[str, Any], code: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_study(write(**values))
    assert refused.value.code == code
    assert message in str(refused.value)
    if code != "MF-CFG-03":
        assert "mine.yaml" in refused.value.where


def test_an_unknown_study_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="study not found: prompt-ablatio") as refused:
        read_study("prompt-ablatio")
    assert "did you mean prompt-ablation?" in refused.value.fix
