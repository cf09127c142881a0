"""Labels that are numbers in tables: which are mistakes, what a check shows, and which column is guessed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import call
from PIL import Image
from test_values import make_prices, table

from mopefuse.config.schema import Data
from mopefuse.data.base import DataSet
from mopefuse.data.check import check
from mopefuse.data.guess_columns import guess_columns
from mopefuse.data.load import load_data
from mopefuse.errors import DataError, MopefuseError
from mopefuse.runs.load import with_labels
from mopefuse.tasks.regression import Regression

PRICES = [f"{number * 1.37:.2f}" for number in range(100)]


@pytest.mark.parametrize(
    ("labels", "settings", "fix"),
    [
        ([*PRICES, "n/a"], {}, "correct or remove the rows, or add --on-bad skip"),
        (PRICES + ["n/a"] * 3, {}, "add --on-bad skip and raise data.max_bad_fraction, which is 0.01"),
        (PRICES + ["n/a"] * 3, {"on_bad": "skip"}, "correct or remove the rows, or raise data.max_bad_fraction, which is 0.01"),
        (PRICES + ["n/a"] * 30, {}, "use --task single-label"),
        (PRICES + ["n/a"] * 30, {"task": "regression"}, "correct or remove the rows"),
        ([price.replace(".", ",") for price in PRICES], {"task": "regression"}, "write a decimal point: 0.00"),
        ([f"masks/{number}.png" for number in range(40)], {"task": "regression"}, "or use --task segmentation"),
        ([f"a word {number}" for number in range(40)], {"task": "regression"}, "the column of the numbers with --label-col"),
    ],
    ids=["few", "too many to skip", "skip is set", "no mistakes", "the task is given", "decimal commas", "masks", "words"],
)
def test_the_fix_for_rows_without_a_number_works(labels: list[str], settings: dict[str, Any], fix: str, tmp_path: Path) -> None:
    config = table(tmp_path, labels, **settings)
    with pytest.raises(MopefuseError) as error:
        load_data(config)
    assert error.value.code == "MF-DATA-400" and error.value.fix.endswith(fix)
    if "max_bad_fraction" in fix:
        data = load_data(config.model_copy(update={"on_bad": "skip", "max_bad_fraction": 0.05}))
        assert len(data.splits["train"].rows) == 100


def test_a_decimal_comma_is_named(tmp_path: Path) -> None:
    prices = [f"{number}7,{number % 90 + 10}" for number in range(100)]
    with pytest.raises(MopefuseError, match="100 distinct labels") as error:
        load_data(table(tmp_path, prices))
    assert error.value.fix.startswith("if labels are numbers, write a decimal point: 07.10; ")
    with pytest.raises(MopefuseError, match="the numbers of column price have decimal commas") as error:
        guess_columns(columns_of(tmp_path, price=prices))
    assert error.value.fix == "write a decimal point: 07.10"


def test_amounts_in_several_currencies_are_a_warning(tmp_path: Path) -> None:
    config = table(tmp_path, [f"{'$' if number % 9 else '€'}{number + 1}.25" for number in range(40)])
    wanted = "numbers are in several currencies, and are not converted: $ (35 rows) and € (5 rows)"
    assert wanted in "".join(load_data(config).notices)
    (finding,) = (finding for finding in check(config).findings if finding.kind == "mixed-currencies")
    assert (finding.message, finding.where, finding.severity) == (wanted, "train.jsonl:1", "warning")
    one = load_data(table(tmp_path / "one", [f"${number + 1}.25" for number in range(40)]))
    assert "currencies" not in "".join(one.notices)


def test_one_shorter_list_does_not_make_numbers_classes(tmp_path: Path) -> None:
    labels: list[Any] = [[0.5], *([row * 1.37, row / 7] for row in range(40))]
    with pytest.raises(MopefuseError, match="length 1, and that of other rows of length 2") as error:
        load_data(table(tmp_path, labels))
    assert error.value.where.startswith("train.jsonl:1") and error.value.fix == "write 2 numbers in every row"


@pytest.mark.parametrize(
    ("labels", "line", "what"),
    [
        (["n/a", 1.5, 2.5, 3.1], 1, "label is a string, expected a number, as in other rows"),
        ([1.5, "cat", "dog", "cat"], 1, "label is a number, expected a string"),
        (["cat", "dog", "cat", 1.5], 4, "label is a number, expected a string"),
    ],
)
def test_the_rarer_kind_of_label_is_the_mistake(labels: list[Any], line: int, what: str, tmp_path: Path) -> None:
    with pytest.raises(MopefuseError, match=what) as error:
        load_data(table(tmp_path, labels))
    assert f"1 bad row: train.jsonl:{line} {what}" in error.value.what


def test_a_check_shows_each_target(tmp_path: Path) -> None:
    config = table(tmp_path / "data", [[number * 1000.5, number / 100] for number in range(20)])
    found = check(config).numbers["train"]
    assert (found["label_0"]["highest"], found["label_1"]["highest"]) == (19009.5, 0.19)
    done = call("data", "check", tmp_path / "data", "--html", tmp_path / "page.html")
    assert "train  label_0" in done.stdout and "train  label_1" in done.stdout
    assert '<td dir="auto">label_1</td>' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("labels", "target"), [([0.1] * 30, "label"), ([[row * 1.5, 0.1] for row in range(30)], "label_1")], ids=["one", "two"]
)
def test_a_constant_target_is_an_error_of_a_check_and_of_training(labels: list[Any], target: str, tmp_path: Path) -> None:
    table(tmp_path, labels)
    done = call("data", "check", tmp_path, "--task", "regression", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 4 and report["kinds"]["one-class"] == 1
    (problem,) = (problem for problem in report["problems"] if problem["kind"] == "one-class")
    assert problem["message"] == f"{target} is 0.1 in all rows, so there is nothing to learn"
    assert problem["code"] == "MF-DATA-07" and problem["hint"] == "specify the label column with --label-col"
    options = ("--main", "tiny:vision", "--comp", "tiny:text", "--task", "regression", "--dry-run")
    done = call("train", "--data", tmp_path, *options)
    assert done.returncode == 4 and "have the same number as label" in done.stderr, done.stderr


def test_odd_labels_are_allowed_without_making_prices_classes(tmp_path: Path) -> None:
    assert load_data(table(tmp_path, PRICES, allow_odd_labels=True)).task == "regression"


def columns_of(path: Path, **columns: list[Any]) -> Data:
    rows = len(next(iter(columns.values())))
    Image.new("RGB", (8, 8)).save(path / "a.png")
    with (path / "items.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "img", *columns])
        writer.writerows([f"some words {row}", "a.png", *(values[row] for values in columns.values())] for row in range(rows))
    return Data(path=str(path / "items.csv"))


@pytest.mark.parametrize(
    ("columns", "label"),
    [
        ({"price": PRICES}, "price"),
        ({"sku": [7 * number + 1000 for number in range(100)], "price": PRICES}, "price"),
        ({"price": PRICES, "kind": ["a", "b"] * 50}, "kind"),
        ({"area": [37 * (number // 2) for number in range(100)]}, "area"),
    ],
    ids=["price", "a code and a price", "classes are preferred", "whole numbers"],
)
def test_quantities_are_guessed_if_no_column_has_classes(columns: dict[str, list[Any]], label: str, tmp_path: Path) -> None:
    assert guess_columns(columns_of(tmp_path, **columns)).settings["label_col"] == label


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"price": PRICES, "weight": PRICES[::-1]}, "each of the columns price, weight could be the label"),
        ({"sku": [7 * number + 1000 for number in range(100)]}, "no column has few enough distinct values to be a class, or"),
    ],
    ids=["two", "only a code"],
)
def test_a_column_that_is_not_guessed_is_named_in_the_error(columns: dict[str, list[Any]], what: str, tmp_path: Path) -> None:
    with pytest.raises(MopefuseError, match=what) as error:
        guess_columns(columns_of(tmp_path, **columns))
    assert "--label-col NAME" in error.value.fix


def test_a_check_without_a_label_column_suggests_the_only_column_of_numbers(tmp_path: Path) -> None:
    prices = make_prices(tmp_path, rows=20)
    done = call("data", "check", prices, "--split-col", "split")
    assert done.returncode == 4 and "did you mean --label-col price?" in done.stdout


@pytest.mark.parametrize(("trained", "found"), [(1, 2), (2, 1), (2, 3)])
def test_a_model_is_evaluated_on_as_many_numbers_as_it_predicts(trained: int, found: int, tmp_path: Path) -> None:
    def numbers(count: int) -> DataSet:
        labels = [[row * 1.5 + 0.25 * column for column in range(count)] if count > 1 else row * 1.5 for row in range(20)]
        return load_data(table(tmp_path / str(count), labels, task="regression"))

    facts = Regression([0.0] * trained, [1.0] * trained).facts()
    with pytest.raises(DataError) as error:
        with_labels(numbers(found), {"labels": numbers(trained).labels, "task": facts}, "val")
    assert error.value.what == f"rows have {found} number{'s' * (found > 1)}, and the model predicts {trained}"
    assert error.value.fix == f"write {trained} number{'s' * (trained > 1)} per row, as in training"


def test_several_numbers_are_a_list_in_one_column(tmp_path: Path) -> None:
    pairs = [[1.37 * row, 1.37 * (row - row % 2)] for row in range(40)]
    config = columns_of(tmp_path, price=PRICES[:40], weight=PRICES[40:80], both=pairs)
    with pytest.raises(MopefuseError, match="column not found: price,weight") as error:
        load_data(config.model_copy(update={"label_col": "price,weight"}))
    assert "[1.5, 2], in a CSV file with --label-sep list" in error.value.fix
    data = load_data(config.model_copy(update={"label_col": "both", "label_sep": "list"}), require=("train",))
    assert data.task == "regression" and data.labels == ("both_0", "both_1"), "also of rows with the same number twice"
