"""The audit: shuffling equals evaluating other pairs, and the audit finds what a model depends on."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_pairs, matrix, plain_config, write_rows

from mopefuse.config.schema import RunConfig
from mopefuse.data.load import load_data
from mopefuse.data.perturbed import draw_derangement
from mopefuse.evaluation.audit import audit, audit_model
from mopefuse.evaluation.split import run_split
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import build_model
from mopefuse.training.train import train

CPU = torch.device("cpu")
COUNTS = {"train": 48, "val": 12, "test": 30}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose text determines the label and whose image is meaningless."""
    return make_pairs(tmp_path_factory.mktemp("data") / "pairs", counts=COUNTS)


def settings(data: Path, **other: Any) -> RunConfig:
    common = {"main": "tiny:vision", "comp": "tiny:text", "data": {"path": str(data)}, "device": "cpu"}
    return plain_config(common | {"prompts": {"experts": 2, "dropout": 0.0, "gate": "none"}} | other)


def model_of(config: RunConfig) -> Fusion:
    """An untrained model with random head weights, so that prompts affect the predictions."""
    return build_model(config, 3)


def predict_logits(config: RunConfig, data: Path) -> torch.Tensor:
    where = config.data.model_copy(update={"path": str(data)})
    return run_split(model_of(config), load_data(where), "test", config, CPU).logits_SN


def test_a_derangement_moves_every_sample_and_depends_only_on_the_seed() -> None:
    for count in (2, 3, 10, 101):
        for seed in range(5):
            found = draw_derangement(count, seed)
            assert sorted(found.tolist()) == list(range(count))
            assert (found != torch.arange(count)).all()
            assert draw_derangement(count, seed).equal(found)
    assert len({tuple(draw_derangement(4, seed).tolist()) for seed in range(60)}) == 6, "all cycles of four"
    assert draw_derangement(1, 0).tolist() == [0]


@pytest.mark.parametrize("other", [{}, {"comp_tuning": {"mode": "prompts"}}, {"method": "late-concat"}], ids=str)
@pytest.mark.parametrize("cached", matrix([True, False], [False]))
def test_shuffled_and_blank_texts_give_the_predictions_of_rows_with_those_texts(
    data: Path, tmp_path: Path, other: dict[str, Any], cached: bool
) -> None:
    config = settings(data, **other)
    options = {"cache_features": cached, "allow_missing_text": True, "cache_images": cached}
    config = config.model_copy(update={"data": config.data.model_copy(update=options)})
    found = audit_model(model_of(config), load_data(config.data), "test", config, CPU, seed=3)
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    partner = draw_derangement(len(rows), 3).tolist()
    texts = {"shuffled": [rows[other]["text"] for other in partner], "blank": [""] * len(rows)}
    for name, instead in texts.items():
        changed = tmp_path / name
        changed.mkdir()
        for split in ("train", "val"):
            (changed / f"{split}.jsonl").write_text((data / f"{split}.jsonl").read_text())
        write_rows(changed / "test.jsonl", [{**row, "text": text} for row, text in zip(rows, instead, strict=True)])
        shutil.copytree(data / "images", changed / "images")
        torch.testing.assert_close(found[name].logits_SN, predict_logits(config, changed), atol=1e-5, rtol=0)
        assert not torch.allclose(found[name].logits_SN, found["as is"].logits_SN, atol=1e-4), name
    assert found["as is"].logits_SN.equal(predict_logits(config, data))
    equal = sum(rows[i]["text"] == rows[other]["text"] for i, other in enumerate(partner))
    assert found.same["text"] == pytest.approx(equal / len(rows))


def test_a_model_that_ignores_its_main_input_is_found_out(data: Path) -> None:
    config = settings(data, method="mlp")
    model, pairs = model_of(config), load_data(config.data)
    found = audit_model(model, pairs, "test", config, CPU)
    rows = [(one.name, one.modality) for one in found.conditions]
    assert rows == [("as is", ""), ("shuffled", "text"), ("blank", "text"), ("shuffled", "image"), ("blank", "image")]
    assert not torch.allclose(found.condition("shuffled", "image").logits_SN, found["as is"].logits_SN, atol=1e-4)
    with torch.no_grad():
        model.head[0].weight[:, : model.encoder("main").feature_width] = 0  # type: ignore[index]
    found = audit_model(model, pairs, "test", config, CPU)
    for name in ("shuffled", "blank"):
        assert found.condition(name, "image").logits_SN.equal(found["as is"].logits_SN)
        assert not found.condition(name, "text").logits_SN.equal(found["as is"].logits_SN)
    assert "There is no sign that the model uses the image" in found.verdict
    assert set(found.same) == {"text", "image"} and found.as_dict()["main"] == "image"


