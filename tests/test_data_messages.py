"""Typical situations of new users: the message names the flag that solves the problem."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, call, write_rows


def rows_of(root: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]


def plan(data: Path, *flags: str) -> Any:
    return call("train", *TINY, "--data", data, *flags, "--dry-run")


def check(data: Path, *flags: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call("data", "check", data, *flags, "--json").stdout)
    return found


@pytest.fixture
def data(pairs: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pairs, tmp_path / "data")


# -- all images are in another folder


@pytest.mark.parametrize("place", ["photos/deep/images", "../photos/images", "../../far/images"])
def test_if_all_images_are_in_another_folder_the_error_names_the_flag(data: Path, place: str) -> None:
    (data / place).parent.mkdir(parents=True)
    (data / "images").rename(data / place)
    root = (data / place).parent.resolve()
    near = root.parent in (data, data.parent)
    refused = plan(data)
    assert refused.returncode == 4
    assert "error[MF-DATA-11]: none of the 12 images exist; first missing: images/train-0.png" in refused.stderr
    fix = f"add --image-root {root}" if near else "add --image-root DIR, the folder that contains them"
    assert f"fix: {fix}" in refused.stderr
    assert f"fix: {fix}" in plan(data, "--on-bad", "skip").stderr
    report = check(data)
    assert {problem["hint"] for problem in report["problems"]} == {fix}
    summary = call("data", "check", data).stdout
    assert [line for line in summary.splitlines() if line.startswith("missing-image") and fix in line]
    done = plan(data, "--image-root", str(root))
    assert done.returncode == 0, done.stderr


def test_for_one_missing_image_the_fix_is_to_add_it(data: Path) -> None:
    (data / "images" / "train-3.png").unlink()
    refused = plan(data)
    assert "image not found: images/train-3.png" in refused.stderr and "fix: add the file" in refused.stderr
    assert "or add --on-bad skip --set data.max_bad_fraction=0.09 to leave the row out" in refused.stderr
    assert plan(data, "--on-bad", "skip", "--set", "data.max_bad_fraction=0.09").returncode == 0
    assert "data.max_bad_fraction=0.09 to leave the row out" in plan(data, "--on-bad", "skip").stderr


def test_eval_does_not_suggest_a_setting_that_it_has_no_flag_for(data: Path, trained: Path) -> None:
    (data / "images" / "test-3.png").unlink()
    refused = call("eval", trained, "--data", data)
    assert "image not found: images/test-3.png" in refused.stderr and refused.stderr.rstrip().endswith("fix: add the file")
    (data / "images" / "train-3.png").unlink()
    refused = call("eval", trained, "--data", data, "--split", "train")
    assert "image not found: images/train-3.png" in refused.stderr and refused.stderr.rstrip().endswith("fix: add the file")


@pytest.mark.parametrize("which", ["all", "one"])
@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"train-": "TRAIN-"}, "the folder has train-0.png: check upper and lower case"),
        ({"/": "\\"}, "write images/train-0.png, with / in place of \\"),
    ],
    ids=["case", "backslashes"],
)
def test_paths_that_are_spelt_differently_are_named(data: Path, change: dict[str, str], fix: str, which: str) -> None:
    rows = rows_of(data, "train")
    for row in rows if which == "all" else rows[:1]:
        for old, new in change.items():
            row["img"] = row["img"].replace(old, new)
    write_rows(data / "train.jsonl", rows)
    assert f"fix: {fix}" in plan(data).stderr
    assert check(data)["problems"][0]["hint"] == fix


def test_texts_in_place_of_paths_name_the_flag_of_the_column(data: Path) -> None:
    rows = [{**row, "img": f"shoe no {number}", "text": row["img"]} for number, row in enumerate(rows_of(data, "train"))]
    write_rows(data / "train.jsonl", rows)
    assert "fix: these are texts, not paths; name the column of the paths with --image-col NAME" in plan(data).stderr


def test_each_problem_is_listed_with_its_own_remedy(data: Path) -> None:
    rows = rows_of(data, "train")
    rows[0]["img"], rows[1]["img"] = "images/TRAIN-0.png", "images\\train-1.png"
    write_rows(data / "train.jsonl", rows)
    lines = call("data", "check", data).stdout.splitlines()
    assert any(
        line.startswith("error: ") and line.endswith("(the folder has train-0.png: check upper and lower case)")
        for line in lines
    )
    assert any(line.endswith("(write images/train-1.png, with / in place of \\)") for line in lines)


def test_predict_without_any_images_is_an_error_with_the_flag(trained: Path, pairs: Path, tmp_path: Path) -> None:
    shutil.copy(pairs / "test.jsonl", tmp_path)
    done = call("predict", trained, tmp_path / "test.jsonl")
    assert done.returncode == 4
    assert "fix: add --image-root DIR, the folder of the files" in done.stderr
    assert call("predict", trained, tmp_path / "test.jsonl", "--image-root", pairs).returncode == 0


# -- rows without a text


@pytest.mark.parametrize("lacking", ["null", "no key"])
def test_rows_without_a_text_are_an_error_that_suggests_on_missing(data: Path, lacking: str) -> None:
    rows = rows_of(data, "train")
    for number in (2, 5):
        rows[number]["text"] = None
        if lacking == "no key":
            del rows[number]["text"]
    write_rows(data / "train.jsonl", rows)
    refused = plan(data)
    assert refused.returncode == 4
    assert "--on-missing" in refused.stderr.rpartition("fix: ")[2], refused.stderr
    assert all("--on-missing" in problem["hint"] for problem in check(data)["problems"])
    done = plan(data, "--on-missing", "absent")
    assert done.returncode == 0, done.stderr
    assert "train: 2 rows have no text" in done.stderr


def test_a_column_that_no_row_has_is_not_a_missing_value(data: Path) -> None:
    for split in ("train", "val", "test"):
        write_rows(data / f"{split}.jsonl", [{k: v for k, v in row.items() if k != "text"} for row in rows_of(data, split)])
    assert "has no text; found id, img, label" in plan(data).stderr
    assert "to accept such rows" not in plan(data).stderr


def test_a_row_without_a_label_is_not_a_missing_value(data: Path) -> None:
    rows = rows_of(data, "train")
    del rows[2]["label"]
    write_rows(data / "train.jsonl", rows)
    assert "train.jsonl:3 has no label; found id, img, text" in plan(data).stderr
    assert "--on-missing" not in plan(data).stderr


def test_the_notice_about_empty_texts_suggests_on_missing(data: Path) -> None:
    rows = rows_of(data, "train")
    rows[2]["text"] = ""
    write_rows(data / "train.jsonl", rows)
    assert "train: 1 text is empty; to treat it as missing, add --on-missing absent" in plan(data).stderr
    assert "--on-missing absent" in check(data)["problems"][0]["hint"]


# -- one table


def one_table(root: Path, **names: str) -> Path:
    """Write all rows to one table; its column ``part`` has the split of each row as given in `names`."""
    own = {split: {"part": names[split]} if names else {} for split in ("train", "val", "test")}
    rows = [row | part for split, part in own.items() for row in rows_of(root, split)]
    write_rows(root / "all.jsonl", rows)
    return root / "all.jsonl"


@pytest.mark.parametrize("names", [("train", "val", "test"), ("Training", "dev", "TEST"), ("train", "validation", "testing")])
def test_a_column_that_names_splits_is_suggested_and_works(data: Path, names: tuple[str, ...]) -> None:
    table = one_table(data, **dict(zip(("train", "val", "test"), names, strict=True)))
    refused = plan(table)
    assert refused.returncode == 4
    assert "fix: add --split-col part, the column that names the split of each row" in refused.stderr
    assert "--split-col part" in next(each["hint"] for each in check(table)["problems"] if each["kind"] == "missing-split")
    done = plan(table, "--split-col", "part")
    assert done.returncode == 0, done.stderr
    assert "train 12, val 6, test 7 rows" in done.stdout


def test_an_unused_column_of_splits_gives_a_notice(data: Path) -> None:
    notices = "the column part of all.jsonl seems to name splits and is ignored; to use it, add --split-col part"
    table = one_table(data, train="train", val="val", test="test")
    assert notices in plan(table, "--val-fraction", "0.2").stderr
    assert "names splits" not in plan(table, "--split-col", "part").stderr


def test_a_folder_with_one_table_of_another_name_names_the_table(data: Path) -> None:
    table = (data / "train.jsonl").rename(data / "items.jsonl")
    for other in ("val", "test"):
        (data / f"{other}.jsonl").unlink()
    assert f"pass the table itself: {table}" in plan(data).stderr


def test_a_table_without_a_split_column_suggests_both_solutions(data: Path) -> None:
    refused = plan(one_table(data))
    assert "--val-fraction 0.1, or specify the split column with --split-col" in refused.stderr


# -- other delimiters


@pytest.mark.parametrize("delimiter", [";", "\t"])
def test_a_csv_with_another_delimiter_trains_with_a_notice(data: Path, delimiter: str) -> None:
    lines = [delimiter.join(("id", "text", "img", "label"))]
    lines += [delimiter.join(row.values()) for split in ("train", "val", "test") for row in rows_of(data, split)]
    (data / "all.csv").write_text("\n".join(lines) + "\n")
    done = plan(data / "all.csv", "--val-fraction", "0.2")
    assert done.returncode == 0, done.stderr
    name = {";": "semicolon", "\t": "tab"}[delimiter]
    assert done.stderr.count(f"notice: all.csv is parsed as {name}-separated, not comma-separated") == 1
