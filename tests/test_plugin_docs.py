"""docs/plugins.md: every code block runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import TINY, call, run_cli, write_rows
from PIL import Image
from plugin_cases import add_site, pip_install

from mopefuse import load
from mopefuse.core.registry import ENCODERS, FUSION, MODALITIES, parse_spec
from mopefuse.testing import check_encoder, check_task

pytest_plugins = ["plugin_cases"]
PAGE = (Path(__file__).resolve().parents[1] / "docs" / "plugins.md").read_text(encoding="utf-8")
POINTS = "[mopefuse.encoders]\npatches = shown:Patches\nsensor = shown:Sensor\n[mopefuse.fusion]\nproduct = shown:Product\n"
POINTS += "[mopefuse.datasets]\ncaptions = shown:Captions\n[mopefuse.modalities]\nsensor = shown:Readings\n"
POINTS += "[mopefuse.tasks]\nordinal = shown:Ordinal\n"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def shown(tmp_path: Path) -> Path:
    """The folder where everything after the first encoder is installed, as one module."""
    site = tmp_path / "site"
    (site / "shown-1.0.dist-info").mkdir(parents=True)
    (site / "shown-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: shown\nVersion: 1.0\n")
    (site / "shown-1.0.dist-info" / "entry_points.txt").write_text(POINTS)
    (site / "shown.py").write_text("\n".join(blocks("python")[1:]))
    return site


@pytest.mark.process
def test_the_nine_line_plugin_installs_and_satisfies_the_contract(
    tmp_path: Path, here: pytest.MonkeyPatch
) -> None:
    code, project = blocks("python")[0], blocks("toml")[0]
    assert len(code.splitlines()) == 9
    package = tmp_path / "package"
    package.mkdir()
    (package / "mopefuse_colour.py").write_text(code)
    (package / "pyproject.toml").write_text(project)
    site = pip_install(tmp_path / "site", package)
    done = run_cli("encoders", "inspect", "colour:mean", "--json", PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["spec"], facts["feature_width"]) == ("mopefuse-colour:colour:mean", 3)
    add_site(here, site)
    check_encoder("colour:mean")


def test_the_method_and_the_promptable_encoder_train_and_can_be_swapped(
    tmp_path: Path, pairs: Path, here: pytest.MonkeyPatch
) -> None:
    add_site(here, shown(tmp_path))
    check_encoder("patches:any")
    run = tmp_path / "run"
    sides = ("--main", "patches:any", "--comp", "tiny:text")
    for out, more in ((run, ("--method", "product")), (tmp_path / "other", ())):
        done = call("train", *TINY[4:], *sides, *more, "--data", pairs, "--out", out, "--steps", 2)
        assert done.returncode == 0, done.stderr
    done = call("swap-encoder", run, "--main", "tiny:vision", "-o", tmp_path / "swapped", "--json")
    assert done.returncode == 0, done.stderr
    swap = json.loads((tmp_path / "swapped" / "swap.json").read_text())
    origins = {tensor["name"]: tensor["origin"] for tensor in swap["tensors"]}
    assert (origins["into.main.weight"], origins["into.comp.weight"]) == ("new", "kept")
    assert "method: shown:product\n" in (tmp_path / "swapped" / "config.yaml").read_text()


def test_the_task_trains_and_predicts_and_is_recorded(tmp_path: Path, pairs: Path, here: pytest.MonkeyPatch) -> None:
    add_site(here, shown(tmp_path))
    check_task("ordinal", rows=[["low"], ["high"], ["middle"]] * 4, known=["low", "middle", "high"])
    run = tmp_path / "run"
    done = call("train", *TINY, "--task", "ordinal", "--data", pairs, "--out", run, "--steps", 2)
    assert done.returncode == 0 and done.stderr.startswith("task: ordinal, one of 3 labels"), done.stderr
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["task"] == {"name": "ordinal"}
    assert {"group": "mopefuse.tasks", "name": "ordinal", "distribution": "shown", "version": "1.0"} in manifest["plugins"]
    done = call("predict", run, "--image", pairs / "images" / "test-0.png", "--text", "what is the red digit")
    assert json.loads(done.stdout)["label"] in ("a", "b", "c")


def test_the_modality_is_read_from_its_column_and_passed_by_name(
    tmp_path: Path, pairs: Path, here: pytest.MonkeyPatch
) -> None:
    add_site(here, shown(tmp_path))
    check_encoder("sensor:last")
    data = shutil.copytree(pairs, tmp_path / "data")
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        write_rows(data / f"{split}.jsonl", [{**row, "heat": f"{i} 0.5"} for i, row in enumerate(rows)])
    sides, run = ("--main", "tiny:vision", "--comp", "sensor:last"), tmp_path / "run"
    assert "reads sensor, but rows have text and image" in call("train", *TINY[4:], *sides, "--data", data, "--out", run).stderr
    done = call("train", *TINY[4:], *sides, "--data", data, "--out", run, "--steps", 2, "--column", "sensor=heat")
    assert done.returncode == 0, done.stderr
    predictor = load(run)
    cold, hot = (predictor.predict([Image.new("RGB", (16, 16))], sensor=[[heat]])[0] for heat in (0.0, 50.0))
    assert cold["probabilities"] != hot["probabilities"]


def test_the_data_set_is_prepared(tmp_path: Path, here: pytest.MonkeyPatch) -> None:
    add_site(here, shown(tmp_path))
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    lines = []
    for number, split in enumerate(("train", "train", "val", "test", "test")):
        Image.new("RGB", (20, 20), (50 * number, 0, 0)).save(source / "images" / f"{number}.png")
        lines.append(f"{split}\t{number}.png\t{'ab'[number % 2]}\t{'' if number == 4 else 'A caption'}\n")
    (source / "captions.tsv").write_text("".join(lines))
    assert "--lower" in call("data", "prepare", "captions", "--help").stdout
    done = call("data", "prepare", "captions", source, tmp_path / "dest", "--lower", "--json")
    assert done.returncode == 0, done.stderr
    written = {split: (tmp_path / "dest" / f"{split}.jsonl").read_text() for split in ("train", "val", "test")}
    assert {split: text.count("\n") for split, text in written.items()} == {"train": 2, "val": 1, "test": 1}
    assert all(json.loads(line)["text"] == "a caption" for text in written.values() for line in text.splitlines())
    assert "no caption" in (tmp_path / "dest" / "skipped.jsonl").read_text()


def test_the_page_names_existing_things() -> None:
    assert {ENCODERS, FUSION, MODALITIES} <= set(re.findall(r"`(mopefuse\.\w+)`", PAGE))
    codes = set(re.findall(r"`(MF-PLUG-\d\d)`", PAGE))
    errors = (Path(__file__).resolve().parents[1] / "docs" / "errors.md").read_text(encoding="utf-8")
    assert codes <= set(re.findall(r"`(MF-PLUG-\d\d)`", errors))
    assert str(parse_spec("mopefuse-audio:audio:wav2vec2")) == "mopefuse-audio:audio:wav2vec2"
