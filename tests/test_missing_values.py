"""Rows that lack a text, an image or another modality: an error, skipped, or kept and marked."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, call, code_of, make_pairs, plain_config, write_rows
from PIL import Image

from mopefuse import build_fusion, load
from mopefuse.config.schema import Data
from mopefuse.data.base import Batch, DataSet
from mopefuse.data.check import check
from mopefuse.data.collate import Samples
from mopefuse.data.feature_cache import split_features
from mopefuse.data.load import load_data
from mopefuse.data.perturbed import ShuffledSamples
from mopefuse.encoders.base import create_encoder, run_frozen
from mopefuse.errors import DataError
from mopefuse.modalities.base import get_modality
from mopefuse.training.train import train

CPU = torch.device("cpu")
GONE = {"no column": ..., "null": None, "empty": "", "blank": "  "}
FORMS = pytest.mark.parametrize("form", GONE)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_pairs(tmp_path / "data")


def change(root: Path, split: str, number: int, **values: Any) -> None:
    """Replace values in a row; `...` removes the column."""
    path = root / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[number] = {key: value for key, value in (rows[number] | values).items() if value is not ...}
    write_rows(path, rows)


def read(root: Path, **options: Any) -> DataSet:
    return load_data(Data(path=str(root), **options))


# -- the three policies


@FORMS
@pytest.mark.parametrize(("column", "modality"), [("text", "text"), ("img", "image")])
def test_a_missing_value_is_handled_by_the_policy(data: Path, form: str, column: str, modality: str) -> None:
    change(data, "train", 4, **{column: GONE[form]})
    if column == "text" and isinstance(GONE[form], str):
        assert read(data).splits["train"].rows[4].values["text"] == GONE[form]
    else:
        assert code_of(lambda: read(data)).startswith("MF-DATA-")
    for _ in range(2):  # first read, then from the cache
        left = read(data, on_missing="skip")
        assert [row.line for row in left.splits["train"].rows] == [1, 2, 3, 4, *range(6, 13)]
        assert f"train.jsonl: 1 row without {modality} is left out" in left.notices
        kept = read(data, on_missing="absent")
        row = kept.splits["train"].rows[4]
        assert (row.line, row.values[modality], None in kept.splits["train"].rows[3].values.values()) == (5, None, False)
        for name in ("text", "image"):
            assert np.flatnonzero(kept.splits["train"].is_missing(name)).tolist() == ([4] if name == modality else [])
        assert f"train: 1 row has no {modality}" in kept.notices


def test_the_error_about_missing_values_names_the_alternatives(data: Path) -> None:
    change(data, "train", 4, text=None)
    with pytest.raises(
        DataError, match=r"text is null, .* \(to treat it as empty, set data.allow_missing_text=true; .* add --on-missing skip"
    ):
        read(data)
    change(data, "train", 4, text="x", img=None)
    with pytest.raises(
        DataError, match=r"img is null, expected a string \(to accept such rows, add --on-missing skip or absent"
    ):
        read(data)


@FORMS
def test_a_row_without_any_value_is_skipped_or_an_error(data: Path, form: str) -> None:
    change(data, "train", 4, text=GONE[form], img=GONE[form])
    with pytest.raises(DataError, match=r"train.jsonl:5 has none of text, img; found "):
        read(data, on_missing="absent")
    report = json.loads(call("data", "check", data, "--json", "--on-missing", "absent").stdout)
    assert report["kinds"] == {"nothing": 1}
    left = read(data, on_missing="skip")
    assert 5 not in [row.line for row in left.splits["train"].rows] and "1 row without" in " ".join(left.notices)


@pytest.mark.parametrize("policy", ["skip", "absent"])
def test_a_value_of_another_type_is_never_missing(data: Path, policy: str) -> None:
    change(data, "train", 4, text=3)
    with pytest.raises(DataError, match="text is a number"):
        read(data, on_missing=policy)


@pytest.mark.parametrize("policy", ["error", "skip", "absent"])
def test_a_null_that_counts_as_empty_is_not_missing(data: Path, policy: str) -> None:
    change(data, "train", 4, text=None)
    change(data, "train", 5, text="")
    split = read(data, on_missing=policy, allow_missing_text=True).splits["train"]
    assert [split.rows[i].values["text"] for i in (4, 5)] == ["", ""] and not split.is_missing("text").any()


@pytest.mark.parametrize("policy", ["skip", "absent"])
def test_a_missing_file_is_an_error_and_not_a_missing_value(data: Path, policy: str) -> None:
    change(data, "train", 4, img="images/none.png")
    assert code_of(lambda: read(data, on_missing=policy)) == "MF-DATA-11"


def test_empty_cells_of_a_table_are_missing(data: Path) -> None:
    change(data, "train", 2, text="")
    change(data, "train", 3, img="")
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    (data / "train.jsonl").unlink()
    with (data / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    with pytest.raises(DataError, match=r"img is empty, expected a string \(to accept such rows, add --on-missing"):
        read(data)
    kept = read(data, on_missing="absent").splits["train"]
    assert [np.flatnonzero(kept.is_missing(name)).tolist() for name in ("text", "image")] == [[2], [3]]
    left = read(data, on_missing="skip")
    assert len(left.splits["train"].rows) == 10
    assert {f"train.csv: 1 row without {modality} is left out" for modality in ("text", "image")} <= set(left.notices)


def test_images_without_captions_lack_the_text(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for i, label in enumerate(("cat", "dog", "cat", "dog")):
            path = tmp_path / split / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, len(split), 0)).save(path)
            if i:
                path.with_suffix(".txt").write_text(f"{label} {i}")
    with pytest.raises(DataError, match=r"has no text: add 0.txt beside it, .*, or --on-missing skip or absent"):
        read(tmp_path)
    assert read(tmp_path, on_missing="absent").splits["val"].rows[0].values == {"text": None, "image": "val/cat/0.png"}
    assert len(read(tmp_path, on_missing="skip").splits["val"].rows) == 3


# -- which modalities the data have


def test_only_named_modalities_are_read(data: Path) -> None:
    (data / "images" / "train-1.png").unlink()
    only = read(data, modalities=("text",))
    assert only.modalities == ("text",) and only.splits["train"].rows[0].values == {"text": "what is the red digit"}
    assert code_of(lambda: read(data)) == "MF-DATA-11"


@pytest.mark.parametrize("other", [{"text": "caption"}, {"img": "photo"}, {"text": "caption", "img": "photo"}])
def test_text_and_image_are_expected_if_fewer_columns_are_found(data: Path, other: dict[str, str]) -> None:
    for split in ("train", "val", "test"):
        path = data / f"{split}.jsonl"
        for name, called in other.items():
            path.write_text(path.read_text().replace(f'"{name}":', f'"{called}":'))
    hint = " ".join({"text": "--text-col caption", "img": "--image-col photo"}[name] for name in other)
    with pytest.raises(DataError, match=rf"has no {' or '.join(other)}; found .*; did you mean {hint}\?"):
        read(data)


@pytest.mark.parametrize("options", [{"modalities": ("texts",)}, {"columns": {"txt": "caption"}}])
def test_a_modality_that_is_not_installed_is_refused(data: Path, options: dict[str, Any]) -> None:
    assert code_of(lambda: read(data, **options)) == "MF-CFG-133"


@pytest.mark.parametrize("columns", [["text"], ["=x"], ["text="], ["text=a", "text=b"]])
def test_the_column_flag_takes_modality_and_name(data: Path, columns: list[str]) -> None:
    done = call("data", "check", data, *(word for one in columns for word in ("--column", one)))
    assert done.returncode == 3 and "MF-CFG-135" in done.stderr


def test_the_column_flag_also_names_built_in_modalities(data: Path) -> None:
    for split in ("train", "val", "test"):
        path = data / f"{split}.jsonl"
        path.write_text(path.read_text().replace('"text":', '"caption":'))
    assert call("data", "check", data).returncode == 4
    assert call("data", "check", data, "--column", "text=caption").returncode == 0


@pytest.mark.parametrize("option", [{"text_col": "txt"}, {"columns": {"text": "txt"}}, {"label_col": "txt"}, {"id_col": "txt"}])
@pytest.mark.parametrize("on_missing", ["error", "absent"])
def test_a_named_column_that_no_table_has_is_refused(data: Path, option: dict[str, Any], on_missing: str) -> None:
    config = Data(path=str(data), on_missing=on_missing, **option)
    for reading in (load_data, check):
        with pytest.raises(DataError, match=r"column not found: txt · train.jsonl, .* · fix: did you mean text\?"):
            reading(config)


def test_a_column_exists_if_any_row_has_it(data: Path) -> None:
    change(data, "val", 5, txt="caption")
    assert read(data, on_missing="absent", text_col="txt").splits["train"].is_missing("text").all()


# -- fingerprints and runs


def test_the_policy_affects_the_fingerprint_only_if_values_are_missing(data: Path) -> None:
    policies = ("error", "skip", "absent")
    assert len({read(data, on_missing=policy).splits["train"].hash for policy in policies}) == 1
    change(data, "train", 4, text="")
    assert len({read(data, on_missing=policy).splits["train"].hash for policy in policies}) == 3


def test_runs_tested_on_different_rows_are_not_compared(data: Path, tmp_path: Path) -> None:
    change(data, "test", 4, text=None)
    for policy in ("skip", "absent"):
        done = call("train", *TINY, "--data", data, "--out", tmp_path / policy, "--steps", 1, "--on-missing", policy)
        assert done.returncode == 0, done.stderr
    assert "MF-CFG" in call("compare", tmp_path / "skip", tmp_path / "absent").stderr
    assert len((tmp_path / "absent" / "predictions.jsonl").read_text().splitlines()) == 7
    assert len((tmp_path / "skip" / "predictions.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("named", [(), ("--column", "text=text")])
def test_a_resumed_run_keeps_its_policy_and_columns(named: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    done = call("train", *TINY, "--data", data, "--out", tmp_path / "run", "--steps", 1, *named)
    assert done.returncode == 0, done.stderr
    again = ("train", "--out", tmp_path / "run", "--resume", "--steps", 2)
    assert "cannot change data.on_missing" in call(*again, "--on-missing", "absent").stderr
    for other, setting in (("text=caption", "text_col"), ("image=photo", "img_col")):
        assert f"cannot change data.{setting}" in call(*again, "--column", other).stderr
    done = call(*again)
    assert done.returncode == 0, done.stderr


def test_values_missing_in_two_splits_are_not_leaks(data: Path) -> None:
    for split in ("train", "test"):
        for number, row in enumerate((data / f"{split}.jsonl").read_text().splitlines()):
            change(data, split, number, text=f"{split} {json.loads(row)['id']}")
        change(data, split, 2, text=None)
        change(data, split, 3, img=None)
    found = read(data, on_missing="absent")
    assert not any("also in train" in notice for notice in found.notices)
    change(data, "test", 1, text="TRAIN  train-1")
    assert "1 text of test is also in train; metrics on it may be too optimistic" in read(data, on_missing="absent").notices
    report = json.loads(call("data", "check", data, "--json", "--on-missing", "absent").stdout)
    assert report["leaks"]["test"] == {"images": 0, "texts": 1}
    assert [(p["split"], p["message"]) for p in report["problems"] if p["kind"] == "missing-value"] == [
        (split, f"1 row has no {modality}") for split in ("train", "test") for modality in ("text", "image")
    ]


# -- inputs of encoders


READERS = {"main": "tiny:vision", "comp": "tiny:text"}


def samples(found: DataSet, **options: Any) -> Samples:
    encoders = {side: create_encoder(spec) for side, spec in READERS.items()}
    readers = {side: (encoder.modality, encoder.preprocess) for side, encoder in encoders.items()}
    return Samples(found, "train", readers, Data(**options.pop("data", {})), **options)


def batch(one: Samples, *rows: int) -> Batch:
    return next(one.batches([[(0, row) for row in rows]]))


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("augment", ["none", "randaugment", "crop"])
def test_missing_values_are_blank_and_marked(data: Path, augment: str, kept: bool) -> None:
    change(data, "train", 1, text=None)
    change(data, "train", 2, img=None)
    one = samples(read(data, on_missing="absent"), training=True, data={"augment": augment})
    if kept:
        one.cache_images()
    found = batch(one, 0, 1, 2)
    assert {side: missing.tolist() for side, missing in found.missing.items()} == {
        "main": [False, False, True],
        "comp": [False, True, False],
    }
    blank = create_encoder("tiny:vision").preprocess.item(get_modality("image").blank_value())
    assert torch.equal(found.inputs["main"]["pixels"][2], blank)
    alone = create_encoder("tiny:text").preprocess.batch([""])
    assert torch.equal(found.inputs["comp"]["ids"][1][: alone["ids"].shape[1]], alone["ids"][0])


def test_a_batch_marks_only_sides_that_can_lack_a_value(data: Path) -> None:
    assert batch(samples(read(data, on_missing="absent")), 0, 1).missing == {}
    change(data, "train", 1, text=None)
    assert batch(samples(read(data, on_missing="absent")), 0, 2).missing["comp"].tolist() == [False, False]


def test_features_of_missing_values_are_those_of_a_blank_value(data: Path) -> None:
    for number in (3, 7):
        change(data, "train", number, text=None)
    found, encoder = read(data, on_missing="absent"), create_encoder("tiny:text")
    config = plain_config({**READERS, "device": "cpu", "data": {"path": str(data)}})
    nothing = run_frozen(encoder, encoder.preprocess.batch([""])).pooled_BC
    computed = build_fusion(**READERS, num_labels=3).pooled_feature("comp", batch(samples(found), 3, 0))
    torch.testing.assert_close(computed[:1], nothing, atol=1e-5, rtol=0)
    for origin in ("kept in", "read from"):
        features = split_features(encoder, found, "train", config, CPU)
        assert origin in features.origin
        torch.testing.assert_close(features[torch.tensor([3, 7])], nothing.expand(2, -1), atol=1e-5, rtol=0)
        assert torch.equal(features[torch.tensor([3])], features[torch.tensor([7])]), "one value is computed once"
        assert not torch.allclose(features[torch.tensor([0])], nothing, atol=1e-3)


def test_shuffling_moves_missing_marks_too(data: Path) -> None:
    change(data, "train", 1, text=None)
    one = samples(read(data, on_missing="absent"))
    turned = ShuffledSamples(one, ("comp",), torch.tensor([1, 0, *range(2, 12)]))
    assert batch(turned, 0, 1).missing["comp"].tolist() == [True, False]
    ids = batch(one, 1, 0).inputs["comp"]["ids"]
    assert torch.equal(batch(turned, 0, 1).inputs["comp"]["ids"], ids)


# -- from Python and in predictions


def test_none_among_values_becomes_the_blank_value() -> None:
    model = build_fusion(**READERS, num_labels=3, either=True)
    picture = Image.new("RGB", (20, 20), "red")
    found = model.collate([picture, None], [None, "a"])
    blank = model.collate([picture, get_modality("image").blank_value()], ["", "a"])
    assert {side: missing.tolist() for side, missing in found.missing.items()} == {"main": [False, True], "comp": [True, False]}
    assert blank.missing == {}
    assert torch.equal(model(replace(found, missing={})).logits, model(blank).logits)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"images": [None], "texts": ["a", "b"]}, "MF-DATA-17"),
        ({"images": ["no image"], "texts": ["a"]}, "MF-DATA-11"),
        ({"images": [3.5], "texts": ["a"]}, "MF-DATA-18"),
        ({"images": [], "texts": []}, "MF-DATA-17"),
        ({}, "MF-DATA-17"),
        ({"images": [None], "texts": ["a"], "sounds": [1]}, "MF-DATA-91"),
        ({"images": [None]}, "MF-DATA-92"),
    ],
)
def test_values_that_do_not_fit_are_refused(values: dict[str, Any], code: str) -> None:
    assert code_of(lambda: build_fusion(**READERS, num_labels=3).collate(**values)) == code


def test_modalities_that_no_encoder_reads_can_be_left_out() -> None:
    model = build_fusion(main="tiny:text", comp="", num_labels=2, method="main-only")
    assert torch.equal(model(model.collate(texts=["a"])).logits, model(model.collate([None], ["a"])).logits)


@pytest.mark.parametrize("policy", ["error", "absent"])
def test_predict_applies_the_policy_of_the_run(policy: str, data: Path, tmp_path: Path) -> None:
    where, run = {"path": str(data), "on_missing": policy}, tmp_path / "run"
    train(plain_config({**READERS, "device": "cpu", "data": where, "train": {"max_steps": 1}}), run)
    image = {"img": "images/test-1.png"}
    write_rows(data / "new.jsonl", [{"text": "x"}, {**image, "text": None}, {"text": "", "img": ""}, {**image, "text": "x"}])
    done = call("predict", run, data / "new.jsonl")
    predictions = [json.loads(line) for line in done.stdout.splitlines()]
    assert ["error" in line for line in predictions] == [True, policy == "error", True, False], done.stderr
    if policy == "absent":
        with Image.open(data / "images" / "test-1.png") as image:
            (prediction,) = load(run).predict([image], [None])
        assert prediction["probabilities"] == predictions[1]["probabilities"]


def test_predict_reads_only_the_modalities_of_the_model(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sides = ("--main", "tiny:text", "--method", "main-only", "--device", "cpu")
    done = call("train", *sides, "--data", data, "--out", run, "--steps", 1)
    assert done.returncode == 0, done.stderr
    write_rows(data / "new.jsonl", [{"text": "what is the red digit"}, {"text": "x", "img": "../outside.png"}])
    predictions = [json.loads(line) for line in call("predict", run, data / "new.jsonl").stdout.splitlines()]
    assert [sorted(line) for line in predictions] == [["id", "label", "probabilities"]] * 2
