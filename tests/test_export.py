"""An export is complete, compared with the model before it is published, and compared with its manifest when it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import TINY, call, code_of, make_pairs, matrix
from PIL import Image

import mopefuse
from mopefuse.core.artifact import publish, read_json
from mopefuse.export import bundle_maker as making
from mopefuse.export import graph
from mopefuse.inference.bundle import Bundle

BUNDLE = set(
    "README.md config.yaml example.json example.png labels.json manifest.json model.onnx preprocess.json".split()
)


@pytest.fixture(scope="module")
def pt2(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as a pt2 bundle; tests must not change it."""
    out = tmp_path_factory.mktemp("exports") / "pt2"
    done = call("export", trained, "-o", out, "--format", "pt2")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may change."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def reseal(folder: Path) -> None:
    """Publish a changed folder again, so that its manifest matches."""
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = {key: value for key, value in manifest.items() if key not in ("files", "format")}
    (folder / "manifest.json").unlink()
    changed = folder.rename(folder.with_name("changed"))
    publish(folder, lambda new: shutil.copytree(changed, new, dirs_exist_ok=True) and None, facts)


def predict(model: Path, pairs: Path, out: Path) -> list[dict[str, Any]]:
    done = call("predict", model, pairs / "test.jsonl", "-o", out)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


# -- content and predictions of a bundle


def test_a_bundle_is_self_contained_and_reveals_no_local_paths(
    exported: Path, trained: Path, pairs: Path
) -> None:
    assert {path.name for path in exported.iterdir()} == BUNDLE
    sides = read_json(exported / "preprocess.json")["sides"]
    assert sides["main"]["size"] == [16, 16] and len(sides["main"]["mean"]) == 3
    assert sides["comp"]["max_tokens"] == 32 and sides["comp"]["tokenizer"]["kind"] == "words"
    assert read_json(exported / "labels.json")["labels"] == ["a", "b", "c"]
    card = (exported / "README.md").read_text()
    facts = read_json(trained / "manifest.json")
    for text in ("tiny:vision", "tiny:text", facts["data"]["train"], facts["encoders"]["main"]["fingerprint"], "accuracy"):
        assert text in card
    assert "mopefuse export RUN --format onnx --routing -o OUT" in card
    for path in exported.iterdir():
        assert str(pairs.parent).encode() not in path.read_bytes(), path.name


