"""Segmentation: masks as labels, metrics against scikit-learn, the decoders, and runs from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call, code_of, ranks
from PIL import Image
from run_cases import check_eval_and_report
from sklearn import metrics as sk
from torch.nn import functional as F

import mopefuse
from mopefuse.config.schema import Data, RunConfig, build_config
from mopefuse.data.collate import Samples
from mopefuse.data.load import load_data
from mopefuse.data.sets import digit_masks
from mopefuse.fusion.build import build_model
from mopefuse.metrics.masks import MaskOutcome
from mopefuse.metrics.names import IGNORED
from mopefuse.modalities.masks import MASKS, decode_runs, encode_runs, resized
from mopefuse.tasks.base import task_from_facts
from mopefuse.tasks.segmentation import OBJECT, Segmentation

SPECS = ("--main", "tiny:vision", "--comp", "tiny:text", "--device", "cpu")
METHODS = ("conditional", "late-concat", "cross-attention", "main-only")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digit-masks") / "data"
    digit_masks.make(folder, train=48, val=11, test=17)
    return folder


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "masks"
    done = call("train", *SPECS, "--data", digits, "--out", out, "--epochs", "2", "--experts", "2", "--batch", "8")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("task: segmentation, masks of what each text names"), done.stderr
    return out


def write_scenes(
    folder: Path, ids: Any = (0, 1, 2, 11), *, rows: int = 12, size: tuple[int, int] = (24, 32), stripes: int = 8
) -> Path:
    """A data set of images with class ids: vertical stripes, each as bright as its id."""
    random = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for split, count in (("train", rows), ("val", 4), ("test", 4)):
        lines = []
        for number in range(count):
            name = f"{split}-{number}.png"
            mask = (
                np.repeat(random.choice(list(ids), stripes), size[1] // stripes)[None].repeat(size[0], axis=0).astype(np.uint8)
            )
            if number == 0:
                mask[0, : len(ids)] = list(ids)  # every split has every id
            Image.fromarray(mask).save(folder / "masks" / name)
            Image.fromarray(np.minimum(20 * mask, 255)).convert("RGB").save(folder / "images" / name)
            lines.append({"text": "a street", "img": f"images/{name}", "label": f"masks/{name}"})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def config_of(method: str = "conditional", **values: Any) -> RunConfig:
    return build_config({"main": "tiny:vision", "comp": "tiny:text", "method": method, **values})


# -- masks


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_one_channel_masks_of_every_mode_are_read(tmp_path: Path, mode: str) -> None:
    ids = np.array([[0, 1], [1, 0], [1, 1]], dtype=np.uint8)
    image = Image.fromarray(ids.astype(np.uint16)) if mode == "I;16" else Image.fromarray(ids)
    image = Image.fromarray(ids.astype(bool)) if mode == "1" else image.convert(mode) if mode.startswith("RGB") else image
    if mode == "P":
        image.putpalette([200, 0, 0, 0, 0, 255])
    image.save(tmp_path / "mask.png")
    assert MASKS.read("mask.png", [tmp_path], where="", config=Data()).tolist() == ids.tolist()


@pytest.mark.parametrize("case", ["colours", "large id", "jpeg", "text", "empty", "transparent", "missing", "outside"])
def test_files_that_are_no_masks_are_refused(tmp_path: Path, case: str) -> None:
    file, codes = tmp_path / "mask.png", {"missing": "MF-DATA-11", "outside": "MF-SEC-01"}
    if case == "colours":
        Image.new("RGB", (2, 2), (200, 10, 10)).save(file)
    elif case == "transparent":
        Image.new("RGBA", (2, 2), (1, 1, 1, 7)).save(file)
    elif case == "large id":
        Image.fromarray(np.full((2, 2), 300, dtype=np.uint16)).save(file)
    elif case == "jpeg":
        Image.new("L", (2, 2)).save(file, format="JPEG")
    elif case != "missing":
        file.write_bytes(b"" if case == "empty" else b"no mask")
    name = "../mask.png" if case == "outside" else "mask.png"
    found = code_of(lambda: MASKS.read(name, [tmp_path], where="", config=Data()))
    assert found == ("MF-DATA-401" if case in ("colours", "large id", "transparent") else codes.get(case, "MF-DATA-13"))


def test_runs_of_pixels_are_written_and_read_again() -> None:
    mask = np.random.default_rng(0).integers(0, 3, (7, 5)).astype(np.uint8)
    assert np.array_equal(decode_runs(json.loads(json.dumps(encode_runs(mask)))), mask)


def test_masks_are_resized_by_the_nearest_pixel() -> None:
    mask = np.random.default_rng(0).integers(0, 200, (8, 12)).astype(np.uint8)
    assert np.array_equal(resized(mask, (4, 6))[:, :3], mask[1::2, 1::2][:, :3])
    assert set(np.unique(resized(mask, (5, 7)))) <= set(np.unique(mask))


# -- what masks mean


def test_ids_are_classes_and_an_ignored_one_is_none(tmp_path: Path) -> None:
    data = load_data(Data(path=str(write_scenes(tmp_path)), ignore_index=11))
    assert data.task == "segmentation" and data.labels == ("0", "1", "2")
    targets = data.targets("train")
    assert targets.shape == (12, 24, 32) and set(targets.unique().tolist()) == {0, 1, 2, IGNORED}


@pytest.mark.parametrize("ids", [(0, 1), (0, 255)])
def test_masks_in_black_and_white_mark_an_object(tmp_path: Path, ids: tuple[int, int]) -> None:
    data = load_data(Data(path=str(write_scenes(tmp_path, ids))))
    assert data.labels == OBJECT and data.task.facts()["foreground"] == ids[1]
    assert set(data.targets("val").unique().tolist()) == {0, 1}


def test_names_of_ids_come_from_a_file_that_has_to_list_them_all(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, (0, 1, 2))
    (folder / "labels.txt").write_text("sky\nroad\ncar\n")
    assert load_data(Data(path=str(folder))).labels == ("sky", "road", "car")
    (folder / "labels.txt").write_text("sky\nroad\n")
    assert code_of(lambda: load_data(Data(path=str(folder)))) == "MF-DATA-402"
    assert load_data(Data(path=str(folder), ignore_index=2)).labels == ("sky", "road")


def test_a_text_that_is_the_name_of_a_class_selects_its_pixels(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, (0, 1, 2))
    (folder / "labels.txt").write_text("sky\nroad\ncar\n")
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        named = [{**row, "text": ("Road", "car")[number % 2]} for number, row in enumerate(rows)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    data = load_data(Data(path=str(folder)))
    assert data.labels == OBJECT and data.task.facts()["names"] == ["sky", "road", "car"]
    ids = np.asarray(Image.open(folder / "masks" / "train-1.png"))
    assert np.array_equal(data.targets("train")[1].numpy(), ids == 2)
    (folder / "val.jsonl").write_text((folder / "val.jsonl").read_text().replace("Road", "a tree"))
    assert code_of(lambda: load_data(Data(path=str(folder)))) == "MF-DATA-403"


def test_a_task_that_is_given_decides_what_paths_are(tmp_path: Path) -> None:
    config = Data(path=str(write_scenes(tmp_path, (0, 1, 2))))
    classes = config.model_copy(update={"task": "single-label", "allow_odd_labels": True, "on_bad": "skip"})
    assert code_of(lambda: load_data(classes)) == "MF-DATA-06"  # each path is a class, and those of val are new
    assert load_data(config).task == "segmentation"
    assert load_data(config.model_copy(update={"task": "segmentation"})).task == "segmentation"


def test_val_masks_have_the_classes_of_train(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, (0, 1, 2))
    Image.fromarray(np.full((24, 32), 9, dtype=np.uint8)).save(folder / "masks" / "val-1.png")
    assert code_of(lambda: load_data(Data(path=str(folder)))) == "MF-DATA-402"


def test_masks_are_part_of_the_fingerprint_of_a_data_set(digits: Path, tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, (0, 1, 2))
    before = load_data(Data(path=str(folder))).fingerprint()
    assert load_data(Data(path=str(folder), task="segmentation")).fingerprint() == before
    Image.fromarray(np.full((24, 32), 2, dtype=np.uint8)).save(folder / "masks" / "val-1.png")
    after = load_data(Data(path=str(folder))).fingerprint()
    assert after["val"] != before["val"] and after["train"] == before["train"]


def test_a_data_check_reports_masks(tmp_path: Path) -> None:
    folder = write_scenes(tmp_path, (0, 1, 2))
    (folder / "masks" / "train-1.png").unlink()
    Image.new("RGB", (32, 24), (9, 8, 7)).save(folder / "masks" / "train-2.png")
    Image.new("L", (24, 32)).save(folder / "masks" / "val-1.png")
    found = json.loads(call("data", "check", folder, "--json").stdout)
    assert found["kinds"] == {"missing-mask": 1, "unreadable-mask": 1, "mask-of-other-shape": 1}
    assert found["labels"]["task"] == "segmentation" and found["labels"]["balance"]["2"]["train"] >= 1


def test_a_data_check_reports_an_id_without_a_name(tmp_path: Path) -> None:
    (write_scenes(tmp_path, (0, 1, 2)) / "labels.txt").write_text("sky\nroad\n")
    found = json.loads(call("data", "check", tmp_path, "--json").stdout)
    assert found["kinds"] == {"unlisted-class": 1} and "id 2" in found["problems"][0]["message"]


# -- metrics and loss


def random_outputs(classes: int, samples: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn(samples, classes, 4, 4, generator=draw)
    targets = torch.randint(0, classes, (samples, 8, 8), generator=draw).byte()
    targets[:, :2, :3] = IGNORED
    return outputs, targets


def test_metrics_of_classes_equal_those_of_scikit_learn() -> None:
    outputs, targets = random_outputs(4)
    task = Segmentation((8, 8))
    found = task.compute(outputs, targets)
    counted = targets != IGNORED
    true, predicted = targets[counted].numpy(), task.classes(outputs, targets)[counted].numpy()
    assert found["miou"] == pytest.approx(sk.jaccard_score(true, predicted, average="macro"))
    assert found["pixel_accuracy"] == pytest.approx(sk.accuracy_score(true, predicted))
    rows = task.count(outputs, targets).per_label("abcd")
    assert [row["recall"] for row in rows] == pytest.approx(sk.recall_score(true, predicted, average=None).tolist())


def test_the_mean_iou_of_objects_is_over_samples() -> None:
    outputs, targets = random_outputs(2)
    task = Segmentation((8, 8), foreground=1)
    counted = targets != IGNORED
    each = [
        sk.jaccard_score(true[valid].numpy(), predicted[valid].numpy())
        for true, predicted, valid in zip(targets, task.classes(outputs, targets), counted, strict=True)
    ]
    found = task.compute(outputs, targets)
    assert found["miou"] == pytest.approx(np.mean(each))
    whole = sk.jaccard_score(targets[counted].numpy(), task.classes(outputs, targets)[counted].numpy())
    assert found["overall_iou"] == pytest.approx(whole)


@pytest.mark.parametrize("marks_object", [True, False])
@pytest.mark.parametrize("metric", ["miou", "pixel_accuracy"])
def test_a_resample_has_the_metric_of_its_repeated_samples(metric: str, marks_object: bool) -> None:
    random = np.random.default_rng(0)
    right = random.integers(0, 9, (20, 2))
    counts = np.stack([right, right + random.integers(0, 5, (20, 2)), right + random.integers(0, 5, (20, 2))], axis=1)
    outcome, chosen = MaskOutcome(counts.astype(float), marks_object), random.integers(0, 20, 20)
    weights = np.bincount(chosen, minlength=20).astype(float)[None]
    repeated = MaskOutcome(counts[chosen].astype(float), marks_object)
    assert outcome.measure(metric, weights)[0] == pytest.approx(repeated.measure(metric, np.ones((1, 20)))[0])


@pytest.mark.parametrize("task", [Segmentation((8, 8)), Segmentation((8, 8), foreground=1)])
def test_the_loss_of_a_sample_depends_on_its_counted_pixels_only(task: Segmentation) -> None:
    outputs, targets = random_outputs(2)
    outputs = F.interpolate(outputs, (8, 8))  # at the size of masks, so that no pixel depends on its neighbours
    loss = task.loss(outputs, targets)
    assert loss.shape == (6,) and loss.isfinite().all()
    alone = torch.cat([task.loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(6)])
    assert torch.allclose(alone, loss, atol=1e-6)
    other = outputs.masked_fill((targets == IGNORED)[:, None], 7.0)
    assert torch.equal(task.loss(other, targets), loss)
    nothing = task.loss(outputs.requires_grad_(), torch.full_like(targets, IGNORED))
    nothing.sum().backward()
    assert nothing.tolist() == [0] * 6 and outputs.grad is not None and not outputs.grad.any()


def test_without_dice_the_loss_is_cross_entropy() -> None:
    outputs, targets = random_outputs(3)
    loss = Segmentation((8, 8), dice=0.0).loss(outputs, targets)
    large = F.interpolate(outputs, (8, 8), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(large[:1], targets[:1].long().masked_fill(targets[:1] == IGNORED, -100))
    assert loss[0] == pytest.approx(float(expected), rel=1e-5)


def test_a_task_is_made_again_from_its_facts() -> None:
    task = Segmentation((8, 12), ignored=11, names=("a", "b"), dice=0.5)
    assert task_from_facts(json.loads(json.dumps(task.facts()))) == task
    assert code_of(lambda: task_from_facts({**task.facts(), "size": [0, 2]})).startswith("MF-CKPT")


# -- models


def batch_of(digits: Path, model: Any, count: int = 5) -> Any:
    data = load_data(Data(path=str(digits)))
    task = data.task.with_statistics(data.sparse_targets("train").numbers())
    rows = mopefuse.PairDataset(digits, "test")
    model.task = task
    return model.collate([rows[number] for number in range(count)])


@pytest.mark.parametrize("decoder", ["linear", "fpn"])
@pytest.mark.parametrize("method", METHODS)
def test_a_sample_does_not_depend_on_its_batch(digits: Path, method: str, decoder: str) -> None:
    model = build_model(config_of(method, segmentation={"decoder": decoder}), 2, Segmentation((16, 16), foreground=1))
    batch = batch_of(digits, model)
    with torch.no_grad():
        whole = model(batch).logits
        assert whole.shape[:2] == (5, 2)
        alone = torch.cat([model(batch.part(number, 5)).logits for number in range(5)])
    assert torch.allclose(alone, whole, atol=2e-5)


def test_without_open_gates_the_decoder_reads_the_untouched_encoder(digits: Path) -> None:
    prompted, plain = (build_model(config_of(name), 2, Segmentation((16, 16), foreground=1)) for name in METHODS[:2])
    plain.decoder.load_state_dict(prompted.decoder.state_dict())
    batch = batch_of(digits, prompted)
    with torch.no_grad():
        assert torch.equal(prompted(batch).logits, plain(batch).logits)
        for name, parameter in prompted.named_trainable_parameters().items():
            if name.endswith("gate_H") or ".film." in name:
                parameter.fill_(0.3)
        assert not torch.allclose(prompted(batch).logits, plain(batch).logits, atol=1e-3)


def test_levels_can_be_chosen_and_a_text_encoder_cannot_be_main() -> None:
    task = Segmentation((16, 16), foreground=1)
    model = build_model(config_of(segmentation={"layers": [2]}), 2, task)
    assert len(model.decoder.levels) == 2
    assert code_of(lambda: build_model(config_of(segmentation={"layers": [9]}), 2, task)) == "MF-CFG-07"
    swapped = build_config({"main": "tiny:text", "comp": "tiny:vision"})
    assert code_of(lambda: build_model(swapped, 2, task)) == "MF-CFG-402"
    assert code_of(lambda: build_model(config_of("mlp"), 2, task)) == "MF-CFG-401"


@pytest.mark.parametrize("augment", ["flip", "crop"])
def test_masks_follow_the_augmentation_of_their_image(tmp_path: Path, augment: str) -> None:
    folder = write_scenes(tmp_path, (0, 6, 12), rows=8, size=(16, 16), stripes=2)
    data = load_data(Data(path=str(folder), ignore_index=255))
    task = data.task.with_statistics(data.sparse_targets("train").numbers())
    model = build_model(config_of("main-only"), 13, task)
    section = Data(path=str(folder), augment=augment)
    samples = Samples(data.__class__(**{**vars(data), "task": task}), "train", model.readers(), section, training=True)
    moved = False
    for epoch in range(4):
        batch = next(samples.batches([[(epoch, number) for number in range(8)]]))
        seen = batch.inputs["main"]["pixels"][..., 0].float() / 20
        off = (seen - batch.targets.float()).abs()
        assert (off < 3).float().mean() > 0.9  # images are interpolated, masks are not; ids are 6 apart
        moved |= not torch.equal(batch.targets, samples.targets[torch.arange(8)])
    assert moved


# -- runs


def test_predictions_of_a_run_give_its_metrics_again(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    facts = json.loads((run / "metrics.json").read_text())["metrics"]["test"]
    task = Segmentation((16, 16), foreground=1)
    outcome = task.read_outcome(enumerate(lines), len(lines), OBJECT)
    assert outcome.measure("miou", np.ones((1, len(lines))))[0] == pytest.approx(facts["miou"])
    true = [np.asarray(Image.open(run_data(run) / line["true"])) for line in lines]
    overlap = [
        ((mask := decode_runs(line["mask"])) & ids).sum() / (mask | ids).sum() for line, ids in zip(lines, true, strict=True)
    ]
    assert np.mean(overlap) == pytest.approx(facts["miou"])


def run_data(run: Path) -> Path:
    return Path(load_config(run)["data"]["path"])


def load_config(run: Path) -> dict[str, Any]:
    import yaml

    found: dict[str, Any] = yaml.safe_load((run / "config.yaml").read_text())
    return found


def test_predict_writes_masks_of_the_size_of_their_images(run: Path, digits: Path, tmp_path: Path) -> None:
    Image.open(digits / "images/test/000000.png").resize((40, 30)).save(tmp_path / "wide.png")
    rows = [{"id": "a/b", "text": "read it", "img": "wide.png"}, {"id": "c", "text": "read it", "img": "no.png"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call("predict", run, tmp_path / "rows.jsonl", "-o", tmp_path / "out.jsonl").returncode == 0
    first, second = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert first == {"id": "a/b", "mask": "out-masks/a-b.png"} and second["error"]["code"] == "MF-DATA-11"
    mask = Image.open(tmp_path / first["mask"])
    assert mask.size == (40, 30) and mask.mode == "P" and set(np.unique(np.asarray(mask))) <= {0, 1}
    assert Image.open(tmp_path / "out-masks/a-b.overlay.jpg").size == (40, 30)
    assert (tmp_path / "out-masks/classes.txt").read_text() == "background\nobject\n"
    shown = json.loads(call("predict", run, "--image", tmp_path / "wide.png", "--text", "read it").stdout)
    assert np.array_equal(decode_runs(shown["mask"]), np.asarray(mask))
    inside = mopefuse.load(run).predict([tmp_path / "wide.png"], ["read it"])[0]["mask"]
    assert inside.dtype == np.uint8 and np.array_equal(inside, np.asarray(mask))


def test_a_run_is_evaluated_reported_audited_and_compared(run: Path, digits: Path, tmp_path: Path) -> None:
    check_eval_and_report(run)
    page = (run / "report.html").read_text()
    assert "Lowest IoU" in page and page.count("<figcaption") > 10
    other = tmp_path / "other"
    train = ("train", *SPECS, "--data", digits, "--epochs", "1", "--batch", "8", "--method", "late-concat")
    assert call(*train, "--out", other).returncode == 0
    rows = json.loads(call("compare", run, other, "--json").stdout)
    assert "miou" in json.dumps(rows)


@pytest.mark.matrix
def test_a_bundle_has_the_metrics_of_its_run_and_an_encoder_can_be_swapped(run: Path, digits: Path, tmp_path: Path) -> None:
    expected = json.loads((run / "metrics.json").read_text())["metrics"]["test"]
    for form in ("onnx", "pt2"):
        bundle = tmp_path / form
        assert call("export", run, "--format", form, "-o", bundle).returncode == 0
        found = json.loads(call("eval", bundle, "--data", digits, "--json").stdout)["metrics"]
        assert found["miou"] == pytest.approx(expected["miou"], abs=1e-3)
        assert call("export", "verify", bundle).returncode == 0
    assert call("swap-encoder", run, "--main", "tiny:vision-b", "-o", tmp_path / "swapped", "--epochs", "1").returncode == 0


def test_a_resumed_run_equals_an_uninterrupted_one(digits: Path, tmp_path: Path) -> None:
    how = ("train", *SPECS, "--data", digits, "--experts", "2", "--batch", "8", "--set", "train.warmup=0")
    how = (*how, "--set", "train.schedule=constant")
    for out, steps in (("run", "7"), ("straight", "12")):
        assert call(*how, "--out", tmp_path / out, "--steps", steps).returncode == 0
    assert call(*how, "--out", tmp_path / "run", "--steps", "12", "--resume").returncode == 0
    first, second = (
        mopefuse.load_model(tmp_path / name, checkpoint="last").trainable_state_dict() for name in ("run", "straight")
    )
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.process
def test_two_processes_equal_one(digits: Path, tmp_path: Path) -> None:
    plain = ("--set", "prompts.dropout=0", "--set", "router.noise=false", "--set", "segmentation.dropout=0")
    how = ("train", *SPECS, "--data", digits, "--batch", "8", "--steps", "4", "--experts", "2", *plain)
    for count in (1, 2):
        done = ranks(count, *map(str, (*how, "--out", tmp_path / str(count))))
        assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line) for line in (tmp_path / n / "predictions.jsonl").open()] for n in ("1", "2"))
    assert [line["id"] for line in one] == [line["id"] for line in two] and len(one) == 17
    metrics = [json.loads((tmp_path / n / "metrics.json").read_text())["metrics"]["test"] for n in ("1", "2")]
    assert metrics[0] == pytest.approx(metrics[1], abs=0.02)


def test_several_complementary_encoders_tokens_and_missing_texts(digits: Path, tmp_path: Path) -> None:
    more = ("--comp", "tiny:text-b", "--modality-dropout", "0.3", "--condition", "tokens", "--epochs", "1", "--batch", "8")
    done = call("train", *SPECS, *more, "--data", digits, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    found = json.loads(call("eval", tmp_path / "run", "--missing", "text=0.5", "--json").stdout)
    assert 0 <= found["cells"][0]["metrics"]["miou"] <= 1


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--method", "linear"), "MF-CFG-401"),
        (("--shots", "2"), "MF-CFG-400"),
        (("--class-weights", "balanced"), "MF-CFG-400"),
        (("--set", "data.augment=randaugment"), "MF-CFG-400"),
        (("--either", "--modality-dropout", "0.1"), "MF-CFG-"),
        (("--select", "f1_macro"), "MF-CFG-52"),
    ],
)
def test_what_has_no_meaning_for_masks_is_refused(digits: Path, tmp_path: Path, flags: tuple[str, ...], code: str) -> None:
    done = call("train", *SPECS, "--data", digits, "--out", tmp_path / "run", *flags)
    assert done.returncode == 3 and code in done.stderr, done.stderr


def test_fit_refuses_masks(digits: Path, tmp_path: Path) -> None:
    done = call("fit", digits, *SPECS[:4], "--out", tmp_path / "fit", "--budget", "20s")
    assert done.returncode == 3 and "MF-CFG-403" in done.stderr, done.stderr


def test_the_digits_of_a_text_are_where_it_says(digits: Path) -> None:
    colours = {name: np.array(rgb) > 0 for name, rgb in digit_masks.COLOURS.items()}
    for line in (digits / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        picture, mask = (np.asarray(Image.open(digits / row[name])) for name in ("img", "label"))
        cells = [(y, x) for y in (0, 8) for x in (0, 8)]
        (y, x) = next((y, x) for y, x in cells if mask[y : y + 8, x : x + 8].any())
        side = next(side for side in ("left", "right", "top", "bottom") if f"the {side} of" in row["text"])
        colour = next(name for name in colours if f"the {name} " in row["text"])
        ay, ax = (y, 8 - x) if side in ("left", "right") else (8 - y, x)
        anchor = picture[ay : ay + 8, ax : ax + 8].reshape(-1, 3).max(axis=0) > 60
        assert (anchor == colours[colour]).all() and (x == 0 if side == "left" else x == 8 if side == "right" else True)
        assert y == 0 if side == "top" else y == 8 if side == "bottom" else True
        assert mask.sum() > 5 and mask.max() == 1
