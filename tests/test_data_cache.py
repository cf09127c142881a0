"""Cached values do not change any result and are never reused for anything else; for features see test_feature_store."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, call, code_of, make_pairs, matrix, plain_config, ranks, write_rows
from PIL import Image
from safetensors.torch import load_file

from mopefuse.config.schema import Data
from mopefuse.core import cache
from mopefuse.data.collate import Samples
from mopefuse.data.feature_cache import split_features
from mopefuse.data.image_cache import pictures
from mopefuse.data.load import load_data
from mopefuse.encoders.base import create_encoder, run_frozen
from mopefuse.modalities import base as modality
from mopefuse.modalities.files import Files
from mopefuse.modalities.inspect_files import inspect_files
from mopefuse.training.listener import Listener
from mopefuse.training.train import train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Images of many sizes, some used by several rows, and texts of many lengths, some of them repeated."""
    rng = np.random.default_rng(3)
    root = make_pairs(tmp_path / "photos")
    for number, path in enumerate(sorted((root / "images").glob("*.png"))):
        Image.fromarray(rng.integers(0, 256, (20 + number, 37 - number % 9, 3), dtype=np.uint8)).save(path)
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]
        images = [row["img"] for row in rows]
        for number, row in enumerate(rows):
            row["text"] = " ".join(["what is the red digit"] * (1 + number % 3))
            row["img"] = images[number // 2]
        write_rows(root / f"{split}.jsonl", rows)
    return root


def settings(root: Path, main: str = "tiny:vision", comp: str = "tiny:text", **data: Any) -> Any:
    values = {
        "main": main,
        "comp": comp,
        "device": "cpu",
        "prompts": {"experts": 2},
        "data": {"path": str(root), **data},
        "train": {"epochs": 2, "batch_size": 5, "log_every": 1},
    }
    return plain_config(values)


def result(run: Path) -> tuple[dict[str, torch.Tensor], str, str]:
    step = max((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    return load_file(step / "weights.safetensors"), (run / "metrics.jsonl").read_text(), (run / "predictions.jsonl").read_text()


def assert_same(one: Path, other: Path) -> None:
    mine, theirs = result(one), result(other)
    assert mine[0].keys() == theirs[0].keys()
    assert [name for name in mine[0] if not torch.equal(mine[0][name], theirs[0][name])] == []
    assert mine[1:] == theirs[1:]


@pytest.mark.parametrize("main", matrix(["tiny:vision", "tiny:text"], ["tiny:vision"]))
@pytest.mark.parametrize("augment", matrix(["none", "randaugment", "crop"], ["none", "crop"]))
def test_cached_features_and_images_give_the_same_results(photos: Path, tmp_path: Path, main: str, augment: str) -> None:
    """Computing and reading cached values agree bit for bit; runs without cached features agree up to rounding."""
    comp = "tiny:text" if main == "tiny:vision" else "tiny:vision"
    plain: dict[str, Any] = {"cache_features": False, "augment": augment}
    kept = {"cache_features": True, "augment": augment}
    for name, data in {
        "plain": plain,
        "images": plain | {"cache_images": True},
        "features": kept,
        "features again": kept,
        "both": kept | {"cache_images": True, "workers": 1},
    }.items():
        train(settings(photos, main, comp, **data), tmp_path / name)
    assert_same(tmp_path / "plain", tmp_path / "images")
    assert_same(tmp_path / "features", tmp_path / "features again")
    assert_same(tmp_path / "features", tmp_path / "both")
    plain_run, kept_run = result(tmp_path / "plain")[0], result(tmp_path / "features")[0]
    for name, tensor in plain_run.items():
        torch.testing.assert_close(tensor, kept_run[name], atol=1e-3, rtol=1e-3)
    if augment != "none":
        train(settings(photos, main, comp, cache_features=False), tmp_path / "unaugmented")
        assert result(tmp_path / "unaugmented")[1] != result(tmp_path / "plain")[1]


def test_a_second_run_encodes_and_decodes_nothing(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Notices(Listener):
        def __init__(self) -> None:
            self.texts: list[str] = []

        def on_notice(self, text: str) -> None:
            self.texts.append(text)

    notices = Notices()
    train(settings(photos, cache_images=True), tmp_path / "first", listener=notices)
    assert "train: 3 distinct texts encoded once by tiny:text, kept in" in " ".join(notices.texts)
    monkeypatch.setattr("mopefuse.data.feature_cache.encode_pooled", lambda *_: pytest.fail("a text was encoded"))
    monkeypatch.setattr("mopefuse.modalities.image._decoded", lambda *_, **__: pytest.fail("an image was decoded or looked at"))
    notices = Notices()
    train(settings(photos, cache_images=True), tmp_path / "second", listener=notices)
    assert "train: 3 distinct texts encoded once by tiny:text, read from" in " ".join(notices.texts)


def features(root: Path, encoder: str = "tiny:text", split: str = "train", **changed: Any) -> Any:
    data = load_data(Data(path=str(root)))
    return split_features(create_encoder(encoder), data, split, settings(root, **changed), CPU)


@pytest.mark.parametrize("encoder", ["tiny:text", "tiny:vision"])
def test_a_cached_feature_belongs_to_its_row(photos: Path, encoder: str) -> None:
    table, again = features(photos, encoder), features(photos, encoder)
    data, model = load_data(Data(path=str(photos))), create_encoder(encoder)
    samples = Samples(data, "train", {"only": (model.modality, model.preprocess)}, Data())
    for row in range(len(samples)):
        item = samples[0, row]["only"]
        expected = run_frozen(model, model.preprocess.batch([item])).pooled_BC
        torch.testing.assert_close(table[torch.tensor([row])], expected, atol=1e-5, rtol=0)
        assert torch.equal(again[torch.tensor([row])], table[torch.tensor([row])])
    assert "read from" in again.origin


def test_cached_features_are_not_reused_for_another_encoder_or_other_samples(photos: Path, tmp_path: Path) -> None:
    assert "kept in" in features(photos).origin
    assert "kept in" in features(photos, "tiny:vision").origin
    assert "kept in" in features(photos, "tiny:vision", split="val").origin
    assert "read from" in features(photos, split="val").origin, "the same texts, in another split"
    same = shutil.copytree(photos, tmp_path / "elsewhere")
    assert "read from" in features(same).origin, "they depend on the content of the samples, not on their location"
    rows = [json.loads(line) for line in (same / "train.jsonl").read_text().splitlines()]
    rows[0]["text"] += "!"
    write_rows(same / "train.jsonl", rows)
    assert features(same).origin.startswith("1 of them computed and kept in"), "the changed text"
    assert "read from" in features(same, "tiny:vision").origin
    Image.new("RGB", (30, 30)).save(same / rows[0]["img"])
    assert features(same, "tiny:vision").origin.startswith("1 of them computed and kept in")


@pytest.mark.parametrize("layer", range(3))
def test_changing_any_weight_of_an_encoder_recomputes_its_features(photos: Path, layer: int) -> None:
    one, other = create_encoder("tiny:text"), create_encoder("tiny:text")
    with torch.no_grad():
        weight = list(other.parameters())[layer]
        weight.view(-1)[1] += 1e-3
    assert one.fingerprint() != other.fingerprint()


def test_a_tokenizer_that_splits_differently_recomputes_features(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features(photos)
    encoder = create_encoder("tiny:text")
    tokenize = encoder.preprocess.tokenize  # type: ignore[attr-defined]
    object.__setattr__(encoder.preprocess, "tokenize", lambda texts, most: tokenize([text[5:] for text in texts], most))
    data = load_data(Data(path=str(photos)))
    assert "kept in" in split_features(encoder, data, "train", settings(photos), CPU).origin


def test_damaged_cache_entries_are_computed_again(photos: Path, empty: Path) -> None:
    expected = features(photos)[torch.arange(12)].clone()
    (file,) = empty.glob("features/*/*/values.bin")
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    table = features(photos)
    assert "kept in" in table.origin
    assert torch.equal(table[torch.arange(12)], expected)


def test_without_a_cache_folder_everything_works_and_nothing_is_stored(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(photos), tmp_path / "with")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "file" / "below"))
    assert cache.root() is None
    train(settings(photos), tmp_path / "without")
    assert_same(tmp_path / "with", tmp_path / "without")
    assert code_of(lambda: train(settings(photos, cache_images=True), tmp_path / "images")) == "MF-RES-09"
    monkeypatch.delenv("MOPEFUSE_CACHE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pathlib.Path.home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.root() is None


def test_processes_share_the_cache(photos: Path, tmp_path: Path) -> None:
    train(settings(photos, cache_images=True), tmp_path / "one")
    shutil.rmtree(tmp_path / "cache")
    done = ranks(2, "train", *TINY, "--data", str(photos), "--out", str(tmp_path / "two"), "--steps", "2", "--cache-images")
    assert done.returncode == 0, done.stderr
    assert {kind for kind, *_ in cache.entries()} == {"index", "features", "images"}


# -- the image cache


def test_a_cached_image_equals_the_decoded_one(photos: Path) -> None:
    data, encoder = load_data(Data(path=str(photos))), create_encoder("tiny:vision")
    kept = pictures(data, data.splits["train"], "image", encoder.preprocess, Data())
    for number, row in enumerate(data.splits["train"].rows):
        with Image.open(photos / row.values["image"]) as image:
            assert np.array_equal(kept[number], encoder.preprocess.reduce(image.convert("RGB")))


def test_an_image_used_by_many_rows_is_cached_once(photos: Path, empty: Path) -> None:
    data, encoder = load_data(Data(path=str(photos))), create_encoder("tiny:vision")
    kept = pictures(data, data.splits["train"], "image", encoder.preprocess, Data())
    different = {row.values["image"]: kept[number].size for number, row in enumerate(data.splits["train"].rows)}
    (file,) = empty.glob("images/*/pixels.bin")
    assert len(different) == 6
    assert file.stat().st_size == sum(different.values())


# -- the index


def test_unchanged_images_are_not_read_again(photos: Path) -> None:
    names = [f"images/train-{i}.png" for i in range(4)]
    kind, how = modality.get_modality("image"), Data()
    assert isinstance(kind, Files)
    looks = inspect_files(kind, [photos], names, how)
    reading: list[tuple[int, int]] = []
    again = inspect_files(kind, [photos], names, how, known=looks, advance=lambda *progress: reading.append(progress))
    assert (again, reading) == (looks, [])
    (photos / names[2]).write_bytes(b"")
    changed = inspect_files(kind, [photos], names, how, known=looks, advance=lambda *progress: reading.append(progress))
    assert reading == [(1, 1)]
    assert [number for number in range(4) if changed[number] != looks[number]] == [2]
    assert changed[2].code == "MF-DATA-13"


def test_an_image_damaged_after_the_index_was_built_is_detected(photos: Path) -> None:
    load_data(Data(path=str(photos)))
    path = photos / "images" / "val-1.png"
    path.write_bytes(path.read_bytes()[:60])
    assert code_of(lambda: load_data(Data(path=str(photos)))) == "MF-DATA-13"


def test_an_index_from_the_cache_equals_a_fresh_one(photos: Path, empty: Path) -> None:
    def read() -> Any:
        data = load_data(Data(path=str(photos)))
        splits = data.splits.values()
        keys = [[each.tolist() for each in (*split.keys.values(), *split.loose_keys.values())] for split in splits]
        return [keys, *((split.hash, list(split.rows), list(split.labels)) for split in splits)]

    fresh = read()
    assert len(list(empty.glob("index/*"))) == 3
    assert read() == fresh


def test_the_cache_lists_its_contents_and_can_be_cleared(photos: Path, tmp_path: Path) -> None:
    train(settings(photos), tmp_path / "run")
    shown = call("data", "cache", "--json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    assert {entry["kind"] for entry in found["entries"]} == {"index", "features"}
    assert call("data", "cache", "--clear").returncode == 0
    assert list(cache.entries()) == []
