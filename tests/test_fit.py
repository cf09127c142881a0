"""`mopefuse fit`: a table of any column names becomes an ordinary run, chosen, calibrated and tested once."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call, code_of
from test_mlp import make_xor

import mopefuse
from mopefuse.autofit import fit as fitting
from mopefuse.autofit import tryouts
from mopefuse.autofit.candidates import NETWORKS, REGRESSIONS, TRAINED
from mopefuse.autofit.state import VALIDATED
from mopefuse.core.tensor_files import read_tensors
from mopefuse.errors import Interrupted
from mopefuse.runs.folder import RunFolder

TINY = ("--main", "tiny:vision", "--comp", "tiny:text", "--device", "cpu")


def as_table(root: Path) -> Path:
    """The rows of light and dark images with one of two words, as one CSV with other column names and a folder of photos."""
    make_xor(root, {"train": 96, "val": 24, "test": 40})
    (root / "images").rename(root / "photos")
    with (root / "things.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["number", "note", "shot", "answer"])
        for split in ("train", "val", "test"):
            for line in (root / f"{split}.jsonl").read_text().splitlines():
                row = json.loads(line)
                note, shot = f"the {row['text']} one", row["img"].removeprefix("images/")
                writer.writerow([row["id"], note, shot, row["label"]])
    return root / "things.csv"


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_table(tmp_path_factory.mktemp("fit") / "data")


@pytest.fixture(scope="module")
def fitted(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A fit and what it printed with --json; not to be changed."""
    out = tmp_path_factory.mktemp("fitted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "NETWORKS", NETWORKS[:1])
        patch.setattr(fitting, "TRAINED", TRAINED[:2])
        patch.setattr("mopefuse.fusion.baselines._MANY_HELD_OUT", 1)  # the start of conditional prompts: no cross-validation
        patch.setattr("mopefuse.fusion.token_reader_fit._STEPS", (20, 10_000))
        done = call("fit", table, *TINY, "--budget", "1h", "--out", out, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return out, json.loads(done.stdout)


@pytest.fixture
def only_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """No candidate that runs an encoder in every step, which takes the longest."""
    monkeypatch.setattr(fitting, "TRAINED", ())
    monkeypatch.setattr(fitting, "NETWORKS", NETWORKS[:1])


def test_the_method_that_the_task_needs_is_chosen(fitted: tuple[Path, dict[str, Any]]) -> None:
    """The label is an exclusive or of the two modalities, which a regression expresses badly."""
    _, found = fitted
    scores = {one["name"]: one["score"]["value"] for one in found["candidates"] if one["score"]}
    assert all(scores[candidate.name] < scores[found["selected"]] - 0.1 for candidate in REGRESSIONS)
    assert found["selected"] in {candidate.name for candidate in NETWORKS} and scores[found["selected"]] > 0.9
    assert found["metrics"]["accuracy"] > 0.9
    assert found["headline"].startswith(("text alone ", "image alone "))
    assert ", both " in found["headline"] and "(selected)" in found["headline"]
    states = {one["name"]: one["state"] for one in found["candidates"]}
    assert states["cross-attention"] == states["conditional"] == VALIDATED
    assert found["headline"].rpartition(", ")[2].startswith(("cross-attention ", "conditional prompts "))


def test_columns_splits_and_encoders_are_reported(fitted: tuple[Path, dict[str, Any]]) -> None:
    _, found = fitted
    text = "\n".join(found["choices"])
    for expected in ("column shot", "photos", "column note", "column answer", "val: 10 %", "test: 20 %", "main: tiny:vision"):
        assert expected in text


def test_the_folder_is_an_ordinary_run(fitted: tuple[Path, dict[str, Any]], table: Path, tmp_path: Path) -> None:
    out, found = fitted
    run = shutil.copytree(out, tmp_path / "run")
    evaluated = call("eval", run, "--device", "cpu", "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["metrics"]["accuracy"] == found["metrics"]["accuracy"]
    answers = tmp_path / "answers.jsonl"
    predicted = call("predict", run, table, "-o", answers, "--device", "cpu")
    assert predicted.returncode == 0, predicted.stderr
    rows = list(csv.DictReader(table.open()))
    labels = [json.loads(line)["label"] for line in answers.read_text().splitlines()]
    assert len(labels) == len(rows) == 160
    assert sum(label == row["answer"] for label, row in zip(labels, rows, strict=True)) > 150


def test_only_the_chosen_candidate_is_tested(fitted: tuple[Path, dict[str, Any]]) -> None:
    out, found = fitted
    results = {file.parent.name: json.loads(file.read_text()) for file in out.glob("candidates/*/metrics.json")}
    assert found["selected"] in results and len(results) > 1
    assert all(result["metrics"]["test"] is None for result in results.values())
    assert not list(out.glob("candidates/*/predictions.jsonl"))
    assert RunFolder(out).result()["metrics"]["test"]["accuracy"] == found["metrics"]["accuracy"]


def test_the_temperature_is_part_of_the_saved_weights(fitted: tuple[Path, dict[str, Any]]) -> None:
    out, found = fitted
    before, after = (
        read_tensors(RunFolder(folder).checkpoint("last")[0] / "weights.safetensors")
        for folder in (out / "candidates" / found["selected"], out)
    )
    last = max(name for name in before if name.startswith("head.") and name.endswith(".weight"))
    assert found["calibration"]["temperature"] != 1.0
    assert torch.allclose(before[last], after[last] * found["calibration"]["temperature"], rtol=1e-4)


def test_the_leaderboard_has_uncertainty_cost_and_one_choice(fitted: tuple[Path, dict[str, Any]]) -> None:
    out, found = fitted
    board = json.loads((out / "leaderboard.json").read_text())
    assert [one["name"] for one in board["candidates"] if one["selected"]] == [found["selected"]]
    scored = [one for one in board["candidates"] if one["score"]]
    assert all(one["score"]["error"] >= 0 and one["seconds"] > 0 and one["trainable"] > 0 for one in scored)
    page = (out / "leaderboard.md").read_text()
    assert page.splitlines()[0] == f"# {found['headline']}"
    assert "Calibration: temperature" in page and "average of" in page


def test_the_report_begins_with_what_each_method_contributed(fitted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from mopefuse.report.run_report import report

    run = shutil.copytree(fitted[0], tmp_path / "run")
    assert report(run, device="cpu", audit=False).notes[0] == fitted[1]["headline"]


@pytest.mark.usefixtures("only_cheap")
@pytest.mark.soak
def test_a_fit_that_was_stopped_continues(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, settings = tmp_path / "run", {"device": "cpu", "seed": 1}
    names: Any = {"main": "tiny:vision", "comp": "tiny:text", "budget": 1200}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "train_leader", stop)
    with pytest.raises(Interrupted, match="resume"):
        mopefuse.fit(table, out, settings=settings, **names)
    assert not RunFolder(out).exists()
    monkeypatch.undo()
    monkeypatch.setattr(fitting, "TRAINED", ())
    monkeypatch.setattr(fitting, "NETWORKS", NETWORKS[:1])
    for repeated in ("cross_validate_regressions", "cross_validate_network"):
        monkeypatch.setattr(tryouts, repeated, stop)  # what is finished is not repeated
    assert code_of(lambda: mopefuse.fit(table, out, settings=settings, **names)) == "MF-CFG-23"
    assert code_of(lambda: mopefuse.fit(table, out, settings={**settings, "seed": 2}, resume=True, **names)) == "MF-CFG-392"
    found = mopefuse.fit(table, out, settings=settings, resume=True, **names)
    assert found.leaderboard.test["accuracy"] > 0.9 and RunFolder(out).result()["fit"]["selected"] == "mlp"


@pytest.mark.usefixtures("only_cheap")
def test_one_modality_is_enough_where_it_says_everything(pairs: Path, tmp_path: Path) -> None:
    """The colour word names the class, and the images are noise: the text alone is chosen, as the simplest."""
    found = mopefuse.fit(pairs, tmp_path / "run", budget="2m", main="tiny:vision", comp="tiny:text", settings={"device": "cpu"})
    assert found.leaderboard.chosen.entry.name == "linear-comp"
    assert "text alone 100.0 % (selected)" in found.headline


def test_without_its_default_encoders_it_says_what_to_name(table: Path, tmp_path: Path) -> None:
    done = call("fit", table, "--out", tmp_path / "run")
    assert done.returncode == 5 and "error[MF-ENC-390]" in done.stderr
    assert "--main" in done.stderr and "--comp" in done.stderr and "digits only" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--budget", "soon"), "MF-CFG-390", "--budget 10m"),
        (("--budget", "0m"), "MF-CFG-390", "'0m'"),
        (("--resume",), "MF-CFG-26", "--out"),
        (("--label-col", "none"), "MF-DATA-", "none"),
    ],
)
def test_mistakes_are_explained(table: Path, arguments: tuple[str, ...], code: str, words: str) -> None:
    done = call("fit", table, *TINY, *arguments)
    assert f"error[{code}" in done.stderr and words in done.stderr and "Traceback" not in done.stderr


def test_a_folder_of_something_else_is_left_alone(table: Path, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    done = call("fit", table, *TINY, "--out", run, "--overwrite")
    assert "error[MF-CFG-391]" in done.stderr and (run / "manifest.json").is_file()
