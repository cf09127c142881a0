"""Several complementary encoders: with one, the model is unchanged; with more, each has an effect, an address, and can be
swapped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import call, plain_config, short_start
from test_fusion import TEXTS, build, images, open_gates
from test_swap import SMALL, config_of, kept, pair

from mopefuse.config.encoder_sides import specs, specs_by_side, with_specs
from mopefuse.core.precision import normalize_feature
from mopefuse.data.load import load_data
from mopefuse.data.perturbed import draw_derangement
from mopefuse.errors import ConfigError
from mopefuse.evaluation.audit import audit_model
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import build_model
from mopefuse.runs.folder import RunFolder

TWO = ["tiny:text", "tiny:text?pool=cls"]
THREE = [*TWO, "tiny:vision"]


def several(comp: list[str] = TWO, **options: object) -> Fusion:
    torch.manual_seed(1)
    model = build(comp=comp, experts=4, **options)  # type: ignore[arg-type]
    open_gates(model)
    return model


# -- names


def test_sides_of_a_configuration() -> None:
    config = plain_config({"main": "a:1", "comp": ["b:2", "c:3"]})
    assert specs(config) == {"main": "a:1", "comp": "b:2", "comp2": "c:3"}
    assert specs(with_specs(config, {"comp2": "d:4"})) == {"main": "a:1", "comp": "b:2", "comp2": "d:4"}
    assert plain_config({"main": "a:1", "comp": ["b:2"]}) == plain_config({"main": "a:1", "comp": "b:2"})
    with pytest.raises(ConfigError, match="comp"):
        plain_config({"main": "a:1", "comp": []})


@pytest.mark.parametrize(
    ("comp", "found"),
    [
        (["2=hf:/a=b/c"], {"comp2": "hf:/a=b/c"}),
        (["text=x:y?k=v"], {"comp": "x:y?k=v"}),
        (["audio=x:y", "1=z:w"], {"comp2": "x:y", "comp": "z:w"}),
        (["comp2=x:y"], {"comp2": "x:y"}),
        ([], {}),
    ],
)
def test_an_address_selects_an_encoder(comp: list[str], found: dict[str, str]) -> None:
    assert specs_by_side(None, comp, {"main": "image", "comp": "text", "comp2": "audio"}) == found


def test_a_modality_of_a_plugin_may_have_a_hyphen() -> None:
    sides = {"main": "image", "comp": "text", "comp2": "point-cloud"}
    assert specs_by_side(None, ["point-cloud=x:y"], sides) == {"comp2": "x:y"}


def test_with_one_encoder_no_address_is_needed() -> None:
    assert specs_by_side("a:b", "c:d?e=f", {"main": "image", "comp": "text"}) == {"main": "a:b", "comp": "c:d?e=f"}


@pytest.mark.parametrize("comp", [["x:y"], ["x:y?a=b"], ["text=x:y"], ["3=x:y"], ["audio=x:y"], ["1=x:y", "1=x:z"]])
def test_an_ambiguous_address_is_refused(comp: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        specs_by_side(None, comp, {"main": "image", "comp": "text", "comp2": "text"})
    assert "1= (text), 2= (text)" in caught.value.fix or caught.value.number == 141


# -- the model


def test_a_list_of_one_encoder_gives_the_same_model() -> None:
    text, listed = build(), build(comp=["tiny:text"])  # type: ignore[arg-type]
    assert text.trainable_state_dict().keys() == listed.trainable_state_dict().keys()
    for name, tensor in text.trainable_state_dict().items():
        assert torch.equal(tensor, listed.trainable_state_dict()[name]), name


@pytest.mark.parametrize("router", ["cross", "joint"])
def test_prompts_of_two_conditions_match_the_definition(router: str) -> None:
    model = several(router={"kind": router})
    batch = model.collate(images(3), TEXTS[:3])
    stack, layer = model.stack, model.stack.layers["1"]
    psi = {side: normalize_feature(model.psi(side, batch)) for side in ("comp", "comp2")}
    conditioned = stack.condition(psi)
    tokens_BLD = torch.randn(3, 5, model.encoder("main").widths[1])
    for i in range(2):
        conditioned(i, tokens_BLD, None)
    got_BPD = conditioned(1, tokens_BLD, None).tokens_BPD
    first = stack.router.of_comp_NQC if router == "joint" else stack.router.weight_NKC
    said_BX = psi["comp"] @ first[1].T + psi["comp2"] @ stack.router.others["comp2"][1].T
    if router == "joint":
        mean_BD = F.layer_norm(tokens_BLD.mean(dim=1), tokens_BLD.shape[-1:])
        said_BX = torch.cat([mean_BD @ stack.router.of_main[1].T, said_BX], dim=-1) @ stack.router.keys_NQK[1]
    else:
        said_BX = said_BX + stack.router.bias_NK[1]
    weights_BK = (said_BX / 0.1).softmax(dim=-1)
    mixed_BPD = torch.einsum("bk,kpd->bpd", weights_BK, layer.experts_KPD)
    mapped_BMD = [
        F.gelu(layer.mapper(stack.trunk(psi["comp"])))[:, None],
        F.gelu(layer.mappers["comp2"](stack.trunks["comp2"](psi["comp2"])))[:, None],
    ]
    expected = torch.cat([layer.static_SD.expand(3, -1, -1), mixed_BPD, *mapped_BMD], dim=1)
    torch.testing.assert_close(got_BPD, expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router": {"kind": "joint"}},
        {"comp_tuning": {"mode": "prompts"}},
        {"warm_start": "linear"},
        {"method": "late-concat"},
        {"method": "comp-only"},
        {"method": "linear"},
        {"method": "linear", "linear": {"features": "average"}},
        {"method": "mlp"},
        {"method": "cross-attention"},
        {"method": "qmf"},
        {"method": "flamingo"},
        {"method": "map"},
    ],
    ids=str,
)
def test_samples_are_independent_and_every_encoder_has_an_effect(options: dict[str, Any]) -> None:
    model = several(THREE, **options)
    with torch.no_grad():
        for name, parameter in model.named_trainable_parameters().items():
            if name.startswith("head"):
                parameter.normal_()
    whole = model.collate(images(3), TEXTS[:3])
    logits = model(whole).logits
    for index in range(3):
        one = model.collate(images(3)[index : index + 1], TEXTS[index : index + 1])
        torch.testing.assert_close(model(one).logits[0], logits[index], atol=2e-5, rtol=1e-4)
    other = model.collate(images(4)[1:], ["red", "the digit", "left"])
    for side in model.uses[-3:]:
        changed = replace(whole, inputs={**whole.inputs, side: other.inputs[side]})
        assert not torch.allclose(model(changed).logits, logits), side


@pytest.mark.parametrize("mode", ["frozen", "prompts", "lora", "full"])
def test_every_trainable_parameter_is_trained(mode: str) -> None:
    model = several(comp_tuning={"mode": mode}, dropout=0.0)
    model(model.collate(images(3), TEXTS[:3])).logits.square().sum().backward()
    trained = model.named_trainable_parameters()
    still = [name for name, parameter in trained.items() if parameter.grad is None or not parameter.grad.any()]
    # Half of LoRA starts at 0 and hides the other half; words that do not occur, and a class token that pooling ignores.
    assert [name for name in still if "lora_A" not in name and not name.startswith(("comp.", "comp2."))] == []
    assert any(name.startswith("comp2") for name in model.named_trainable_parameters()) == (mode != "frozen")


@pytest.mark.parametrize("method", ["mmbt", "pmf", "p-late-concat", "sequential", "promptfuse", "p-sequential"])
def test_a_method_of_two_modalities_refuses_a_third(method: str) -> None:
    if method == "p-late-concat":
        assert len(several(method=method).uses) == 3
        return
    with pytest.raises(ConfigError) as caught:
        several(method=method)
    assert caught.value.number == 142 and "3 " not in caught.value.what and method in caught.value.what


def test_main_only_needs_no_complementary_encoder() -> None:
    assert several(method="main-only").uses == ("main",)


# -- swapping one


def test_replacing_the_second_encoder_keeps_the_tensors_of_the_first() -> None:
    origins = pair({"comp": TWO}, {"comp": [TWO[0], "tiny:vision"]})[2]
    assert kept(origins, "stack.router.weight") == kept(origins, "stack.trunk.") == kept(origins, "stack.layers") == {"kept"}
    assert kept(origins, "stack.router.others.comp2") == kept(origins, "stack.trunks.comp2.0") == {"new"}
    assert kept(origins, "head") == {"kept"}
    origins = pair({"comp": TWO}, {"comp": ["tiny:vision", TWO[1]]})[2]
    assert kept(origins, "stack.router.weight") == {"new"} and kept(origins, "stack.router.others.comp2") == {"kept"}


def test_late_concat_keeps_the_columns_of_the_other_encoders() -> None:
    before, after = ({"comp": comp, "method": "late-concat"} for comp in (TWO, ["tiny:vision", TWO[1]]))
    old, state, _ = pair(before, after)
    model = build_model(config_of(comp=TWO, method="late-concat"), 2)
    main, comp, comp2 = (model.encoder(side).feature_width for side in model.uses)
    assert torch.equal(state["head.weight"][:, -comp2:], old["head.weight"][:, -comp2:])
    assert torch.equal(state["head.weight"][:, :main], old["head.weight"][:, :main])
    assert not torch.equal(state["head.weight"][:, main : main + comp], old["head.weight"][:, main : main + comp])


# -- the commands


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "run"
    command = ("train", "--main", "tiny:vision", "--comp", TWO[0], "--comp", TWO[1], "--experts", 3, "--data", pairs)
    with short_start():
        done = call(*command, "--out", folder, "--set", "train.max_steps=3", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    return folder


def test_train_records_every_encoder(run: Path) -> None:
    facts = json.loads((run / "manifest.json").read_text())["encoders"]
    assert [facts[side]["spec"] for side in ("main", "comp", "comp2")] == ["tiny:vision", *TWO]
    parts = json.loads((run / "metrics.json").read_text())["parameters"]["by_part"]
    assert "other" not in parts and parts["mapper"] > 0


def test_eval_and_predict_match_the_results_of_training(run: Path, pairs: Path) -> None:
    done = call("eval", run, "--json")
    assert json.loads(done.stdout)["metrics"] == json.loads((run / "metrics.json").read_text())["metrics"]["test"]
    done = call("eval", run, "--json", "--comp", f"2={TWO[1]}")
    assert done.returncode == 0, done.stderr
    done = call("eval", run, "--json", "--comp", "tiny:text")
    assert json.loads(done.stdout)["error"]["code"] == "MF-CFG-140"


def test_swap_encoder_selects_an_encoder_by_number(run: Path, tmp_path: Path) -> None:
    done = call("swap-encoder", run, "--comp", "2=tiny:text", "-o", tmp_path / "new", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["encoders"] == {"main": "tiny:vision", "comp": TWO[0], "comp2": "tiny:text"}
    done = call("swap-encoder", run, "--comp", "text=tiny:text", "-o", tmp_path / "other", "--json")
    assert json.loads(done.stdout)["error"]["code"] == "MF-CFG-140"


@pytest.mark.matrix
def test_a_run_with_several_encoders_can_be_exported_and_reported(run: Path, tmp_path: Path) -> None:
    done = call("export", run, "--format", "onnx", "-o", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "bundle" / "preprocess.json").read_text())["sides"].keys() == {"main", "comp", "comp2"}
    assert call("export", run, "--format", "adapter", "-o", tmp_path / "adapter").returncode == 0
    done = call("report", run)
    assert done.returncode == 0, done.stderr
    page = (run / "report.html").read_text()
    assert page.count("complementary encoder") == 2


def test_resuming_with_another_number_of_encoders_is_refused(run: Path, pairs: Path) -> None:
    done = call("train", "--resume", "--out", run, "--comp", TWO[0], "--json")
    assert json.loads(done.stdout.splitlines()[-1])["error"]["code"] == "MF-CFG-32"


def test_an_audit_shuffles_each_modality_separately(pairs: Path) -> None:
    config = config_of(comp=[TWO[0], "tiny:vision", TWO[1]], data={"path": str(pairs)})
    data, cpu = load_data(config.data), torch.device("cpu")
    model = build_model(config, len(data.labels))
    open_gates(model)
    found = audit_model(model, data, "test", config, cpu)
    assert found.modalities == ("text", "image") and found.same.keys() == {"text", "image"}
    names = [(one.name, one.modality) for one in found.conditions]
    assert names[:5] == [("as is", ""), *((name, m) for m in ("text", "image") for name in ("shuffled", "blank"))]
    rows, partner = data.splits["test"].rows, draw_derangement(len(data.splits["test"].rows), 0).tolist()
    shown = [data.read(data.splits["test"], row, "image", config.data) for row in rows]
    batch = model.collate(shown, [rows[other].values["text"] for other in partner])
    shuffled_SN = found.condition("shuffled", "text").logits_SN
    torch.testing.assert_close(shuffled_SN, model(batch).logits.detach(), atol=2e-5, rtol=1e-4)
    assert found.verdict.count("the image") == 1 and found.verdict.count("the text") == 1


def test_with_another_main_encoder_and_more_others_the_head_is_new() -> None:
    before, after = ({"comp": comp, "method": "late-concat"} for comp in (TWO[:1], ["tiny:vision", "tiny:vision-b"]))
    _, _, origins = pair(before, {**after, "main": SMALL})
    assert kept(origins, "head") == {"new"}


@pytest.mark.parametrize("method", ["conditional", "late-concat"])
def test_one_more_encoder_than_before_is_new(method: str) -> None:
    before, after = ({"comp": comp, "method": method} for comp in (TWO, [*TWO, "tiny:vision"]))
    old, state, origins = pair(before, after)
    assert torch.equal(state["head.weight"][:, : old["head.weight"].shape[1]], old["head.weight"])
    if method == "conditional":
        assert kept(origins, "stack.router.others.comp3") == {"new"} and kept(origins, "stack.router.others.comp2") == {"kept"}


def test_a_run_records_the_modalities_of_its_rows(run: Path) -> None:
    assert RunFolder(run).config().data.modalities == ("text", "image")
