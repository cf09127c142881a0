"""The loss in accuracy if a modality is missing: in evaluation, predictions, bundles, and the report."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call, write_rows
from missing_cases import holes, train
from tasks_of import SINGLE
from test_fusion import images

import mopefuse
from mopefuse.data.load import load_data
from mopefuse.data.modality_dropout import FixedMissing
from mopefuse.errors import DataError
from mopefuse.evaluation import missing_modalities
from mopefuse.evaluation.missing_shares import describe_shares, parse_shares
from mopefuse.evaluation.split import prepare_samples, run_split
from mopefuse.inference.bundle import Bundle
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.load import load_model


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("missing") / "run"
    done = train(pairs, folder, "--modality-dropout", 0.3, "--steps", 4)
    assert done.returncode == 0, done.stderr
    return folder


def kept_in(run: Path, seed: int = 0) -> Any:
    """The saved result of `eval --missing` for the test split and the selected checkpoint."""
    step = json.loads((run / "metrics.json").read_text())["selected_step"]
    return json.loads((run / f"missing-test-step-{step}-seed-{seed}.json").read_text())


def test_a_result_for_a_missing_fraction_is_printed_saved_and_reproducible(run: Path) -> None:
    done = call("eval", run, "--missing", "text=0.7", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["cells"][0]["words"] == "70 % of samples lack text"
    kept = kept_in(run)
    cell, order = kept["cells"][0], kept["orders"]["text"]
    assert cell["metrics"] == result["metrics"] and cell["rows"] == {"text": round(0.7 * len(order))} and kept["learned"]
    loaded = load_model(RunFolder(run), "best", torch.device("cpu"))
    data = load_data(loaded.config.data)
    lacks = set(order[: cell["rows"]["text"]])
    mask_S = np.array([row.id in lacks for row in data.splits["test"].rows])
    cpu = torch.device("cpu")
    taken = FixedMissing(prepare_samples(loaded.model, data, "test", loaded.config, cpu), {"text": mask_S})
    logits_SN = run_split(loaded.model, data, "test", loaded.config, cpu, samples=taken).logits_SN
    again = SINGLE.compute(logits_SN, data.targets("test"), thresholds=0.5)
    assert again == pytest.approx(cell["metrics"], abs=1e-6)


@pytest.mark.process
def test_a_grid_has_a_table_and_a_section_in_the_report(run: Path) -> None:
    done = call("eval", run, "--missing", "grid")
    assert done.returncode == 0, done.stderr
    assert "100 % of samples lack text" in done.stdout and "nothing is removed" in done.stdout
    kept = kept_in(run)
    plain = next(cell for cell in kept["cells"] if not cell["missing"])
    assert plain["metrics"] == json.loads((run / "metrics.json").read_text())["metrics"]["test"]
    assert [cell["missing"] for cell in kept["cells"] if cell["missing"]].count({"text": 0.7}) == 1
    assert call("report", run, "--no-audit").returncode == 0
    page = (run / "report.html").read_text()
    assert "Where a modality is missing" in page and "70 % of samples lack text" in page


@pytest.mark.process
def test_another_seed_or_checkpoint_does_not_overwrite_saved_results(run: Path) -> None:
    assert call("eval", run, "--missing", "text=0.7").returncode == 0
    before = kept_in(run)
    assert call("eval", run, "--missing", "text=0.7", "--missing-seed", 5).returncode == 0
    assert call("eval", run, "--missing", "text=0.3", "--checkpoint", "last").returncode == 0
    assert kept_in(run, 5)["orders"] != kept_in(run)["orders"] == before["orders"]
    assert [cell for cell in kept_in(run)["cells"] if cell in before["cells"]] == before["cells"]
    assert call("report", run, "--no-audit").returncode == 0
    assert "70 % of samples lack text" in (run / "report.html").read_text()


def test_a_model_never_trained_with_missing_modalities_gives_a_notice(trained: Path) -> None:
    done = call("eval", trained, "--missing", "text=1")
    assert done.returncode == 0 and "trained on complete samples only" in done.stderr, done.stderr
    for file in trained.glob("missing-test-*.json"):
        file.unlink()


@pytest.mark.parametrize(
    ("predicted", "code"),
    [
        (["text"], "MF-CFG-150"),
        (["text=1.5"], "MF-CFG-150"),
        (["text=nan"], "MF-CFG-150"),
        (["=0.5"], "MF-CFG-150"),
        (["text=0.5", "text=0.6"], "MF-CFG-150"),
        (["image=0.5"], "MF-CFG-152"),
        (["txt=0.5"], "MF-CFG-152"),
        (["grid", "--min", "accuracy=0.1"], "MF-CFG-153"),
    ],
)
def test_modalities_that_cannot_be_removed_are_refused(run: Path, predicted: list[str], code: str) -> None:
    words = [word for a in predicted for word in (["--missing", a] if a[0] != "-" and "accuracy" not in a else [a])]
    error = json.loads(call("eval", run, *words, "--json").stdout)["error"]
    assert error["code"] == code
    assert "--either" in error["hint"] if predicted == ["image=0.5"] else "text" in error["hint"] or "twice" in error["message"]


def test_a_bundle_does_not_support_missing_modalities(exported: Path) -> None:
    error = json.loads(call("eval", exported, "--missing", "text=0.5", "--json").stdout)["error"]
    assert error["code"] == "MF-CFG-151"


def test_missing_fractions_are_parsed_and_described() -> None:
    assert parse_shares(["grid"]) is None and parse_shares(["text+audio=0.5"]) == [{"audio+text": 0.5}]
    found = describe_shares({"audio+text": 0.5, "image": 0.125})
    assert found == "50 % of samples lack audio and text, 12.5 % of samples lack image"
    assert describe_shares({}) == describe_shares({"text": 0.0}) == "nothing is removed"


def test_predict_handles_rows_with_gaps_if_the_model_was_trained_to(pairs: Path, trained: Path, tmp_path: Path) -> None:
    data = holes(pairs, tmp_path / "data", column="text")
    done = train(data, tmp_path / "run", "--on-missing", "absent", "--steps", 2)
    assert done.returncode == 0, done.stderr
    found = {
        name: [json.loads(line) for line in call("predict", folder, data / "test.jsonl").stdout.splitlines()]
        for name, folder in {"run": tmp_path / "run", "other": trained}.items()
    }
    assert found["run"] and not any("error" in row for row in found["run"])
    assert sum("error" in row for row in found["other"]) == len(found["run"][::3])
    whole = [json.loads(line) for line in call("predict", tmp_path / "run", pairs / "test.jsonl").stdout.splitlines()]
    same = [one["probabilities"] == other["probabilities"] for one, other in zip(found["run"], whole, strict=True)]
    assert same[:3] == [False, True, True]


@pytest.mark.process
def test_bundles_predict_rows_with_gaps_like_their_run(pairs: Path, tmp_path: Path) -> None:
    data = holes(pairs, tmp_path / "data", column="text")
    run = tmp_path / "run"
    assert train(data, run, "--on-missing", "absent", "--steps", 2).returncode == 0
    wanted = [json.loads(line)["probabilities"] for line in call("predict", run, data / "test.jsonl").stdout.splitlines()]
    metrics = json.loads(call("eval", run, "--data", data, "--json").stdout)["metrics"]
    for kind in ("onnx", "pt2"):
        bundle = tmp_path / kind
        assert call("export", run, "--format", kind, "-o", bundle).returncode == 0
        rows = [json.loads(line) for line in call("predict", bundle, data / "test.jsonl").stdout.splitlines()]
        for row, probabilities in zip(rows, wanted, strict=True):
            assert row["probabilities"] == pytest.approx(probabilities, abs=1e-4)
        found = json.loads(call("eval", bundle, "--data", data, "--json").stdout)["metrics"]
        assert found == pytest.approx(metrics, abs=1e-5)


def test_a_bundle_not_trained_for_missing_modalities_raises_an_error(exported: Path) -> None:
    bundle = Bundle(exported)
    with pytest.raises(DataError) as caught:
        bundle.collate(images(2), ["a", None])
    assert caught.value.number == 100


def test_a_missing_fraction_includes_values_that_the_data_lack(pairs: Path, tmp_path: Path) -> None:
    data = holes(pairs, tmp_path / "data", column="text")
    done = train(data, tmp_path / "run", "--on-missing", "absent", "--steps", 1)
    assert done.returncode == 0, done.stderr
    count = len((data / "test.jsonl").read_text().splitlines())
    without = len(range(0, count, 3))
    for share, lack in ((0.5, round(0.5 * count)), (0.1, without)):
        cell = json.loads(call("eval", tmp_path / "run", "--missing", f"text={share}", "--json").stdout)["cells"][0]
        assert cell["rows"] == {"text": lack} and cell["missing"]["text"] == pytest.approx(lack / count, abs=0.51 / count)
        order = kept_in(tmp_path / "run")["orders"]["text"]
        assert set(order[:without]) == {f"test-{number}" for number in range(0, count, 3)}


@pytest.fixture(scope="module")
def either(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that can predict without either modality, and its data: of seven test rows, two lack text and one lacks an
    image."""
    root = tmp_path_factory.mktemp("either")
    data = holes(pairs, root / "data", column="text")
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        write_rows(data / f"{split}.jsonl", [{**row, "img": None} if i == 1 else row for i, row in enumerate(rows)])
    done = train(data, root / "run", "--on-missing", "absent", "--either", "--steps", 2)
    assert done.returncode == 0, done.stderr
    return root / "run", data


