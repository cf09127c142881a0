"""LoRA: an adapted encoder equals the library's own model with merged weights, and starts as the unadapted one, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call, matrix, plain_config
from encoder_cases import Case
from families import FAMILIES, QUICK
from oracles import insert_prompts
from test_encoders import batch_of, prompts_for
from test_fusion import TEXTS, build, images, open_gates
from test_tuned import ALL, predict_logits, sides
from torch import Tensor, nn

from mopefuse.config.method_settings import Lora
from mopefuse.config.schema import RunConfig
from mopefuse.core.tensor_files import read_tensors
from mopefuse.data.load import load_data
from mopefuse.encoders.base import Encoder, Inputs, Prompt, create_encoder
from mopefuse.errors import CheckpointError, EncoderError, PackageError
from mopefuse.evaluation.evaluate import evaluate
from mopefuse.evaluation.split import prepare_samples
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import build_model
from mopefuse.fusion.model_facts import unsaved_fingerprints
from mopefuse.runs.folder import RunFolder
from mopefuse.testing import check_encoder
from mopefuse.training.train import train
from mopefuse.training.transfer_weights import transfer_weights

pytest_plugins = ["families"]
RANK, ALPHA = 4, 6.0
CLIP = [name for name in FAMILIES if name.startswith("open_clip") and name != "open_clip-siglip-visual"]
UNCALLED = [name for name in FAMILIES if name.startswith(("timm-beit", "timm-swinv2"))]
UNCALLED += [name for name in FAMILIES if name.startswith("timm-eva02") and name != "timm-eva02-apart"]
HOLDS = [name for name in FAMILIES if name not in (*CLIP, *UNCALLED, "hf-gpt2")]
TINY = ("vision", "text")
ADAPTED = [*HOLDS, *(f"tiny-{name}" for name in TINY)]
QUICK_ADAPTED = [name for name in QUICK if name in HOLDS]
SMALL_BERT = (
    "hf:bert-base?pretrained=false&hidden_size=32&num_hidden_layers=2&num_attention_heads=4&intermediate_size=48"
    "&vocab_size=300"
)
SMALL_VIT = "hf:google/vit-base-patch16-224-in21k?pretrained=false&hidden_size=32&num_hidden_layers=2&num_attention_heads=4"
SMALL_VIT += "&intermediate_size=48&image_size=32&patch_size=16"


def learn(module: nn.Module) -> None:
    """Set every B to random values, so that LoRA has an effect."""
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))


def tiny_case(name: str) -> Case:
    """An unmodified encoder stands in for the library's model: its `_keys_values` reads the merged weights."""

    def run(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        out = model.encode(inputs)
        return out.pooled_BC, out.tokens_BLD

    return Case(f"tiny:{name}", lambda encoder: create_encoder(f"tiny:{name}"), run)


def case_of(family: str, cases: Mapping[str, Case]) -> Case:
    return tiny_case(family.removeprefix("tiny-")) if family.startswith("tiny-") else cases[family]


def merge(encoder: Encoder, plain: nn.Module, names: tuple[str, ...]) -> None:
    """Compute W + (alpha / r) B A in the unmodified model."""
    tensors = dict(encoder.named_parameters())
    with torch.no_grad():
        for name in names:
            a, b = (tensors[f"{name}.lora_{which}.default.weight"] for which in "AB")
            assert (a.shape[0], b.shape[1]) == (RANK, RANK)
            plain.get_submodule(name.removeprefix("backbone.")).weight.add_(ALPHA / RANK * (b @ a))


@pytest.mark.parametrize("family", matrix(ADAPTED, QUICK_ADAPTED))
def test_lora_starts_as_the_encoder_and_equals_merged_weights_after_training(
    family: str, cases: Mapping[str, Case]
) -> None:
    case = case_of(family, cases)
    encoder = create_encoder(case.spec)
    plain, inputs, targets = case.plain(encoder), batch_of(encoder), encoder.lora_targets
    layers = 1 if family == "hf-albert" else len(encoder.widths)  # which share their weights
    assert len(targets) in (layers, 2 * layers)
    with torch.no_grad():
        before = encoder.encode(inputs)
        encoder.adapt(Lora(rank=RANK, alpha=ALPHA))
        fresh = encoder.encode(inputs)
        assert torch.equal(fresh.pooled_BC, before.pooled_BC) and torch.equal(fresh.tokens_BLD, before.tokens_BLD)
        learn(encoder)
        merge(encoder, plain, targets)
        learned, (pooled, tokens) = encoder.encode(inputs), case.call(plain, inputs)
    real = torch.ones(tokens.shape[:2], dtype=torch.bool) if learned.mask_BL is None else learned.mask_BL
    assert (learned.pooled_BC - before.pooled_BC).abs().max() > 1e-3
    torch.testing.assert_close(learned.pooled_BC, pooled, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(learned.tokens_BLD[real], tokens[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", matrix(ADAPTED, QUICK_ADAPTED))
def test_prompts_of_an_adapted_encoder_use_the_merged_weights(
    family: str, cases: Mapping[str, Case]
) -> None:
    """Where a family's code computes keys and values itself, LoRA's contribution could be lost."""
    case = case_of(family, cases)
    encoder = create_encoder(case.spec)
    plain, inputs, targets, prompts = case.plain(encoder), batch_of(encoder), encoder.lora_targets, prompts_for(encoder)
    encoder.adapt(Lora(rank=RANK, alpha=ALPHA))
    learn(encoder)
    merge(encoder, plain, targets)

    def prompt_at(layer: int, tokens: Tensor, mask: Tensor | None) -> Prompt:
        return Prompt(prompts[layer])

    with torch.no_grad():
        ours = encoder.encode(inputs, prompt_at).pooled_BC
        if isinstance(plain, Encoder):
            theirs = plain.encode(inputs, prompt_at).pooled_BC
        else:
            theirs, _ = case.call(insert_prompts(plain, prompts), inputs)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", matrix(ADAPTED, QUICK_ADAPTED))
def test_an_adapted_encoder_satisfies_the_contract(family: str, cases: Mapping[str, Case]) -> None:
    encoder = create_encoder(case_of(family, cases).spec)
    encoder.adapt(Lora())
    learn(encoder)
    check_encoder(encoder)


# -- encoders without LoRA support


def refusal(spec: str, number: int, **lora: Any) -> EncoderError:
    with pytest.raises(EncoderError) as caught:
        create_encoder(spec).adapt(Lora(**lora))
    assert (caught.value.number, bool(caught.value.fix)) == (number, True)
    return caught.value


@pytest.mark.parametrize("family", CLIP)
def test_lora_on_open_clips_fused_attention_is_refused_but_not_on_other_layers(
    family: str, cases: Mapping[str, Case]
) -> None:
    spec = cases[family].spec
    assert "c_fc, c_proj" in refusal(spec, 80).fix
    assert "without calling the layer" in refusal(spec, 82, targets=("out_proj",)).what
    encoder = create_encoder(spec)
    encoder.adapt(Lora(targets=("c_fc", "c_proj")))
    before = encoder.encode(batch_of(encoder)).pooled_BC
    learn(encoder)
    assert not torch.allclose(encoder.encode(batch_of(encoder)).pooled_BC, before)


@pytest.mark.parametrize("family", matrix(UNCALLED, ["timm-beit"]))
def test_layers_whose_weights_are_read_without_a_call_are_refused(family: str, cases: Mapping[str, Case]) -> None:
    refusal(cases[family].spec, 82)


def test_projections_that_are_not_linear_layers_are_refused(cases: Mapping[str, Case]) -> None:
    """GPT-2's are `Conv1D`, whose weights are transposed."""
    refusal(cases["hf-gpt2"].spec, 80)


def test_an_encoder_without_attention_and_an_unknown_layer_are_refused() -> None:
    assert "timm:resnet18" in refusal("timm:resnet18?pretrained=false", 80).what
    assert "qkv" in refusal("tiny:vision", 81, targets=("qvk",)).fix


def test_without_peft_the_error_has_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "peft" else object())
    with pytest.raises(PackageError, match="LoRA needs peft") as caught:
        create_encoder("tiny:text").adapt(Lora())
    assert caught.value.fix == 'pip install "mopefuse[lora]"'


# -- in a fusion model


@pytest.mark.parametrize("method", ALL)
def test_with_an_alpha_of_0_it_is_the_frozen_encoder_bit_for_bit(method: str) -> None:
    adapted = build(method=method, tune="lora", lora={"alpha": 0}, **sides(method))
    learn(adapted)
    frozen = build(method=method, tune="probe", **sides(method))
    without_lora = {n: t for n, t in adapted.trainable_state_dict().items() if ".lora_" not in n}
    frozen.load_trainable_state_dict(without_lora, where="here")
    assert torch.equal(predict_logits(adapted), predict_logits(frozen))
    shown = build(method=method, tune="lora", **sides(method))
    learn(shown)
    shown.load_trainable_state_dict({**shown.trainable_state_dict(), **frozen.trainable_state_dict()}, where="here")
    assert not torch.allclose(predict_logits(shown), predict_logits(frozen))


def test_psi_of_an_adapted_encoder_equals_the_feature_of_comp_only() -> None:
    alone, unimodal = build(comp_tuning={"mode": "lora"}), build(method="comp-only", tune="lora")
    learn(alone)
    mine = {name for name in alone.trainable_state_dict() if name.startswith("comp.")}
    assert mine == {name for name in unimodal.trainable_state_dict() if name.startswith("comp.")}
    batch = alone.collate(images(3), TEXTS[:3])
    with torch.no_grad():
        for name in mine:
            unimodal.get_parameter(name).copy_(alone.get_parameter(name))
        assert torch.equal(alone.psi("comp", batch), unimodal.pooled("comp", batch))


@pytest.mark.parametrize("options", [{"comp_tuning": {"mode": "lora"}}, {"method": "main-only", "tune": "lora"}], ids=str)
def test_a_sample_does_not_depend_on_its_batch(options: dict[str, Any]) -> None:
    model = build(**options)
    open_gates(model)
    learn(model)
    together = predict_logits(model)
    for i, (image, text) in enumerate(zip(images(5), TEXTS, strict=True)):
        torch.testing.assert_close(model(model.collate([image], [text])).logits[0], together[i], atol=1e-5, rtol=1e-5)


def test_a_trained_psi_is_never_read_from_the_cache(pairs: Path) -> None:
    model = build(comp_tuning={"mode": "lora"}).train()
    batch = model.collate(images(2), TEXTS[:2])
    assert model.psi("comp", batch).requires_grad
    assert model.frozen == ()
    assert build().frozen == ("comp",)
    config = model.config.model_copy(update={"data": model.config.data.model_copy(update={"path": str(pairs)})})
    notices: list[str] = []
    prepare_samples(model, load_data(config.data), "val", config, torch.device("cpu"), notice=notices.append)
    assert notices == []
    prepare_samples(build(), load_data(config.data), "val", config, torch.device("cpu"), notice=notices.append)
    assert "encoded once" in notices[0]


def test_in_training_only_loras_dropout_is_active() -> None:
    model = build(comp=SMALL_BERT, method="comp-only", tune="lora", lora={"dropout": 0.5}).train()
    dropouts = {name: m.training for name, m in model.encoder("comp").named_modules() if isinstance(m, nn.Dropout)}
    assert {training for name, training in dropouts.items() if "lora_dropout" in name} == {True}
    assert {training for name, training in dropouts.items() if "lora_dropout" not in name} == {False}
    learn(model)
    assert not torch.equal(predict_logits(model), predict_logits(model))
    assert torch.equal(predict_logits(model.eval()), predict_logits(model))


def test_unused_lora_settings_give_a_notice() -> None:
    changed = {"lora": {"rank": 2}}
    assert "lora" in build(**changed).unused_sections()
    assert "lora" in build(method="late-concat", tune="probe", **changed).unused_sections()
    assert build(comp_tuning={"mode": "lora"}, **changed).unused_sections() == []
    assert build(method="late-concat", tune="lora", **changed).unused_sections() == []


def test_the_fingerprint_covers_the_pretrained_weights_but_not_lora() -> None:
    frozen, adapted = build(), build(comp_tuning={"mode": "lora"})
    learn(adapted)
    assert unsaved_fingerprints(adapted) == unsaved_fingerprints(frozen)
    assert unsaved_fingerprints(build(method="late-concat", tune="lora")) == unsaved_fingerprints(frozen)
    with torch.no_grad():
        adapted.encoder("comp").get_parameter("blocks.0.qkv.base_layer.weight")[0, 0] += 1e-3
    assert unsaved_fingerprints(adapted)["comp"] != unsaved_fingerprints(frozen)["comp"]


@pytest.mark.parametrize(
    ("new", "anew", "carried"),
    [({"comp": "tiny:text-b"}, "comp.", "main."), ({"main": "tiny:vision-b"}, "main.", "comp."), ({}, "", "")],
    ids=["comp", "main", "nothing"],
)
def test_a_swapped_encoder_gets_a_new_lora_and_the_other_keeps_it(new: dict[str, str], anew: str, carried: str) -> None:
    def model(seed: int, **encoders: str) -> Fusion:
        values = {"main": "tiny:vision", "comp": "tiny:text", "method": "late-concat", "tune": "lora", "seed": seed}
        return build_model(plain_config(values | encoders), 2)

    old = model(0)
    learn(old)
    state, transferred = transfer_weights(old, model(1, **new), ["a", "b"], ["a", "b"])
    origins = {entry.name: entry.origin for entry in transferred if ".lora_" in entry.name}
    assert {origin for name, origin in origins.items() if name.startswith(carried)} == {"kept"}
    if anew:
        assert {origin for name, origin in origins.items() if name.startswith(anew)} == {"new"}
        assert all(not state[name].any() for name in origins if name.startswith(anew) and ".lora_B." in name)


# -- in a run


def config(pairs: Path, epochs: int = 2, **changed: Any) -> RunConfig:
    values = {"main": SMALL_VIT, "comp": SMALL_BERT, "device": "cpu", "data": {"path": str(pairs)}, "lora": {"rank": 2}}
    values["train"] = {"epochs": epochs, "batch_size": 6, "schedule": "constant", "lr": 1e-2}
    return plain_config(values | changed)


METHODS: dict[str, dict[str, Any]] = {
    "conditional": {"comp_tuning": {"mode": "lora"}, "prompts": {"experts": 2}},
    "late-concat": {"method": "late-concat", "tune": "lora"},
}


@pytest.fixture(scope="module", params=matrix(METHODS, ["conditional"]))
def run(request: pytest.FixtureRequest, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """(folder, settings) of a small pair of transformers models, tuned by LoRA; tests must not change it."""
    out: Path = tmp_path_factory.mktemp("lora") / request.param
    train(config(pairs, **METHODS[request.param]), out)
    return out, METHODS[request.param]


def weights(folder: Path, which: str = "best") -> dict[str, Tensor]:
    return read_tensors(RunFolder(folder).checkpoint(which)[0] / "weights.safetensors")


def test_only_trained_weights_are_saved_and_no_encoder_weights(run: tuple[Path, dict[str, Any]], pairs: Path) -> None:
    folder, settings = run
    saved = weights(folder)
    model = build_model(config(pairs, **settings), 3)
    assert saved.keys() == model.trainable_state_dict().keys()
    of_encoders = {name for name in saved if name.startswith(("main.", "comp."))}
    assert of_encoders and all(name.endswith((".lora_A.default.weight", ".lora_B.default.weight")) for name in of_encoders)
    assert all(saved[name].any() for name in of_encoders), "LoRA was trained"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(model.named_trainable_parameters())
    assert sum(model.breakdown()[part] for part in model.breakdown() if part.startswith("LoRA")) == sum(
        saved[name].numel() for name in of_encoders
    )


def test_a_resumed_run_is_equal_bit_for_bit(run: tuple[Path, dict[str, Any]], pairs: Path, tmp_path: Path) -> None:
    folder, settings = run
    train(config(pairs, 1, **settings), tmp_path / "run")
    train(config(pairs, 2, **settings), tmp_path / "run", resume=True)
    one, other = weights(folder, "last"), weights(tmp_path / "run", "last")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.matrix
@pytest.mark.parametrize("form", ["pt2", "adapter"])
def test_an_export_predicts_like_the_run(
    run: tuple[Path, dict[str, Any]], form: str, pairs: Path, tmp_path: Path
) -> None:
    """Export compares the graph with the model; this test checks that the model included LoRA, and its metrics."""
    folder, _ = run
    done = call("export", folder, "-o", tmp_path / "out", "--format", form, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert form == "adapter" or result["parity"]["max_difference"] <= 1e-4
    written = (tmp_path / "mine.jsonl", tmp_path / "theirs.jsonl")
    for path, file in zip((folder, tmp_path / "out"), written, strict=True):
        evaluate(path, data=pairs, predictions=file)
    mine, theirs = ([json.loads(line) for line in file.read_text().splitlines()] for file in written)
    for one, other in zip(mine, theirs, strict=True):
        assert other["probabilities"] == pytest.approx(one["probabilities"], abs=1e-4)


def test_lora_weights_are_refused_for_another_encoder(pairs: Path, tmp_path: Path) -> None:
    """LoRA is only valid for the weights that it was trained with."""
    tiny = {"main": "tiny:vision", "comp": "tiny:text", **METHODS["conditional"]}
    train(config(pairs, 1, **tiny), tmp_path / "run")
    with pytest.raises(CheckpointError, match="not those that the run was trained with"):
        evaluate(tmp_path / "run", comp="tiny:text-b")


@pytest.mark.process
def test_trainable_parameters_match_the_definition_for_vit_b_and_bert_base() -> None:
    """A is r x D_in and B is D_out x r: for timm's fused projection 3 D wide, for BERT's query and value D wide each."""
    depth, width, rank, labels = 12, 768, 8, 101
    vit, bert = depth * rank * (width + 3 * width), depth * 2 * rank * (width + width)
    head = labels * 2 * width + labels
    values = {"main": "timm:vit_base?pretrained=false", "comp": "hf:bert-base?pretrained=false"}
    model = build_model(plain_config({**values, "method": "late-concat", "tune": "lora"}), labels)
    assert model.breakdown() == {
        "LoRA of the main encoder": vit,
        "LoRA of the complementary encoder": bert,
        "head": head,
    }
    assert (vit, bert) == (294_912, 294_912)
