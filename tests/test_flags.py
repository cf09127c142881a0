"""Flags that set a setting: one line of a table gives a flag its option, help text, validation and name in errors."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import TINY, call
from typer.testing import CliRunner

from mopefuse.__main__ import main as start_command
from mopefuse.cli.app import app
from mopefuse.cli.settings import add_command
from mopefuse.config import flags
from mopefuse.config.flags import FLAGS, Flag
from mopefuse.config.messages import bounds, choices, help_text
from mopefuse.config.method_defaults import CONDITIONAL_BY_PATH
from mopefuse.config.recipe import resolve
from mopefuse.config.schema import RunConfig, setting
from mopefuse.errors import ConfigError

COMMANDS = ("train", "fit", "eval", "predict", "data check", "data preview", "data pack")
READING = {"--text-col", "--image-col", "--column", "--id-col", "--image-root"}
LABELLED = READING | {"--label-col", "--split-col", "--label-sep"}
CHECKED = LABELLED | {"--labels", "--fold-labels", "--allow-odd-labels", "--val-fraction", "--test-fraction", "--on-missing"}
PUBLISHED = {
    "fit": CHECKED | {"--main", "--comp", "--seed", "--device", "--fraction", "--on-bad"},
    "eval": LABELLED | {"--on-missing"},
    "predict": READING,
    "data pack": LABELLED | {"--on-missing", "--on-bad", "--max-pixels"},
    "data check": CHECKED | {"--max-pixels"},
    "data preview": LABELLED | {"--max-pixels"},
    "train": CHECKED | set(
        "--main --comp --data --method --experts --static --dynamic --mapped --layers --router --top-m --gate --comp-tuning "
        "--tune --warm-start --compat --epochs --steps --batch --lr --seed --device --precision --workers --shots --fraction "
        "--on-bad --strict --cache-images --modality-dropout --either --class-weights --threshold".split()
    ),
}  # fmt: skip


def options(command: str) -> dict[str, Any]:
    """The options of a command, as documentation generators see them."""
    found: Any = typer.main.get_command(app)
    for part in command.split():
        found = found.commands[part]
    return {name: option for option in found.params for name in option.opts if name.startswith("-")}


class Toy:
    """A command that has the flags of the table for ``toy``, and the arguments it was called with."""

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}

    def run(self, *arguments: str) -> Any:
        toys = typer.Typer(rich_markup_mode=None)
        toys.callback()(lambda: None)
        add_command(toys, "toy", self.remember)
        return CliRunner().invoke(toys, ["toy", *arguments])

    def remember(self, settings: dict[str, Any], quick: bool = False) -> None:
        """A command.

        Args are those of the table."""
        self.settings = settings


# -- existing flags


@pytest.mark.parametrize("command", COMMANDS)
def test_no_published_flag_was_removed(command: str) -> None:
    assert PUBLISHED[command] <= options(command).keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_has_the_help_text_of_its_setting(command: str) -> None:
    found = options(command)
    for flag in flags.flags_for(command):
        shows_default = command not in ("fit", "eval", "predict")  # the run determines the value
        usual = CONDITIONAL_BY_PATH.get(flag.path)
        assert found[flag.name].help == help_text(setting(flag.path), default=shows_default, of_method=usual)
        assert found[flag.name].rich_help_panel == flag.panel


def test_help_has_a_heading_for_each_group_and_every_option_once() -> None:
    done = call("train", "--help")
    headings = [line for line in done.stdout.splitlines() if line.endswith(":") and not line.startswith(" ")]
    panels = (
        flags.MODEL,
        flags.DATA,
        flags.COLUMNS,
        flags.TRAINING,
        flags.PROMPTS,
        "Options",
    )
    assert headings == [f"{name}:" for name in panels]
    first_words = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  --")]
    assert sorted(first_words) == sorted({*options("train"), "--help"})


def test_every_flag_sets_a_setting_and_no_two_the_same() -> None:
    assert len({flag.path for flag in FLAGS}) == len({flag.name for flag in FLAGS}) == len(FLAGS)
    for flag in FLAGS:
        assert setting(flag.path).description
        assert set(flag.commands.split(", ")) <= set(COMMANDS)


# -- effects of a line of the table


def test_a_new_line_of_the_table_is_a_new_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    new = (Flag("--clip", "train.clip", "Training", "toy"), Flag("--noise", "router.noise", "Training", "toy"))
    monkeypatch.setattr(flags, "FLAGS", new)
    toy = Toy()
    assert toy.run("--clip", "0.5", "--noise").exit_code == 0
    assert toy.settings == {"train.clip": 0.5, "router.noise": True}
    assert toy.run("--clip", "much").exit_code == 2
    assert toy.run().exit_code == 0
    assert toy.settings == {}
    text = " ".join(toy.run("--help").stdout.split())
    assert re.search(r"Training: --clip (<float>|FLOAT) Maximum norm of the gradient\. \[default: 1\.0; above 0]", text), text


def test_every_flag_of_train_reaches_its_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    every = [flag._replace(commands="toy") for flag in FLAGS]
    monkeypatch.setattr(flags, "FLAGS", every)
    values = {"--layers": "last:2", "--image-root": str(tmp_path), "--column": "audio=clip", "--device": "cpu"}
    words, expected = [], {}
    for flag in every:
        field = setting(flag.path)
        kind = field.annotation
        if kind is bool:
            words, expected[flag.path] = [*words, flag.name], True
            continue
        number = 0.25 if "float" in str(kind) else 3 if "int" in str(kind) and "Layers" not in str(kind) else None
        text = values.get(flag.name) or (choices(field) or [str(number if number is not None else "x")])[-1]
        words += [flag.name, text]
    toy = Toy()
    done = toy.run(*words)
    assert done.exit_code == 0, done.output
    assert toy.settings.keys() == {flag.path for flag in FLAGS}
    assert expected.items() <= toy.settings.items()
    exclusive = {path: value for path, value in toy.settings.items() if path != "data.shots"}
    config = resolve(flags=exclusive)
    assert (config.prompts.layers, config.data.columns, config.comp) == ("last:2", {"audio": "clip"}, "x")
    assert config.data.image_roots == (str(tmp_path),)
    assert (config.train.threshold, config.prompts.experts, config.router.kind) == (0.25, 3, "joint")


def test_a_repeated_flag_is_a_list() -> None:
    done = call("train", "--main", "tiny:vision", "--comp", "tiny:text", "--comp", "", "--set", "comp=[a, b]", "--seed", "-1")
    assert done.returncode == 3
    assert resolve(flags={"main": "a", "comp": ["b", "c"]}).comp == ("b", "c")


@pytest.mark.parametrize(("text", "value"), [("0,3,5", (0, 3, 5)), ("4", (4,)), ("all", "all"), ("first:2", "first:2")])
def test_layers_are_a_keyword_or_indices(text: str, value: object) -> None:
    assert resolve(flags={"main": "a", "comp": "b", "prompts.layers": text}).prompts.layers == value


# -- errors name the flag


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--experts", "0"), "--experts: got 0; needs at least 1"),
        (("--lr", "nan"), "--lr: got nan; needs a finite number"),
        (("--threshold", "high"), "--threshold: got 'high'; needs a number or 'tuned'"),
        (("--threshold", "1.5"), "--threshold: got '1.5'; needs less than 1 or 'tuned'"),
        (("--layers", "some"), "--layers: got 'some'; needs all, first:N, last:N, last:1/N, or a list of indices from 0"),
        (("--device", "gpu"), "--device: got 'gpu'; needs auto, cpu, cuda, cuda:N or mps"),
        (("--val-fraction", "1"), "--val-fraction: got 1.0; needs less than 1"),
        (("--set", "train.clip=0"), "train.clip: got 0; needs more than 0"),
        (("--seed", "-1", "--experts", "0"), "--seed: got -1; needs at least 0; --experts: got 0; needs at least 1"),
    ],
)
def test_a_value_out_of_bounds_is_an_error_that_names_its_flag(words: tuple[str, ...], message: str) -> None:
    done = call("train", "--main", "x:y", "--comp", "x:y", *words)
    assert done.returncode == 3
    assert message in done.stderr


def test_a_missing_setting_is_an_error_that_names_its_flag() -> None:
    done = call("train", "--comp", "tiny:text")
    assert done.stderr.startswith("error[MF-CFG-01]: --main is missing (main encoder")
    assert done.stderr.endswith("fix: add --main timm:vit_base\n")
    with pytest.raises(ConfigError, match=r"^main is missing"):
        resolve()


def test_an_error_about_set_names_the_path_even_if_there_is_a_flag() -> None:
    done = call("train", *TINY, "--set", "prompts.experts=0")
    assert "prompts.experts: got 0; needs at least 1" in done.stderr


def test_the_bounds_in_the_help_are_enforced() -> None:
    assert bounds(setting("data.workers")) == ["at least 0", "at most 256"]
    assert bounds(setting("data.fraction")) == ["above 0", "at most 1"]
    assert bounds(setting("train.modality_dropout")) == ["at least 0", "below 1"]
    assert bounds(setting("prompts.experts")) == ["at least 1"], "4096 only catches typing errors"
    assert RunConfig(main="a", comp="b", data={"fraction": 1.0}).data.fraction == 1.0  # type: ignore[arg-type]


# -- a file of weights


@pytest.mark.parametrize("side", ["--main", "--comp"])
def test_a_file_of_weights_that_does_not_exist_is_reported_before_data_are_read(side: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone.safetensors"
    done = call("train", *TINY, side, f"timm:vit_tiny_patch16_224?weights={gone}", "--data", tmp_path / "nowhere")
    assert done.returncode == 6
    assert f"{side}, {gone}" in done.stderr and "fix: pass an existing file" in done.stderr


def test_swap_encoder_reports_a_missing_weights_file_too(trained: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.safetensors"
    done = call("swap-encoder", trained, "--comp", f"hf:bert-base?weights={gone}", "-o", tmp_path / "new")
    assert done.returncode == 6 and f"--comp, {gone}" in done.stderr


# -- Ctrl-C


@pytest.mark.parametrize(
    ("module", "start"),
    [
        ("typer", ("-m", "mopefuse")),
        ("rich", ("-c", "from mopefuse.__main__ import main; main()")),  # while a command runs, started as when installed
    ],
)
def test_ctrl_c_during_imports_prints_one_line(module: str, start: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("raise KeyboardInterrupt\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, *start, "plugins", "list"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (130, "", 1)
    assert done.stderr.startswith("stopped: by Ctrl-C")


def test_ctrl_c_before_error_handling_prints_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mopefuse.cli.app.guard_imports", interrupted)
    with pytest.raises(SystemExit) as left:
        start_command()
    assert (left.value.code, capsys.readouterr().err.count("\n")) == (130, 1)


def test_ctrl_c_before_typer_starts_prints_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mopefuse.cli.app.app", interrupted)
    done = call("doctor")
    assert (done.returncode, done.stderr.count("\n")) == (130, 1)
    assert done.stderr.startswith("stopped: by Ctrl-C")
