"""The public Python API: what `import mopefuse` provides, your own training loop, and what is saved from it."""

from __future__ import annotations

import copy
import csv
import json
import re
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import call, matrix, write_rows
from PIL import Image
from torch.utils.data import DataLoader

import mopefuse
from mopefuse.core.argument_names import as_argument
from mopefuse.errors import CheckpointError, ConfigError, DataError, EncoderError, MopefuseError, NumericError
from mopefuse.fusion.base import Fusion

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
TEXT = "what is the red digit"


def build(**options: Any) -> Fusion:
    return mopefuse.build_fusion(**{"main": "tiny:vision", "comp": "tiny:text", "num_labels": 3, "experts": 2, **options})


def nudge(model: Fusion) -> None:
    """Change everything that is trainable, so that prompts have an effect and a forgotten tensor is noticed."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.1)


# -- imports


def test_importing_the_package_is_fast_and_lists_the_public_names() -> None:
    code = """
import sys, mopefuse
names = dir(mopefuse)
assert not {"torch", "pydantic", "numpy"} & set(sys.modules), "import mopefuse imports too much"
assert set(mopefuse.__all__) <= set(names), set(mopefuse.__all__) - set(names)
assert not [name for name in names if not name.startswith("_") and name not in mopefuse.__all__], names
config = mopefuse.RunConfig
assert "torch" not in sys.modules, "a configuration needs no torch"
for name in mopefuse.__all__:
    exec(f"from mopefuse import {name}")
    assert getattr(mopefuse, name) is not None
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'mopefuse' has no attribute 'biuld_fusion'"):
        mopefuse.biuld_fusion  # noqa: B018
    with pytest.raises(ImportError):
        from mopefuse import nothing  # type: ignore[attr-defined] # noqa: F401


# -- build_fusion


def test_arguments_are_settings_of_the_prompts() -> None:
    model = build(experts=5, static=2, dynamic=3, mapped=0, layers=[1], gate="none", dropout=0.2, head_hidden=7, seed=4)
    prompts = model.config.prompts
    assert (prompts.experts, prompts.static, prompts.dynamic, prompts.mapped, prompts.layers) == (5, 2, 3, 0, (1,))
    assert (prompts.gate, prompts.dropout, model.config.head_hidden, model.config.seed) == ("none", 0.2, 7, 4)
    by_section = build(experts=None, prompts={"experts": 5}, router={"top_m": 2})
    assert (by_section.config.prompts.experts, by_section.config.router.top_m) == (5, 2)


def test_a_model_has_the_labels_and_task_that_it_was_built_with() -> None:
    model = build(num_labels=None, labels=["cat", "dog"], task="multi-label")
    assert (model.labels, model.num_labels, model.task) == (("cat", "dog"), 2, "multi-label")
    assert model(model.collate([np.zeros((8, 8, 3), np.uint8)], ["a"])).logits.shape == (1, 2)
    assert build().labels == () and build().task == "single-label"
    alone = mopefuse.build_fusion("tiny:text", num_labels=2, method="main-only")
    assert alone.uses == ("main",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert": 4}, "build_fusion has no argument 'expert' · expert · fix: did you mean experts?"),
        ({"experts": 0}, "experts: got 0; needs at least 1"),
        ({"gate": "on"}, "gate: got 'on'; needs 'none' or 'zero'"),
        ({"layers": "every"}, "layers: got 'every'; needs all, first:N, last:N, last:1/N, or a list of indices from 0"),
        ({"num_labels": 0}, "num_labels must be a positive integer, got 0 · num_labels"),
        ({"num_labels": None}, "num_labels must be a positive integer, got None · num_labels"),
        ({"num_labels": None, "labels": ["a", "a"]}, "labels must be a non-empty list of distinct names · labels"),
        ({"num_labels": None, "labels": "cat"}, "labels must be a non-empty list of distinct names · labels"),
        ({"labels": ["a", "b"]}, "num_labels is 3, and labels has 2 names · num_labels"),
        (
            {"task": "multilabel"},
            "task must be one of single-label, multi-label, regression, retrieval, segmentation, got 'multilabel' · task · "
            "fix: did you mean",
        ),
        ({"comp": None}, "comp is missing"),
        ({"router": {"top": 1}}, "unknown setting router.top (did you mean router.top_m?)"),
        ({"method": "mmbt", "either": True}, "mmbt requires the main modality · either · fix: use method conditional"),
        ({"comp": "tiny:txt"}, "unknown encoder tiny:txt · comp · fix: did you mean tiny:text"),
    ],
    ids=str,
)
def test_an_error_names_the_argument_and_not_the_flag(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MopefuseError) as caught:
        build(**options)
    assert message in str(caught.value) and "--" not in str(caught.value)


