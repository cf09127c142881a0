"""New pairs get predictions in input order, the same as in evaluation; an invalid pair gets an error and does not affect
others."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TINY, call, code_of, make_pairs, ranks, run_cli, write_rows
from PIL import Image
from tasks_of import SINGLE

import mopefuse
from mopefuse.config.schema import Data
from mopefuse.inference.pairs import read_pairs
from mopefuse.inference.predict import as_csv, predict_pairs

MODALITIES = ("image", "text")


@pytest.fixture(scope="module")
def multi(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A multi-label data set and a run on it with tuned thresholds."""
    root = make_pairs(tmp_path_factory.mktemp("multi") / "data", multi=True)
    run = root.parent / "run"
    done = call("train", *TINY, "--data", root, "--out", run, "--steps", "2", "--threshold", "tuned")
    assert done.returncode == 0, done.stderr
    return root, run


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without(prediction: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in prediction.items() if name not in names}


def assert_alike(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal except for the last digits of probabilities, which depend on the batch size."""
    assert without(one, "probabilities") == without(other, "probabilities")
    assert one["probabilities"] == pytest.approx(other["probabilities"], abs=2e-5)


# -- the same as evaluation


def test_predictions_for_a_split_equal_those_of_evaluation(trained: Path, pairs: Path, tmp_path: Path) -> None:
    done = call("predict", trained, pairs / "test.jsonl", "-o", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "7 rows" in done.stderr
    for mine, theirs in zip(rows(tmp_path / "out.jsonl"), rows(trained / "predictions.jsonl"), strict=True):
        assert_alike(mine, without(theirs, "true"))


def test_multi_label_predictions_use_the_thresholds_of_the_run(multi: tuple[Path, Path], tmp_path: Path) -> None:
    root, run = multi
    assert call("predict", run, root / "test.jsonl", "-o", tmp_path / "out.jsonl").returncode == 0
    for mine, theirs in zip(rows(tmp_path / "out.jsonl"), rows(run / "predictions.jsonl"), strict=True):
        assert_alike(mine, without(theirs, "true"))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_predictions_do_not_depend_on_the_batch_size(trained: Path, pairs: Path, batch: int) -> None:
    predictor = mopefuse.load(trained, device="cpu")
    whole = list(predict_pairs(predictor, read_pairs(pairs / "test.jsonl", Data(), MODALITIES), batch=32))
    batched = predict_pairs(predictor, read_pairs(pairs / "test.jsonl", Data(), MODALITIES), batch=batch)
    for one, other in zip(batched, whole, strict=True):
        assert_alike(one, other)


# -- Python


def test_the_python_predictor_accepts_images_of_any_mode(trained: Path, pairs: Path) -> None:
    predictor = mopefuse.load(trained, device="cpu")
    with Image.open(pairs / "images" / "test-0.png") as image:
        predictions = predictor.predict([image, image.convert("RGBA")], ["what is the red digit"] * 2, top=2, routing=True)
    assert_alike(predictions[0], predictions[1])
    assert list(predictions[0]["probabilities"].values()) == sorted(predictions[0]["probabilities"].values(), reverse=True)
    assert len(predictions[0]["probabilities"]) == 2
    assert next(iter(predictions[0]["probabilities"])) == predictions[0]["label"]
    assert [round(sum(layer), 5) for layer in predictions[0]["routing"]] == [1.0] * 4
    assert predictor.predict([], []) == []
    assert code_of(lambda: predictor.predict([], ["a"])) == "MF-DATA-17"


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    assert code_of(lambda: mopefuse.load(tmp_path / "none")) == "MF-CKPT-04"
    assert code_of(lambda: mopefuse.load(tmp_path)) == "MF-CKPT-04"


# -- input


@pytest.fixture
def mixed(pairs: Path, tmp_path: Path) -> Path:
    """Valid pairs among invalid ones."""
    good = rows(pairs / "test.jsonl")
    images = tmp_path / "images"
    images.mkdir()
    for row in good:
        (tmp_path / row["img"]).write_bytes((pairs / row["img"]).read_bytes())
    (images / "broken.png").write_bytes(b"<html>")
    outside, broken, missing = "../x.png", "images/broken.png", "images/none.png"
    bad = [{"text": "t"}, {"id": "b", "text": None, "img": "x"}]
    bad += [{"id": name, "text": "t", "img": img} for name, img in (("c", outside), ("d", broken), ("e", missing))]
    write_rows(tmp_path / "in.jsonl", [good[0], *bad[:2], good[1], *bad[2:], without(good[2], "label")])
    with (tmp_path / "in.jsonl").open("a") as file:
        file.write("nonsense\n")
    return tmp_path / "in.jsonl"


def test_an_invalid_pair_becomes_a_row_with_its_error(trained: Path, mixed: Path, tmp_path: Path) -> None:
    done = call("predict", trained, mixed, "-o", tmp_path / "out.jsonl", "--batch", "2")
    assert done.returncode == 0, done.stderr
    assert "9 rows, 6 of which could not be read" in done.stderr
    predictions = rows(tmp_path / "out.jsonl")
    assert [row["id"] for row in predictions] == ["test-0", "2", "3", "test-1", "c", "d", "e", "test-2", "9"]
    codes = [row["error"]["code"] if "error" in row else "" for row in predictions]
    assert codes == ["", "MF-DATA-03", "MF-DATA-03", "", "MF-SEC-01", "MF-DATA-13", "MF-DATA-11", "", "MF-DATA-03"]
    assert all(("label" in row) != ("error" in row) for row in predictions)


def test_predicting_only_invalid_rows_is_an_error(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,text,photo\n1,a,x.png\n2,b,y.png\n")
    done = call("predict", trained, tmp_path / "in.csv", "-o", tmp_path / "out.jsonl")
    assert done.returncode == 4
    assert "could not read any of 2 rows" in done.stderr and "--image-col photo" in done.stderr
    assert len(rows(tmp_path / "out.jsonl")) == 2
    (tmp_path / "in.csv").write_text("id,text,photo\n")
    assert call("predict", trained, tmp_path / "in.csv").returncode == 0, "an empty table is not an error"


def test_strict_stops_at_the_first_invalid_row_and_writes_nothing(trained: Path, mixed: Path, tmp_path: Path) -> None:
    done = call("predict", trained, mixed, "-o", tmp_path / "out.jsonl", "--strict")
    assert (done.returncode, (tmp_path / "out.jsonl").exists()) == (4, False)
    assert "in.jsonl:2 has no img" in done.stderr


def test_rows_on_standard_input_are_predicted_line_by_line(trained: Path, mixed: Path) -> None:
    options = ["--image-root", str(mixed.parent), "--batch", "1"]
    command = [sys.executable, "-m", "mopefuse", "predict", str(trained), "-", *options]
    done = subprocess.run(command, input=mixed.read_bytes(), capture_output=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    predictions = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["id"] for row in predictions][:4] == ["test-0", "2", "3", "test-1"]


def test_a_csv_with_other_columns_is_read_and_written(trained: Path, pairs: Path, tmp_path: Path) -> None:
    good = rows(pairs / "test.jsonl")
    lines = ["no,title,photo", *(f"{row['id']},{row['text']},{row['img']}" for row in good)]
    (tmp_path / "in.csv").write_text("\n".join(lines) + "\n")
    columns = "--id-col no --text-col title --image-col photo".split()
    done = call("predict", trained, tmp_path / "in.csv", *columns, "--image-root", pairs, "-o", tmp_path / "out.csv")
    assert done.returncode == 0, done.stderr
    predictions = list(csv.DictReader((tmp_path / "out.csv").open()))
    expected = rows(trained / "predictions.jsonl")
    assert [(row["id"], row["label"]) for row in predictions] == [(row["id"], row["label"]) for row in expected]
    assert float(predictions[0]["p(a)"]) == pytest.approx(expected[0]["probabilities"]["a"], abs=2e-5)


def test_a_single_pair_is_identified_by_its_file(trained: Path, pairs: Path) -> None:
    done = call("predict", trained, "--image", pairs / "images" / "test-0.png", "--text", "what is the red digit", "--top", "1")
    assert done.returncode == 0, done.stderr
    predictions = json.loads(done.stdout)
    assert (predictions["id"], len(predictions["probabilities"])) == ("test-0.png", 1)


def test_a_cell_that_a_spreadsheet_would_evaluate_is_quoted() -> None:
    model: Any = SimpleNamespace(task=SINGLE, labels=["@x"])
    lines = "".join(as_csv([{"id": "=1+1", "label": "@x", "probabilities": {"@x": 0.5}}], model))
    assert list(csv.reader(io.StringIO(lines)))[1] == ["'=1+1", "'@x", "0.5", ""]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ((), "MF-CFG-64"),
        (("in.jsonl", "--image", "a.png", "--text", "t"), "MF-CFG-64"),
        (("in.jsonl", "--text", "t"), "MF-CFG-64"),
        (("nowhere.jsonl",), "MF-CFG-66"),
        (("-", "-o", "out.parquet"), "MF-CFG-65"),
        (("-", "-o", f"{__file__}/out.csv"), "MF-CFG-54"),
        (("--image", "nowhere.png", "--text", "t"), "MF-DATA-11"),
    ],
)
def test_unsupported_options_are_refused(trained: Path, options: tuple[str, ...], code: str) -> None:
    done = call("predict", trained, *options)
    assert code in done.stderr
    assert done.stdout == ""


def test_several_processes_write_the_same_file(trained: Path, mixed: Path, tmp_path: Path) -> None:
    assert call("predict", trained, mixed, "-o", tmp_path / "one.jsonl", "--batch", "1").returncode == 0
    done = ranks(2, "predict", str(trained), str(mixed), "-o", str(tmp_path / "two.jsonl"), "--batch", "1")
    assert done.returncode == 0, done.stderr
    for one, two in zip(rows(tmp_path / "one.jsonl"), rows(tmp_path / "two.jsonl"), strict=True):
        if "label" in one:
            assert_alike(one, two)
        else:
            assert one == two


def test_a_closed_pipe_is_not_an_error(trained: Path, mixed: Path) -> None:
    command = f"{sys.executable} -m mopefuse predict {trained} {mixed} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=120)
    assert json.loads(done.stdout)["id"] == "test-0"
    assert "Traceback" not in done.stderr
    assert run_cli("predict", trained, "nowhere.jsonl").returncode == 3
