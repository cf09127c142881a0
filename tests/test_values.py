"""Regression: losses, metrics and ridge regression against scikit-learn, inference of the task, and a run from end to end."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import call, code_of
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import spearmanr
from sklearn import metrics as sk
from sklearn.linear_model import Ridge

import mopefuse
from mopefuse.config.method_settings import Linear
from mopefuse.config.schema import Data, build_config
from mopefuse.data.labels import Labels, Targets
from mopefuse.data.labels_task import describe_task, look_like_quantities
from mopefuse.data.load import load_data
from mopefuse.errors import MopefuseError
from mopefuse.fusion.regression import FitSettings, Fold, fit_heads
from mopefuse.metrics.bootstrap import difference
from mopefuse.metrics.names import ERRORS
from mopefuse.metrics.values import ValueOutcome
from mopefuse.tasks.base import get_task, task_from_facts
from mopefuse.tasks.regression import Regression, parse_number

SPECS = ("--main", "tiny:vision", "--comp", "tiny:text", "--device", "cpu")
pytestmark = pytest.mark.usefixtures("short_starts")
WORDS = {"red": 3, "green": 7, "blue": 1, "small": -2, "large": 5, "old": -4, "new": 2, "fine": 6}


def make_prices(folder: Path, *, rows: int = 150, name: str = "items.csv", seed: int = 0) -> Path:
    """A table with a price that depends on words and on how bright the image is."""
    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with (folder / name).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "text", "img", "price", "split"])
        for number in range(rows):
            words, grey = random.choice([*WORDS], 2, replace=False), int(random.integers(20, 235))
            Image.new("RGB", (16, 16), (grey, grey, grey)).save(folder / "images" / f"{number}.png")
            price = 100 + 10 * sum(WORDS[word] for word in words) + grey / 2 + random.normal()
            split = ("train", "train", "train", "val", "test")[number % 5]
            table.writerow([number, " ".join(words), f"images/{number}.png", f"{price:.2f}", split])
    return folder / name


@pytest.fixture(scope="module")
def prices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_prices(tmp_path_factory.mktemp("prices"))


def columns(table: Path) -> tuple[str, ...]:
    return ("--data", str(table), "--label-col", "price", "--split-col", "split")


@pytest.fixture(scope="module")
def run(prices: Path, short_starts: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "prices"
    done = call("train", *SPECS, *columns(prices), "--out", out, "--epochs", "1", "--experts", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("task: regression, the number price (inferred from the labels")
    return out


# -- metrics and losses


@given(st.integers(2, 40), st.integers(1, 3), st.integers(0, 999))
def test_metrics_equal_those_of_scikit_learn_and_scipy(samples: int, targets: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    actual = random.normal(1000, 3, (samples, targets)).astype(np.float32)
    predicted = (actual + random.normal(0, 2, actual.shape)).astype(np.float32)
    task = Regression()
    found = task.compute(torch.from_numpy(predicted), torch.from_numpy(actual))
    assert found["r2"] == pytest.approx(sk.r2_score(actual.astype(float), predicted.astype(float)), abs=1e-9)
    mae, rmse = ("mae", "rmse") if targets == 1 else ("mae_sd", "rmse_sd")
    assert found[mae] == pytest.approx(sk.mean_absolute_error(actual, predicted), rel=1e-5)
    assert found[rmse] == pytest.approx(sk.root_mean_squared_error(actual, predicted), rel=1e-5)
    ranks = [spearmanr(p, a).statistic for p, a in zip(predicted.T, actual.T, strict=True)]
    assert found["spearman"] == pytest.approx(np.mean(ranks), abs=1e-9)


@pytest.mark.parametrize("metric", Regression.metrics)
def test_a_resample_has_the_metric_of_its_repeated_samples(metric: str) -> None:
    random = np.random.default_rng(0)
    actual, deviation = random.normal(size=(30, 2)), np.array([0.5, 3.0])
    outcome = ValueOutcome(actual + random.normal(size=actual.shape), actual, deviation)
    chosen = random.integers(0, 30, 30)
    weights = np.bincount(chosen, minlength=30).astype(float)[None]
    repeated = ValueOutcome(outcome.predicted_ST[chosen], outcome.actual_ST[chosen], deviation)
    assert outcome.measure(metric, weights)[0] == pytest.approx(repeated.measure(metric, np.ones((1, 30)))[0])
    perfect = ValueOutcome(actual, actual, deviation)
    worse = difference([outcome], [perfect], metric, resamples=200)
    assert (worse.value > 0) == (metric in ERRORS) and worse.p < 0.05
    assert difference([perfect], [perfect], metric, resamples=50).p == 1


def test_equal_true_values_have_no_variance_to_explain() -> None:
    same = torch.full((5, 1), 3.0)
    assert Regression().compute(same, same)["r2"] == 1
    assert Regression().compute(same + torch.arange(5)[:, None], same)["r2"] == 0
    assert Regression().compute(same, same)["spearman"] == 0


def test_losses_do_not_depend_on_units() -> None:
    """A target in cents has the loss of one in euros."""
    draw = torch.Generator().manual_seed(0)
    targets, outputs = torch.randn(20, 1, generator=draw), torch.randn(20, 1, generator=draw)
    rows = [[str(value)] for value in targets[:, 0].tolist()], [[str(100 * value)] for value in targets[:, 0].tolist()]
    for loss in ("mse", "mae", "huber"):
        one, other = Regression([2.0], [0.5], loss=loss), Regression([200.0], [50.0], loss=loss)
        encoded = [Targets(Labels.from_rows(each), ("x",), task).dense() for each, task in zip(rows, (one, other), strict=True)]
        torch.testing.assert_close(one.loss(outputs, encoded[0]), other.loss(outputs, encoded[1]))
        torch.testing.assert_close(100 * one.values(outputs), other.values(outputs))
        torch.testing.assert_close(one.in_units(encoded[0]).float(), targets)


def test_the_limits_of_the_losses() -> None:
    """Huber's loss with a large delta is half the squared error, and the loss of the median is half the absolute error."""
    draw = torch.Generator().manual_seed(0)
    targets, outputs = torch.randn(20, 2, generator=draw), torch.randn(20, 2, generator=draw)
    squared, absolute = Regression().loss(outputs, targets), Regression(loss="mae").loss(outputs, targets)
    torch.testing.assert_close(2 * Regression(loss="huber", delta=100.0).loss(outputs, targets), squared)
    torch.testing.assert_close(2 * Regression(loss="quantile").loss(outputs, targets), absolute)


