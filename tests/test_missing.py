"""Samples that lack a modality: what stands in for it, how training meets them, and what is told of it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call, write_rows
from test_fusion import TEXTS, build, images, open_gates

import mopefuse
from mopefuse import metrics, missing
from mopefuse.config import build_config
from mopefuse.data.collate import Samples
from mopefuse.data.load import load_data
from mopefuse.data.missing import Dropped, Taken, loss_order
from mopefuse.errors import ConfigError, DataError
from mopefuse.evaluate import load_model, prepared, run_split
from mopefuse.fusion._base import Fusion
from mopefuse.fusion._regression import statistics
from mopefuse.losses import classification_loss
from mopefuse.predictor import Bundle
from mopefuse.run import RunFolder
from mopefuse.shares import parse, words

METHODS: list[dict[str, Any]] = [
    {},
    {"router": {"kind": "joint"}},
    {"warm_start": "linear"},
    {"comp_tuning": {"mode": "prompts"}},
    {"method": "late-concat"},
    {"method": "linear"},
    {"method": "linear", "linear": {"features": "average"}},
]


def heard(comp: Any = "tiny:text", **options: Any) -> Fusion:
    """A model that learns absence, with weights that say something."""
    torch.manual_seed(0)
    model = build(comp=comp, experts=4, data={"on_missing": "absent"}, **options)
    open_gates(model)
    with torch.no_grad():
        for name, parameter in model.ours().items():
            if name.startswith(("head", "absent")):
                parameter.normal_()
    return model


def without(batch: Any, side: str, rows: list[int]) -> Any:
    mask_B = torch.zeros(len(batch.index), dtype=torch.bool)
    mask_B[rows] = True
    return replace(batch, missing={side: mask_B})


# -- the model


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_an_answer_does_not_depend_on_what_is_missing_and_that_of_others_not_at_all(options: dict[str, Any]) -> None:
    model = heard(**options)
    whole = model.collate(images(4), TEXTS[:4])
    other = model.collate(images(4), [TEXTS[0], "something else", "8", TEXTS[3]])
    with torch.no_grad():
        full, none, some, same = (
            model(batch).logits
            for batch in (whole, without(whole, "comp", []), without(whole, "comp", [1, 2]), without(other, "comp", [1, 2]))
        )
    assert torch.equal(full, none), "a mask of nothing changes an answer"
    assert torch.equal(full[[0, 3]], some[[0, 3]])
    assert torch.equal(some, same), "an answer depends on a text that is missing"
    assert not torch.allclose(full[[1, 2]], some[[1, 2]])
    alone = without(model.collate(images(4)[1:2], TEXTS[1:2]), "comp", [0])
    torch.testing.assert_close(model(alone).logits[0], some[1], atol=2e-5, rtol=1e-4)


def test_what_stands_in_is_learned_from_zero_and_only_where_that_was_asked_for() -> None:
    assert not any(name.startswith("absent") for name in build().own_state())
    for asked in ({"data": {"on_missing": "absent"}}, {"train": {"modality_dropout": 0.1}}):
        model = build(**asked, either=True)
        assert [name for name in model.own_state() if name.startswith("absent")] == ["absent.comp"]
        assert torch.equal(model.own_state()["absent.comp"], torch.zeros(model.encoder("comp").feature_width))
    assert not build(either=True).absent and build(either=True).does_without == ("main",)
    model = heard()
    model(without(model.collate(images(2), TEXTS[:2]), "comp", [0])).logits.sum().backward()
    assert model.absent["comp"].grad is not None and model.absent["comp"].grad.any()
    assert model.bond("absent.comp") == "comp features" and model.pace("absent.comp") == "main"
    model = heard(method="linear")
    assert not model.absent, "nothing is trained after a closed form"


def test_each_of_several_encoders_can_be_missing_by_itself() -> None:
    model = heard(comp=["tiny:text", "tiny:vision"], either=True)
    batch = model.collate(images(3), TEXTS[:3])
    answers = [model(without(batch, side, [1])).logits[1] for side in ("comp", "comp2")]
    assert not torch.allclose(*answers)
    assert model.may_lack == ("main", "comp", "comp2")
    assert build(comp=["tiny:text", "tiny:vision"]).may_lack == ("comp",), "a sample with an image for one encoder lacks none"


@pytest.mark.parametrize(
    ("options", "number"),
    [
        ({"method": "mmbt", "train": {"modality_dropout": 0.1}}, 144),
        ({"comp": "tiny:vision", "train": {"modality_dropout": 0.1}}, 144),
        ({"method": "late-concat", "either": True}, 145),
        ({"warm_start": "linear", "either": True}, 146),
    ],
    ids=str,
)
def test_what_would_learn_nothing_is_refused(options: dict[str, Any], number: int) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**options)
    assert caught.value.number == number


@pytest.mark.parametrize("method", ["main-only", "comp-only", "mmbt", "pmf", "promptfuse", "sequential"])
def test_methods_that_need_everything_say_so(method: str) -> None:
    model = build(method=method)
    assert model.may_lack == ()
    texts = [None, "a"] if "comp" in model.uses else ["a", "b"]
    shown = images(2) if "comp" in model.uses else [None, images(1)[0]]
    with pytest.raises(DataError) as caught:
        model.collate(shown, texts)
    assert caught.value.number == 100 and "--on-missing skip" in caught.value.fix and "--either" not in caught.value.fix


def test_the_main_modality_is_needed_unless_the_model_was_trained_without() -> None:
    with pytest.raises(DataError) as caught:
        build().collate([None, *images(1)], TEXTS[:2])
    assert caught.value.number == 100 and "--either" in caught.value.fix
    with pytest.raises(ConfigError) as refused:
        build(method="mmbt", either=True)
    assert refused.value.number == 143


def test_either_answers_from_the_complementary_side_alone() -> None:
    model = heard(either=True)
    pictures = images(3)
    some = model(model.collate([pictures[0], None, pictures[2]], TEXTS[:3]))
    full = model(model.collate(pictures, TEXTS[:3]))
    assert torch.equal(some.logits[1], some.alone_BN[1]) and torch.equal(some.logits[[0, 2]], full.logits[[0, 2]])
    assert torch.equal(full.alone_BN, some.alone_BN), "the answer of the complementary side alone looks at images"
    batch = replace(model.collate(pictures, TEXTS[:3]), targets=torch.tensor([0, 1, 2]))
    both = classification_loss(full, batch, multi_label=False)
    one = classification_loss(full._replace(alone_BN=None), batch, multi_label=False)
    cross = torch.nn.functional.cross_entropy(full.alone_BN, batch.targets, reduction="sum")
    torch.testing.assert_close(both, one + cross)
    model.zero_grad()
    one = torch.autograd.grad(one, model.head.weight, retain_graph=True)[0]
    assert torch.equal(one, torch.autograd.grad(both, model.head.weight)[0]), "the second head changes what the first learns"


def test_late_concat_can_lack_either_but_is_told() -> None:
    model = heard(method="late-concat", either=True)
    assert model.may_lack == ("main", "comp")
    answers = model(model.collate([None, *images(1)], ["a", None])).logits
    assert answers.isfinite().all()


# -- in training


@pytest.fixture(scope="module")
def data(pairs: Path) -> Any:
    return load_data(build_config({"main": "tiny:vision", "comp": "tiny:text", "data": {"path": str(pairs)}}).data)


def samples(data: Any, model: Fusion, **changed: Any) -> Samples:
    config = build_config({"main": "a:1", "comp": "b:2", "data": {"path": str(data.root)}})
    return Samples(data, "train", model.readers(), config.data, training=True, **changed)


def drawn(dropped: Dropped, epoch: int) -> list[bool]:
    return [dropped.absent("comp", epoch, index) for index in range(len(dropped))]


def test_dropout_is_a_function_of_seed_epoch_and_index(data: Any) -> None:
    model = build()
    one = Dropped(samples(data, model, seed=3), ["comp"], 0.3)
    same = Dropped(samples(data, model, seed=3), ["comp"], 0.3)
    assert drawn(one, 1) == drawn(same, 1) != drawn(one, 2)
    assert drawn(Dropped(samples(data, model, seed=4), ["comp"], 0.3), 1) != drawn(one, 1)
    share = np.mean([drawn(one, epoch) for epoch in range(200)])
    count = 200 * len(one)
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5
    batch = next(iter(one.batches([[(1, index) for index in range(len(one))]])))
    assert batch.missing["comp"].tolist() == drawn(one, 1)


def test_encoders_of_one_modality_lose_it_together_and_nothing_loses_everything(data: Any) -> None:
    how: dict[str, Any] = {"method": "late-concat", "either": True, "data": {"on_missing": "absent"}}
    model = build(comp=["tiny:text", "tiny:text?pool=cls", "tiny:vision"], **how)
    dropped = Dropped(samples(data, model), model.may_lack, 0.9)
    every = 0
    for epoch in range(20):
        for index in range(len(dropped)):
            lost = {side: dropped.absent(side, epoch, index) for side in model.uses}
            assert lost["main"] == lost["comp3"] and lost["comp"] == lost["comp2"]
            assert not all(lost.values())
            every += any(lost.values())
    assert every


def test_a_larger_share_takes_all_that_a_smaller_one_does() -> None:
    ids = [str(number) for number in range(500)]
    order = loss_order(ids, ["text"], 0)
    assert sorted(order) == list(range(500)) and order != list(range(500))
    assert loss_order(ids[::-1], ["text"], 0) == [499 - number for number in order]
    assert loss_order(ids, ["audio"], 0) != order != loss_order(ids, ["text"], 1)


def holes(pairs: Path, root: Path, *, column: str) -> Path:
    """The data set, and in each split every third row without a value in a column."""
    shutil.copytree(pairs, root)
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]
        for row in rows[::3]:
            row[column] = None
        write_rows(root / f"{split}.jsonl", rows)
    return root


SMALL = ("--main", "tiny:vision", "--comp", "tiny:text", "--experts", 3, "--device", "cpu", "--batch", 8, "--seed", 1)


def train(data: Path, out: Path, *more: object) -> Any:
    return call("train", *SMALL, "--data", data, "--out", out, *more)


def test_a_resumed_run_with_dropout_equals_an_uninterrupted_one(pairs: Path, tmp_path: Path) -> None:
    how = ("--modality-dropout", 0.5, "--set", "train.schedule=constant")
    assert train(pairs, tmp_path / "one", *how, "--steps", 6).returncode == 0
    assert train(pairs, tmp_path / "two", *how, "--steps", 3).returncode == 0
    done = call("train", "--resume", "--out", tmp_path / "two", "--steps", 6)
    assert done.returncode == 0, done.stderr
    one, two = (read(tmp_path / name / "checkpoints" / "step-6") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert one["absent.comp"].any()


def read(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "weights.safetensors")


@pytest.mark.parametrize("column", ["text", "img"])
def test_rows_with_holes_are_an_error_that_says_what_to_do(pairs: Path, tmp_path: Path, column: str) -> None:
    data = holes(pairs, tmp_path / "data", column=column)
    error = json.loads(train(data, tmp_path / "run", "--json").stdout.splitlines()[-1])["error"]
    assert error["code"].startswith("MF-DATA") and "on_missing" in str(error)
    done = train(data, tmp_path / "skip", "--on-missing", "skip", "--steps", 1, "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "skip" / "metrics.json").read_text())["rows"]
    every = {split: len((data / f"{split}.jsonl").read_text().splitlines()) for split in rows}
    assert rows == {split: count - len(range(0, count, 3)) for split, count in every.items()}
    done = train(data, tmp_path / "absent", "--on-missing", "absent", "--steps", 1, "--json")
    if column == "text":
        assert done.returncode == 0, done.stderr
    else:
        assert "--either" in json.loads(done.stdout.splitlines()[-1])["error"]["hint"]
        done = train(data, tmp_path / "either", "--on-missing", "absent", "--either", "--steps", 2, "--json")
        assert done.returncode == 0, done.stderr
    assert json.loads((done.stdout or "{}").splitlines()[-1])["ok"]


def test_a_regression_takes_what_is_missing_as_the_mean(pairs: Path, tmp_path: Path) -> None:
    data = holes(pairs, tmp_path / "data", column="text")
    done = train(data, tmp_path / "run", "--method", "linear", "--on-missing", "absent")
    assert done.returncode == 0, done.stderr
    model = load_model(RunFolder(tmp_path / "run"), "best", torch.device("cpu")).model
    config = RunFolder(tmp_path / "run").config()
    found = prepared(model, load_data(config.data), "train", config, torch.device("cpu"))
    lacking = torch.from_numpy(found.lacking["comp"])
    features = found.features["comp"][torch.arange(len(found))]
    assert 0 < lacking.sum() < len(lacking)
    nothing = statistics(features[:0])
    assert torch.equal(nothing["mean_C"], torch.zeros(96)) and torch.equal(nothing["deviation_C"], torch.ones(96))
    torch.testing.assert_close(model.standard["comp"].mean_C, features[~lacking].double().mean(dim=0).float())


# -- in evaluation


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("missing") / "run"
    done = train(pairs, folder, "--modality-dropout", 0.3, "--steps", 4)
    assert done.returncode == 0, done.stderr
    return folder


def kept_in(run: Path, seed: int = 0) -> Any:
    """What `eval --missing` kept of the test split, of the selected checkpoint."""
    step = json.loads((run / "metrics.json").read_text())["selected_step"]
    return json.loads((run / f"missing-test-step-{step}-seed-{seed}.json").read_text())


def test_a_share_that_is_taken_away_is_told_kept_and_can_be_computed_again(run: Path) -> None:
    done = call("eval", run, "--missing", "text=0.7", "--json")
    said = json.loads(done.stdout)
    assert done.returncode == 0 and said["cells"][0]["words"] == "70 % of samples lack text"
    kept = kept_in(run)
    cell, order = kept["cells"][0], kept["orders"]["text"]
    assert cell["metrics"] == said["metrics"] and cell["rows"] == {"text": round(0.7 * len(order))} and kept["learned"]
    loaded = load_model(RunFolder(run), "best", torch.device("cpu"))
    data = load_data(loaded.config.data)
    lacks = set(order[: cell["rows"]["text"]])
    mask_S = np.array([row.id in lacks for row in data.splits["test"].rows])
    cpu = torch.device("cpu")
    taken = Taken(prepared(loaded.model, data, "test", loaded.config, cpu), {"text": mask_S})
    logits_SN = run_split(loaded.model, data, "test", loaded.config, cpu, samples=taken).logits_SN
    again = metrics.compute(logits_SN, data.targets("test"), multi_label=False, thresholds=0.5)
    assert again == pytest.approx(cell["metrics"], abs=1e-6)


def test_a_grid_its_table_and_its_part_of_the_report(run: Path) -> None:
    done = call("eval", run, "--missing", "grid")
    assert done.returncode == 0, done.stderr
    assert "100 % of samples lack text" in done.stdout and "nothing is taken away" in done.stdout
    kept = kept_in(run)
    plain = next(cell for cell in kept["cells"] if not cell["missing"])
    assert plain["metrics"] == json.loads((run / "metrics.json").read_text())["metrics"]["test"]
    assert [cell["missing"] for cell in kept["cells"] if cell["missing"]].count({"text": 0.7}) == 1
    assert call("report", run, "--no-audit").returncode == 0
    page = (run / "report.html").read_text()
    assert "Where a modality is missing" in page and "70 % of samples lack text" in page


def test_another_seed_or_checkpoint_takes_nothing_from_what_is_kept(run: Path) -> None:
    assert call("eval", run, "--missing", "text=0.7").returncode == 0
    before = kept_in(run)
    assert call("eval", run, "--missing", "text=0.7", "--missing-seed", 5).returncode == 0
    assert call("eval", run, "--missing", "text=0.3", "--checkpoint", "last").returncode == 0
    assert kept_in(run, 5)["orders"] != kept_in(run)["orders"] == before["orders"]
    assert [cell for cell in kept_in(run)["cells"] if cell in before["cells"]] == before["cells"]
    assert call("report", run, "--no-audit").returncode == 0
    assert "70 % of samples lack text" in (run / "report.html").read_text()


def test_a_model_that_never_met_it_is_told_of(trained: Path) -> None:
    done = call("eval", trained, "--missing", "text=1")
    assert done.returncode == 0 and "never met" in done.stderr, done.stderr
    for file in trained.glob("missing-test-*.json"):
        file.unlink()


@pytest.mark.parametrize(
    ("asked", "code"),
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
def test_what_cannot_be_taken_away_is_refused(run: Path, asked: list[str], code: str) -> None:
    words = [word for a in asked for word in (["--missing", a] if a[0] != "-" and "accuracy" not in a else [a])]
    error = json.loads(call("eval", run, *words, "--json").stdout)["error"]
    assert error["code"] == code
    assert "--either" in error["hint"] if asked == ["image=0.5"] else "text" in error["hint"] or "twice" in error["message"]


def test_a_bundle_takes_whole_pairs(exported: Path) -> None:
    error = json.loads(call("eval", exported, "--missing", "text=0.5", "--json").stdout)["error"]
    assert error["code"] == "MF-CFG-151"


def test_words_and_what_they_are_made_of() -> None:
    assert parse(["grid"]) is None and parse(["text+audio=0.5"]) == [{"audio+text": 0.5}]
    assert words({"audio+text": 0.5, "image": 0.125}) == "50 % of samples lack audio and text, 12.5 % of samples lack image"
    assert words({}) == words({"text": 0.0}) == "nothing is taken away"


def test_predict_answers_rows_with_holes_where_the_model_learned_to(pairs: Path, trained: Path, tmp_path: Path) -> None:
    data = holes(pairs, tmp_path / "data", column="text")
    done = train(data, tmp_path / "run", "--on-missing", "absent", "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert call("export", tmp_path / "run", "--format", "onnx", "-o", tmp_path / "bundle").returncode == 0
    assert call("export", tmp_path / "run", "--format", "pt2", "-o", tmp_path / "pt2").returncode == 0
    found = [json.loads(call("eval", tmp_path / name, "--data", data, "--json").stdout) for name in ("run", "bundle", "pt2")]
    for one in found[1:]:
        assert one["metrics"] == pytest.approx(found[0]["metrics"], abs=1e-5)
    asked = {name: call("predict", folder, data / "test.jsonl") for name, folder in
             {"run": tmp_path / "run", "bundle": tmp_path / "bundle", "other": trained}.items()}  # fmt: skip
    said = {name: [json.loads(line) for line in done.stdout.splitlines()] for name, done in asked.items()}
    assert said["run"] and not any("error" in row for row in [*said["run"], *said["bundle"]])
    assert sum("error" in row for row in said["other"]) == len(said["run"][::3])
    for one, other in zip(said["run"], said["bundle"], strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
    whole = [json.loads(line) for line in call("predict", tmp_path / "run", pairs / "test.jsonl").stdout.splitlines()]
    assert [one["probabilities"] == other["probabilities"] for one, other in zip(said["run"], whole, strict=True)][:3] == [
        False, True, True,
    ]  # fmt: skip


def test_a_bundle_that_was_not_trained_to_do_without_says_so(exported: Path) -> None:
    bundle = Bundle(exported)
    with pytest.raises(DataError) as caught:
        bundle.collate(images(2), ["a", None])
    assert caught.value.number == 100


def test_a_share_counts_what_rows_lack_by_themselves(pairs: Path, tmp_path: Path) -> None:
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
    """A run that does without either modality, and its data: of seven test rows two lack text, and one an image."""
    root = tmp_path_factory.mktemp("either")
    data = holes(pairs, root / "data", column="text")
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        write_rows(data / f"{split}.jsonl", [{**row, "img": None} if i == 1 else row for i, row in enumerate(rows)])
    done = train(data, root / "run", "--on-missing", "absent", "--either", "--steps", 2)
    assert done.returncode == 0, done.stderr
    return root / "run", data


def test_no_sample_loses_all_that_it_has(either: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run, data = either
    masks: list[Any] = []
    monkeypatch.setattr(missing, "Taken", lambda samples, taken: masks.append(taken) or Taken(samples, taken))
    done = call("eval", run, "--missing", "grid")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    lacks = {name: {row["id"] for row in rows if row[key] is None} for name, key in (("text", "text"), ("image", "img"))}
    kept = kept_in(run)
    assert kept["natural"] == {name: len(ids) for name, ids in lacks.items()}
    assert f"1 image, {len(lacks['text'])} text" in done.stdout and "nothing but what rows lack" in done.stdout
    for cell in kept["cells"]:
        for name, count in cell["rows"].items():
            (other,) = {"text", "image"} - {name}
            assert not lacks[other] & set(kept["orders"][name][:count]) and lacks[name] <= set(kept["orders"][name][:count])
    most = max(cell["rows"].get("text", 0) for cell in kept["cells"])
    assert most == len(rows) - 1, "all that have an image"
    said = json.loads(call("eval", run, "--missing", "text=0.6", "--missing", "image=0.4", "--json").stdout)
    assert said["cells"][0]["rows"] == {"text": 4, "image": 3} and len(rows) == 7
    assert (masks[-1]["text"] ^ masks[-1]["image"]).all() and not any((m["text"] & m["image"]).any() for m in masks)
    for asked, code in ((["text=1"], 155), (["text=0.5", "image=0.8"], 155), (["image+text=0.5"], 152)):
        words = [word for one in asked for word in ("--missing", one)]
        error = json.loads(call("eval", run, *words, "--json").stdout)["error"]
        assert error["code"] == f"MF-CFG-{code}" and "nothing left" in error["message"]


def test_a_single_pair_may_have_a_hole_where_the_model_does_without(
    either: tuple[Path, Path], pairs: Path, trained: Path
) -> None:
    run, _ = either
    image, text = pairs / "images" / "test-0.png", "what is the red digit"
    rows = [{"img": str(image), "text": ""}, {"text": text}, {"img": str(image), "text": text}]
    asked = [("--image", image), ("--text", text), ("--image", image, "--text", text)]
    write_rows(run / "in.jsonl", rows)
    done = call("predict", run, run / "in.jsonl", "--image-root", pairs)
    by_row = [json.loads(line)["probabilities"] for line in done.stdout.splitlines()]
    for flags, found in zip(asked, by_row, strict=True):
        assert json.loads(call("predict", run, *flags).stdout)["probabilities"] == pytest.approx(found, abs=1e-5)
    empty = json.loads(call("predict", run, "--image", image, "--text", "").stdout)["probabilities"]
    assert empty == pytest.approx(by_row[0], abs=1e-5)
    refused = call("predict", trained, "--image", image)
    assert refused.returncode == 4 and "has no text" in refused.stderr


def test_a_sample_that_has_nothing_is_refused(either: tuple[Path, Path], tmp_path: Path) -> None:
    model = load_model(RunFolder(either[0]), "best", torch.device("cpu")).model
    one, none = images(1)[0], None
    assert model.collate([one, none], [none, "a"]).missing.keys() == {"main", "comp"}
    with pytest.raises(DataError, match="1 of the samples have nothing") as caught:
        model.collate([one, none], ["a", none])
    assert caught.value.number == 110


def test_other_data_with_holes_are_evaluated_where_that_is_asked_for(run: Path, pairs: Path, tmp_path: Path) -> None:
    data = holes(pairs, tmp_path / "data", column="text")
    refused = call("eval", run, "--data", data)
    assert refused.returncode == 4 and re.search("on.missing", refused.stderr)
    said = json.loads(call("eval", run, "--data", data, "--on-missing", "absent", "--json").stdout)
    asked = [json.loads(line) for line in call("predict", run, data / "test.jsonl").stdout.splitlines()]
    true = [json.loads(line)["label"] for line in (data / "test.jsonl").read_text().splitlines()]
    right = sum(one["label"] == label for one, label in zip(asked, true, strict=True))
    assert said["metrics"]["accuracy"] == pytest.approx(right / len(true))
    for flags, code in ((["--on-missing", "skip"], 154), (["--data", data, "--on-missing", "drop"], 1)):
        assert json.loads(call("eval", run, *flags, "--json").stdout)["error"]["code"] == f"MF-CFG-{code:02}"
    assert "MF-CFG-01" in call("predict", run, data / "test.jsonl", "--text-col", "").stderr


def test_dropout_where_nothing_looks_at_the_other_modality_changes_nothing(pairs: Path, tmp_path: Path) -> None:
    blind = ("--set", "prompts.dynamic=0", "--set", "prompts.mapped=0", "--steps", 2)
    assert train(pairs, tmp_path / "dropped", *blind, "--modality-dropout", 0.5).returncode == 0
    assert train(pairs, tmp_path / "whole", *blind).returncode == 0
    one, two = (read(tmp_path / name / "checkpoints" / "step-2") for name in ("dropped", "whole"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    done = train(pairs, tmp_path / "linear", "--method", "linear", "--modality-dropout", 0.5)
    assert done.returncode == 0 and "linear does not use the settings of train.modality_dropout" in done.stderr


def test_one_modality_cannot_stand_in_for_itself(pairs: Path, tmp_path: Path) -> None:
    images = ("--main", "tiny:vision", "--comp", "tiny:vision-b")
    done = call("train", *images, "--either", "--data", pairs, "--out", tmp_path / "run")
    assert done.returncode == 3 and "all encoders read image" in done.stderr


def test_an_empty_text_is_the_same_to_eval_and_predict(pairs: Path, run: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    write_rows(data / "test.jsonl", [{**row, "text": ""} for row in rows])
    assert call("eval", run, "--data", data, "-o", tmp_path / "said.jsonl").returncode == 0
    judged = [json.loads(line)["probabilities"] for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    asked = [json.loads(line)["probabilities"] for line in call("predict", run, data / "test.jsonl").stdout.splitlines()]
    for one, other in zip(judged, asked, strict=True):
        assert one == pytest.approx(other, abs=2e-6)


def test_python_refuses_what_a_model_never_learned(trained: Path, run: Path) -> None:
    for folder, values in ((trained, (images(1), [None])), (run, ([None], ["a"])), (run, ([None], [None]))):
        with pytest.raises(DataError) as caught:
            mopefuse.load(folder, device="cpu").predict(*values)
        assert caught.value.number == 100


def test_a_dry_run_refuses_what_training_does(pairs: Path, tmp_path: Path) -> None:
    data = holes(pairs, tmp_path / "data", column="text")
    for more in ((), ("--dry-run",)):
        error = json.loads(train(data, tmp_path / "run", "--method", "mmbt", "--on-missing", "absent", "--json", *more).stdout)
        assert error["error"]["code"] == "MF-DATA-100"
