"""Methods whose encoders are frozen, prompted, adapted or fully tuned: what is trained, at which rate, and their limits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_fusion import TEXTS, build, images, open_gates

from mopefuse.config.schema import build_config
from mopefuse.core import registry
from mopefuse.errors import EncoderError
from mopefuse.fusion._tuned_encoders import TunedFusion
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import build_model
from mopefuse.runs.folder import RunFolder
from mopefuse.training.optimizer import make_optimizer
from mopefuse.training.plan import resolve_defaults
from mopefuse.training.train import train

ALL = sorted(
    name
    for name in registry.available(registry.FUSION)
    if issubclass(registry.load(registry.FUSION, name), TunedFusion)
)
TUNES = ("probe", "prompt", "lora", "full")


def sides(method: str) -> dict[str, str]:
    """Encoders that suit a method: text as main if it requires that."""
    return {"main": "tiny:text", "comp": "tiny:vision"} if "mmbt" in method else {}


def predict_logits(model: Fusion, count: int = 5) -> torch.Tensor:
    return model(model.collate(images(count), TEXTS[:count])).logits


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("method", ALL)
def test_a_sample_does_not_depend_on_its_batch(method: str, tune: str) -> None:
    model = build(method=method, tune=tune, **sides(method))
    open_gates(model)
    together = predict_logits(model)
    assert together.shape == (5, 7)
    for i, (image, text) in enumerate(zip(images(5), TEXTS, strict=True)):
        alone = model(model.collate([image], [text])).logits[0]
        torch.testing.assert_close(alone, together[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tune", TUNES)
@pytest.mark.parametrize("method", ALL)
def test_exactly_the_trainable_parameters_are_trained(method: str, tune: str) -> None:
    model = build(method=method, tune=tune, dropout=0.0, **sides(method)).train()
    open_gates(model)
    for name, parameter in model.named_trainable_parameters().items():
        if ".lora_B." in name:  # while B is 0, A gets no gradient
            torch.nn.init.normal_(parameter)
    batch = model.collate(images(5), TEXTS)
    torch.nn.functional.cross_entropy(model(batch).logits, torch.arange(5)).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    trained = set(model.named_trainable_parameters())
    unused = {name for name in trained if name.endswith((".word.weight", "position_LD")) and name not in moved}
    assert moved | unused == trained == {name for name, p in model.named_parameters() if p.requires_grad}
    tuned = {name.partition(".")[0] for name in moved} & {"main", "comp"}
    assert tuned == (set(model.uses) if tune in ("full", "lora") else set())
    assert all(".lora_" in name for name in moved if tune == "lora" and name.startswith(("main.", "comp.")))
    assert "other" not in model.breakdown()
    assert all(model.dependency_of(name) for name in model.trainable_state_dict() if not name.startswith("head."))


@pytest.mark.parametrize("method", ALL)
def test_prompts_of_length_0_or_gated_to_0_equal_a_probe_bit_for_bit(method: str) -> None:
    probe = build(method=method, tune="probe", **sides(method))
    none = build(method=method, tune="prompt", static=0, **sides(method))
    gated = build(method=method, tune="prompt", **sides(method))
    state = none.trainable_state_dict()
    assert not len(none.stacks) and set(state) == set(probe.trainable_state_dict())
    probe.load_trainable_state_dict(state, where="here")
    known = gated.trainable_state_dict()
    gated.load_trainable_state_dict(known | {name: tensor for name, tensor in state.items() if name in known}, where="here")
    assert torch.equal(predict_logits(none), predict_logits(probe))
    assert torch.equal(predict_logits(gated), predict_logits(probe))
    open_gates(gated)
    assert not torch.equal(predict_logits(gated), predict_logits(probe))


def test_p_late_concat_without_prompts_equals_late_concat() -> None:
    prompted, plain = build(method="p-late-concat", static=0), build(method="late-concat")
    plain.load_trainable_state_dict(prompted.trainable_state_dict(), where="here")
    assert torch.equal(predict_logits(prompted), predict_logits(plain))
    assert plain.frozen == prompted.frozen == ("main", "comp")


def test_main_only_with_prompts_equals_conditional_with_static_prompts_alone() -> None:
    alone, ours = build(method="main-only", tune="prompt", static=3), build(static=3, dynamic=0, mapped=0)
    open_gates(alone)
    state = {n.replace("stacks.main.", "stack."): t for n, t in alone.trainable_state_dict().items()}
    ours.load_trainable_state_dict(state, where="here")
    torch.testing.assert_close(predict_logits(alone), predict_logits(ours))


@pytest.mark.parametrize(("tune", "lr"), [("full", 3e-5), ("prompt", 4e-4), ("lora", 4e-4)])
def test_tuned_weights_have_their_own_learning_rate(tune: str, lr: float) -> None:
    config = build_config(
        {"main": "tiny:vision", "comp": "tiny:text", "method": "late-concat", "tune": tune, "train": {"lr_tuned": 3e-5}}
    )
    model = build_model(config, 3)
    rates = resolve_defaults(config, model).train
    of = {id(p): group["peak"] for group in make_optimizer(model, rates).param_groups for p in group["params"]}
    found = {name.partition(".")[0]: of[id(p)] for name, p in model.named_trainable_parameters().items()}
    comp = 3e-5 if tune == "full" else 5e-4
    expected = {"head": 4e-4, "main": lr, "comp": comp} if tune != "prompt" else {"head": 4e-4, "stacks": comp}
    assert found == expected
    if tune == "prompt":
        assert of[id(model.stacks["main"].layers["0"].static_SD)] == lr


def test_an_encoder_that_cannot_be_prompted_can_be_probed_and_tuned() -> None:
    resnet = "timm:resnet18?pretrained=false"
    with pytest.raises(EncoderError, match="tune probe, lora or full"):
        build(comp=resnet, method="comp-only", tune="prompt")
    assert build(comp=resnet, method="comp-only", tune="full").encoder("comp").tuned


@pytest.mark.parametrize("tune", ["prompt", "full"])
def test_a_resumed_run_is_equal_bit_for_bit_and_can_be_evaluated(pairs: Path, tmp_path: Path, tune: str) -> None:
    def config(epochs: int) -> Any:
        return build_config(
            {
                "main": "tiny:vision",
                "comp": "tiny:text",
                "method": "late-concat",
                "tune": tune,
                "data": {"path": str(pairs)},
                "train": {"epochs": epochs, "batch_size": 6, "schedule": "constant"},
            }
        )

    from mopefuse.core.tensor_files import read_tensors
    from mopefuse.evaluation.evaluate import evaluate

    result = train(config(2), tmp_path / "whole")
    train(config(1), tmp_path / "parts")
    train(config(2), tmp_path / "parts", resume=True)
    one, other = (
        read_tensors(RunFolder(tmp_path / name).checkpoint("last")[0] / "weights.safetensors") for name in ("whole", "parts")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert evaluate(tmp_path / "whole").metrics == pytest.approx(result["metrics"]["test"])
    assert RunFolder(tmp_path / "whole").config().tune == tune


def test_settings_in_use_are_not_reported_as_unused() -> None:
    for method, unused in (("promptfuse", []), ("p-sequential", []), ("sequential", ["prompts"])):
        assert build(method=method, tune="probe", init=0.2).unused_sections() == unused


def test_tuning_does_not_update_batch_norm_statistics(tmp_path: Path) -> None:
    """In training mode they would mix the samples of a batch, and have different statistics in each process."""
    model = build(method="comp-only", tune="full", comp="timm:resnet18?pretrained=false", main="tiny:vision").train()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    pixels = torch.randn(3, 3, 64, 64)
    encode = lambda x: model.encoder("comp").encode({"pixels": x}).pooled_BC  # noqa: E731
    torch.testing.assert_close(encode(pixels)[:1], encode(pixels[:1]), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))
    assert norms[0].weight.requires_grad