# -- rows and batches


def test_rows_are_raw_values_and_the_index_of_the_label(pairs: Path) -> None:
    dataset = mopefuse.PairDataset(pairs, "train")
    lines = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    assert len(dataset) == len(lines) == len(list(dataset)) and dataset.modalities == ("text", "image")
    for line, row in zip(lines, dataset, strict=True):
        assert (row["id"], row["text"], dataset.labels[row["label"]]) == (line["id"], line["text"], line["label"])
        assert row["image"].mode == "RGB" and np.array_equal(row["image"], Image.open(pairs / line["img"]).convert("RGB"))
    assert dataset[-1]["id"] == lines[-1]["id"]
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_labels_of_multi_label_rows_are_lists_and_targets_zeros_and_ones(multi_pairs: Path) -> None:
    dataset = mopefuse.PairDataset(multi_pairs, "val")
    assert dataset.task == "multi-label"
    model = build(num_labels=None, labels=dataset.labels, task=dataset.task)
    rows = [dataset[i] for i in range(4)]
    targets_BN = model.collate(rows).targets
    assert targets_BN.dtype == torch.float32 and targets_BN.shape == (4, len(dataset.labels))
    assert [torch.nonzero(row_N).flatten().tolist() for row_N in targets_BN] == [sorted(row["label"]) for row in rows]
    assert torch.equal(targets_BN, dataset.data.targets("val")[:4])


def test_columns_labels_and_splits_are_arguments(pairs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    table = tmp_path / "all.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "caption", "file", "kind"])
        writer.writerows([row["id"], row["text"], row["img"], row["label"]] for row in rows)
    same = {"text_col": "caption", "img_col": "file", "label_col": "kind", "id_col": "key", "image_roots": [pairs]}
    train, val = (mopefuse.PairDataset(table, split, val_fraction=0.3, **same) for split in ("train", "val"))
    assert {row["id"] for row in train} | {row["id"] for row in val} == {row["id"] for row in rows} and len(val)
    assert val.labels == train.labels
    turned = mopefuse.PairDataset(table, "train", labels=train.labels[::-1], **same)
    first = mopefuse.PairDataset(table, "train", **same)[0]
    assert turned.labels[turned[0]["label"]] == train.labels[first["label"]]


def test_an_invalid_data_set_is_an_error_that_names_the_problem(pairs: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="labels that are not in `labels`"):
        mopefuse.PairDataset(pairs, "train", labels=["none", "of them"])
    with pytest.raises(ConfigError, match="labels must be distinct names"):
        mopefuse.PairDataset(pairs, "train", labels=["a", "a"])
    with pytest.raises(ConfigError, match=r"^on_missing: got 'ignore'; needs 'error', 'skip' or 'absent'"):
        mopefuse.PairDataset(pairs, "train", on_missing="ignore")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the dev split is missing"):
        mopefuse.PairDataset(pairs, "dev")
    write_rows(tmp_path / "test.jsonl", [{"text": "a", "img": "a.png", "label": "x"}])
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="no training split to take the labels from"):
        mopefuse.PairDataset(tmp_path, "test")
    assert mopefuse.PairDataset(tmp_path, "test", labels=["w", "x"])[0]["label"] == 1


def test_a_missing_modality_is_none_in_the_row_and_marked_in_the_batch(pairs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()][:6]
    rows[2]["text"] = None
    write_rows(tmp_path / "train.jsonl", rows)
    dataset = mopefuse.PairDataset(tmp_path, "train", on_missing="absent", image_roots=[pairs])
    assert dataset[2]["text"] is None
    model = build(data={"on_missing": "absent"})
    batch = model.collate(list(dataset))
    assert batch.missing["comp"].tolist() == [False, False, True, False, False, False] and batch.missing.keys() == {"comp"}
    assert model(batch).logits.isfinite().all()