def test_the_quantile_loss_is_least_at_the_quantile() -> None:
    targets = torch.arange(101.0)[:, None]
    task = Regression(loss="quantile", quantiles=(0.1, 0.5, 0.9))
    means = [float(task.loss(torch.full((101, 3), value), targets)[:].mean()) for value in (10.0, 50.0, 90.0)]
    best = float(task.loss(torch.tensor([10.0, 50.0, 90.0]).expand(101, 3), targets).mean())
    assert best < min(means)
    for place, value in enumerate((10.0, 50.0, 90.0)):
        for moved in (-3.0, 3.0):
            outputs = torch.tensor([10.0, 50.0, 90.0])
            outputs[place] = value + moved
            assert float(task.loss(outputs.expand(101, 3), targets).mean()) > best


# -- ridge regression


@pytest.mark.parametrize("samples", [12, 80], ids=["fewer samples than features", "more"])
def test_ridge_regression_equals_scikit_learns(samples: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(samples, 20, generator=draw), torch.randn(samples, 2, generator=draw)
    y = 50 + 10 * x[:, :2] + noise
    task = Regression(y.double().mean(0).tolist(), y.double().std(0, correction=0).tolist())
    how = FitSettings(2, task, 0.5, False, Linear(strengths=(0.05,)))
    z = ((y.double() - y.double().mean(0)) / y.double().std(0, correction=0)).float()
    fold = Fold({"main": x}, z)
    state, _ = fit_heads({"head": ("main",)}, fold, fold, how)
    standard = (x - state["standard.main.mean_C"]) / state["standard.main.deviation_C"]
    ours = task.values(standard @ state["head.weight"].T + state["head.bias"])
    theirs = Ridge(alpha=20.0).fit(standard.double().numpy(), z.double().numpy())
    wanted = theirs.predict(standard.double().numpy()) * y.double().std(0, correction=0).numpy() + y.double().mean(0).numpy()
    np.testing.assert_allclose(ours.numpy(), wanted, rtol=1e-4)


def test_quantiles_of_a_linear_start_contain_their_share_of_the_training_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=draw)
    y = x[:, :1] + torch.randn(500, 1, generator=draw)
    task = Regression([0.0], [1.0], loss="quantile", quantiles=(0.1, 0.5, 0.9))
    how = FitSettings(3, task, 0.5, False, Linear(strengths=(1.0,)))
    fold = Fold({"main": x}, y)
    state, _ = fit_heads({"head": ("main",)}, fold, fold, how)
    standard = (x - state["standard.main.mean_C"]) / state["standard.main.deviation_C"]
    outputs = standard @ state["head.weight"].T + state["head.bias"]
    assert (y <= outputs).double().mean(dim=0).tolist() == pytest.approx([0.1, 0.5, 0.9], abs=0.01)


