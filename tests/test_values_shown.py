"""How the results of a regression are shown: units, intervals, and several targets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import PLAIN, call, ranks, write_rows
from PIL import Image
from test_values import SPECS, WORDS

import mopefuse
from mopefuse.errors import MopefuseError
from mopefuse.metrics.names import write_change, write_metric, write_number

pytestmark = pytest.mark.usefixtures("short_starts")


def make_offers(folder: Path) -> Path:
    """Rows with two numbers of different units, which depend on words and on how bright the image is."""
    random = np.random.default_rng(0)
    for split, count in (("train", 90), ("val", 30), ("test", 30)):
        rows = []
        for number in range(count):
            words, grey = random.choice([*WORDS], 2, replace=False), int(random.integers(20, 235))
            Image.new("RGB", (16, 16), (grey, grey, grey)).save(folder / f"{split}-{number}.png")
            label = [1e4 + 1e3 * sum(WORDS[word] for word in words) + random.normal(), grey / 1000 + random.normal() / 1000]
            rows.append({"id": f"{split}-{number}", "text": " ".join(words), "img": f"{split}-{number}.png", "label": label})
        write_rows(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def offers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_offers(tmp_path_factory.mktemp("offers"))


@pytest.fixture(scope="module")
def run(offers: Path, short_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "offers"
    options = ("--set", "regression.loss=quantile", "--epochs", "1", "--experts", "2", "--modality-dropout", "0.2")
    done = call("train", *SPECS, "--data", offers, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    r2 = json.loads((out / "metrics.json").read_text())["metrics"]["test"]["r2"]
    assert f" {r2:.3f} " in done.stdout, "not in per cent"
    return out


def test_r2_and_correlations_are_decimals_and_shares_are_in_per_cent() -> None:
    assert [write_metric(name, 0.9412) for name in ("r2", "spearman", "accuracy")] == ["0.941", "0.941", "94.1 %"]
    assert [write_metric(name, 0.9412) for name in ("mae", "rmse_sd", "interval_coverage")] == ["0.9412", "0.9412", "94.1 %"]
    assert [write_number(name, 0.5, signed=True) for name in ("r2", "accuracy", "mae")] == ["+0.500", "+50.0", "+0.5"]
    nothing = [write_number(name, value, signed=True) for name in ("r2", "accuracy") for value in (-1e-9, 1e-9)]
    assert nothing == ["0.000", "0.000", "0.0", "0.0"], "no negative zero"
    assert [write_change(name, -0.5) for name in ("r2", "accuracy")] == ["-0.500", "-50.0 points"]


def test_errors_of_several_targets_are_in_standard_deviations(run: Path, offers: Path) -> None:
    result = json.loads((run / "metrics.json").read_text())
    test, per_target = result["metrics"]["test"], result["per_label"]
    labels = [json.loads(line)["label"] for line in (offers / "train.jsonl").read_text().splitlines()]
    for name in ("mae", "rmse"):
        wanted = np.mean([row[name] / deviation for row, deviation in zip(per_target, np.std(labels, axis=0), strict=True)])
        assert name not in test and test[f"{name}_sd"] == pytest.approx(wanted)
    done = call("eval", run, "--device", "cpu")
    assert "mae_sd" in done.stdout and f"{test['mae_sd']:.4g}" in done.stdout and f"{per_target[0]['mae']:.4g}" in done.stdout
    done = call("eval", run, "--max", "mae=2", "--device", "cpu")
    assert done.returncode == 3 and "did you mean mae_sd" in done.stderr


def test_one_of_the_metrics_of_several_targets_selects_the_checkpoint(offers: Path, tmp_path: Path) -> None:
    options = (*SPECS, "--data", offers, "--out", tmp_path / "run", "--method", "linear")
    done = call("train", *options, "--select", "mae")
    assert done.returncode == 3 and "regression has no metric 'mae'" in done.stderr and "mae_sd" in done.stderr
    assert call("train", *options, "--select", "mae_sd").returncode == 0


def test_comparisons_and_pages_have_the_same_units(run: Path, offers: Path, tmp_path: Path) -> None:
    linear = tmp_path / "linear"
    done = call("train", *SPECS, "--data", offers, "--out", linear, "--method", "linear", "--set", "regression.loss=quantile")
    assert done.returncode == 0, done.stderr
    done = call("compare", run, linear, "--against", run)
    r2, mae = (json.loads((run / "metrics.json").read_text())["metrics"]["test"][name] for name in ("r2", "mae_sd"))
    assert f" {r2:.3f} " in done.stdout and f" {mae:.4g} " in done.stdout
    assert "mae_sd and rmse_sd in standard deviations of the training labels" in done.stderr and "per cent" not in done.stderr
    done = call("report", run, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    page = (run / "report.html").read_text()
    assert f"{r2:.3f}" in page and f"{100 * r2:.1f} %" not in page and "points lost" not in page


def test_the_page_draws_predicted_intervals(run: Path) -> None:
    assert call("report", run, "--device", "cpu").returncode == 0
    page = (run / "report.html").read_text()
    assert "Bars are the predicted intervals, from the 5 % to the 95 % quantile." in page
    line = json.loads((run / "predictions.jsonl").read_text().splitlines()[0])
    low, high = (line["quantiles"]["label_0"][level] for level in ("0.05", "0.95"))
    assert f"{line['id']}: " in page and '"low":' in page and low < high


def test_a_missing_modality_costs_r2_and_is_shown_as_a_decimal(run: Path) -> None:
    done = call("eval", run, "--missing", "text=0.5", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    (saved,) = (json.loads(path.read_text()) for path in run.glob("missing-test-*.json"))
    (r2,) = (cell["metrics"]["r2"] for cell in saved["cells"])
    assert f" {r2:.3f}" in done.stdout and "%" not in done.stdout.splitlines()[-1].replace("50 %", "")
    assert call("eval", run, "--missing", "grid", "--device", "cpu").returncode == 0
    assert call("report", run, "--device", "cpu").returncode == 0
    assert "Where a modality is missing" in (run / "report.html").read_text()


def test_two_processes_train_and_test_like_one(offers: Path, tmp_path: Path) -> None:
    options = ("--data", offers, "--epochs", "1", "--experts", "2", "--batch", "32", "--warm-start", "none")
    plain = (*PLAIN, "--set", "prompts.dropout=0", "--set", "router.noise=false")
    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = ranks(processes, "train", *SPECS, *options, *plain, "--out", out)
        assert done.returncode == 0, done.stderr
        results.append(json.loads((out / "metrics.json").read_text())["metrics"]["test"])
        assert len((out / "predictions.jsonl").read_text().splitlines()) == 30
    assert results[0] == pytest.approx(results[1], abs=1e-3)


def test_settings_about_classes_say_that_they_have_no_effect(offers: Path, tmp_path: Path) -> None:
    options = ("--method", "linear", "--fold-labels", "--allow-odd-labels")
    done = call("train", *SPECS, "--data", offers, "--out", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    for flag in ("--fold-labels", "--allow-odd-labels"):
        assert f"{flag} has no effect: the task is regression" in done.stderr
    done = call("predict", tmp_path / "run", offers / "test.jsonl", "--top", "1", "--device", "cpu")
    assert done.returncode == 0 and "--top has no effect: the task is regression" in done.stderr


@pytest.mark.matrix
def test_an_export_speaks_of_values(run: Path, tmp_path: Path) -> None:
    done = call("export", run, "--format", "onnx", "--int8", "-o", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    assert "largest difference of standardised values" in done.stdout and "label" not in done.stdout
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "standardised values" in card and "logits" not in card and "validation r2 after 8-bit weights" in card


def test_a_model_of_a_run_can_be_saved_as_an_adapter(run: Path, tmp_path: Path) -> None:
    with pytest.raises(MopefuseError, match=r"needs a model from build_fusion or load_model, got RunModel") as error:
        mopefuse.save_adapter(mopefuse.load(run, device="cpu").model, tmp_path / "adapter")  # type: ignore[arg-type]
    assert "pass the result of mopefuse.load_model" in error.value.fix
    saved = mopefuse.save_adapter(mopefuse.load_model(run, device="cpu"), tmp_path / "adapter", labels=["price", "size"])
    (value,) = mopefuse.load(saved, device="cpu").predict([Image.new("RGB", (16, 16))], ["red large"])
    assert value["value"].keys() == value["quantiles"].keys() == {"price", "size"}