@pytest.mark.parametrize("context", matrix(["fork", "spawn"], ["fork"]))
def test_data_workers_collate_the_same_batches_as_the_main_process(pairs: Path, context: str) -> None:
    dataset, model = mopefuse.PairDataset(pairs, "train"), build()
    plain = DataLoader(dataset, batch_size=4, collate_fn=model.collate)
    worked = DataLoader(dataset, batch_size=4, collate_fn=model.collate, num_workers=2, multiprocessing_context=context)
    for found, wanted in zip(worked, plain, strict=True):
        assert torch.equal(found.targets, wanted.targets)
        for side, inputs in wanted.inputs.items():
            assert all(torch.equal(found.inputs[side][name], tensor) for name, tensor in inputs.items())
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert len(ForkingPickler.dumps(model.collate)) < 10_000 < size / 100


def test_collate_returns_a_batch_on_the_cpu_for_a_model_on_any_device() -> None:
    model = build().to("meta")
    batch = model.collate([np.zeros((8, 8, 3), np.uint8)], [TEXT])
    assert {tensor.device.type for inputs in batch.inputs.values() for tensor in inputs.values()} == {"cpu"}
    moved = batch.to("meta")
    assert {tensor.device.type for inputs in moved.inputs.values() for tensor in inputs.values()} == {"meta"}
    assert moved.index.device.type == "cpu"


def test_collating_rows_equals_collating_their_values() -> None:
    model, image = build(), np.zeros((8, 8, 3), np.uint8)
    rows = model.collate([{"image": image, "text": TEXT, "extra": 1}])
    values = model.collate([image], [TEXT])
    assert rows.targets is None and torch.equal(model(rows).logits, model(values).logits)
    assert model.collate([{"image": image, "text": TEXT, "label": 2}]).targets.tolist() == [2]


@pytest.mark.parametrize(
    ("labels", "task", "number", "message"),
    [
        ([0, None], "single-label", 335, "the row has no label, but other rows of the batch have one"),
        ([0, 3], "single-label", 336, "the label is 3, and the model has 3 labels"),
        ([0, -1], "single-label", 336, "the label is -1"),
        (["a", 1], "single-label", 337, "the label is 'a', expected one index from 0"),
        ([True, 1], "single-label", 337, "the label is True, expected one index"),
        ([[0], [1]], "single-label", 337, r"the label is \[0\], expected one index"),
        ([1, 2], "multi-label", 337, "the label is 1, expected a list of indices"),
        ([[0, 3], []], "multi-label", 336, "the label is 3, and the model has 3 labels"),
        (["ab", []], "multi-label", 337, "the label is 'ab', expected a list of indices"),
    ],
)
def test_an_invalid_label_is_refused(labels: list[Any], task: Any, number: int, message: str) -> None:
    model, image = build(task=task), np.zeros((8, 8, 3), np.uint8)
    rows = [{"image": image, "text": TEXT} | ({} if label is None else {"label": label}) for label in labels]
    with pytest.raises(DataError, match=message) as caught:
        model.collate(rows)
    assert caught.value.number == number and caught.value.where.startswith("sample ")


def test_errors_name_arguments_instead_of_flags_except_within_commands() -> None:
    converted = as_argument("write --split-col NAME, or --val-fraction 0.1; mopefuse data check --json lists all")
    assert converted == "write split_col NAME, or val_fraction 0.1; mopefuse data check --json lists all"


def test_errors_of_train_and_evaluate_name_arguments(pairs: Path, tmp_path: Path) -> None:
    config = mopefuse.build_config({"main": "tiny:vision", "comp": "tiny:text", "data": {"path": str(pairs)}})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    with pytest.raises(ConfigError, match=r"is not empty · out · fix: add resume or overwrite, or choose a different out"):
        mopefuse.train(config, str(tmp_path / "full"))
    with pytest.raises(CheckpointError, match="run not found"):
        mopefuse.evaluate(str(tmp_path / "none"))


# -- what is trained, saved and loaded


def test_training_changes_only_the_trainable_state() -> None:
    model = build().train()
    state = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.1)
    model(model.collate([np.zeros((8, 8, 3), np.uint8)] * 2, [TEXT, "a"])).logits.square().sum().backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert moved and moved <= set(model.trainable_state_dict())
    other = build()
    other.load_trainable_state_dict(model.trainable_state_dict())
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"head.linear.bias is missing · load_trainable_state_dict"):
        other.load_trainable_state_dict({k: v for k, v in model.trainable_state_dict().items() if k != "head.linear.bias"})