def test_known_logits_of_the_whole_split_are_not_computed_again(data: Path) -> None:
    config = settings(data)
    model, pairs, conditions = model_of(config), load_data(config.data), list[str]()
    whole_SN = run_split(model, pairs, "test", config, CPU).logits_SN
    for most in (None, 8):
        computed = audit_model(model, pairs, "test", config, CPU, max_samples=most)
        conditions.clear()
        progress = lambda name, done, total: conditions.append(name)  # noqa: E731
        known = audit_model(model, pairs, "test", config, CPU, max_samples=most, as_is_SN=whole_SN, advance=progress)
        assert "another text" in conditions and "as is" not in conditions
        torch.testing.assert_close(known["as is"].logits_SN, computed["as is"].logits_SN, atol=1e-5, rtol=0)
        assert known.verdict == computed.verdict


def test_with_static_prompts_alone_shuffling_the_text_changes_nothing(data: Path) -> None:
    config = settings(data, prompts={"static": 4, "dynamic": 0, "mapped": 0, "gate": "none"})
    found = audit_model(model_of(config), load_data(config.data), "test", config, CPU)
    assert [condition.name for condition in found.conditions] == ["as is", "static"]
    assert "ignores the text" in found.verdict
    # whether read or not, the prompts do not depend on the text, bit for bit
    model = model_of(config)
    model.reads = ("main", "comp")
    found = audit_model(model, load_data(config.data), "test", config, CPU)
    for name in ("shuffled", "blank"):
        assert found[name].logits_SN.equal(found["as is"].logits_SN)
        assert (found[name].changed, found[name].lost, found[name].is_significant) == (0, 0, False)
    assert found.verdict.startswith("There is no sign that the model uses the text")


def test_without_its_only_prompts_the_model_is_the_unmodified_encoder(data: Path) -> None:
    config = settings(data, prompts={"static": 4, "dynamic": 0, "mapped": 0, "gate": "none"})
    model, pairs = model_of(config), load_data(config.data)
    found = audit_model(model, pairs, "test", config, CPU)
    bare = build_model(settings(data, method="main-only"), 3)
    bare.head.load_state_dict(model.head.state_dict())  # both classify the main encoder's pooled feature
    expected = run_split(bare, pairs, "test", settings(data, method="main-only"), CPU).logits_SN
    torch.testing.assert_close(found["static"].logits_SN, expected, rtol=0, atol=1e-5)
    assert not found["static"].logits_SN.equal(found["as is"].logits_SN)


@pytest.mark.parametrize("kind", ["static", "dynamic", "mapped"])
def test_removing_a_kind_of_prompt_equals_a_model_built_without_it(data: Path, kind: str) -> None:
    lengths = {"static": 2, "dynamic": 3, "mapped": 1}
    config = settings(data, prompts={**lengths, "experts": 4, "gate": "none"})
    model, pairs = model_of(config), load_data(config.data)
    found = audit_model(model, pairs, "test", config, CPU)
    less = settings(data, prompts={**lengths, kind: 0, "experts": 4, "gate": "none"})
    without = model_of(less)
    own = model.trainable_state_dict()
    without.load_trainable_state_dict({name: own[name] for name in without.trainable_state_dict()}, where="")
    assert found[kind].logits_SN.equal(run_split(without, pairs, "test", less, CPU).logits_SN)
    again = run_split(model, pairs, "test", config, CPU).logits_SN
    assert again.equal(found["as is"].logits_SN), "the model is unchanged"