# -- what a label is


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("12.5", 12.5), ("-3", -3), ("+3", 3), ("1,299", 1299), ("1,299.50", 1299.5), ("1e-3", 1e-3), (".5", 0.5), ("5.", 5)],
        *[("€ 3", 3), ("-$5", -5), ("\u22125", -5), ("1\u202f299", 1299), ("₹ 500", 500), ("12 %", 12)],
        *((text, None) for text in ("", "abc", "1.2.3", "12 apples", "nan", "inf", "1e999", "0x10", "1_000", "--3", "1 2")),
        *((text, None) for text in ("$", "٣", "3,5", "0,595", "12345,678", "1,299,50")),
    ],
)  # fmt: skip
def test_numbers_are_parsed_as_people_write_them(text: str, value: float | None) -> None:
    assert parse_number(text) == value


@given(st.text(alphabet="0123456789.,eE+-$€% \u2212\u202f٣x", max_size=12))
def test_no_text_breaks_the_parser(text: str) -> None:
    value = parse_number(text)
    assert value is None or abs(value) < 1e30


@pytest.mark.parametrize(
    ("labels", "rows", "quantities"),
    [
        ([f"{number * 3.17:.2f}" for number in range(30)], 100, True),
        (["1.25", "2.75", "3.1"], 4, True),
        ([str(number * 37) for number in range(40)], 100, True),
        ([str(number) for number in range(10)], 100, False),
        ([str(number) for number in range(1980, 2020)], 100, False),
        (["1.0", "1.5", "2.0", "2.5", "3.0", "3.5", "4.0"], 100, False),
        ([f"{number:03}" for number in range(0, 900, 7)], 300, False),
        (["0", "1"], 10, False),
        (["a", "b", *[f"{number * 3.17:.2f}" for number in range(30)]], 100, False),
        (["n/a", *[f"{number * 3.17:.2f}" for number in range(30)]], 100, True),
    ],
    ids=["prices", "few of few rows", "far apart", "digits", "years", "ratings", "codes", "yes or no", "words", "a mistake"],
)
def test_quantities_are_told_from_codes(labels: list[str], rows: int, quantities: bool) -> None:
    assert look_like_quantities(labels, rows) is quantities


