"""Audio with images or texts, from tables to predictions, with a few synthetic clips and small random models."""

from __future__ import annotations

import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import soundfile
import torch
from mopefuse_audio_clips import Audio, Clip
from PIL import Image
from test_audio import save, spec

from mopefuse import build_fusion, load
from mopefuse.config.schema import Data
from mopefuse.data.load import load_data
from mopefuse.errors import ConfigError, DataError
from mopefuse.fusion.build import require_rows
from mopefuse.testing import check_modality

COUNTS = {"train": 6, "val": 4, "test": 4}
SMALL = ("--device", "cpu", "--experts", "2", "--batch", "4", "--steps", "2")


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with patch.dict(os.environ, MOPEFUSE_CACHE=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save(tmp_path_factory.mktemp("models"))


def make(root: Path, *columns: str) -> Path:
    """Write a data set with these columns: tones of two pitches, grey and white images."""
    (root / "clips").mkdir(parents=True)
    for split, count in COUNTS.items():
        rows = []
        for i in range(count):
            name, kind = f"{split}-{i}", i % 2
            tone = np.sin(np.arange(4000 + 100 * i) * (0.1 + kind)).astype(np.float32)
            soundfile.write(root / "clips" / f"{name}.wav", (0.5 + 0.01 * len(split)) * tone, 8000)
            Image.new("RGB", (16, 16), (128 + 100 * kind + i,) * 3).save(root / "clips" / f"{name}.png")
            whole = {"audio": f"clips/{name}.wav", "img": f"clips/{name}.png", "text": f"sound {name}"}
            rows.append({"id": name, "label": "ab"[kind], **{column: whole[column] for column in columns}})
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def change(root: Path, number: int, **changed: Any) -> Path:
    """Change a value in one row of train; `...` removes the column."""
    path = root / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[number] = {key: value for key, value in (rows[number] | changed).items() if value is not ...}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def call(*args: object) -> tuple[int, str, str]:
    """Run the command line in this process; returns exit code, stdout and stderr."""
    from mopefuse.cli.app import main

    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["mopefuse", *map(str, args)]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as leaving,
    ):
        main()
    return int(leaving.value.code or 0), out.getvalue(), err.getvalue()


def test_clips_that_no_encoder_reads_can_be_left_out(tmp_path: Path) -> None:
    root = change(make(tmp_path / "data", "audio", "img", "text"), 0, audio=None)
    images = ("train", "--main", "tiny:vision", "--comp", "tiny:text", "--data", root, *SMALL)
    code, _, err = call(*images, "--out", tmp_path / "run")
    assert code == 4 and "leave audio out of data.modalities if no encoder reads it" in err
    code, _, err = call(*images, "--out", tmp_path / "run", "--set", "data.modalities=[image,text]")
    assert code == 0, err


@pytest.mark.parametrize("columns", [("audio", "text"), ("audio", "img", "text")])
def test_a_preview_names_clips_next_to_images_and_texts(tmp_path: Path, columns: tuple[str, ...]) -> None:
    root, sheet = make(tmp_path / "data", *columns), tmp_path / "sheet.html"
    code, _, err = call("data", "preview", root, "-o", sheet)
    assert code == 0, err
    page = sheet.read_text(encoding="utf-8")
    names = [f"audio: clips/train-{i}.wav" for i in range(6)]
    assert all(page.count(name) == 1 for name in names)
    assert page.count("<img ") == (6 if "img" in columns else 0)
    assert "pill error" not in page.partition("</style>")[2]


def done(*args: object) -> str:
    """Run a command that must succeed; returns its stdout."""
    code, out, err = call(*args)
    assert code == 0, err
    return out


# -- complete runs