@pytest.mark.parametrize("method", ["conditional", "late-concat", "linear", "mlp", "cross-attention", "qmf"])
def test_a_saved_model_predicts_as_before(method: str, pairs: Path, tmp_path: Path) -> None:
    dataset = mopefuse.PairDataset(pairs, "val")
    model = build(num_labels=None, labels=dataset.labels, method=method)
    nudge(model)
    model.train()
    out = mopefuse.save_adapter(model, tmp_path / "adapter", metrics={"val": {"accuracy": 0.5}})
    assert model.training and out == tmp_path / "adapter"
    again = mopefuse.load_model(str(out), device="cpu")
    assert not again.training and (again.labels, again.task) == (dataset.labels, "single-label")
    rows = list(dataset)
    with torch.no_grad():
        wanted = model.eval()(model.collate(rows)).logits
        torch.testing.assert_close(again(again.collate(rows)).logits, wanted, atol=1e-6, rtol=0)
    predictions = mopefuse.load(out, device="cpu").predict([row["image"] for row in rows], [row["text"] for row in rows])
    for prediction, p_N in zip(predictions, wanted.softmax(dim=-1).tolist(), strict=True):
        assert [prediction["probabilities"][label] for label in dataset.labels] == pytest.approx(p_N, abs=1e-6)
    accuracy = mopefuse.evaluate(out, data=pairs, split="val", device="cpu").metrics["accuracy"]
    right = [one["label"] == dataset.labels[row["label"]] for one, row in zip(predictions, rows, strict=True)]
    assert accuracy == pytest.approx(np.mean(right))


@pytest.mark.process
def test_the_command_line_accepts_a_saved_model(pairs: Path, tmp_path: Path) -> None:
    dataset = mopefuse.PairDataset(pairs, "val")
    model = build(num_labels=None, labels=dataset.labels)
    nudge(model)
    out = mopefuse.save_adapter(model, tmp_path / "adapter")
    assert "every file" in call("export", "verify", out).stdout
    done = call("predict", out, pairs / "val.jsonl", "-o", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)["label"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    with torch.no_grad():
        numbers = model(model.collate(list(dataset))).logits.argmax(dim=-1).tolist()
    assert found == [dataset.labels[number] for number in numbers]
    for command in (("eval", "--data", pairs, "--split", "val"), ("export", "--format", "pt2", "-o", tmp_path / "pt2")):
        done = call(command[0], out, *command[1:])
        assert done.returncode == 0, done.stderr
    card = (out / "README.md").read_text()
    assert "a training loop in Python trained it" in card and "mopefuse train" not in card


def test_a_multi_label_model_is_saved_with_its_thresholds(multi_pairs: Path, tmp_path: Path) -> None:
    dataset = mopefuse.PairDataset(multi_pairs, "val")
    model = build(num_labels=None, labels=dataset.labels, task=dataset.task)
    thresholds = [0.01, *[0.99] * (len(dataset.labels) - 1)]
    out = mopefuse.save_adapter(model, tmp_path / "adapter", thresholds=thresholds)
    assert mopefuse.load_model(out, device="cpu").task == "multi-label"
    predictor = mopefuse.load(out, device="cpu")
    assert predictor.model.thresholds == thresholds
    assert predictor.predict([dataset[0]["image"]], [dataset[0]["text"]])[0]["labels"] == [dataset.labels[0]]
    mopefuse.save_adapter(model, out, thresholds=0.001, overwrite=True)
    assert len(mopefuse.load(out, device="cpu").predict([dataset[0]["image"]], ["a"])[0]["labels"]) == len(dataset.labels)


def test_a_model_that_cannot_be_saved_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    labels = ["a", "b", "c"]
    out = tmp_path / "adapter"
    with pytest.raises(ConfigError, match="the model has no names for its labels · labels"):
        mopefuse.save_adapter(build(), out)
    with pytest.raises(ConfigError, match=r"2 label names \(2 distinct\) were given for 3 logits"):
        mopefuse.save_adapter(build(), out, labels=["a", "b"])
    for thresholds in ([0.5], 0.0, [0.5, 0.5, 1.0]):
        with pytest.raises(ConfigError, match="must be one probability"):
            mopefuse.save_adapter(build(), out, labels=labels, thresholds=thresholds)
    broken = build()
    with torch.no_grad():
        broken.head.linear.bias[0] = float("nan")
    with pytest.raises(NumericError, match=r"the weights head\.linear\.bias are not finite"):
        mopefuse.save_adapter(broken, out, labels=labels)
    for changed in (build().to(torch.bfloat16), build()):
        if changed.head.linear.weight.dtype == torch.float32:
            with torch.no_grad():
                next(changed.encoder("comp").parameters()).add_(1.0)
        with pytest.raises(EncoderError, match="encoder are no longer those of tiny:") as caught:
            mopefuse.save_adapter(changed, out, labels=labels)
        assert "autocast" in caught.value.fix
    assert list(tmp_path.iterdir()) == []
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match=r"is not empty · out · fix: choose a different out$"):
        mopefuse.save_adapter(build(), mine, labels=labels, overwrite=True)
    mopefuse.save_adapter(build(), out, labels=labels)
    with pytest.raises(ConfigError, match=r"choose a different out, or add overwrite$"):
        mopefuse.save_adapter(build(), out, labels=labels)