@pytest.fixture(scope="module")
def reader(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learned to read the text."""
    out = tmp_path_factory.mktemp("runs") / "reader"
    training = {"epochs": 12, "batch_size": 16, "lr": 0.01, "lr_comp": 0.01, "evals_per_epoch": 1}
    prompts = {"static": 0, "dynamic": 0, "mapped": 2, "gate": "none", "dropout": 0.0}
    assert train(settings(data, train=training, prompts=prompts), out)["metrics"]["test"]["accuracy"] > 0.9
    return out


def test_shuffling_the_texts_hurts_a_model_that_reads_them(reader: Path) -> None:
    found = audit(reader, seed=1)
    shuffled = found["shuffled"]
    assert shuffled.lost > 0.3 and shuffled.is_significant
    assert found.verdict.startswith("The model uses the text: with another sample's text, accuracy goes from ")
    before, after = found["as is"].metrics["accuracy"], shuffled.metrics["accuracy"]
    assert shuffled.lost == pytest.approx(before - after)
    assert json.loads(json.dumps(found.as_dict()))["conditions"][1]["name"] == "shuffled"
    # the interval is that of the paired differences
    targets = load_data(settings(Path()).data.model_copy(update={"path": str(_data_of(reader))})).targets("test")
    right = [(c.logits_SN.argmax(dim=-1) == targets).double() for c in (found["as is"], shuffled)]
    spread = 1.96 * float((right[0] - right[1]).std(correction=0)) / len(targets) ** 0.5
    assert shuffled.low == pytest.approx(shuffled.lost - spread, abs=0.05)
    assert shuffled.high == pytest.approx(shuffled.lost + spread, abs=0.05)


def _data_of(run: Path) -> Path:
    import yaml

    return Path(yaml.safe_load((run / "config.yaml").read_text())["data"]["path"])


def test_a_large_split_is_subsampled(reader: Path) -> None:
    found = audit(reader, max_samples=10)
    assert (found.samples, found.total, len(found["as is"].logits_SN)) == (10, 30, 10)
    whole = audit(reader, max_samples=None)["as is"].logits_SN
    assert all((whole - row).abs().sum(dim=-1).min() < 1e-4 for row in found["as is"].logits_SN)


def test_the_verdict_on_a_model_with_one_input_says_so(data: Path) -> None:
    for method, verdict in (("main-only", "ignores the text"), ("comp-only", "The text is the only input that the model uses")):
        config = settings(data, method=method)
        assert verdict in audit_model(model_of(config), load_data(config.data), "test", config, CPU).verdict


def test_multi_label_models_are_scored_by_the_metric_that_is_shown(multi_pairs: Path) -> None:
    config = settings(multi_pairs)
    found = audit_model(model_of(config), load_data(config.data), "test", config, CPU, thresholds=0.3)
    assert found.metric == "f1_macro"
    before, after = (found[name].metrics["f1_macro"] for name in ("as is", "shuffled"))
    assert found["shuffled"].lost == pytest.approx(before - after)
    assert found["shuffled"].low <= found["shuffled"].lost <= found["shuffled"].high


@pytest.mark.parametrize("multi", [False, True], ids=["one label", "several"])
@pytest.mark.parametrize("lost", [0, 1, 60], ids=["nothing", "little", "much"])
def test_the_verdict_and_its_numbers_agree(
    data: Path, multi_pairs: Path, multi: bool, lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drop is called noise exactly if it is within the stated interval."""
    config = settings(multi_pairs if multi else data)
    pairs = load_data(config.data)
    split = pairs.splits["test"]
    rows = [number % len(split.rows) for number in range(400)]
    pairs = replace(pairs, splits={**pairs.splits, "test": split.select_rows(rows)})
    targets = pairs.targets("test")
    right_SN = 20 * (targets if multi else torch.nn.functional.one_hot(targets, 3)).float() - 10
    calls = 0

    def fake_run_split(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        logits_SN = right_SN.clone()
        logits_SN[100:200] = logits_SN[100:200].roll(1, dims=1)  # with unaltered inputs, a quarter is wrong
        if calls == 2 and lost:  # with another text, more are wrong; with few changes, some fewer too
            logits_SN[: 2 * lost] = logits_SN[: 2 * lost].roll(1, dims=1)
            logits_SN[100 : 100 + min(lost, 1)] = right_SN[100 : 100 + min(lost, 1)]
        return SimpleNamespace(logits_SN=logits_SN)

    monkeypatch.setattr("mopefuse.evaluation.audit.run_split", fake_run_split)
    found = audit_model(model_of(config), pairs, "test", config, CPU)
    shuffled = found["shuffled"]
    before, after = (100 * found[name].metrics[found.metric] for name in ("as is", "shuffled"))
    assert 100 * shuffled.lost == pytest.approx(before - after)
    assert f"goes from {before:.1f} to {after:.1f} %" in found.verdict
    if lost == 60:
        assert found.verdict.startswith("The model uses the text") and shuffled.low > 0
    elif lost == 0:
        assert "nothing changed; with 400 samples, a drop of up to 0.8 points could go undetected" in found.verdict
    else:
        stated = re.search(r"a loss of (\S+) points is within noise: 95 % interval (\S+) to (\S+), 400 samples", found.verdict)
        assert stated, found.verdict
        loss, low, high = map(float, stated.groups())
        assert loss == pytest.approx(before - after, abs=0.06) and low <= 0 <= high and low <= loss <= high


def test_a_subsample_has_the_rows_keys_and_labels_of_its_samples(data: Path) -> None:
    pairs = load_data(settings(data).data)
    split = pairs.splits["test"]
    part = split.select_rows([4, 2])
    assert [row.id for row in part.rows] == [split.rows[4].id, split.rows[2].id]
    assert list(part.labels) == [split.labels[4], split.labels[2]]
    assert part.keys["image"].tolist() == [split.keys["image"][4], split.keys["image"][2]]
    some = replace(pairs, splits={**pairs.splits, "test": part})
    assert some.targets("test").tolist() == [pairs.targets("test")[4], pairs.targets("test")[2]]
