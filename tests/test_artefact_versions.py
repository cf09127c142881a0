"""Artifacts of other versions, or that need a plugin, by number in the list of faults, tested on the command line.

tests/golden/format-N holds a run of that format, its adapter and their predictions. It was made there by ``mopefuse train
--main tiny:vision --comp tiny:text --device cpu --experts 2 --batch 3 --data data --out run --steps 1`` with ``--set``
prompts.static=1 dynamic=1 mapped=1 layers=last:2 bottleneck=2 init=1 and train.lr=0.02, then ``mopefuse export`` and
``mopefuse predict run data/val.jsonl``; format 2 from the recipe of format 1's run, with ``--compat paper`` and the same
head. Once a version is released, the folder of its format is never made again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from artefact_cases import MANIFEST, Artefact, Predict, read, refused, resume, tree, write
from conftest import TINY, call, run_cli

from mopefuse.core import artifact as checkpoint
from mopefuse.core import registry
from mopefuse.runs.folder import RunFolder

pytest_plugins = ["artefact_cases"]

GOLDEN = Path(__file__).parent / "golden"
FORMATS = range(1, checkpoint.FORMAT + 1)
NEXT = checkpoint.FORMAT + 1


def predictions(model: Path, pairs: Path) -> dict[str, dict[str, float]]:
    done = call("predict", model, pairs, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return {row["id"]: row["probabilities"] for row in map(json.loads, done.stdout.splitlines())}


def expected(golden: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (golden / "expected.jsonl").read_text().splitlines()]
    return {row["id"]: pytest.approx(row["probabilities"], abs=1e-5) for row in rows}


# -- a newer format


def newer(artefact: Artefact, manifest: Path, **facts: object) -> str:
    write(manifest, read(manifest) | {"format": NEXT} | facts)
    by = f" {facts['mopefuse']}" if facts else ""
    return f"written by a newer version of mopefuse{by} (format {NEXT}); this version reads formats up to {checkpoint.FORMAT}"


def test_F_79_an_artefact_of_a_newer_version_is_an_error_with_both_format_numbers(artefact: Artefact, predict: Predict) -> None:
    message = newer(artefact, artefact.path / MANIFEST, mopefuse="9.1")
    refused(predict(artefact.path), "MF-CKPT-07", message, fix="upgrade mopefuse")
    if artefact.is_run:
        refused(resume(artefact.path), "MF-CKPT-07", message, fix="upgrade mopefuse")


def test_F_79_a_newer_checkpoint_is_neither_loaded_nor_skipped(of_run: Artefact, predict: Predict) -> None:
    for folder in of_run.path.glob("checkpoints/step-*"):
        message = newer(of_run, folder / MANIFEST)
    before = tree(of_run.path / "checkpoints")
    refused(predict(of_run.path), "MF-CKPT-07", message, fix="upgrade mopefuse")
    refused(resume(of_run.path), "MF-CKPT-07", message, fix="upgrade mopefuse")
    assert tree(of_run.path / "checkpoints") == before


# -- an older format


def test_F_80_every_format_has_golden_files() -> None:
    assert [path.name for path in sorted(GOLDEN.iterdir()) if path.is_dir()] == [f"format-{number}" for number in FORMATS]
    assert all(read(GOLDEN / f"format-{number}" / "run" / MANIFEST)["format"] == number for number in FORMATS)


@pytest.mark.parametrize("number", FORMATS)
@pytest.mark.parametrize("kind", ["run", "adapter"])
def test_F_80_golden_files_give_the_original_predictions_and_are_not_modified(number: int, kind: str) -> None:
    golden = GOLDEN / f"format-{number}"
    before = tree(golden)
    assert predictions(golden / kind, golden / "data" / "val.jsonl") == expected(golden)
    assert tree(golden) == before


@pytest.mark.parametrize("number", FORMATS)
def test_F_80_a_golden_run_is_resumed(number: int, tmp_path: Path) -> None:
    golden = GOLDEN / f"format-{number}"
    shutil.copytree(golden / "run", tmp_path / "run")
    done = resume(tmp_path / "run", 2, data=golden / "data")
    assert done.returncode == 0, done.stderr
    assert "resuming at step 1 of 2" in done.stderr
    assert RunFolder(tmp_path / "run").steps() == [1, 2]
    assert predictions(tmp_path / "run", golden / "data" / "val.jsonl") == expected(golden), "the first step is still the best"


# -- settings that were renamed


def test_F_81_an_unknown_setting_is_refused_with_a_suggestion(artefact: Artefact, predict: Predict) -> None:
    artefact.config("  experts: 2", "  num_experts: 2")
    parts = "unknown setting prompts.num_experts", "did you mean prompts.experts"
    refused(predict(artefact.path), "MF-CFG-01", *parts, exit_code=3)


# -- a plugin that is not installed

TOY = """
from mopefuse.encoders.tiny import TinyEncoder
from mopefuse.core.registry import Spec

class Toy(TinyEncoder):
    def __init__(self, spec):
        super().__init__(Spec("tiny", spec.name, spec.options))
        self.spec = spec
"""
NEED = {"group": registry.ENCODERS, "name": "toy", "distribution": "mopefuse-toy"}
MISSING = "this run needs the plugin mopefuse-toy, which provides 'toy'; it is not installed"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """A folder with an installed plugin, for processes that have it on the path."""
    site = tmp_path / "site"
    (site / "mopefuse_toy-1.0.dist-info").mkdir(parents=True)
    (site / "mopefuse_toy-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: mopefuse-toy\nVersion: 1.0\n")
    (site / "mopefuse_toy-1.0.dist-info" / "entry_points.txt").write_text("[mopefuse.encoders]\ntoy = mopefuse_toy:Toy\n")
    (site / "mopefuse_toy.py").write_text(TOY)
    return site


def test_F_107_a_manifest_with_a_plugin_that_is_not_installed_is_refused(artefact: Artefact, predict: Predict) -> None:
    write(artefact.facts, read(artefact.facts) | {"plugins": [NEED]})
    artefact.config("main: tiny:vision", "main: toy:vision")
    refused(predict(artefact.path), "MF-PLUG-03", MISSING, exit_code=9, fix="pip install mopefuse-toy")


@pytest.mark.process
def test_F_107_a_run_records_its_plugins_and_cannot_be_loaded_without_them(
    pairs: Path, toy: Path, tmp_path: Path, predict: Predict, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    command = ("train", *TINY, "--main", "toy:vision", "--data", pairs, "--out", run, "--steps", "1")
    done = run_cli(*command, PYTHONPATH=str(toy))
    assert done.returncode == 0, done.stderr
    assert read(run / MANIFEST)["plugins"] == [NEED | {"version": "1.0"}]
    missing = MISSING.replace("mopefuse-toy", "mopefuse-toy 1.0")
    for refusal in (predict(run), call("eval", run), resume(run, 2), call("export", run, "-o", tmp_path / "x")):
        refused(refusal, "MF-PLUG-03", missing, exit_code=9, fix="pip install mopefuse-toy==1.0")
    monkeypatch.syspath_prepend(str(toy))
    registry.available.cache_clear()
    try:
        assert predict(run).returncode == 0
    finally:
        registry.available.cache_clear()