@pytest.mark.parametrize("columns", [("img", "audio"), ("text", "audio")], ids="+".join)
def test_a_model_trains_and_predicts(columns: tuple[str, str], tmp_path: Path, folders: dict[str, Path]) -> None:
    data, run, audio = make(tmp_path / "data", *columns), tmp_path / "run", spec("wav2vec2", folders["wav2vec2"])
    sides = ("--main", "tiny:vision", "--comp", audio) if "img" in columns else ("--main", audio, "--comp", "tiny:text")
    done("train", *sides, *SMALL, "--data", data, "--out", run, "--compat", "paper")
    config = (run / "config.yaml").read_text()
    assert ("lr: 0.0004" if "img" in columns else "lr: 0.0005") in config  # the default for the main encoder's modality
    needs = {need["group"] for need in json.loads((run / "manifest.json").read_text())["plugins"]}
    assert needs == {"mopefuse.encoders", "mopefuse.modalities"}
    metrics = json.loads(done("eval", run, "--json"))["metrics"]
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    rows[1].pop(columns[1])
    (data / "new.jsonl").write_text("".join(json.dumps({**row, "unread": 3}) + "\n" for row in rows))
    predictions = [json.loads(line) for line in done("predict", run, data / "new.jsonl").splitlines()]
    assert [line["id"] for line in predictions] == ["test-0", "2", "test-2", "test-3"]  # an invalid row has its line
    assert predictions[1]["error"]["code"] == "MF-DATA-03" and "has no audio" in predictions[1]["error"]["message"]
    rest = [line["label"] == row["label"] for line, row in zip(predictions, rows, strict=True) if "error" not in line]
    assert len(rest) == 3 and 0 <= metrics["accuracy"] <= 1
    tone = (np.sin(np.arange(4000) * 0.1).astype(np.float32), 8000)
    other = {"images": [Image.new("RGB", (16, 16))]} if "img" in columns else {"texts": ["sound"]}
    assert load(run).predict(**other, audio=[tone])[0]["label"] in ("a", "b")
    assert "MF-ENC-57" in call("export", run, "-o", tmp_path / "bundle")[2]
    report = done("report", run)
    assert "Traceback" not in report


def test_samples_equal_those_in_the_files(tmp_path: Path, folders: dict[str, Path]) -> None:
    data = load_data(Data(path=str(make(tmp_path, "text", "audio"))))
    assert data.modalities == ("text", "audio")
    model = build_fusion(main=spec("hubert", folders["hubert"]), comp="tiny:text", num_labels=2)
    row = data.splits["val"].rows[2]
    read = [data.read(data.splits["val"], row, name, Data()) for name in ("audio", "text")]
    one = model.collate(audio=read[:1], texts=read[1:])
    other = model.collate(audio=[tmp_path / "clips" / "val-2.wav"], texts=["sound val-2"])
    assert torch.equal(one.inputs["main"]["audio"], other.inputs["main"]["audio"])
    assert torch.equal(model(one).logits, model(other).logits)


def test_a_model_of_audio_refuses_rows_without_audio(tmp_path: Path, folders: dict[str, Path]) -> None:
    audio = spec("wav2vec2", folders["wav2vec2"])
    code, _, err = call("train", "--main", "tiny:vision", "--comp", audio, *SMALL, "--data", make(tmp_path, "img", "text"))
    assert code == 3 and "reads audio, but rows have text and image" in err and "--column audio=NAME" in err
    with pytest.raises(ConfigError):
        require_rows(build_fusion(main="tiny:vision", comp=audio, num_labels=2), ("text", "image"))


# -- tables


def test_the_column_can_have_another_name(tmp_path: Path) -> None:
    root = make(tmp_path, "img", "text", "audio")
    for split in COUNTS:
        path = root / f"{split}.jsonl"
        path.write_text(path.read_text().replace('"audio":', '"wav":'))
    assert load_data(Data(path=str(root))).modalities == ("text", "image")
    found = json.loads(done("data", "check", root, "--column", "audio=wav", "--json"))
    assert found["splits"]["train"]["clips"] == 6
    assert load_data(Data(path=str(root), columns={"audio": "wav"})).modalities == ("text", "image", "audio")


def test_data_check_finds_problems_with_clips(tmp_path: Path) -> None:
    root = make(tmp_path, "text", "audio")
    clips = root / "clips"
    (clips / "train-0.wav").write_bytes((clips / "train-0.wav").read_bytes()[:2000])
    (clips / "train-1.wav").unlink()
    (clips / "train-2.wav").write_bytes((clips / "test-2.wav").read_bytes())
    change(root, 3, audio="../outside.wav")
    code, out, _ = call("data", "check", root, "--json", "--html", tmp_path.parent / f"{tmp_path.name}.html")
    report = json.loads(out)
    kinds = {problem["id"]: (problem["kind"], problem["code"]) for problem in report["problems"]}
    assert kinds["train-0"] == ("unreadable-file", "MF-DATA-200")
    assert kinds["train-1"] == ("missing-file", "MF-DATA-11")
    assert kinds["train-3"] == ("unsafe-path", "MF-SEC-01")
    assert code == 4 and report["leaks"]["test"] == {"clips": 1, "texts": 0}
    assert "clips" in report["splits"]["train"] and "images" not in report["splits"]["train"]
    with pytest.raises(DataError, match=r"1 bad row: train.jsonl:4, id train-3: the audio path is outside the data folder"):
        load_data(Data(path=str(root)))