def test_no_sample_loses_its_last_modality(either: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run, data = either
    masks: list[Any] = []
    monkeypatch.setattr(
        missing_modalities, "FixedMissing", lambda samples, taken: masks.append(taken) or FixedMissing(samples, taken)
    )
    done = call("eval", run, "--missing", "grid")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    lacks = {name: {row["id"] for row in rows if row[key] is None} for name, key in (("text", "text"), ("image", "img"))}
    kept = kept_in(run)
    assert kept["natural"] == {name: len(ids) for name, ids in lacks.items()}
    assert f"1 image, {len(lacks['text'])} text" in done.stdout
    assert "nothing removed beyond what rows already lack" in done.stdout
    for cell in kept["cells"]:
        for name, count in cell["rows"].items():
            (other,) = {"text", "image"} - {name}
            assert not lacks[other] & set(kept["orders"][name][:count]) and lacks[name] <= set(kept["orders"][name][:count])
    most = max(cell["rows"].get("text", 0) for cell in kept["cells"])
    assert most == len(rows) - 1, "all rows that have an image"
    result = json.loads(call("eval", run, "--missing", "text=0.6", "--missing", "image=0.4", "--json").stdout)
    assert result["cells"][0]["rows"] == {"text": 4, "image": 3} and len(rows) == 7
    assert (masks[-1]["text"] ^ masks[-1]["image"]).all() and not any((m["text"] & m["image"]).any() for m in masks)
    for requests, code in ((["text=1"], 155), (["text=0.5", "image=0.8"], 155), (["image+text=0.5"], 152)):
        words = [word for one in requests for word in ("--missing", one)]
        error = json.loads(call("eval", run, *words, "--json").stdout)["error"]
        assert error["code"] == f"MF-CFG-{code}" and re.search("no other modality|no input", error["message"])


def test_a_single_pair_may_lack_an_optional_modality(
    either: tuple[Path, Path], pairs: Path, trained: Path
) -> None:
    run, _ = either
    image, text = pairs / "images" / "test-0.png", "what is the red digit"
    rows = [{"img": str(image), "text": ""}, {"text": text}, {"img": str(image), "text": text}]
    options = [("--image", image), ("--text", text), ("--image", image, "--text", text)]
    write_rows(run / "in.jsonl", rows)
    done = call("predict", run, run / "in.jsonl", "--image-root", pairs)
    by_row = [json.loads(line)["probabilities"] for line in done.stdout.splitlines()]
    for flags, found in zip(options, by_row, strict=True):
        assert json.loads(call("predict", run, *flags).stdout)["probabilities"] == pytest.approx(found, abs=1e-5)
    empty = json.loads(call("predict", run, "--image", image, "--text", "").stdout)["probabilities"]
    assert empty == pytest.approx(by_row[0], abs=1e-5)
    refused = call("predict", trained, "--image", image)
    assert refused.returncode == 4 and "has no text" in refused.stderr


def test_a_sample_without_any_modality_is_refused(either: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_model(RunFolder(either[0]), "best", torch.device("cpu")).model
    one, none = images(1)[0], None
    assert model.collate([one, none], [none, "a"]).missing.keys() == {"main", "comp"}
    with pytest.raises(DataError, match="1 of the samples have no value") as caught:
        model.collate([one, none], ["a", none])
    assert caught.value.number == 110


def test_other_data_with_gaps_are_evaluated_on_request(run: Path, pairs: Path, tmp_path: Path) -> None:
    data = holes(pairs, tmp_path / "data", column="text")
    refused = call("eval", run, "--data", data)
    assert refused.returncode == 4 and "--on-missing" in refused.stderr
    result = json.loads(call("eval", run, "--data", data, "--on-missing", "absent", "--json").stdout)
    predicted = [json.loads(line) for line in call("predict", run, data / "test.jsonl").stdout.splitlines()]
    true = [json.loads(line)["label"] for line in (data / "test.jsonl").read_text().splitlines()]
    right = sum(one["label"] == label for one, label in zip(predicted, true, strict=True))
    assert result["metrics"]["accuracy"] == pytest.approx(right / len(true))
    for flags, code in ((["--on-missing", "skip"], 154), (["--data", data, "--on-missing", "drop"], 1)):
        assert json.loads(call("eval", run, *flags, "--json").stdout)["error"]["code"] == f"MF-CFG-{code:02}"
    assert "MF-CFG-01" in call("predict", run, data / "test.jsonl", "--text-col", "").stderr


def test_eval_and_predict_treat_an_empty_text_alike(pairs: Path, run: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    write_rows(data / "test.jsonl", [{**row, "text": ""} for row in rows])
    assert call("eval", run, "--data", data, "-o", tmp_path / "predictions.jsonl").returncode == 0
    judged = [json.loads(line)["probabilities"] for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    predicted = [json.loads(line)["probabilities"] for line in call("predict", run, data / "test.jsonl").stdout.splitlines()]
    for one, other in zip(judged, predicted, strict=True):
        assert one == pytest.approx(other, abs=2e-6)


def test_python_refuses_missing_modalities_that_the_model_was_not_trained_for(trained: Path, run: Path) -> None:
    for folder, values in ((trained, (images(1), [None])), (run, ([None], ["a"])), (run, ([None], [None]))):
        with pytest.raises(DataError) as caught:
            mopefuse.load(folder, device="cpu").predict(*values)
        assert caught.value.number == 100
