"""Columns: each modality has one, a model keeps those of its training data, and unread modalities give a notice."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import PLAIN, TINY, call, code_of, make_pairs, matrix

from mopefuse.config.recipe import changed_data, data_settings
from mopefuse.config.schema import Data, RunConfig, build_config
from mopefuse.errors import ConfigError
from mopefuse.inference.predict import input_settings

COLUMNS = {"id": "no", "text": "title", "img": "photo", "label": "kind"}
FLAGS = ("--id-col", "no", "--text-col", "title", "--image-col", "photo", "--label-col", "kind")


def rows_of(root: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]


def write_table(path: Path, rows: list[dict[str, Any]], columns: dict[str, str] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns.values())
        writer.writerows([row[name] for name in columns] for row in rows)
    return path


@pytest.fixture(scope="module")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set with other column names, and a run on it."""
    root = make_pairs(tmp_path_factory.mktemp("renamed") / "data")
    for split in ("train", "val", "test"):
        write_table(root / f"{split}.csv", rows_of(root, split))
        (root / f"{split}.jsonl").unlink()
    run = root.parent / "run"
    done = call("train", *TINY, "--data", root, *FLAGS, "--out", run, "--steps", "2")
    assert done.returncode == 0, done.stderr
    return root, run


def ids(done: Any) -> list[str]:
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [one for one in found if "error" in one]
    return [one["id"] for one in found]


# -- a model keeps the columns of its training data


def test_predict_reads_the_columns_of_the_run(renamed: tuple[Path, Path]) -> None:
    root, run = renamed
    assert ids(call("predict", run, root / "test.csv")) == [f"test-{number}" for number in range(7)]


@pytest.mark.parametrize("form", matrix(["onnx", "adapter"], ["adapter"]))
def test_an_export_reads_the_columns_of_the_run(renamed: tuple[Path, Path], tmp_path: Path, form: str) -> None:
    root, run = renamed
    done = call("export", run, "-o", tmp_path / form, "--format", form)
    assert done.returncode == 0, done.stderr
    assert ids(call("predict", tmp_path / form, root / "test.csv"))[0] == "test-0"
    done = call("eval", tmp_path / form, "--data", root, "--json")
    assert done.returncode == 0, done.stderr
    assert input_settings(tmp_path / form).text_col == "title"
    assert input_settings(tmp_path / form).path is None


def test_flags_override_the_columns_of_the_run(renamed: tuple[Path, Path], tmp_path: Path) -> None:
    root, run = renamed
    rows = [dict(zip(COLUMNS, row.values(), strict=True)) for row in csv.DictReader((root / "test.csv").open())]
    other = {**COLUMNS, "id": "key", "text": "caption", "img": "picture"}
    write_table(tmp_path / "in.csv", rows, other)
    flags = ("--id-col", "key", "--text-col", "caption", "--column", "image=picture", "--image-root", root)
    assert ids(call("predict", run, tmp_path / "in.csv", *flags))[0] == "test-0"
    done = call("eval", run, "--data", tmp_path / "in.csv", *flags, "--json")
    assert done.returncode == 0, done.stderr
    assert "did you mean --text-col caption" in call("predict", run, tmp_path / "in.csv").stderr


def test_changing_a_setting_keeps_the_others() -> None:
    saved = Data(path="here", text_col="title", columns={"audio": "clip", "depth": "d"}, max_pixels=7, image_roots=("a",))
    found = changed_data(saved, {"columns": {"audio": "sound"}, "id_col": "no", "text_col": None})
    assert found == saved.model_copy(update={"columns": {"audio": "sound", "depth": "d"}, "id_col": "no"})
    assert code_of(lambda: changed_data(saved, {"nothing": 1})) == "MF-CFG-01"


# -- a table is the split that is evaluated


