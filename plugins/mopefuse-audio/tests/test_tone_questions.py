"""Three modalities: a text and a tone ask about an image, and the loss without either of them is reported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
import tone_questions
from PIL import Image
from typer.testing import CliRunner

import mopefuse
from mopefuse.cli.app import app

STEPS = 150  # a quick look; ten epochs of 8,000 rows reach 96 % (docs/log.md)


def call(*args: object) -> Any:
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("tones")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPEFUSE_CACHE", str(root / "cache"))
        tone_questions.make(root / "data", train=4000, val=200, test=400)
        whisper = f"audio:{tone_questions.pretrain(root / 'whisper')}"
        call(
            "train", "--recipe", "digit-questions/short", "--main", "tiny:vision", "--comp", "tiny:text", "--comp", whisper,
            "--data", root / "data", "--out", root / "run", "--modality-dropout", 0.1, "--steps", STEPS, "--device", "cpu",
        )  # fmt: skip
        yield root


def test_the_model_learns_what_no_two_modalities_determine(folder: Path) -> None:
    facts = json.loads((folder / "run" / "manifest.json").read_text())["encoders"]
    assert [facts[side]["modality"] for side in ("main", "comp", "comp2")] == ["image", "text", "audio"]
    assert json.loads((folder / "run" / "metrics.json").read_text())["metrics"]["test"]["accuracy"] > 0.63


def test_the_loss_without_a_modality_is_reported(folder: Path) -> None:
    call("eval", folder / "run", "--missing", "grid", "--device", "cpu")
    (file,) = (folder / "run").glob("missing-test-*.json")
    kept = json.loads(file.read_text())
    accuracy = {json.dumps(cell["missing"]): cell["metrics"]["accuracy"] for cell in kept["cells"]}
    whole, text, audio, both = (accuracy[key] for key in ("{}", '{"text": 1.0}', '{"audio": 1.0}', '{"audio+text": 1.0}'))
    assert whole > text + 0.05 and text > audio + 0.05 and abs(audio - both) < 0.15
    call("report", folder / "run", "--device", "cpu")
    page = (folder / "run" / "report.html").read_text()
    for words in ("70 % of samples lack audio", "70 % of samples lack text", "100 % of samples lack audio and text"):
        assert words in page
    assert "The model uses the audio" in page and "The model uses the text" in page


def test_a_tone_can_be_left_out_in_python(folder: Path) -> None:
    row = json.loads((folder / "data" / "test.jsonl").read_text().splitlines()[0])
    model = mopefuse.load(folder / "run", device="cpu")
    image, clip = Image.open(folder / "data" / row["img"]), soundfile.read(folder / "data" / row["audio"])
    whole, without = model.predict([image] * 2, [row["text"]] * 2, audio=[clip, None])
    assert whole["probabilities"] != without["probabilities"]


def test_swap_encoder_selects_an_encoder_by_its_modality(folder: Path) -> None:
    whisper = tone_questions.pretrain(folder / "other", steps=1)
    done = call("swap-encoder", folder / "run", "--comp", f"audio=audio:{whisper}", "-o", folder / "swapped", "--json")
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["encoders"]["comp2"].endswith(str(whisper)) and result["encoders"]["comp"] == "tiny:text"
    origins = {entry["name"]: entry["origin"] for entry in result["tensors"]}
    assert origins["stack.router.weight_NKC"] == origins["head.weight"] == "kept"
    assert origins["stack.router.others.comp2"] == origins["absent.comp2"] == "new"