def table(folder: Path, labels: list[Any], **settings: Any) -> Data:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(len(labels)):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number}.png")
    rows = [{"id": str(i), "text": f"text {i}", "img": f"{i}.png", "label": label} for i, label in enumerate(labels)]
    for split in ("train", "val"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(path=str(folder), **settings)


def test_numbers_in_json_need_no_quotes(tmp_path: Path) -> None:
    data = load_data(table(tmp_path, [0.5, 1.25, -3, 7.125]))
    assert (data.task, data.labels) == ("regression", ("label",))
    assert data.targets("train").tolist() == [[0.5], [1.25], [-3.0], [7.125]]
    classes = load_data(table(tmp_path / "codes", [0, 1, 1, 0]))
    assert (classes.task, classes.labels) == ("single-label", ("0", "1"))


def test_lists_of_numbers_are_several_targets_in_order_with_repetitions(tmp_path: Path) -> None:
    data = load_data(table(tmp_path, [[1.5, 1.5], [2.25, 0.5], [0.125, 9.5]]))
    assert (data.task, data.labels, data.outputs) == ("regression", ("label_0", "label_1"), 2)
    assert data.targets("val").tolist() == [[1.5, 1.5], [2.25, 0.5], [0.125, 9.5]]


@pytest.mark.parametrize(
    ("labels", "settings", "code", "what"),
    [
        ([1.5, "n/a", 2.5, 3.1], {}, "MF-DATA-03", "label is a string, expected a number"),
        (["1.5", "n/a", "2.5"], {"task": "regression"}, "MF-DATA-400", "the label 'n/a' is not a number"),
        ([[1.5, 2.5], [1.25]], {"task": "regression"}, "MF-DATA-400", "a list of length 1, and that of other rows of length 2"),
        ([["a"], ["b"]], {"task": "single-label"}, "MF-DATA-05", "labels are lists"),
        (["a", "b"], {"task": "regress"}, "MF-CFG-338", "task must be one of"),
    ],
    ids=["mixed", "text", "lengths", "lists", "typo"],
)
def test_labels_that_are_not_of_the_task_are_refused(
    labels: list[Any], settings: dict[str, Any], code: str, what: str, tmp_path: Path
) -> None:
    with pytest.raises(MopefuseError, match=what) as error:
        load_data(table(tmp_path, labels, **settings))
    assert error.value.code == code


def test_rows_are_held_out_and_drawn_regardless_of_their_numbers(tmp_path: Path) -> None:
    config = table(tmp_path, [number * 1.37 for number in range(40)])
    (tmp_path / "val.jsonl").unlink()
    data = load_data(config.model_copy(update={"val_fraction": 0.25, "fraction": 0.5}))
    assert {name: len(split.rows) for name, split in data.splits.items()} == {"train": 15, "val": 10}
    assert code_of(lambda: load_data(config.model_copy(update={"val_fraction": 0.25, "shots": 2}))) == "MF-CFG-400"


class Numbers(NamedTuple):
    """Targets of a training split."""

    number_ST: Any

    def numbers(self) -> Any:
        return self.number_ST


def test_a_label_without_variance_and_class_weights_are_refused() -> None:
    config = build_config({"main": "tiny:vision", "comp": "tiny:text"})
    assert code_of(lambda: get_task("regression").fitted(Numbers(np.ones((4, 1))), config)) == "MF-DATA-07"
    balanced = build_config({"main": "tiny:vision", "comp": "tiny:text", "train": {"class_weights": "balanced"}})
    assert code_of(lambda: get_task("regression").fitted(Numbers(np.arange(4.0)[:, None]), balanced)) == "MF-CFG-400"


def test_a_task_is_made_again_from_its_facts() -> None:
    task = Regression([1.5, 2.0], [0.1, 3.0], loss="quantile", quantiles=(0.1, 0.5))
    assert task_from_facts(json.loads(json.dumps(task.facts()))) == task
    for spoilt in ({"deviation": [0.0, 1.0]}, {"mean": [1.0]}, {"loss": "x"}, {"quantiles": [0.1]}, {"delta": None}):
        assert code_of(lambda spoilt=spoilt: task_from_facts(task.facts() | spoilt)) == "MF-CKPT-03"


# -- a run


def test_a_run_beats_the_mean_and_starts_at_the_best_simple_model(run: Path) -> None:
    result, start = (json.loads((run / name).read_text()) for name in ("metrics.json", "start.json"))
    assert result["metrics"]["val"]["r2"] > 0.1
    assert "ridge regression on main and comp" in {one["name"] for one in start["baselines"]}
    assert result["thresholds"] is None and result["per_label"][0]["label"] == "price"


def test_predictions_have_a_value_and_every_metric_follows_from_them(run: Path, prices: Path) -> None:
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [*lines[0]] == ["id", "value", "true"]
    predicted, actual = (np.array([line[key] for line in lines]) for key in ("value", "true"))
    test = json.loads((run / "metrics.json").read_text())["metrics"]["test"]
    assert test["r2"] == pytest.approx(sk.r2_score(actual, predicted), abs=1e-4)
    assert test["mae"] == pytest.approx(np.abs(actual - predicted).mean(), rel=1e-4)
    with prices.open() as file:
        by_id = {row["id"]: float(row["price"]) for row in csv.DictReader(file)}
    assert {line["id"]: line["true"] for line in lines} == {i: price for i, price in by_id.items() if int(i) % 5 == 4}
    done = call("predict", run, prices, "--device", "cpu")
    answers = {row["id"]: row["value"] for row in map(json.loads, done.stdout.splitlines())}
    assert [answers[line["id"]] for line in lines] == pytest.approx(predicted.tolist(), rel=1e-4)


def test_a_csv_of_predictions_has_a_column_of_values(run: Path, prices: Path, tmp_path: Path) -> None:
    assert call("predict", run, prices, "-o", tmp_path / "out.csv", "--device", "cpu").returncode == 0
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [*rows[0]] == ["id", "value", "error"] and all(float(row["value"]) > 0 for row in rows)


def test_eval_report_and_compare_handle_numbers(run: Path, prices: Path, tmp_path: Path) -> None:
    done = call("eval", run, "--json", "--device", "cpu")
    assert json.loads(done.stdout)["metrics"]["rmse"] > 0
    assert call("eval", run, "--min", "r2=0.999", "--device", "cpu").returncode == 10
    reported = call("report", run, "--device", "cpu")
    assert reported.returncode == 0, reported.stderr
    assert "Predicted and true values" in (run / "report.html").read_text()
    done = call("train", *SPECS, *columns(prices), "--out", tmp_path / "linear", "--method", "linear")
    assert "ridge regression, chosen on validation" in done.stderr
    compared = call("compare", run, tmp_path / "linear", "--json")
    assert [row["metrics"]["test"].keys() for row in json.loads(compared.stdout)["rows"]]


@pytest.mark.matrix
def test_an_export_predicts_the_values_of_the_run(run: Path, tmp_path: Path) -> None:
    done = call("export", run, "--format", "onnx", "-o", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    ours, theirs = (mopefuse.load(path, device="cpu") for path in (run, tmp_path / "bundle"))
    image, text = Image.new("RGB", (16, 16), (90, 90, 90)), "red large"
    value = ours.predict([image], [text])[0]["value"]
    assert theirs.predict([image], [text])[0]["value"] == pytest.approx(value, rel=1e-3)


def test_an_interrupted_run_resumes_exactly(prices: Path, tmp_path: Path) -> None:
    options = (*SPECS, *columns(prices), "--experts", "2", "--warm-start", "none", "--batch", "30")
    options = (*options, "--set", "train.schedule=constant", "--set", "train.warmup=0")
    assert call("train", *options, "--out", tmp_path / "whole", "--epochs", "2").returncode == 0
    assert call("train", *options, "--out", tmp_path / "parts", "--epochs", "1").returncode == 0
    assert call("train", *options, "--out", tmp_path / "parts", "--epochs", "2", "--resume").returncode == 0
    results = [json.loads((tmp_path / name / "metrics.json").read_text())["metrics"] for name in ("whole", "parts")]
    assert results[0] == results[1]


def test_quantiles_give_an_interval(prices: Path, tmp_path: Path) -> None:
    options = ("--set", "regression.loss=quantile", "--epochs", "1", "--experts", "2")
    done = call("train", *SPECS, *columns(prices), "--out", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    inside = []
    for line in map(json.loads, (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()):
        low, middle, high = line["quantiles"].values()
        assert low <= middle <= high and middle == line["value"]
        inside.append(low <= line["true"] <= high)
    test = json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]["test"]
    assert test["interval_coverage"] == pytest.approx(np.mean(inside))


def test_data_check_summarises_numbers_and_lists_what_is_none(prices: Path, tmp_path: Path) -> None:
    done = call("data", "check", prices, *columns(prices)[2:], "--json")
    labels = json.loads(done.stdout)["labels"]
    assert labels["task"] == "regression" and labels["numbers"]["train"]["price"]["highest"] > 0
    assert call("data", "check", prices, *columns(prices)[2:], "--html", tmp_path / "page.html").returncode in (0, 4)
    assert "three quarters" in (tmp_path / "page.html").read_text()
    table(tmp_path / "odd", ["1.5", "n/a", "2.5"])
    done = call("data", "check", tmp_path / "odd", "--task", "regression", "--json")
    assert done.returncode == 4 and json.loads(done.stdout)["kinds"]["label-not-a-number"] == 2


def test_training_in_python_takes_rows_with_numbers(prices: Path) -> None:
    dataset = mopefuse.PairDataset(prices, "train", label_col="price", split_col="split")
    model = mopefuse.build_fusion("tiny:vision", "tiny:text", labels=dataset.labels, task=dataset.task, experts=2)
    batch = model.collate([dataset[0], dataset[1]])
    assert batch.targets is not None and batch.targets.shape == (2, 1) and batch.targets.dtype == torch.float32
    assert model(batch).logits.shape == (2, 1) and model.task == "regression"
    assert code_of(lambda: model.collate([{**dataset[0], "label": "12"}])) == "MF-DATA-337"


@pytest.mark.parametrize(("metric", "best"), [("mae", min), ("spearman", max), ("loss", min)])
def test_any_metric_of_the_task_selects_the_checkpoint(metric: str, best: Any, prices: Path, tmp_path: Path) -> None:
    options = ("--select", metric, "--warm-start", "none", "--epochs", "4", "--experts", "2", "--batch", "30")
    done = call("train", *SPECS, *columns(prices), "--out", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = {line["step"]: line["val"][metric] for line in lines if "val" in line}
    selected = json.loads((tmp_path / "run" / "metrics.json").read_text())["selected_step"]
    assert len(scores) == 4 and scores[selected] == best(scores.values())


def test_an_unknown_metric_is_refused_before_training(prices: Path, tmp_path: Path) -> None:
    done = call("train", *SPECS, *columns(prices), "--out", tmp_path / "run", "--select", "accuracy")
    assert done.returncode == 3 and "regression has no metric 'accuracy' · --select" in done.stderr


def test_a_study_of_numbers_compares_by_any_metric_and_a_search_by_a_score(prices: Path, tmp_path: Path) -> None:
    base = {"main": "tiny:vision", "comp": "tiny:text", "method": "linear"}
    base |= {"data": {"path": str(prices), "label_col": "price", "split_col": "split"}}
    study = {"settings": base, "cells": {"both": {}, "text": {"linear.features": "comp"}}, "metric": "rmse"}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    done = call("study", tmp_path / "study.yaml", "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    done = call("compare", tmp_path / "out", "--against", "text", "--json")
    rows = {row["label"]: row for row in json.loads(done.stdout)["rows"]}
    assert rows["both"]["best"] and rows["both"]["versus"]["value"] < 0, "less is better"
    for changes, message in (
        ({"metric": "mse"}, "there is no metric 'mse'"),
        ({"cells": {}, "search": {"space": {"train.lr": {"low": 1e-3, "high": 1e-2}}}}, "a search maximises"),
    ):
        (tmp_path / "bad.yaml").write_text(json.dumps({**study, **changes}))
        done = call("study", tmp_path / "bad.yaml", "--out", tmp_path / "no")
        assert done.returncode == 3 and message in done.stderr, done.stderr


def test_swapping_an_encoder_keeps_the_task(run: Path, tmp_path: Path) -> None:
    done = call("swap-encoder", run, "--comp", "tiny:text-b", "-o", tmp_path / "swapped", "--epochs", "1")
    assert done.returncode == 0 and "r2" in done.stdout, done.stderr
    old, new = (json.loads((path / "manifest.json").read_text())["task"] for path in (run, tmp_path / "swapped"))
    assert old == new and new["name"] == "regression"


def test_fit_chooses_a_regression(prices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopefuse.autofit.fit.TRAINED", ())  # they take the longest
    done = call("fit", prices, *SPECS[:4], "--budget", "1h", "--out", tmp_path / "fit")
    assert done.returncode == 0, done.stderr
    assert "training " in done.stderr and "{linear}" not in done.stderr + done.stdout
    assert "calibration_error" not in done.stdout and "ridge" in (tmp_path / "fit" / "leaderboard.md").read_text()
    predicted = call("predict", tmp_path / "fit", prices)
    assert predicted.returncode == 0 and "value" in json.loads(predicted.stdout.splitlines()[0])


def test_a_large_offset_costs_no_digits(tmp_path: Path) -> None:
    """Dates in seconds: a float32 has steps of 128 there."""
    data = load_data(table(tmp_path, [1.6e9 + number * 1.25 for number in range(40)]))
    task = get_task("regression").fitted(data.sparse_targets("train"), build_config({"main": "a:b", "comp": "a:b"}))
    assert isinstance(task, Regression)
    fitted = Targets(data.splits["train"].labels, data.labels, task)
    numbers = [1.6e9 + number * 1.25 for number in range(40)]
    assert task.in_units(fitted.dense())[:, 0].tolist() == pytest.approx(numbers, abs=1e-4)
    (line,) = task.prediction_lines([(torch.tensor([0]), torch.tensor([0.1]))], data.splits["train"].rows, data.labels)
    assert json.loads(line)["value"] == pytest.approx(1.6e9 + 24.375 + 0.1 * task.deviation[0], abs=1e-4)


def test_a_few_labels_that_are_not_numbers_can_be_skipped(tmp_path: Path) -> None:
    config = table(tmp_path, [f"{number * 1.37:.2f}" for number in range(150)] + ["n/a"])
    assert code_of(lambda: load_data(config)) == "MF-DATA-400"
    data = load_data(config.model_copy(update={"on_bad": "skip"}))
    assert len(data.splits["train"].rows) == 150 and data.task == "regression"
    assert "the label is not a number" in str(data.splits["train"].skipped[0])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--min", "mae=3"), "less mae is better, so --min would refuse good models · --min · fix: write --max mae=3"),
        (("--max", "r2=0.5"), "more r2 is better, so --max would refuse good models · --max · fix: write --min r2=0.5"),
        (("--max", "mae=0.001"), "above 0.001 · --max · fix: train longer, or raise the threshold"),
        (("--max", "mae=x"), "not a quality gate: 'mae=x' · --max · fix: write --max mae=2.5"),
    ],
    ids=["minimum of an error", "maximum of a score", "too large", "no number"],
)
def test_errors_have_maximum_gates(option: tuple[str, str], message: str, run: Path) -> None:
    done = call("eval", run, *option, "--device", "cpu")
    assert done.returncode in (3, 10) and message in done.stderr, done.stderr


def test_ages_are_classes_with_a_hint_and_numbers_on_request(tmp_path: Path) -> None:
    config = table(tmp_path, [str(18 + number % 40) for number in range(60)])
    hint = describe_task(get_task("single-label"), tuple(str(age) for age in range(18, 58)), config)
    assert hint.endswith("(they are numbers; to predict a number, add --task regression)")
    with pytest.raises(MopefuseError) as error:
        load_data(config)
    assert "use --task regression" in error.value.fix
    assert load_data(config.model_copy(update={"task": "regression"})).task == "regression"
    dataset = mopefuse.PairDataset(tmp_path, task="regression")
    assert dataset.task.mean == pytest.approx([np.mean([18 + number % 40 for number in range(60)])])
    assert dataset[3]["label"] == 21
