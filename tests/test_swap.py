"""Swapping an encoder keeps exactly the tensors whose meaning and shape are unchanged."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, call, make_pairs, matrix, plain_config, ranks, write_rows
from safetensors.torch import load_file
from test_lora import SMALL_BERT

from mopefuse.errors import ConfigError
from mopefuse.fusion.build import build_model
from mopefuse.runs.folder import RunFolder
from mopefuse.training.listener import Listener
from mopefuse.training.swap import swap_encoder
from mopefuse.training.train import train
from mopefuse.training.transfer_weights import transfer_weights

SMALL = "timm:vit_tiny?pretrained=false&img_size=32&patch_size=16&depth=2&embed_dim=48&num_heads=4"
DEEPER = SMALL.replace("depth=2", "depth=3")
WIDER = SMALL.replace("embed_dim=48", "embed_dim=96")


def config_of(**changed: Any) -> Any:
    return plain_config({"main": "tiny:vision", "comp": "tiny:text", "prompts": {"experts": 3}, "device": "cpu"} | changed)


Labels = tuple[list[str], list[str]]


def pair(old: dict[str, Any], new: dict[str, Any], labels: Labels = (["a", "b"], ["a", "b"])) -> Any:
    """(old model, state of the new one, origin by tensor name); values of the old model show where a tensor comes from."""
    one, other = build_model(config_of(**old), len(labels[0])), build_model(config_of(**new, seed=5), len(labels[1]))
    with torch.no_grad():
        for parameter in one.trainable_parameters():
            parameter.normal_()
    state, transferred = transfer_weights(one, other, *labels)
    return one.trainable_state_dict(), state, {entry.name: entry.origin for entry in transferred}


def kept(origins: dict[str, str], prefix: str) -> set[str]:
    return {origin for name, origin in origins.items() if name.startswith(prefix)}


def test_if_nothing_is_swapped_everything_is_kept() -> None:
    old, state, origins = pair({}, {})
    assert set(origins.values()) == {"kept"}
    assert all(torch.equal(state[name], tensor) for name, tensor in old.items())


def test_encoders_in_another_format_keep_everything() -> None:
    wide = {"head_features": "all", "head_hidden": 8}
    _, _, origins = pair(wide, {**wide, "main": "tiny:vision?quantize=int8", "comp": "tiny:text?quantize=nf4"})
    assert set(origins.values()) == {"kept"}
    _, _, origins = pair(wide, {**wide, "comp": "tiny:text-b?quantize=nf4"})
    assert "partial" in origins.values()


@pytest.mark.parametrize("router", ["cross", "joint"])
def test_a_new_complementary_encoder_keeps_prompts_experts_and_head(router: str) -> None:
    old, state, origins = pair({"router": {"kind": router}}, {"comp": "tiny:text?pool=cls", "router": {"kind": router}})
    assert kept(origins, "stack.layers") == kept(origins, "head") == kept(origins, "stack.trunk.1") == {"kept"}
    assert kept(origins, "stack.trunk.0") == {"new"}
    new = {name for name, origin in origins.items() if name.startswith("stack.router") and origin == "new"}
    expected = {"cross": {"stack.router.weight_NKC", "stack.router.bias_NK"}, "joint": {"stack.router.of_comp_NQC"}}
    assert new == expected[router]
    assert all(torch.equal(state[name], old[name]) for name, origin in origins.items() if origin == "kept")
    assert not torch.equal(state["stack.trunk.0.weight"], old["stack.trunk.0.weight"])


def test_a_main_encoder_of_the_same_shape_keeps_everything() -> None:
    _, _, origins = pair({"main": SMALL}, {"main": f"{SMALL}&drop_path_rate=0.0"})
    assert set(origins.values()) == {"kept"}


def test_a_main_encoder_of_other_widths_keeps_tensors_that_do_not_touch_its_layers() -> None:
    _, _, origins = pair({"main": SMALL}, {"main": WIDER})
    assert kept(origins, "stack.layers") == kept(origins, "head.weight") == {"new"}
    assert kept(origins, "stack.router") == kept(origins, "stack.trunk") == {"kept"}


def test_another_depth_gets_a_new_router() -> None:
    _, _, origins = pair({"main": SMALL}, {"main": DEEPER})
    assert kept(origins, "stack.layers") == kept(origins, "stack.router") == {"new"}
    assert kept(origins, "stack.trunk") == {"kept"}


def test_head_rows_of_unchanged_labels_are_kept() -> None:
    old, state, origins = pair({}, {}, (["a", "b", "c"], ["c", "x", "a", "y"]))
    assert (origins["head.weight"], origins["head.bias"]) == ("partial", "partial")
    assert torch.equal(state["head.weight"][[0, 2]], old["head.weight"][[2, 0]])
    assert torch.equal(state["head.bias"][[0, 2]], old["head.bias"][[2, 0]])
    _, _, none = pair({}, {}, (["a", "b"], ["x", "y"]))
    assert kept(none, "head") == {"new"}


def test_head_columns_of_a_new_complementary_encoder_are_new() -> None:
    late: dict[str, Any] = {"method": "late-concat", "main": SMALL}
    old, state, origins = pair(late, {**late, "comp": "tiny:text-b"})
    assert origins["head.weight"] == "partial"
    width = state["head.weight"].shape[1] - 96
    assert torch.equal(state["head.weight"][:, :width], old["head.weight"][:, :width])
    assert not (state["head.weight"][:, width:] == old["head.weight"][:, width:]).any()
    several: dict[str, Any] = {"either": True, "comp": ["tiny:text", "tiny:text-b"]}
    old, state, origins = pair(several, {**several, "comp": ["tiny:text", "tiny:text-b?pool=cls"]})
    assert (origins["head.weight"], origins["head_comp.weight"]) == ("kept", "partial")
    mine, theirs = state["head_comp.weight"], old["head_comp.weight"]
    assert torch.equal(mine[:, :96], theirs[:, :96]) and not (mine[:, 96:] == theirs[:, 96:]).any()


def test_late_concat_keeps_the_head_columns_of_the_other_encoder() -> None:
    late: dict[str, Any] = {"method": "late-concat", "main": SMALL}
    old, state, origins = pair(late, late | {"main": WIDER})
    assert origins["head.weight"] == "partial"
    assert torch.equal(state["head.weight"][:, 96:], old["head.weight"][:, 48:])


# -- a run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("swap") / "data")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = call("train", *TINY, "--data", data, "--out", folder, "--steps", "4")
    assert done.returncode == 0, done.stderr
    return folder


def weights(run: Path, which: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / which / "weights.safetensors")


def best(run: Path) -> dict[str, torch.Tensor]:
    return weights(run, (run / "checkpoints" / "best").read_text().strip())


def test_a_swap_without_tuning_is_a_run_that_can_be_evaluated(run: Path, tmp_path: Path) -> None:
    done = call("swap-encoder", run, "--comp", "tiny:text?pool=cls", "-o", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    assert "not trained" in done.stderr
    assert re.search(r"^stack\.layers\.\*\.experts_KPD +kept +4 ", done.stdout, re.MULTILINE)
    assert re.search(r"^stack\.router\.weight_NKC +new +1 ", done.stdout, re.MULTILINE)
    assert torch.equal(best(tmp_path / "new")["head.weight"], best(run)["head.weight"])
    summary = json.loads((tmp_path / "new" / "swap.json").read_text())
    assert summary["encoders"]["comp"] == "tiny:text?pool=cls"
    assert 0 < summary["share_kept"] < 1
    assert call("eval", tmp_path / "new").returncode == 0


def test_swapping_an_encoder_for_itself_changes_no_prediction(run: Path, tmp_path: Path) -> None:
    done = call("swap-encoder", run, "--comp", "tiny:text", "-o", tmp_path / "new", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["share_kept"] == 1
    assert (tmp_path / "new" / "predictions.jsonl").read_text() == (run / "predictions.jsonl").read_text()


def test_tuning_is_compared_with_training_from_scratch(run: Path, tmp_path: Path) -> None:
    done = call("swap-encoder", run, "--main", SMALL, "-o", tmp_path / "new", "--epochs", 2, "--json")
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert set(stages) == {"before", "after", "tuned", "scratch"}
    assert RunFolder(tmp_path / "new-scratch").exists()
    steps = [line["step"] for line in RunFolder(tmp_path / "new").read_log() if "val" in line]
    assert steps == [0, 3, 6]


@pytest.mark.process
def test_two_processes_swap_tune_and_compare_like_one(run: Path, tmp_path: Path) -> None:
    options = ("--comp", "tiny:text-b", "--epochs", "1", "--json")
    done = ranks(2, "swap-encoder", str(run), "-o", str(tmp_path / "two"), *options)
    assert done.returncode == 0, done.stderr
    alone = call("swap-encoder", run, "-o", tmp_path / "one", *options)
    two, one = json.loads(done.stdout)["stages"], json.loads(alone.stdout)["stages"]
    assert two.keys() == one.keys() == {"before", "after", "tuned", "scratch"}
    for stage in ("tuned", "scratch"):
        assert two[stage]["val"]["loss"] == pytest.approx(one[stage]["val"]["loss"], abs=1e-3)


def test_chosen_settings_are_kept_and_defaults_follow_the_new_encoder(data: Path, tmp_path: Path) -> None:
    for name, chosen in (("chosen", {"lr": 0.02}), ("default", {})):
        settings = {"data": {"path": str(data)}, "train": {"epochs": 0, **chosen}}
        train(config_of(**settings, prompts={"experts": 2, **({"init": 0.3} if chosen else {})}), tmp_path / name)
        swap_encoder(tmp_path / name, tmp_path / f"{name}-text", main="tiny:text", comp="tiny:vision")
    lr = {name: RunFolder(tmp_path / name).config().train.lr for name in ("chosen-text", "default", "default-text")}
    assert lr == {"chosen-text": 0.02, "default": 4e-4, "default-text": 5e-4}
    init = {name: RunFolder(tmp_path / name).config().prompts.init for name in ("chosen-text", "default", "default-text")}
    assert init["chosen-text"] == 0.3 and init["default"] != init["default-text"]


def test_patches_are_dropped_only_if_the_new_main_encoder_has_some(data: Path, tmp_path: Path) -> None:
    """A default run of an image encoder can be swapped for a text encoder; a fraction that was chosen is refused there."""
    for name, fraction in (("default", None), ("chosen", 0.2)):
        settings = {"data": {"path": str(data)}, "train": {"epochs": 0}}
        train(config_of(**settings, prompts={"experts": 2, "token_dropout": fraction}), tmp_path / name)
    assert RunFolder(tmp_path / "default").config().prompts.token_dropout == 0.4
    swap_encoder(tmp_path / "default", tmp_path / "text", main="tiny:text", comp="tiny:vision")
    assert RunFolder(tmp_path / "text").config().prompts.token_dropout == 0.0
    with pytest.raises(ConfigError, match=r"tokens of tiny:text cannot be dropped"):
        swap_encoder(tmp_path / "chosen", tmp_path / "refused", main="tiny:text", comp="tiny:vision")


def test_the_rate_of_the_router_follows_the_new_encoder_unless_it_was_chosen(data: Path, tmp_path: Path) -> None:
    for name, factor in (("default", None), ("chosen", 0.3)):
        settings = {"data": {"path": str(data)}, "train": {"epochs": 0}, "router": {"lr_factor": factor}}
        train(config_of(**settings), tmp_path / name)
        swap_encoder(tmp_path / name, tmp_path / f"{name}-new", comp=SMALL_BERT, scratch=False)
    rate = {name: RunFolder(tmp_path / name).config().router.lr_factor for name in ("default", "default-new", "chosen-new")}
    assert rate == {"default": pytest.approx(0.4 / 96**0.5), "default-new": pytest.approx(0.4 / 32**0.5), "chosen-new": 0.3}


def test_during_warm_up_only_new_tensors_are_trained(run: Path, tmp_path: Path) -> None:
    for epochs in (1, 2):
        swap_encoder(
            run, tmp_path / str(epochs), comp="tiny:text?pool=cls", epochs=epochs, warm_up=1, scratch=False,
            settings={"train": {"select": "last"}},
        )  # fmt: skip
    start, warm, tuned = best(run), weights(tmp_path / "1", "step-3"), weights(tmp_path / "2", "step-6")
    origins = {entry["name"]: entry["origin"] for entry in json.loads((tmp_path / "1" / "swap.json").read_text())["tensors"]}
    for name in start:
        if origins[name] == "kept":
            assert torch.equal(warm[name], start[name]), name
    assert not torch.equal(tuned["head.weight"], start["head.weight"])


def test_a_killed_swapped_run_resumes_to_the_same_result(run: Path, tmp_path: Path) -> None:
    class Killed(Listener):
        def on_step(self, progress: Any, total: int, loss: float, lr: float) -> None:
            if progress.step == 4:
                raise KeyboardInterrupt

    options: dict[str, Any] = {"comp": "tiny:text?pool=cls", "epochs": 2, "warm_up": 1, "scratch": False}
    swap_encoder(run, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        swap_encoder(run, tmp_path / "killed", listener=Killed(), **options)
    train(RunFolder(tmp_path / "killed").config(), tmp_path / "killed", resume=True)
    assert (tmp_path / "killed" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    for name, tensor in weights(tmp_path / "whole", "step-6").items():
        assert torch.equal(tensor, weights(tmp_path / "killed", "step-6")[name])


def test_the_data_can_be_swapped_for_data_with_other_labels(run: Path, data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (other / f"{split}.jsonl").read_text().splitlines()]
        write_rows(other / f"{split}.jsonl", [row | {"label": row["label"].replace("b", "new")} for row in rows])
    done = call("swap-encoder", run, "--data", other, "-o", tmp_path / "new", "--json")
    assert done.returncode == 0, done.stderr
    origins = {entry["name"]: entry["origin"] for entry in json.loads(done.stdout)["tensors"]}
    assert origins["head.weight"] == "partial"
    assert RunFolder(tmp_path / "new").manifest()["labels"] == ["a", "c", "new"]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ((), "MF-CFG-61"),
        (("--comp", "tiny:text", "--warm-up", "1"), "MF-CFG-62"),
        (("--main", "timm:resnet18?pretrained=false"), "MF-ENC-21"),
        (("--comp", "tiny:nothing"), "MF-ENC-51"),
        (("--comp", "tiny:text", "--set", "train.epoch=3"), "MF-CFG-06"),
    ],
)
def test_an_impossible_swap_is_refused_and_leaves_no_files(
    run: Path, tmp_path: Path, options: tuple[str, ...], code: str
) -> None:
    done = call("swap-encoder", run, *options, "-o", tmp_path / "new")
    assert code in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new" / "config.yaml").exists()


class Unplugged(Exception):
    """Raised during training to simulate a power failure."""


def _while_features_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopefuse.training.trainer.prepare_samples", unplug)


def _while_step_0_is_validated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopefuse.training.trainer.model_outputs", unplug)


def _while_step_0_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunFolder, "save", unplug)


def unplug(*_: Any, **__: Any) -> None:
    raise Unplugged


MOMENTS = [_while_features_are_computed, _while_step_0_is_validated, _while_step_0_is_published]
SWAPS: dict[str, dict[str, Any]] = {
    "tuned": {"comp": "tiny:text?pool=cls", "epochs": 2, "warm_up": 1, "scratch": False},
    "as it is": {"comp": "tiny:text-b"},
}


@pytest.mark.parametrize("moment", matrix(MOMENTS, list(MOMENTS)[:1]), ids=lambda moment: moment.__name__.strip("_"))
@pytest.mark.parametrize("how", SWAPS)
def test_a_swap_stopped_before_its_first_checkpoint_resumes_as_a_swap(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: Any, how: str
) -> None:
    swap_encoder(run, tmp_path / "whole", **SWAPS[how])
    with monkeypatch.context() as now:
        moment(now)
        with pytest.raises(Unplugged):
            swap_encoder(run, tmp_path / "stopped", **SWAPS[how])
    assert RunFolder(tmp_path / "stopped").steps() == []
    done = call("train", "--resume", "--out", tmp_path / "stopped", "--set", "train.patience=9")
    assert done.returncode == 0, done.stderr
    assert RunFolder(tmp_path / "stopped").config().train.patience == 9
    for file in ("metrics.jsonl", "predictions.jsonl"):
        assert (tmp_path / "stopped" / file).read_text() == (tmp_path / "whole" / file).read_text()
    for name, tensor in weights(tmp_path / "whole", "step-0").items():
        assert torch.equal(tensor, weights(tmp_path / "stopped", "step-0")[name]), name
    assert not (tmp_path / "stopped" / "start").exists(), "the checkpoint of step 0 replaced it"


def test_a_swap_with_damaged_initial_weights_does_not_start_from_scratch(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as now:
        _while_features_are_computed(now)
        with pytest.raises(Unplugged):
            swap_encoder(run, tmp_path / "new", comp="tiny:text-b")
    start = tmp_path / "new" / "start"
    shutil.copytree(start, tmp_path / "start")
    facts = json.loads((start / "manifest.json").read_text())
    damages: list[Callable[[], object]] = [
        lambda: (start / "weights.safetensors").write_bytes(b"x"),
        lambda: (start / "manifest.json").write_text(json.dumps(facts | {"start": "another"})),
        lambda: shutil.rmtree(start),
    ]
    for damage in damages:
        shutil.copytree(tmp_path / "start", start, dirs_exist_ok=True)
        damage()
        done = call("train", "--resume", "--out", tmp_path / "new")
        assert (done.returncode, "swap-encoder again" in done.stderr) == (6, True), done.stderr
    swap_encoder(run, tmp_path / "new", comp="tiny:text-b")
    assert call("eval", tmp_path / "new").returncode == 0


def test_a_new_run_in_place_of_a_stopped_swap_starts_from_scratch(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as now:
        _while_features_are_computed(now)
        with pytest.raises(Unplugged):
            swap_encoder(run, tmp_path / "new", comp="tiny:text-b")
    for out in ("new", "other"):
        assert call("train", *TINY, "--data", data, "--out", tmp_path / out, "--steps", "2").returncode == 0
    for name, tensor in weights(tmp_path / "other", "step-2").items():
        assert torch.equal(tensor, weights(tmp_path / "new", "step-2")[name]), name
