"""A recipe is a claim: its header says what it reproduces and how to run it, and it runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from conftest import call

from mopefuse.recipe import find_recipe, resolve
from mopefuse.train import train

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
HEADER = ("Paper:", "Data:", "Hardware:", "Time:", "Expected:", "Command:")


def test_all_recipes_are_found() -> None:
    assert len(RECIPES) == 5


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_the_header_makes_a_claim_and_its_command_names_the_file(path: Path) -> None:
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    text = "\n".join(line.removeprefix("#").strip() for line in header)
    assert [word for word in HEADER if not re.search(rf"^{word}", text, re.MULTILINE)] == []
    command = re.search(r"^Command: (.*)$", text, re.MULTILINE).group(1)
    name = str(path.relative_to(ROOT / "recipes").with_suffix(""))
    assert f"--recipe {name}" in command or (name == "digit-questions/demo" and command == "mopefuse demo")
    assert find_recipe(name) == path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_the_command_that_makes_its_data_can_be_run_and_writes_where_the_recipe_reads(path: Path, tmp_path: Path) -> None:
    """A data set that is prepared lacks its owners' files here: that is what the command must complain of."""
    command = shlex.split(re.search(r"^# Data: .*`mopefuse (.*)`", path.read_text(encoding="utf-8"), re.MULTILINE).group(1))
    assert str(resolve(recipe=str(path)).data.path) in command
    if command[1] == "prepare":
        source = command.index("SOURCE")
        (tmp_path / "source").mkdir()
        done = call(*command[:source], tmp_path / "source", tmp_path / "made", *command[source + 2 :])
        assert (done.returncode, "the folder has nothing" in done.stderr) == (4, True), done.stderr


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_two_steps_run_on_tiny_encoders_and_data(path: Path, pairs: Path, tmp_path: Path) -> None:
    flags = {"main": "tiny:vision", "comp": "tiny:text", "data.path": str(pairs), "train.max_steps": 2, "train.batch_size": 4}
    flags["data.workers"] = 0
    result = train(resolve(recipe=str(path), flags=flags), tmp_path / "run")
    assert result["steps"] == 2
    assert result["metrics"]["test"]["accuracy"] >= 0
