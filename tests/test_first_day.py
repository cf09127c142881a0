"""Typical first steps and mistakes of new users: each message says what to do next, and that works."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY, call, write_rows
from PIL import Image

import mopefuse
from mopefuse.errors import ConfigError


def test_notices_of_training_are_in_its_json(pairs: Path, tmp_path: Path) -> None:
    flags = (*TINY, "--data", pairs, "--steps", "1", "--threshold", "tuned", "--json")
    text = "--threshold tuned has no effect: each row has one label, and the likeliest is predicted"
    assert text in json.loads(call("train", *flags, "--out", tmp_path / "run").stdout)["notices"]
    swapped = call("swap-encoder", tmp_path / "run", "--comp", "tiny:text?pool=cls", "-o", tmp_path / "new", "--json")
    assert text in json.loads(swapped.stdout)["notices"]
    assert isinstance(json.loads(call("train", *flags, "--dry-run").stdout)["notices"], list)


def test_tuned_thresholds_for_multi_label_rows_give_no_warning(multi_pairs: Path, tmp_path: Path) -> None:
    flags = (*TINY, "--data", multi_pairs, "--steps", "1", "--threshold", "tuned", "--out", tmp_path / "run")
    assert "has no effect" not in call("train", *flags).stderr


def test_labels_without_samples_are_reported_in_plain_english(pairs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (pairs / "val.jsonl").read_text().splitlines()]
    labels = sorted({row["label"] for row in rows})
    data = Path(shutil.copytree(pairs, tmp_path / "data"))
    write_rows(data / "val.jsonl", [row for row in rows if row["label"] != labels[0]])
    done = call("train", *TINY, "--data", data, "--steps", "1", "--out", tmp_path / "run")
    assert "val: 1 label has no sample" in done.stderr


@pytest.mark.parametrize("given", ["image", "text"])
def test_if_one_of_two_related_flags_is_missing_the_error_names_it(given: str, trained: Path, pairs: Path) -> None:
    half = {"image": ("--image", pairs / "images" / "test-0.png"), "text": ("--text", "what is the red digit")}
    other = "text" if given == "image" else "image"
    done = call("predict", trained, *half[given])
    assert done.returncode == 4
    assert f"the row has no {other}" in done.stderr and f"fix: add --{other} " in done.stderr
    assert call("predict", trained, *half[given], *half[other]).returncode == 0


def test_rows_with_other_columns_are_an_error_that_names_the_flags(trained: Path, pairs: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "new.jsonl", [{"title": "what is the red digit", "photo": "test-0.png"}])
    flags = ("predict", trained, tmp_path / "new.jsonl", "--image-root", pairs / "images")
    done = call(*flags)
    assert done.returncode == 4 and "--text-col, --image-col" in done.stderr
    assert call(*flags, "--text-col", "title", "--image-col", "photo").returncode == 0


@pytest.mark.parametrize("top", [0, -1])
def test_requesting_zero_labels_is_an_error(top: int, trained: Path) -> None:
    with pytest.raises(ConfigError) as error:
        mopefuse.load(trained).predict(Image.new("RGB", (8, 8)), "what is the red digit", top=top)
    assert error.value.code == "MF-CFG-300"


def test_for_a_folder_of_runs_the_error_suggests_one(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(trained)
    for command in ("eval", "report"):
        done = call(command, tmp_path / "runs")
        assert done.returncode == 6 and f"such as {tmp_path / 'runs' / 'first'}" in done.stderr


def test_a_preview_of_rows_that_cannot_be_read_says_why(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("photo,title,kind\n" + "test-0.png,what is the red digit,a\n" * 3)
    done = call("data", "preview", tmp_path / "new.csv", "-o", tmp_path / "page.html")
    assert done.returncode == 4
    assert "could not read any of the 3 rows" in done.stderr and "has no text or img or label; found" in done.stderr


def test_a_missing_image_root_is_refused(trained: Path, pairs: Path, tmp_path: Path) -> None:
    """Even if every image is found without it."""
    for command in (
        ("train", *TINY, "--data", pairs, "--out", tmp_path / "run", "--steps", "1"),
        ("data", "check", pairs),
        ("predict", trained, pairs / "test.jsonl"),
    ):
        done = call(*command, "--image-root", tmp_path / "phtos")
        assert (done.returncode, "error[MF-CFG-301]" in done.stderr) == (3, True), done.stderr


def test_for_one_of_several_tables_the_error_suggests_their_folder(pairs: Path, tmp_path: Path) -> None:
    done = call("train", *TINY, "--data", pairs / "train.jsonl", "--out", tmp_path / "run")
    assert done.returncode == 4 and f"pass the folder that also has the other splits: {pairs}" in done.stderr


def test_a_folder_of_images_alone_is_not_reported_as_empty(pairs: Path, tmp_path: Path) -> None:
    done = call("train", *TINY, "--data", pairs / "images", "--out", tmp_path / "run")
    count = len(list((pairs / "images").iterdir()))
    assert done.returncode == 4 and f"(the folder has no table among {count} files)" in done.stderr


def test_a_compressed_shard_is_named_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "train.tar.gz").touch()
    done = call("train", *TINY, "--data", tmp_path, "--out", tmp_path / "run")
    assert done.returncode == 4 and "decompress train.tar.gz" in done.stderr


def test_an_archive_of_images_is_not_taken_for_a_missing_split(pairs: Path, tmp_path: Path) -> None:
    shutil.copy(pairs / "train.jsonl", tmp_path)
    (tmp_path / "images.tar.gz").touch()
    done = call("train", *TINY, "--data", tmp_path, "--image-root", pairs, "--out", tmp_path / "run")
    assert "decompress" not in done.stderr and "--val-fraction 0.1" in done.stderr


def test_predict_on_a_folder_or_an_image_is_an_error_that_names_valid_inputs(trained: Path, pairs: Path) -> None:
    done = call("predict", trained, pairs)
    assert done.returncode == 3 and f"{pairs} is a folder" in done.stderr and str(pairs / "test.jsonl") in done.stderr
    image = pairs / "images" / "test-0.png"
    done = call("predict", trained, image)
    assert done.returncode == 3 and f"--image {image}" in done.stderr and "--text TEXT" in done.stderr
    assert call("predict", trained, "--image", image, "--text", "what is the red digit").returncode == 0


def test_a_folder_is_refused_as_an_output_file(trained: Path, pairs: Path, tmp_path: Path) -> None:
    for command in (
        ("eval", trained, "--out"),
        ("compare", trained, "-o"),
        ("data", "preview", pairs, "-o"),
        ("data", "check", pairs, "--html"),
    ):
        done = call(*command, tmp_path)
        assert (done.returncode, f"{tmp_path} is a folder" in done.stderr) == (3, True), done.stderr
        assert call(*command, tmp_path / "new" / f"{command[0]}.html").returncode == 0


def test_a_table_and_a_model_in_the_wrong_order_are_noticed(trained: Path, pairs: Path) -> None:
    done = call("predict", pairs / "test.jsonl", trained)
    assert (
        done.returncode == 3 and f"fix: write the model first: mopefuse predict {trained} {pairs / 'test.jsonl'}" in done.stderr
    )


def test_a_folder_as_gallery_is_not_reported_as_missing(trained: Path, pairs: Path) -> None:
    done = call("predict", trained, "--gallery", pairs, "--text", "x")
    assert done.returncode == 3 and f"{pairs} is a folder" in done.stderr


@pytest.mark.parametrize("method", ["main-onli", "lineer"])
def test_a_misspelt_method_is_reported_before_a_missing_encoder(method: str, pairs: Path, tmp_path: Path) -> None:
    done = call("train", "--main", "tiny:vision", "--method", method, "--data", pairs, "--out", tmp_path / "run")
    assert done.returncode == 3 and f"unknown fusion method '{method}'" in done.stderr and "did you mean" in done.stderr


@pytest.mark.parametrize(
    ("gate", "code", "fix"),
    [
        ("f1=0.9", 3, "did you mean f1_macro, f1_micro, f1_samples?"),
        ("accuracy=98", 10, "write accuracy=0.98, as accuracy is at most 1"),
    ],
)
def test_a_gate_that_cannot_be_meant_names_the_one_that_is(
    gate: str, code: int, fix: str, trained: Path, tmp_path: Path
) -> None:
    done = call("eval", trained, "--min", gate, "--out", tmp_path / "predictions.jsonl")
    assert done.returncode == code and fix in done.stderr


def test_a_table_with_other_column_names_gets_the_flags_of_all_of_them(pairs: Path, tmp_path: Path) -> None:
    shutil.copytree(pairs / "images", tmp_path / "images")
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    names = {"id": "SKU", "text": "Titel des Artikels", "img": "Bild", "label": "Sorte"}
    words = ("red", "green", "blue")
    table = [
        {names[key]: f"a {words[at % 3]} shoe" if key == "text" else row[key] for key in names} for at, row in enumerate(rows)
    ]
    write_rows(tmp_path / "things.jsonl", table)
    flags = "--image-col Bild --text-col 'Titel des Artikels' --label-col Sorte"
    done = call("train", *TINY, "--data", tmp_path / "things.jsonl", "--out", tmp_path / "run")
    assert done.returncode == 4 and f"fix: add {flags}" in done.stderr
    search = call("train", *TINY, "--task", "retrieval", "--data", tmp_path / "things.jsonl", "--out", tmp_path / "run")
    assert search.stderr.rstrip().endswith("fix: add --image-col Bild --text-col 'Titel des Artikels'"), "pairs have no label"
    checked = call("data", "check", tmp_path / "things.jsonl").stdout
    assert any("missing-column" in line and f"add {flags}" in line for line in checked.splitlines())


def test_a_recipe_with_another_suffix_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "products.yaml").write_text("main: tiny:vision\ncomp: tiny:text\n")
    done = call("train", "--recipe", tmp_path / "products.yml", "--out", tmp_path / "run")
    assert done.returncode == 3 and f"did you mean {tmp_path / 'products.yaml'}?" in done.stderr