def test_the_same_clip_in_two_splits_is_a_leak(tmp_path: Path) -> None:
    root = make(tmp_path, "text", "audio")
    (root / "clips" / "test-2.wav").write_bytes((root / "clips" / "train-2.wav").read_bytes())
    assert any("1 audio of test is also in train" in notice for notice in load_data(Data(path=str(root))).notices)
    (found,) = [p for p in json.loads(done("data", "check", root, "--json"))["problems"] if p["kind"] == "leaked-file"]
    assert (found["id"], found["message"]) == ("test-2", "its audio is also in train.jsonl:3, id train-2")


@pytest.mark.parametrize("value", [..., None, ""])
def test_a_row_without_a_clip_is_an_error_skipped_or_kept(value: Any, tmp_path: Path, folders: dict[str, Path]) -> None:
    root = change(make(tmp_path / "data", "text", "audio"), 1, audio=value)
    with pytest.raises(DataError):
        load_data(Data(path=str(root)))
    skipped = load_data(Data(path=str(root), on_missing="skip"))
    assert len(skipped.splits["train"].rows) == 5 and "train.jsonl: 1 row without audio is left out" in skipped.notices
    kept = load_data(Data(path=str(root), on_missing="absent"))
    assert kept.splits["train"].rows[1].values["audio"] is None
    assert kept.splits["train"].is_missing("audio").tolist() == [False, True, False, False, False, False]
    sides = ("--main", "tiny:text", "--comp", spec("wav2vec2", folders["wav2vec2"]))
    done("train", *sides, *SMALL, "--data", root, "--out", tmp_path / "run", "--on-missing", "absent")


# -- clips


def written(samples: np.ndarray, **how: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 16000, **{"format": "WAV", **how})
    return file.getvalue()


TONE = np.sin(np.arange(8000) / 20).astype(np.float32)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_every_format_is_read(kind: str) -> None:
    clip = Clip(written(TONE, format=kind), "a")
    clip.check()
    samples, rate = clip.start(0.25)
    assert (samples.shape, rate) == ((4000, 1), 16000)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"<html>not found</html>", "Format not recognised"),
        (written(TONE)[:3000], "it is cut short"),
        (written(TONE, format="FLAC")[:3000], "is not readable audio"),
        (written(TONE[:0]), "it has no samples"),
        (written(np.array([0, np.nan, 0], dtype=np.float32), subtype="FLOAT"), "not finite"),
    ],
    ids=["empty", "HTML", "cut WAV", "cut FLAC", "no samples", "NaN"],
)
def test_damaged_clips_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        Clip(content, "a.wav").check()
    assert caught.value.code == "MF-DATA-200" and caught.value.what.startswith("a.wav ")


def test_a_clip_may_not_be_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopefuse_audio_clips.MAX_SAMPLES", len(TONE) - 1)
    with pytest.raises(DataError, match="8,000 samples, more than 7,999"):
        Clip(written(TONE), "a.wav").check()


def test_the_blank_value_is_a_second_of_silence() -> None:
    samples, rate = Audio().blank_value()
    assert not samples.any() and len(samples) == rate


def test_the_modality_satisfies_the_contract(tmp_path: Path) -> None:
    (tmp_path / "mono.wav").write_bytes(written(TONE))
    (tmp_path / "stereo.flac").write_bytes(written(np.stack([TONE, -TONE], axis=1), format="FLAC"))
    assert isinstance(check_modality("audio", values=["mono.wav", "stereo.flac"], root=tmp_path), Audio)


def test_samples_with_their_rate_are_one_value_and_two_paths_are_two() -> None:
    audio = Audio()
    assert audio.is_single((TONE, 16000)) and audio.accepts((TONE, 16000))
    assert not audio.is_single(("a.wav", "b.wav")) and not audio.accepts(("a.wav", "b.wav"))


def test_a_path_that_cannot_be_read_is_an_error_with_the_sample(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read") as caught:
        Audio().prepare(tmp_path / "missing.wav", where="sample 3")
    assert caught.value.where == "sample 3"
