"""A recipe is a claim: its header states what it reproduces and how to run it, and it runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import call

from mopefuse.config.recipe import find_recipe, find_study, resolve
from mopefuse.studies.study import count_trainable
from mopefuse.studies.study_file import Cell, Study, read_study
from mopefuse.training.train import train

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "recipes" / "studies").glob("*.yaml"))
RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path not in STUDIES]
pytestmark = pytest.mark.usefixtures("short_starts")


def cells_of(study: Study) -> list[Cell]:
    """The cells of a study; for a search, the cells at its bounds."""
    search = study.file.search
    if search is None:
        return list(study.cells)
    return [cell for n, ends in enumerate(search.extremes()) for cell in study.trial(n, {**search.first(), **ends})]


def tiny(path: Path) -> list[str]:
    """Settings that replace encoders that would have to be downloaded."""
    return ["main=tiny:vision", "comp=tiny:text"] if "main: hf:" in path.read_text(encoding="utf-8") else []


HEADER = ("Paper:", "Data:", "Hardware:", "Time:", "Expected:", "Command:")


def test_all_recipes_are_found() -> None:
    assert len(RECIPES) == 10
    assert len(STUDIES) == 13


@pytest.mark.parametrize("path", RECIPES + STUDIES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_the_header_states_a_claim_and_a_command_with_the_file(path: Path) -> None:
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(line.removeprefix("#").strip() for line in header)
    assert [word for word in HEADER if not re.search(rf"^{word}", text, re.MULTILINE)] == []
    command = re.search(r"^Command: (.*)$", text, re.MULTILINE).group(1)
    name = str(path.relative_to(ROOT / "recipes").with_suffix(""))
    if path in STUDIES:
        assert re.fullmatch(rf"mopefuse study {path.stem}( --jobs 2)?", command)
        assert find_study(path.stem) == path
        return
    assert f"--recipe {name}" in command or (name == "digit-questions/demo" and command == "mopefuse demo")
    assert find_recipe(name) == path


@pytest.mark.parametrize("path", RECIPES + STUDIES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_the_data_command_of_a_recipe_writes_where_the_recipe_reads(path: Path, tmp_path: Path) -> None:
    """The files of data sets that need preparation are not available here, and the command must report exactly that."""
    command = shlex.split(re.search(r"^# Data: .*`mopefuse (.*)`", path.read_text(encoding="utf-8"), re.MULTILINE).group(1))
    config = cells_of(read_study(str(path)))[0].config if path in STUDIES else resolve(recipe=str(path))
    assert str(config.data.path) in command
    if command[1] == "prepare":
        source = command.index("SOURCE")
        (tmp_path / "source").mkdir()
        done = call(*command[:source], tmp_path / "source", tmp_path / "made", *command[source + 2 :])
        assert (done.returncode, "the folder contains nothing" in done.stderr) == (4, True), done.stderr


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_two_steps_run_on_tiny_encoders_and_data(path: Path, pairs: Path, tmp_path: Path) -> None:
    flags = {"main": "tiny:vision", "comp": "tiny:text", "data.path": str(pairs), "train.max_steps": 2, "train.batch_size": 4}
    flags |= {"data.workers": 0, "data.label_col": "label"}
    whole = ("data.val_fraction=null", "data.test_fraction=null")
    result = train(resolve(recipe=str(path), flags=flags, sets=whole), tmp_path / "run")
    assert result["steps"] == 2
    assert result["metrics"]["test"]["accuracy"] >= 0


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_cell_of_a_study_can_be_built_on_tiny_data(path: Path, pairs: Path) -> None:
    study = read_study(str(path), [f"data.path={pairs}", *tiny(path)])
    cells = cells_of(study)
    assert count_trainable(cells).keys() == {cell.label for cell in cells}
    assert study.file.seeds == ((0, 1, 2) if study.file.search is None else (0,))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_two_steps_of_the_first_and_last_cell_run_on_tiny_data(path: Path, pairs: Path, tmp_path: Path) -> None:
    sets = [f"data.path={pairs}", "train.max_steps=2", "train.epochs=2", "train.batch_size=4", *tiny(path)]
    study = read_study(str(path), sets)
    cells = cells_of(study)
    for number, cell in enumerate((cells[0], cells[-1])):
        steps = 0 if cell.config.method == "linear" else 2  # a regression has no steps
        assert train(cell.config, tmp_path / str(number))["steps"] == steps


@pytest.mark.parametrize(
    ("experts", "tokens"),
    [(4, "static, 20"), (16, "static, 80"), (128, "static, 640"), (64, "mapped, 4"), (128, "mapped, 8")],
)
def test_experts_and_longer_prompts_of_the_study_have_about_the_same_parameters(pairs: Path, experts: int, tokens: str) -> None:
    count = count_trainable(read_study("experts-vs-length", [f"data.path={pairs}"]).cells)
    assert count[f"{tokens} tokens"] == pytest.approx(count[f"{experts} experts"], rel=0.1)