def test_the_graph_has_named_dynamic_dimensions_and_its_weights_inside(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx", load_external_data=False)
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["main_pixels"] == ["batch", 16, 16, 3]
    assert shapes["comp_ids"] == shapes["comp_mask"] == ["batch", "comp_tokens"]
    assert shapes["logits"] == ["batch", 3] and shapes["routing"] == ["batch", 4, 2]
    assert not any(tensor.external_data for tensor in model.graph.initializer)


@pytest.mark.parametrize("kind", matrix(["exported", "pt2"], ["exported"]))
def test_a_bundle_predicts_like_its_run(
    kind: str, trained: Path, pairs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    found = predict(folder, pairs, tmp_path / "bundle.jsonl")
    for mine, theirs in zip(found, predict(trained, pairs, tmp_path / "run.jsonl"), strict=True):
        assert (mine["id"], mine["label"]) == (theirs["id"], theirs["label"])
        assert mine["probabilities"] == pytest.approx(theirs["probabilities"], abs=1e-4)


def test_a_bundle_and_a_run_have_the_same_python_interface(exported: Path, trained: Path, pairs: Path) -> None:
    with Image.open(pairs / "images" / "test-1.png") as image:
        pair = [image.convert("LA")], ["what is the red digit"]
        one = mopefuse.load(exported).predict(*pair, top=2, routing=True)
        other = mopefuse.load(trained, device="cpu").predict(*pair, top=2, routing=True)
    assert one[0]["label"] == other[0]["label"] and len(one[0]["probabilities"]) == 2
    assert np.allclose(one[0]["routing"], other[0]["routing"], atol=1e-5) and np.shape(one[0]["routing"]) == (4, 2)


def test_a_run_its_adapter_and_its_bundles_have_the_same_metric(
    exported: Path, pt2: Path, trained: Path, pairs: Path, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    assert call("export", trained, "--format", "adapter", "-o", adapter).returncode == 0
    assert sum(path.stat().st_size for path in adapter.iterdir()) < 300_000
    found = {}
    for model in (trained, adapter, exported, pt2):
        done = call("eval", model, "--data", pairs, "--json", "-o", tmp_path / "out.jsonl")
        assert done.returncode == 0, done.stderr
        found[model] = json.loads(done.stdout)["metrics"]
    assert found[adapter] == found[trained]
    for model in (exported, pt2):
        assert found[model]["accuracy"] == found[trained]["accuracy"]
        assert found[model]["loss"] == pytest.approx(found[trained]["loss"], abs=1e-4)
    unnamed = call("eval", exported)
    assert unnamed.returncode == 3 and "add --data DIR" in unnamed.stderr


@pytest.mark.matrix
@pytest.mark.parametrize("form", ["pt2"])
def test_a_multi_label_bundle_keeps_the_thresholds_of_the_run(form: str, tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data", multi=True)
    run, out = tmp_path / "run", tmp_path / "bundle"
    assert call("train", *TINY, "--data", root, "--out", run, "--steps", "2", "--threshold", "tuned").returncode == 0
    assert call("export", run, "-o", out, "--format", form).returncode == 0
    assert mopefuse.load(out, device="cpu").model.thresholds == list(read_json(run / "metrics.json")["thresholds"].values())
    for mine, theirs in zip(predict(out, root, tmp_path / "a.jsonl"), predict(run, root, tmp_path / "b.jsonl"), strict=True):
        assert mine["labels"] == theirs["labels"]


def test_an_adapter_is_evaluated_on_a_table_with_other_columns(trained: Path, pairs: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    assert call("export", trained, "--format", "adapter", "-o", adapter).returncode == 0
    rows = [json.loads(line) for line in (pairs / "test.jsonl").read_text().splitlines()]
    lines = [",".join((row["text"], row["img"], row["label"])) for row in rows]
    (tmp_path / "shop.csv").write_text("\n".join(["title,photo,kind", *lines]))
    table = ("--data", tmp_path / "shop.csv", "--image-root", pairs, "--text-col", "title", "--image-col", "photo")
    own = json.loads(call("eval", trained, "--json").stdout)["metrics"]
    for model in (adapter, trained):
        flags = ("--label-col", "kind", "--split", "train", "--json", "-o", tmp_path / "predictions.jsonl")
        done = call("eval", model, *table, *flags)
        assert done.returncode == 0, done.stdout
        assert json.loads(done.stdout)["metrics"] == pytest.approx(own)
    whole = call("eval", adapter, *table, "--label-col", "kind", "--json")  # the whole table is the test split
    assert json.loads(whole.stdout)["metrics"] == pytest.approx(own)
    assert call("eval", trained, "--text-col", "title").returncode == 3


def test_a_half_precision_adapter_predicts_almost_the_same(trained: Path, pairs: Path, tmp_path: Path) -> None:
    adapter, half = tmp_path / "adapter", tmp_path / "half"
    assert call("export", trained, "--format", "adapter", "-o", adapter).returncode == 0
    assert call("export", trained, "--format", "adapter", "--half", "-o", half).returncode == 0
    whole, small = ((folder / "weights.safetensors").stat().st_size for folder in (adapter, half))
    assert small < 0.6 * whole
    mine, theirs = (predict(folder, pairs, tmp_path / "out.jsonl") for folder in (half, adapter))
    for one, other in zip(mine, theirs, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=2e-3)
    assert mine != theirs


def test_an_adapter_can_be_swapped_and_exported_again(trained: Path, pairs: Path, tmp_path: Path) -> None:
    adapter, again, swapped = (tmp_path / name for name in ("adapter", "again", "swapped"))
    assert call("export", trained, "--format", "adapter", "-o", adapter).returncode == 0
    assert call("export", adapter, "--format", "adapter", "-o", again).returncode == 0
    assert (adapter / "weights.safetensors").read_bytes() == (again / "weights.safetensors").read_bytes()
    data = f"data.path={pairs}"
    done = call("swap-encoder", adapter, "--comp", "tiny:text-b", "-o", swapped, "--set", data, "--json")
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert stages["before"] == read_json(trained / "metrics.json")["metrics"]


# -- exports that are not published


@pytest.mark.process
def test_a_graph_with_different_outputs_is_not_published(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(making, "TOLERANCE", -1.0)
    done = call("export", trained, "--format", "pt2", "-o", tmp_path / "out", "--json")
    error = json.loads(done.stdout)["error"]
    assert done.returncode == 10 and error["code"] == "MF-GATE-02" and "differ by" in error["message"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.matrix
def test_a_bundle_that_tokenizes_differently_is_not_published(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collate = Bundle.collate

    def other(self: Bundle, images: Any, texts: Any) -> Any:
        return collate(self, images, [text.replace("red", "green") for text in texts])

    monkeypatch.setattr(Bundle, "collate", other)
    done = call("export", trained, "--format", "pt2", "-o", tmp_path / "out")
    assert done.returncode == 10 and "comp_ids of the bundle differs from training" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_an_export_is_never_replaced(trained: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    for flags in ((), ("--overwrite",)):
        done = call("export", trained, "--format", "adapter", "-o", mine, *flags)
        assert done.returncode == 3 and "MF-CFG-23" in done.stderr
    assert (mine / "thesis.txt").read_text() == "years of work"
    out = tmp_path / "out"
    assert call("export", trained, "--format", "adapter", "-o", out).returncode == 0
    assert call("export", trained, "--format", "adapter", "-o", out).returncode == 3
    assert call("export", trained, "--format", "adapter", "-o", out, "--overwrite").returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--format", "tflite", "-o", "x"), "MF-CFG-67"),
        (("--format", "adapter", "--routing", "-o", "x"), "MF-CFG-68"),
        (("--format", "pt2", "--int8", "-o", "x"), "MF-CFG-68"),
        (("--format", "onnx", "--half", "-o", "x"), "MF-CFG-68"),
        (("-o", f"{__file__}/such/x"), "MF-CFG-54"),
        ((), "MF-CFG-71"),
    ],
)
def test_incompatible_options_are_refused(
    arguments: tuple[str, ...], code: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = call("export", trained, *arguments)
    assert done.returncode == 3 and code in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_routing_is_refused_for_a_model_without_a_router(pairs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert call("train", *TINY, "--method", "late-concat", "--data", pairs, "--out", run, "--steps", "1").returncode == 0
    done = call("export", run, "--format", "pt2", "--routing", "-o", tmp_path / "out")
    assert done.returncode == 3 and "MF-CFG-69" in done.stderr
    assert not (tmp_path / "out").exists()


def test_export_without_its_packages_names_the_extra(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exporting needs the package onnx, and the error names the extra that installs it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnx" else object())
    done = call("export", trained, "-o", tmp_path / "out")
    assert done.returncode == 5 and "MF-ENV-01" in done.stderr and 'pip install "mopefuse[export]"' in done.stderr
    assert not (tmp_path / "out").exists()


# -- 8 bits


@pytest.mark.matrix
def test_int8_weights_are_smaller_and_measured_before_and_after(exported: Path, trained: Path, tmp_path: Path) -> None:
    done = call("export", trained, "--int8", "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["size"] < 0.5 * sum(path.stat().st_size for path in exported.iterdir())
    assert result["int8"]["before"] == pytest.approx(read_json(trained / "metrics.json")["metrics"]["val"], abs=1e-4)
    assert result["int8"]["after"].keys() == result["int8"]["before"].keys()
    assert "before 8-bit weights" in (tmp_path / "out" / "README.md").read_text()
    assert call("export", "verify", tmp_path / "out").returncode == 0


# -- verify, and tampering


def test_verify_reports_what_was_checked(exported: Path, pt2: Path) -> None:
    for folder in (exported, pt2):
        done = call("export", "verify", folder, "--json")
        assert done.returncode == 0 and "as it was exported" in json.loads(done.stdout)["found"]


@pytest.mark.parametrize("name", sorted(BUNDLE - {"manifest.json"}))
def test_a_changed_file_is_named(name: str, copy: Path) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    for command in (("export", "verify", copy), ("predict", copy, "--image", copy / "example.png", "--text", "a")):
        done = call(*command)
        assert done.returncode == 6 and name in done.stderr and "sha256 differs" in done.stderr


def test_a_different_prediction_for_the_example_is_an_error(copy: Path) -> None:
    example = read_json(copy / "example.json")
    example["logits"][0] += 0.01
    (copy / "example.json").write_text(json.dumps(example))
    reseal(copy)
    done = call("export", "verify", copy)
    assert done.returncode == 10 and "differs by 0.01" in done.stderr


def test_labels_that_do_not_fit_the_graph_are_refused(copy: Path) -> None:
    labels = read_json(copy / "labels.json")
    (copy / "labels.json").write_text(json.dumps({**labels, "labels": ["a", "b"]}))
    reseal(copy)
    done = call("export", "verify", copy)
    assert done.returncode == 6 and "2 labels" in done.stderr and "3" in done.stderr


@pytest.mark.parametrize("key", ["labels", "thresholds", "task"])
def test_a_bundle_with_incomplete_labels_is_refused(key: str, copy: Path) -> None:
    labels = read_json(copy / "labels.json")
    del labels[key]
    (copy / "labels.json").write_text(json.dumps(labels))
    reseal(copy)
    assert code_of(lambda: Bundle(copy)) == "MF-CKPT-03"


@pytest.mark.soak
class TestWeightsBesideTheGraph:
    """Models of more than 2 GB have their weights in model.onnx.data."""

    @pytest.fixture
    def large(self, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(graph, "LARGEST", 0)
        done = call("export", trained, "-o", tmp_path / "large")
        assert done.returncode == 0, done.stderr
        for text in ("largest difference", "same predictions", "100.0 % of 20", "one row, 1 thread: PyTorch"):
            assert text in done.stdout
        return tmp_path / "large"

    def test_they_must_be_complete_and_inside_the_folder(self, large: Path, tmp_path: Path) -> None:
        data = large / "model.onnx.data"
        content = data.read_bytes()
        assert "model.onnx.data" in read_json(large / "manifest.json")["files"]
        assert call("export", "verify", large).returncode == 0
        data.unlink()
        missing = call("export", "verify", large)
        data.write_bytes(content[:-100])
        cut = call("export", "verify", large)
        for done in (missing, cut):
            assert done.returncode == 6 and "model.onnx.data" in done.stderr and "Traceback" not in done.stderr
        (tmp_path / "outside.data").write_bytes(content)
        data.unlink()
        model = onnx.load(large / "model.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "../outside.data"
        onnx.save(model, large / "model.onnx")
        reseal(large)
        away = call("export", "verify", large)
        assert away.returncode == 6 and "model.onnx" in away.stderr and "Traceback" not in away.stderr
