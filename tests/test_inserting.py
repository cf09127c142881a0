"""Methods that insert the other modality among the main encoder's tokens: what each equals in its limits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import call
from test_fusion import TEXTS, build, images
from test_tuned import predict_logits, sides

from mopefuse.encoders.base import InsertedTokens, Prompt, create_encoder
from mopefuse.errors import EncoderError
from mopefuse.evaluation.evaluate import evaluate

INSERTING = ("sequential", "mmbt", "p-mmbt", "promptfuse", "blindprompt")


@pytest.mark.parametrize("method", [*INSERTING, "p-sequential"])
def test_the_logits_depend_on_the_other_modality_only_through_the_projection(method: str) -> None:
    model = build(method=method, gate="none", **sides(method))
    text_is_main = model.encoder("main").modality == "text"
    one = model.collate(images(2), TEXTS[:2])
    other = model.collate(images(4)[2:], TEXTS[:2]) if text_is_main else model.collate(images(2), TEXTS[2:4])
    assert not torch.equal(model(one).logits, model(other).logits)
    with torch.no_grad():
        model.project.weight.zero_()
    assert torch.equal(model(one).logits, model(other).logits)


@pytest.mark.parametrize("method", ["promptfuse", "blindprompt"])
def test_promptfuse_without_learned_tokens_is_sequential_with_frozen_encoders(method: str) -> None:
    fuse, sequential = build(method=method, inserted={"prompts": 0}), build(method="sequential", tune="probe")
    sequential.load_trainable_state_dict(fuse.trainable_state_dict(), where="here")
    assert torch.equal(predict_logits(fuse), predict_logits(sequential))


def test_blindprompt_is_promptfuse_with_a_mask() -> None:
    fuse, blind = build(method="promptfuse"), build(method="blindprompt")
    blind.load_trainable_state_dict(fuse.trainable_state_dict(), where="here")
    assert not torch.equal(predict_logits(fuse), predict_logits(blind))
    batch = fuse.collate(images(3), TEXTS[:3])
    inserted = fuse.build_insert(batch)
    assert (inserted.blind, blind.build_insert(batch).blind) == (0, 20)
    assert inserted.tokens_BPD.shape == (3, 21, 96)


def test_blind_tokens_equal_deep_prompts_that_are_independent_of_the_input() -> None:
    """The values of blind tokens at a layer, given as prompts there, have the same effect: they act only through keys and
    values."""
    encoder = create_encoder("tiny:vision")
    random = torch.Generator().manual_seed(0)
    inputs, tokens = {"pixels": torch.randn(3, 3, 16, 16, generator=random)}, torch.randn(1, 5, 96, generator=random) * 0.3
    states: list[torch.Tensor] = []
    with torch.no_grad():
        ahead = InsertedTokens(tokens.expand(3, -1, -1), blind=5)
        blind = encoder.encode(inputs, lambda layer, x, mask: states.append(x[:, :5]), ahead)  # type: ignore[func-returns-value]
        as_prompts = encoder.encode(inputs, lambda layer, x, mask: Prompt(states[layer]))
    torch.testing.assert_close(blind.pooled_BC, as_prompts.pooled_BC, atol=1e-5, rtol=1e-4)


def test_mmbt_with_one_token_of_a_mean_pooled_image_is_sequential() -> None:
    encoders = {"main": "tiny:text", "comp": "tiny:vision?pool=mean"}
    one, sequential = build(method="mmbt", inserted={"images": 1}, **encoders), build(method="sequential", **encoders)
    sequential.load_trainable_state_dict(one.trainable_state_dict(), where="here")
    torch.testing.assert_close(predict_logits(one), predict_logits(sequential), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "places", "width"),
    [
        ("timm:resnet18?pretrained=false", 7 * 7, 512),
        ("timm:mobilenetv3_small_050?pretrained=false", 7 * 7, 288),
    ],
)
def test_mmbt_reads_the_feature_map_of_a_cnn_as_in_its_paper(spec: str, places: int, width: int) -> None:
    """The second CNN has a pooled feature of another width (1024) than its feature map."""
    model = build(method="mmbt", main="tiny:text", comp=spec, inserted={"images": places})
    batch = model.collate(images(3), TEXTS[:3])
    with torch.no_grad():
        encoder = model.encoder("comp")
        map_BCHW = encoder.backbone.forward_features(encoder.preprocess.finish(batch.inputs["comp"])["pixels"])
        height, width_ = map_BCHW.shape[2:]
        by_hand = [model.project_features(map_BCHW[:, :, y, x]) for y in range(height) for x in range(width_)]
        found = model.build_insert(batch).tokens_BPD
    assert (map_BCHW.shape[1], len(by_hand)) == (width, places)
    torch.testing.assert_close(found, torch.stack(by_hand, dim=1), atol=1e-5, rtol=1e-5)


def test_p_mmbt_without_prompts_is_mmbt_with_frozen_encoders() -> None:
    encoders = sides("mmbt")
    prompted, frozen = build(method="p-mmbt", static=0, **encoders), build(method="mmbt", tune="probe", **encoders)
    frozen.load_trainable_state_dict(prompted.trainable_state_dict(), where="here")
    assert torch.equal(predict_logits(prompted), predict_logits(frozen))


def test_p_sequential_with_closed_gates_is_main_only_and_ungated_it_is_a_prompt_of_the_first_layer() -> None:
    probe = build(method="main-only")
    closed = build(method="p-sequential")
    head = {name: t for name, t in closed.trainable_state_dict().items() if name.startswith("head.")}
    probe.load_trainable_state_dict(head, where="here")
    assert torch.equal(predict_logits(closed), predict_logits(probe))
    model = build(method="p-sequential", static=0, gate="none")
    batch = model.collate(images(3), TEXTS[:3])
    psi = torch.nn.functional.layer_norm(model.pooled_feature("comp", batch), (96,), eps=1e-8)
    token = (psi @ model.project.weight.T + model.project.bias)[:, None]
    encoder = model.encoder("main")
    by_hand = encoder.encode(batch.inputs["main"], lambda layer, x, mask: Prompt(token) if layer == 0 else None).pooled_BC
    torch.testing.assert_close(model(batch).logits, model.classify(by_hand))


def test_unsuitable_encoders_are_refused() -> None:
    for options, number in (
        ({"method": "sequential", "main": "timm:swin_tiny?pretrained=false&img_size=32&window_size=1"}, 70),
        ({"method": "p-mmbt", "main": "tiny:text", "comp": "tiny:text-b"}, 71),
        ({"method": "mmbt", "main": "tiny:text", "comp": "open_clip:RN50#visual?pretrained=false"}, 72),
    ):
        with pytest.raises(EncoderError) as refused:
            build(**options)
        assert refused.value.number == number


@pytest.mark.parametrize("method", ["mmbt", "p-mmbt"])
def test_in_mmbt_the_text_reads_the_image_whichever_is_main(method: str) -> None:
    text_main = build(method=method, main="tiny:text", comp="tiny:vision")
    image_main = build(method=method, main="tiny:vision", comp="tiny:text")
    other = {"main": "comp", "comp": "main"}
    exchanged = {
        ".".join(other.get(part, part) for part in name.split(".")): tensor
        for name, tensor in text_main.trainable_state_dict().items()
    }
    image_main.load_trainable_state_dict(exchanged, where="here")
    assert torch.equal(predict_logits(text_main), predict_logits(image_main))
    assert [model.dependency_of("project.weight") for model in (text_main, image_main)] == ["comp features", "main features"]


@pytest.mark.matrix
@pytest.mark.parametrize("method", ["p-mmbt"])
def test_a_run_can_be_evaluated_and_exported(pairs: Path, tmp_path: Path, method: str) -> None:
    named = sides(method) or {"main": "tiny:vision", "comp": "tiny:text"}
    flags = [word for side, spec in named.items() for word in (f"--{side}", spec)]
    run = tmp_path / "run"
    done = call("train", *flags, "--method", method, "--data", pairs, "--steps", "2", "--batch", "4", "--out", run)
    assert done.returncode == 0, done.stderr
    assert evaluate(run).metrics["accuracy"] >= 0
    exported = call("export", run, "-o", tmp_path / "bundle")
    assert exported.returncode == 0, exported.stderr