def test_a_tuned_encoder_is_saved_with_the_model(tmp_path: Path) -> None:
    model = build(comp_tuning={"mode": "full"}, labels=["a", "b", "c"])
    nudge(model)
    again = mopefuse.load_model(mopefuse.save_adapter(model, tmp_path / "adapter"), device="cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_bundle_cannot_be_loaded_as_a_module(exported: Path) -> None:
    with pytest.raises(CheckpointError, match="bundle"):
        mopefuse.load_model(exported)


def test_a_loaded_run_has_its_labels_and_predicts_like_the_predictor(trained: Path) -> None:
    model = mopefuse.load_model(trained, device="cpu")
    image = Image.new("RGB", (20, 20), "red")
    with torch.no_grad():
        p_N = model(model.collate(image, TEXT)).logits.softmax(dim=-1)[0].tolist()
    predicted = mopefuse.load(trained, device="cpu").predict(image, TEXT)[0]["probabilities"]
    assert [predicted[label] for label in model.labels] == pytest.approx(p_N, abs=1e-6)


# -- the page


@pytest.mark.usefixtures("short_starts")
def test_every_code_block_of_the_page_runs(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Run the page like a script, in a folder with data; the loop's model predicts the same when it is loaded again."""
    (tmp_path / "data").symlink_to(pairs)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/python.md", "exec"), space)
    assert space["probabilities"].shape == (2, len(space["dataset"].labels))
    model, loaded, rows = space["model"].cpu().eval(), space["loaded"], list(space["dataset"])
    with torch.no_grad():
        found, wanted = loaded(loaded.collate(rows)).logits, model(model.collate(rows)).logits
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    start = mopefuse.build_fusion("tiny:vision", "tiny:text", labels=model.labels, experts=4)
    assert not torch.equal(start.head.linear.weight, model.head.linear.weight), "the loop has trained the model"
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_the_page_lists_every_public_name() -> None:
    for name in set(mopefuse.__all__) - {"__version__"}:
        assert f"`{name}`" in PAGE, name


def test_arguments_of_another_kind_are_errors_that_name_the_right_one(trained: Path, tmp_path: Path) -> None:
    for call_it, fix in (
        (lambda: mopefuse.train({"main": "tiny:vision"}, tmp_path / "run"), "pass mopefuse.build_config"),  # type: ignore[arg-type]
        (lambda: mopefuse.build_config("recipe.yaml"), 'write {"main"'),  # type: ignore[arg-type]
        (
            lambda: mopefuse.load(trained, device="cpu").predict([Image.new("RGB", (16, 16))]),
            "pass texts too, one for each sample",
        ),
    ):
        with pytest.raises(MopefuseError) as caught:
            call_it()
        assert fix in caught.value.fix
    with pytest.raises(ConfigError, match="data: got 'here'; needs a mapping of its settings"):
        mopefuse.build_config({"main": "tiny:vision", "comp": "tiny:text", "data": "here"})