def test_eval_uses_a_given_table_as_the_split(renamed: tuple[Path, Path], tmp_path: Path) -> None:
    root, run = renamed
    plain = json.loads(call("eval", run, "--data", root, "--json").stdout)["metrics"]
    shutil.copytree(root / "images", tmp_path / "images")
    shutil.copy(root / "test.csv", tmp_path / "new.csv")
    for split in ("test", "val", "train"):
        done = call("eval", run, "--data", tmp_path / "new.csv", "--split", split, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["metrics"] == plain


def test_report_uses_a_given_table_as_the_test_split(renamed: tuple[Path, Path], tmp_path: Path) -> None:
    root, run = renamed
    done = call("report", run, "--data", root / "val.csv", "--out", tmp_path / "page.html", "--no-audit", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["split"] == "test"


def test_a_run_on_a_table_with_a_split_column_can_be_evaluated_on_a_table_without_one(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data")
    rows = [row | {"split": name} for name in ("train", "val", "test") for row in rows_of(root, name)]
    every = {name: name for name in ("id", "text", "img", "label")}
    table = write_table(root / "all.csv", rows, every | {"split": "split"})
    done = call("train", *TINY, "--data", table, "--split-col", "split", "--out", tmp_path / "run", "--steps", "2", "--json")
    assert done.returncode == 0, done.stderr
    own = json.loads(done.stdout)["splits"]["test"]
    new = write_table(root / "new.csv", rows_of(root, "test"), every)
    for data in (new, table):
        done = call("eval", tmp_path / "run", "--data", data, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["metrics"] == pytest.approx(own)
    assert call("eval", tmp_path / "run", "--data", new, "--split-col", "part").returncode == 4


# -- a modality has one column


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--image-col", "a", "--column", "image=b"), ("--image-col a", "--column image=b")),
        (("--image-col", "img", "--column", "image=b"), ("--image-col img", "--column image=b")),
        (("--text-col", "a", "--column", "text=b"), ("--text-col a", "--column text=b")),
        (("--image-col", "a", "--set", "data.columns={image: b}"), ("'a'", "'b'", "img_col", "columns")),
        (("--set", "data.text_col=a", "--set", "data.columns={text: b}"), ("'a'", "'b'", "text_col", "columns")),
        (("--set", "data.text_col=a", "--column", "text=b"), ()),
    ],
)
def test_two_columns_for_one_modality_are_refused(pairs: Path, flags: tuple[str, ...], named: tuple[str, ...]) -> None:
    done = call("train", *TINY, "--data", pairs, *flags, "--dry-run")
    if named:
        assert done.returncode == 3
        assert all(name in done.stderr for name in named), done.stderr
    else:
        assert "column not found: a" in done.stderr, "--set overrides flags, as always"


@pytest.mark.parametrize("flags", [("--label-col", "text"), ("--text-col", "label"), ("--image-col", "label")])
def test_a_label_column_that_is_also_an_input_is_refused(pairs: Path, flags: tuple[str, ...]) -> None:
    for done in (call("train", *TINY, "--data", pairs, *flags, "--dry-run"), call("data", "check", pairs, *flags)):
        assert (done.returncode, "MF-CFG-231" in done.stderr) == (3, True), done.stderr


def test_a_column_may_be_named_by_either_flag_or_both() -> None:
    expected = Data(img_col="b")
    for values in ({"columns": {"image": "b"}}, {"img_col": "b", "columns": {"image": "b"}}, {"img_col": "b"}):
        assert Data(**values) == expected
    assert data_settings({"data.columns": {"image": "b", "audio": "c"}}).columns == {"audio": "c"}
    with pytest.raises(ConfigError, match="img_col is 'a' and columns has 'b' for image"):
        build_config({"main": "a:b", "comp": "a:b", "data": {"img_col": "a", "columns": {"image": "b"}}})


# -- modalities that no encoder reads


def test_a_modality_that_no_encoder_reads_gives_a_notice_before_training(pairs: Path, tmp_path: Path) -> None:
    both = ("--main", "tiny:text", "--comp", "tiny:text?pool=mean", "--device", "cpu", "--experts", "2", *PLAIN)
    done = call("train", *both, "--data", pairs, "--out", tmp_path / "run", "--steps", "1")
    assert done.returncode == 0, done.stderr
    line = "no encoder reads image: --main tiny:text, --comp tiny:text?pool=mean read text; to use it, add an encoder"
    assert line in done.stderr
    assert done.stderr.index(line) < done.stderr.index("step 1")
    assert line in call("train", *both, "--data", pairs, "--dry-run").stderr
    assert "no encoder reads" not in call("train", *TINY, "--data", pairs, "--dry-run").stderr
    alone = ("--main", "tiny:text", "--method", "main-only", "--device", "cpu")
    assert "no encoder reads" not in call("train", *alone, "--data", pairs, "--dry-run").stderr


# -- thresholds tuned on few rows


def test_thresholds_tuned_on_few_rows_give_a_notice(multi_pairs: Path, pairs: Path) -> None:
    done = call("train", *TINY, "--data", multi_pairs, "--threshold", "tuned", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "on 6 validation rows, and 3 of 3 labels have fewer than 10 of them" in done.stderr
    assert "--threshold 0.5" in done.stderr
    assert "validation rows" not in call("train", *TINY, "--data", multi_pairs, "--dry-run").stderr
    assert "validation rows" not in call("train", *TINY, "--data", pairs, "--threshold", "tuned", "--dry-run").stderr


def test_thresholds_tuned_on_many_rows_of_each_label_give_no_notice(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data", multi=True, counts={"train": 8, "val": 120})
    done = call("train", *TINY, "--data", root, "--threshold", "tuned", "--dry-run")
    assert (done.returncode, "validation rows" in done.stderr) == (0, False)


def test_the_settings_of_columns_are_those_of_the_configuration() -> None:
    from mopefuse.config.schema import COLUMN_SETTINGS
    from mopefuse.data.columns import EXPECTED

    assert tuple(COLUMN_SETTINGS) == EXPECTED
    assert set(COLUMN_SETTINGS.values()) <= Data.model_fields.keys()
    assert RunConfig.model_fields.keys() >= {"data"}
