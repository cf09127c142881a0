"""The runtime of a bundle: the same pixels and tokens as in training, clear messages for invalid inputs, and no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from conftest import code_of, run_cli
from encoder_cases import OPEN_CLIP, save_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tasks_of import task_of
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import mopefuse
from mopefuse.encoders.base import create_encoder
from mopefuse.inference import bundle_tokens
from mopefuse.inference.bundle import Bundle
from mopefuse.modalities import pixels

ROOT = Path(__file__).parent.parent
TEXTS = [
    "what is the RED digit?", "", "  a  b\tc\n", "It's John's 42nd café — “quoted” text… ﬁne", "日本語 テキスト 123", "x" * 400,
    "hello " * 300, "&lt;b&gt; &amp;amp; it&#39;s", "emoji 😀🎉 <end_of_text> [CLS] [SEP] <start_of_text>", "a_b-c_d 3.14 I'll",
    "ÀÉÎ Straße İstanbul", "zero\u200bwidth nbsp\xa0x", "Ａｂｃ", "cafÃ© mojibake", "\ud800 half", "bell\x07",
]  # fmt: skip


@pytest.fixture(scope="module")
def bundle(exported: Path) -> Bundle:
    return Bundle(exported)


# -- the same as training


@given(
    sides=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    resize=st.integers(1, 90) | st.tuples(st.integers(1, 90), st.integers(1, 90)),
    how=st.sampled_from(["bicubic", "bilinear", "nearest", "lanczos"]),
)
@settings(max_examples=60)
def test_pixels_equal_those_of_torchvision(sides: tuple[int, int], size: tuple[int, int], resize: Any, how: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8))
    if max(sides) > 50 * min(sides):
        return  # of longer images, only the middle is resized
    wanted = TF.resize(image, [resize] if isinstance(resize, int) else list(resize), v2.InterpolationMode(how), antialias=True)
    shrunk = pixels.shrink(image, resize, how)
    assert np.array_equal(shrunk, np.asarray(wanted))
    assert np.array_equal(pixels.centre(shrunk, size), np.asarray(TF.center_crop(wanted, list(size))))


def test_of_a_very_long_image_only_the_middle_is_resized() -> None:
    strip = Image.fromarray(np.tile(np.arange(3000, dtype=np.uint16)[None, :, None] // 12, (2, 1, 3)).astype(np.uint8))
    assert pixels.shrink(strip, 4, "bilinear").shape == (4, 200, 3)
    assert abs(float(pixels.centre(pixels.shrink(strip, 4, "bilinear"), (4, 4)).mean()) - 124.5) < 2


@pytest.mark.parametrize("kind", ["tiny", "hashing", "hf", "open_clip"])
@pytest.mark.parametrize("ftfy", [True, False])
def test_tokens_equal_those_of_the_encoder(
    kind: str, ftfy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "open_clip":
        (tmp_path / "mopefuse-tokens.json").write_text(json.dumps(OPEN_CLIP))
        open_clip.add_model_config(tmp_path / "mopefuse-tokens.json")
    if kind == "hf":
        save_hf("bert", tmp_path / "bert")
    specs = {
        "tiny": "tiny:text",
        "hashing": "hf:bert-base?pretrained=false&num_hidden_layers=1&max_tokens=40",
        "hf": f"hf:{tmp_path / 'bert'}",
        "open_clip": "open_clip:mopefuse-tokens#text?pretrained=false",
    }
    preprocess: Any = create_encoder(specs[kind]).preprocess
    file = tmp_path / "comp-tokenizer.json"
    how = {**preprocess.describe(), "tokenizer": preprocess.save(file), "length": preprocess.length}
    how["tokenizer"]["file"] = file.name
    if not file.exists():
        del how["tokenizer"]["file"]
    monkeypatch.setattr(bundle_tokens, "find_spec", lambda name: object() if ftfy else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenize = bundle_tokens.load_tokenizer(how, tmp_path)
        broken = kind == "open_clip" and not ftfy
        texts = [text for text in TEXTS if not (broken and "mojibake" in text)]
        wanted = preprocess.batch([preprocess.item(text) for text in texts])
        ids, mask = tokenize(texts)
    assert np.array_equal(mask, wanted["mask"].numpy())
    for text, mine, theirs in zip(texts, ids, wanted["ids"].numpy(), strict=True):
        assert np.array_equal(mine, theirs), text


def test_text_that_may_need_ftfy_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_tokens, "find_spec", lambda name: None)
    clean = bundle_tokens._clip_text()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert clean("  A &lt;b&gt;  C ") == "a <b> c"
        with pytest.raises(Warning, match="ftfy is not installed"):
            clean("café")


@pytest.mark.parametrize("multi", [True, False])
def test_probabilities_equal_those_of_training(multi: bool) -> None:
    logits = np.array([[3.0, -2.0, 0.5], [800.0, -800.0, 0.0]], dtype=np.float32)
    wanted = task_of(multi).probabilities(torch.from_numpy(logits)).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.allclose(task_of(multi).decode(logits), wanted, atol=1e-7)


# -- invalid inputs


def good(bundle: Bundle) -> dict[str, Any]:
    return bundle.collate([Image.new("RGB", (20, 30))] * 2, ["what is red", "a"])


BAD: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str, str]] = {
    "another size": (lambda i: i | {"main_pixels": i["main_pixels"][:, :8]}, "MF-DATA-88", "Bx16x16x3"),
    "floats": (lambda i: i | {"main_pixels": i["main_pixels"] / 255}, "MF-DATA-88", "uint8"),
    "no batch": (lambda i: i | {"main_pixels": i["main_pixels"][0]}, "MF-DATA-88", "Bx16x16x3"),
    "an empty batch": (lambda i: {name: array[:0] for name, array in i.items()}, "MF-DATA-88", "batch size B >= 1"),
    "batches of two sizes": (lambda i: i | {"main_pixels": i["main_pixels"][:1]}, "MF-DATA-88", "the same batch size B >= 1"),
    "ids of 32 bits": (lambda i: i | {"comp_ids": i["comp_ids"].astype(np.int32)}, "MF-DATA-88", "int64"),
    "a token that is not known": (lambda i: i | {"comp_ids": i["comp_ids"] + 10_000}, "MF-DATA-90", "valid ids are 0 to"),
    "a negative token": (lambda i: i | {"comp_ids": i["comp_ids"] - 5}, "MF-DATA-90", "token -"),
    "a text of no tokens": (lambda i: i | {"comp_mask": np.zeros_like(i["comp_mask"])}, "MF-DATA-89", "a real token"),
    "too long a text": (
        lambda i: i | {"comp_ids": np.ones((2, 99), np.int64), "comp_mask": np.ones((2, 99), bool)}, "MF-DATA-89", "1 to 32",
    ),
    "a mask of another shape": (lambda i: i | {"comp_mask": i["comp_mask"][:, :1]}, "MF-DATA-89", "of the same shape"),
    "a missing input": (lambda i: {name: i[name] for name in ("main_pixels", "comp_ids")}, "MF-DATA-87", "comp_mask"),
    "an unknown input": (lambda i: i | {"audio": i["comp_ids"]}, "MF-DATA-87", "audio"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_invalid_raw_inputs_are_refused_with_a_clear_message(name: str, bundle: Bundle) -> None:
    change, code, message = BAD[name]
    assert bundle.run(good(bundle))[0].shape == (2, 3)
    with pytest.raises(mopefuse.errors.DataError) as caught:
        bundle.run(change(good(bundle)))
    assert (caught.value.code, caught.value.exit_code) == (code, 4)
    assert message in str(caught.value) and caught.value.fix


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kind", ["run", "bundle"])
def test_pixels_that_are_not_finite_are_an_error(
    kind: str, bad: float, exported: Path, trained: Path
) -> None:
    predictor = mopefuse.load(exported if kind == "bundle" else trained, device="cpu")
    array = np.zeros((20, 20), np.float32)
    whole = Image.fromarray(array)
    array[3, 4] = bad
    assert predictor.predict([whole], ["a"])[0]["probabilities"]
    with pytest.raises(mopefuse.errors.NumericError) as caught:
        predictor.predict([Image.fromarray(array)], ["a"])
    assert (caught.value.code, caught.value.exit_code) == ("MF-NUM-04", 8)


def test_a_prediction_that_is_not_finite_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_run", lambda inputs: [np.full((2, 3), np.nan, np.float32)])
    with pytest.raises(mopefuse.errors.NumericError, match="NaN or infinite"):
        bundle.run(good(bundle))


def test_a_bundle_refuses_a_checkpoint_and_an_unavailable_device(exported: Path) -> None:
    assert code_of(lambda: mopefuse.load(exported, checkpoint="last")) == "MF-CFG-70"
    assert code_of(lambda: mopefuse.load(exported, main="tiny:vision-b")) == "MF-CFG-70"
    assert code_of(lambda: mopefuse.load(exported, device="cuda:3")) == "MF-CFG-41"


# -- without torch


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with mopefuse and the packages that its runtime needs, but without torch."""
    folder = tmp_path_factory.mktemp("runtime") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for packages in (["--no-deps", str(ROOT)], ["onnxruntime", "tokenizers", "pillow", "numpy"]):
        done = subprocess.run([*pip, *packages], capture_output=True, text=True, check=False)
        if done.returncode and "No matching distribution" in done.stderr:
            pytest.skip("the package index cannot be reached")
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.process
def test_a_bundle_predicts_without_torch(environment: Path, exported: Path, tmp_path: Path) -> None:
    """First with only onnxruntime, tokenizers, Pillow and numpy; then on the command line, which needs a few more packages."""
    example = json.loads((exported / "example.json").read_text())
    python, clean = environment / "bin" / "python", {"PATH": os.environ["PATH"], "MOPEFUSE_CACHE": str(tmp_path / "cache")}
    program = (
        "import sys; from pathlib import Path; from PIL import Image; from mopefuse.inference.bundle import Bundle\n"
        f"folder = Path({str(exported)!r}); bundle = Bundle(folder)\n"
        f"inputs = bundle.collate([Image.open(folder / 'example.png')], [{example['text']!r}])\n"
        "print(bundle.run(inputs)[0][0].tolist()); print(sorted({'torch', 'typer', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, env=clean, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    logits, imported = done.stdout.splitlines()
    assert json.loads(logits) == pytest.approx(example["logits"], abs=1e-4) and imported == "[]"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "typer", "rich", "pydantic", "pyyaml"], check=True)
    command = [environment / "bin" / "mopefuse", "predict", exported]
    pair = ["--image", exported / "example.png", "--text", example["text"]]
    done = subprocess.run([*command, *pair], capture_output=True, text=True, env=clean, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["label"] == example["prediction"]["label"]
    missing = subprocess.run([python, "-c", "import torch"], capture_output=True, env=clean, check=False)
    assert missing.returncode != 0


def test_the_runtime_imports_no_torch(exported: Path) -> None:
    program = f"import sys, mopefuse; mopefuse.load({str(exported)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert run_cli("export", "verify", exported).returncode == 0
