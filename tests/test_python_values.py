"""Values from Python are prepared like the same values in files: images of every kind, paths, arrays, single values."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call, code_of, matrix, write_rows
from PIL import Image

import mopefuse
from mopefuse.config.schema import Data
from mopefuse.encoders.preprocess import ImagePreprocess
from mopefuse.errors import DataError
from mopefuse.fusion.base import Fusion
from mopefuse.inference.pairs import read_pairs
from mopefuse.inference.predict import Predictor, predict_pairs
from mopefuse.modalities.image import open_image, upright_rgb

TEXT = "what is the red digit"
KINDS = ["run", "adapter", "onnx", "pt2"]


def drawn(mode: str, seed: int = 0) -> Image.Image:
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (18, 30, 4), dtype=np.uint8), "RGBA")
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 2**16, (18, 30), dtype=np.uint16))
    return image if mode == "RGBA" else image.convert(mode)


def save_palette(path: Path) -> None:
    drawn("RGB").convert("P", palette=Image.Palette.ADAPTIVE).save(path, transparency=bytes(range(256)))


def save_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn("RGB").save(path, exif=exif)


FILES: dict[str, Callable[[Path], object]] = {
    "rgba.png": lambda path: drawn("RGBA").save(path),
    "grey-alpha.png": lambda path: drawn("LA").save(path),
    "palette-transparent.png": save_palette,
    "cmyk.jpg": lambda path: drawn("CMYK").save(path),
    "16-bit.png": lambda path: drawn("I;16").save(path),
    "1-bit.png": lambda path: drawn("1").save(path),
    "turned.jpg": save_turned,
    "rgb.png": lambda path: drawn("RGB").save(path),
}
LOST = ("rgba.png", "grey-alpha.png", "palette-transparent.png", "16-bit.png", "turned.jpg")  # by `convert("RGB")`


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    for name, save in FILES.items():
        save(root / name)
    write_rows(root / "table.jsonl", [{"id": name, "text": TEXT, "img": name} for name in FILES])
    return root


class Forms(dict[str, Predictor]):
    """The same model as a run, an adapter and bundles, each exported when it is first used."""

    def __init__(self, run: Path, places: dict[str, Path], folder: Path) -> None:
        super().__init__()
        self._run, self._places, self._folder = run, places, folder

    def __missing__(self, kind: str) -> Predictor:
        place = self._places.get(kind, self._folder / kind)
        if kind not in self._places:
            done = call("export", self._run, "-o", place, "--format", kind)
            assert done.returncode == 0, done.stderr
        self[kind] = mopefuse.load(place, device="cpu")
        return self[kind]


@pytest.fixture(scope="module")
def loaded(trained: Path, exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(trained, {"run": trained, "onnx": exported}, tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="module")
def model() -> Fusion:
    return mopefuse.build_fusion("tiny:vision", "tiny:text", 3)


def pixels_of(model: Fusion, image: Any) -> torch.Tensor:
    return model.collate([image], [TEXT]).inputs["main"]["pixels"][0]


@pytest.mark.parametrize("kind", matrix(KINDS, [kind for kind in KINDS if kind != "pt2"]))
def test_an_image_from_python_gets_the_same_prediction_as_its_file(kind: str, loaded: Forms, folder: Path) -> None:
    predictor = loaded[kind]
    of_files = list(predict_pairs(predictor, read_pairs(folder / "table.jsonl", Data(), ("image", "text"))))
    opened = [Image.open(folder / name) for name in FILES]
    paths = [folder / name for name in FILES]
    for values in (opened, paths, [str(path) for path in paths]):
        predictions = predictor.predict(values, [TEXT] * len(values))
        for prediction, of_file in zip(predictions, of_files, strict=True):
            assert prediction["label"] == of_file["label"]
            assert prediction["probabilities"] == pytest.approx(of_file["probabilities"], abs=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_collate_gives_the_pixels_of_the_file(name: str, folder: Path, model: Fusion) -> None:
    preprocess = model.encoder("main").preprocess
    assert isinstance(preprocess, ImagePreprocess)
    wanted = preprocess.item(open_image([folder], name, where=""))
    for value in (Image.open(folder / name), folder / name, str(folder / name)):
        assert torch.equal(pixels_of(model, value), wanted)
    plain = preprocess.item(Image.open(folder / name).convert("RGB"))
    assert torch.equal(plain, wanted) == (name not in LOST), "otherwise the test could not fail"


@pytest.mark.parametrize("name", FILES)
def test_preparing_an_image_twice_equals_preparing_it_once(name: str, folder: Path) -> None:
    once = upright_rgb(Image.open(folder / name))
    assert np.array_equal(np.asarray(upright_rgb(once)), np.asarray(once))


@pytest.mark.parametrize("kind", matrix(KINDS, [kind for kind in KINDS if kind != "pt2"]))
def test_a_single_value_is_treated_as_a_list_of_one(kind: str, loaded: Forms, folder: Path) -> None:
    predictor, image = loaded[kind], Image.open(folder / "rgb.png")
    predictions = predictor.predict([image], [TEXT])
    for value in (image, str(folder / "rgb.png"), folder / "rgb.png", np.asarray(image)):
        assert predictor.predict(value, TEXT) == predictions
    assert predictor.predict(iter([image]), (TEXT,)) == predictions
    assert code_of(lambda: predictor.predict(image, [TEXT, TEXT])) == "MF-DATA-17"


def test_arrays_are_accepted_as_images(model: Fusion) -> None:
    colours, grey, deep = (np.asarray(drawn(mode)) for mode in ("RGBA", "L", "I;16"))
    assert grey.ndim == deep.ndim == 2 and deep.dtype == np.uint16
    for array in (colours, colours[..., :3], grey, deep):
        assert torch.equal(pixels_of(model, array), pixels_of(model, Image.fromarray(array)))


def values_that_are_none() -> Iterator[tuple[Any, Any, str]]:
    image = drawn("RGB")
    yield [1], [TEXT], "a sample must be an image and a string; got int and str"
    yield 1, TEXT, "images must be a list, or an image; got int"
    yield b"bytes", TEXT, "images must be a list, or an image; got bytes"
    yield {"a": image}, TEXT, "images must be a list, or an image; got dict"
    yield [np.zeros((4, 4, 3))], [TEXT], "got ndarray and str"
    yield [torch.zeros(3, 4, 4)], [TEXT], "got Tensor and str"
    yield image, [1], "got Image and int"
    yield image, 1, "texts must be a list, or a string; got int"
    yield "none.png", TEXT, "image not found: none.png"
    yield "nul\0.png", TEXT, "image not found"
    yield "https://example.org/a.png", TEXT, "image not found: https://example.org/a.png"
    yield os.curdir, TEXT, r"\. is not a regular file"
    yield Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)), TEXT, "pixels that are not finite"


@pytest.mark.parametrize("kind", matrix(KINDS, [kind for kind in KINDS if kind != "pt2"]))
def test_an_invalid_value_is_refused(kind: str, loaded: Forms) -> None:
    for images, texts, message in values_that_are_none():
        with pytest.raises(mopefuse.errors.MopefuseError, match=message) as caught:
            loaded[kind].predict(images, texts)
        assert caught.value.fix


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, loaded: Forms) -> None:
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:5000])
    for value in (tmp_path / "half.png", Image.open(tmp_path / "half.png")):
        with pytest.raises(DataError, match="truncated") as caught:
            loaded["run"].predict([whole, value], [TEXT] * 2)
        assert caught.value.where == "sample 1"


@pytest.mark.parametrize("empty", [np.zeros((0, 5, 3), np.uint8), np.zeros((4, 0), np.uint8), Image.new("L", (0, 0))])
def test_an_image_without_pixels_is_refused(empty: Any, loaded: Forms) -> None:
    for predictor in (loaded["run"], loaded["onnx"]):
        with pytest.raises(DataError, match="the image has no pixels"):
            predictor.predict([empty], [TEXT])


def test_a_pipe_in_place_of_an_image_does_not_block(tmp_path: Path, loaded: Forms) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="is not a regular file"):
        loaded["run"].predict(tmp_path / "pipe.png", TEXT)


def test_a_bundle_prepares_images_without_torch_and_pydantic(exported: Path, folder: Path) -> None:
    code = """
import sys
sys.modules["torch"] = sys.modules["pydantic"] = None
from pathlib import Path
from mopefuse.inference.bundle import Bundle
bundle = Bundle(Path(sys.argv[1]))
print(bundle.run(bundle.collate(sys.argv[2], "what is the red digit"))[0].shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(exported), str(folder / "turned.jpg")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 3)"
