"""Every family of encoders: prompts as keys and values equal inserted tokens; without prompts, the backbone is unmodified."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers
from conftest import matrix
from encoder_cases import MISSING_TIMM, SMALL, TEXTS, TIMM, Case, every_spec, save_tokenizer
from families import FAMILIES, QUICK
from oracles import insert_prompts
from PIL import Image

from mopefuse.encoders.base import Encoder, Inputs, InsertedTokens, Prompt, create_encoder
from mopefuse.errors import EncoderError
from mopefuse.testing import check_encoder

pytest_plugins = ["families"]
BY_HAND = (
    "hf-bert", "hf-clip_text_model", "hf-swin", "timm-vit", "timm-swin-padded", "timm-beit", "timm-dinov3",
    "timm-swinv2",
)  # fmt: skip
EXPORTED = (
    "hf-bert", "hf-albert", "hf-qwen3", "hf-swin", "timm-vit", "timm-swin-padded", "timm-beit", "timm-dinov3", "timm-swinv2",
    "open_clip-text", "open_clip-siglip-text",
)  # fmt: skip
SENTENCES = ["a photo of two cats", "no", "the quick brown fox jumps over the lazy dog and then over the friend"]


def batch_of(encoder: Encoder) -> Inputs:
    if encoder.modality == "text":
        return encoder.preprocess.batch([encoder.preprocess.item(text) for text in SENTENCES])
    random = torch.Generator().manual_seed(2)
    height, width = encoder.preprocess.size  # type: ignore[attr-defined]
    return {"pixels": torch.randn(3, 3, height, width, generator=random)}


def prompts_for(encoder: Encoder, length: int = 5) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randn(3, length, width, generator=random) for width in encoder.widths]


@pytest.mark.parametrize("family", matrix(FAMILIES, QUICK))
@pytest.mark.parametrize("rows", [slice(0, 3), slice(2, 3)], ids=["padded", "alone"])
def test_keys_and_values_equal_inserted_tokens(
    family: str, rows: slice, cases: Mapping[str, Case], encoders: Mapping[str, Encoder]
) -> None:
    """A single text has no padding; libraries then replace the mask by a flag or omit it."""
    case, encoder = cases[family], encoders[family]
    inputs = {name: tensor[rows] for name, tensor in batch_of(encoder).items()}
    prompts = [prompt[rows] for prompt in prompts_for(encoder)]
    with torch.no_grad():
        ours = encoder.encode(inputs, lambda layer, tokens, mask: Prompt(prompts[layer]))
        pooled, tokens = case.call(insert_prompts(case.plain(encoder), prompts), inputs)
    real = torch.ones(tokens.shape[:2], dtype=torch.bool) if ours.mask_BL is None else ours.mask_BL
    torch.testing.assert_close(ours.pooled_BC, pooled, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.tokens_BLD[real], tokens[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", matrix(FAMILIES, QUICK))
@pytest.mark.parametrize("gradient", [False, True])
def test_without_prompts_the_backbone_is_unmodified(
    family: str, gradient: bool, cases: Mapping[str, Case], encoders: Mapping[str, Encoder]
) -> None:
    case, encoder = cases[family], encoders[family]
    inputs = batch_of(encoder)
    plain = case.plain(encoder).requires_grad_(False)
    with torch.set_grad_enabled(gradient):
        ours = encoder.encode(inputs)
        pooled, tokens = case.call(plain, inputs)
    assert torch.equal(ours.pooled_BC, pooled)
    assert torch.equal(ours.tokens_BLD, tokens)


@pytest.mark.parametrize("blind", [0, 2])
@pytest.mark.parametrize("family", ["hf-bert", "timm-vit"])
def test_inserted_tokens_equal_the_librarys_own_blocks_over_all_tokens(
    family: str, blind: int, cases: Mapping[str, Case], encoders: Mapping[str, Encoder]
) -> None:
    """The reference runs the unmodified model's layers one by one, with an explicit mask."""
    encoder, inputs = encoders[family], batch_of(encoders[family])
    tokens = prompts_for(encoder, length=4)[0]
    plain = cases[family].plain(encoder)
    with torch.no_grad():
        ours = encoder.encode(inputs, None, InsertedTokens(tokens, blind))
        if family == "hf-bert":
            x, real = plain.embeddings(inputs["ids"]), torch.cat([torch.ones(3, 4).bool(), inputs["mask"]], dim=1)  # type: ignore[operator]
        else:
            x = plain.norm_pre(plain._pos_embed(plain.patch_embed(inputs["pixels"])))  # type: ignore[operator]
            real = torch.ones(3, 4 + x.shape[1]).bool()
        x = torch.cat([tokens, x], dim=1)
        mask = real[:, None, None, :].repeat(1, 1, x.shape[1], 1)
        mask[:, :, :blind, blind:] = False
        for layer in plain.encoder.layer if family == "hf-bert" else plain.blocks:  # type: ignore[union-attr]
            x = layer(x, mask)
        x = x[:, 4:] if family == "hf-bert" else plain.norm(x)[:, 4:]  # type: ignore[operator]
    torch.testing.assert_close(ours.pooled_BC, x[:, 0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.tokens_BLD[real[:, 4:]], x[real[:, 4:]], atol=2e-5, rtol=1e-4)


@pytest.mark.matrix
def test_the_families_that_support_inserted_tokens_are_as_documented(encoders: Mapping[str, Encoder]) -> None:
    takes = {name for name, encoder in encoders.items() if encoder.supports_inserted_tokens}
    texts = {f"hf-{kind}" for kind in ("bert", "roberta", "xlm-roberta", "distilbert", "electra")}
    images = {f"timm-{name}" for name in ("vit", "vit-qk-norm", "vit-post-norm", "deit-distilled", "dinov2")}
    assert takes == texts | images | {"open_clip-siglip-visual"}
    with pytest.raises(EncoderError, match="does not support inserted tokens") as refused:
        encoders["timm-swin-padded"].encode(batch_of(encoders["timm-swin-padded"]), None, InsertedTokens(torch.zeros(3, 1, 16)))
    assert refused.value.number == 70


@pytest.mark.parametrize("family", matrix(FAMILIES, QUICK))
def test_every_family_satisfies_the_contract(family: str, encoders: Mapping[str, Encoder]) -> None:
    check_encoder(encoders[family])


@pytest.mark.parametrize("family", matrix(FAMILIES, QUICK))
def test_gated_prompts_have_their_own_softmax(family: str, encoders: Mapping[str, Encoder]) -> None:
    """An open gate on a prompt far from every query adds the mean of its values: finite, and different from token insertion."""
    encoder = encoders[family]
    inputs, prompts = batch_of(encoder), prompts_for(encoder)
    half = [torch.full((heads,), 0.5) for heads in encoder.heads]
    with torch.no_grad():
        plain = encoder.encode(inputs).pooled_BC
        gated = encoder.encode(inputs, lambda layer, tokens, mask: Prompt(prompts[layer], half[layer])).pooled_BC
        other = encoder.encode(inputs, lambda layer, tokens, mask: Prompt(prompts[layer], -half[layer])).pooled_BC
    assert not torch.allclose(gated, plain) and not torch.allclose(gated, other)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in BY_HAND])
def test_a_gated_layer_matches_a_computation_by_hand(family: str, encoders: Mapping[str, Encoder]) -> None:
    """The softmax over a single prompt token is 1, so a gate adds tanh(g) * V_p to every head."""
    encoder = encoders[family]
    inputs, prompts = batch_of(encoder), prompts_for(encoder, length=1)
    seen: list[torch.Tensor] = []

    def last_attention(gate: float) -> torch.Tensor:
        seen.clear()
        name = "attn.proj" if family.startswith("timm") else "o_proj" if "swin" in family else "out_proj"
        blocks = [m for n, m in encoder.backbone.named_modules() if n.endswith(f".{name}")]  # type: ignore[union-attr]
        target = blocks[0] if blocks else encoder.backbone.get_submodule("encoder.layer.0.attention.output.dense")  # type: ignore[union-attr, operator]
        handle = target.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        gates = torch.full((encoder.heads[0],), gate)
        with torch.no_grad():
            encoder.encode(inputs, lambda layer, tokens, mask: Prompt(prompts[0], gates) if layer == 0 else None)
        handle.remove()
        return seen[0]

    none, some, more = last_attention(0.0), last_attention(0.3), last_attention(0.9)
    tanh = torch.tanh(torch.tensor([0.3, 0.9]))
    torch.testing.assert_close((some - none) / tanh[0], (more - none) / tanh[1], atol=1e-5, rtol=1e-4)
    added = (more - none).reshape(3, -1, none.shape[-1])
    assert added.abs().max() > 0.1
    torch.testing.assert_close(added, added[:, :1].expand_as(added), atol=1e-5, rtol=1e-4)  # the same for every query


@pytest.mark.parametrize("family", [f"timm-{name}" for name in TIMM if name != "eva02-apart"])  # has a norm in between
def test_ungated_attention_interpolates_between_tokens_alone_and_prompt_alone(
    family: str, encoders: Mapping[str, Encoder]
) -> None:
    """The output of the first attention is, for each query and head, a weighted mean of the outputs for tokens alone and prompt
    alone."""
    encoder = encoders[family]
    inputs, prompts, heads = batch_of(encoder), prompts_for(encoder), encoder.heads[0]
    projection = next(m for n, m in encoder.backbone.named_modules() if n.endswith("attn.proj"))  # type: ignore[union-attr]

    def first(prompt: Prompt | None) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].unflatten(-1, (heads, -1))))
        with torch.no_grad():
            encoder.encode(inputs, lambda layer, tokens, mask: prompt if layer == 0 else None)
        handle.remove()
        return seen[0]

    of_tokens, both = first(None), first(Prompt(prompts[0]))
    of_prompt = first(Prompt(prompts[0], torch.full((heads,), 20.0))) - of_tokens
    share = ((both - of_tokens) * (of_prompt - of_tokens)).sum(-1) / (of_prompt - of_tokens).square().sum(-1)
    assert share.min() > 0 and share.max() < 1
    torch.testing.assert_close(both, torch.lerp(of_tokens, of_prompt, share[..., None]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", matrix(FAMILIES, QUICK))
def test_a_copied_encoder_has_its_own_hooks(family: str, encoders: Mapping[str, Encoder]) -> None:
    original = encoders[family]
    twin = copy.deepcopy(original)
    inputs, prompts = batch_of(twin), prompts_for(twin)
    seen: list[int] = []

    def ask(layer: int, tokens: torch.Tensor, mask: torch.Tensor | None) -> Prompt:
        seen.append(layer)
        return Prompt(prompts[layer])

    with torch.no_grad():
        ours = twin.encode(inputs, ask)
        same = original.encode(inputs, lambda layer, tokens, mask: Prompt(prompts[layer]))
    assert seen == list(range(len(twin.widths)))
    assert torch.equal(ours.pooled_BC, same.pooled_BC)


@pytest.mark.parametrize("family", matrix([name for name in FAMILIES if name in EXPORTED], ["timm-vit", "open_clip-text"]))
def test_a_prompted_encoder_can_be_exported_for_any_batch(family: str, encoders: Mapping[str, Encoder]) -> None:
    encoder = encoders[family]
    inputs, prompts = batch_of(encoder), prompts_for(encoder)

    class Prompted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            named = {"ids": first, "mask": second} if encoder.modality == "text" else {"pixels": first}
            return self.encoder.encode(
                named, lambda layer, tokens, mask: Prompt(prompts[layer][:1].expand(tokens.shape[0], -1, -1))
            ).pooled_BC

    example = (inputs["ids"], inputs["mask"]) if encoder.modality == "text" else (inputs["pixels"], inputs["pixels"])
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(Prompted().eval(), example, strict=False, dynamic_shapes=({0: batch}, {0: batch}))
    five = tuple(torch.cat([tensor, tensor[:2]]) for tensor in example)
    torch.testing.assert_close(exported.module()(*five), Prompted()(*five))


def test_an_interrupted_call_leaves_no_prompt(encoders: Mapping[str, Encoder]) -> None:
    encoder = copy.deepcopy(encoders["timm-vit"])
    prompts = prompts_for(encoder)

    def fail(module: torch.nn.Module, args: object) -> None:
        raise RuntimeError("between the hook and the attention")

    encoder.get_submodule("backbone.blocks.1.attn").register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="between"):
        encoder.encode(batch_of(encoder), lambda layer, tokens, mask: Prompt(prompts[layer]))
    assert encoder._current_call.value is None and not encoder._call.pending


def test_prompts_of_the_wrong_batch_size_are_refused(encoders: Mapping[str, Encoder]) -> None:
    """Otherwise, one prompt for three images would silently be spread over the windows of Swin."""
    encoder = encoders["timm-swin-padded"]
    with pytest.raises(AssertionError, match="expected \\(3, 16\\)"):
        encoder.encode(batch_of(encoder), lambda layer, tokens, mask: Prompt(torch.zeros(1, 2, 16)))


@pytest.mark.parametrize(
    "spec",
    matrix(
        [
            "timm:resnet18?pretrained=false",
            "timm:convnext_atto?pretrained=false",
            f"timm:vit_small_patch16_18x2_224?img_size=32&{SMALL}",
            "timm:swinv2_cr_tiny_224?img_size=64&window_size=2&depths=1,1,1,1&pretrained=false",
            "open_clip:RN50#visual?pretrained=false&force_image_size=64",
        ],
        ["timm:resnet18?pretrained=false"],
    ),
)
def test_an_encoder_that_cannot_be_prompted_gives_its_pooled_feature(spec: str) -> None:
    encoder = check_encoder(spec)
    assert encoder.widths == () and "usable as --comp" in encoder.unpromptable_reason


def test_an_unknown_family_of_transformers_is_complementary_only(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    transformers.AutoModel.from_config(
        transformers.MPNetConfig(**small, vocab_size=64, max_position_embeddings=40)
    ).save_pretrained(tmp_path / "mpnet")
    save_tokenizer(tmp_path / "mpnet")
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    transformers.AutoModel.from_config(transformers.ResNetConfig(**sizes)).save_pretrained(tmp_path / "resnet")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "resnet")
    for kind in ("mpnet", "resnet"):
        encoder = check_encoder(f"hf:{tmp_path / kind}")
        assert encoder.feature_width == 16 and "usable as --comp" in encoder.unpromptable_reason


def test_swin_requests_a_prompt_in_every_block_of_every_stage() -> None:
    encoder = create_encoder("timm:swin_base_patch4_window7_224?pretrained=false&img_size=64&window_size=2")
    assert encoder.widths == (128,) * 2 + (256,) * 2 + (512,) * 18 + (1024,) * 2
    assert encoder.heads == (4,) * 2 + (8,) * 2 + (16,) * 18 + (32,) * 2


def test_the_page_of_encoders_lists_every_family(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "encoders.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\w+: [^|]+) \|", page, re.MULTILINE)
    families = set(every_spec(tmp_path)) | {f"timm: {name}" for name in MISSING_TIMM}
    assert families == {name for name in listed if not name.startswith("audio")}, "scripts/encoders_page.py"
    held = re.findall(r"(\d+) of (\d+) pass", page)
    assert len(held) == len(listed) >= 24 and all(left == right for left, right in held)


def test_a_fingerprint_changes_with_a_weight(encoders: Mapping[str, Encoder]) -> None:
    encoder = copy.deepcopy(encoders["hf-bert"])
    before = encoder.fingerprint()
    with torch.no_grad():
        next(encoder.parameters())[0, 0] += 1.0
    assert encoder.fingerprint() != before == encoders["hf-bert"].fingerprint()


@pytest.mark.parametrize("kind", [kind for kind in TEXTS if kind != "qwen2"])  # transformers rebuilds its tokenizer
def test_texts_use_the_encoders_own_tokenizer_and_padding(kind: str, encoders: Mapping[str, Encoder]) -> None:
    encoder = encoders[f"hf-{kind}"]
    inputs = encoder.preprocess.batch(["no", "the lazy dog"])
    end = 3 if kind == "clip_text_model" else 2
    assert inputs["ids"].tolist()[0][:3] == [1, inputs["ids"][0, 1], end]
    length = 20 if kind == "siglip_text_model" else 5
    assert inputs["mask"].tolist() == [[True] * 3 + [False] * (length - 3), [True] * 5 + [False] * (length - 5)]


def test_siglip_texts_are_padded_to_its_context_length(encoders: Mapping[str, Encoder]) -> None:
    """SigLIP attends to padding and pools the last token; the feature of a text still does not depend on its batch."""
    encoder = encoders["open_clip-siglip-text"]
    inputs = encoder.preprocess.batch(["no", "the lazy dog"])
    assert inputs["ids"].shape == (2, 20)
    assert inputs["mask"].sum(dim=1).tolist() == [3, 5]
    shown = encoder.encode({**inputs, "ids": inputs["ids"].masked_fill(~inputs["mask"], 7)})
    assert not torch.allclose(shown.pooled_BC, encoder.encode(inputs).pooled_BC)


def test_a_timm_tower_accepts_images_of_another_size(cases: Mapping[str, Case]) -> None:
    encoder = create_encoder(f"{cases['open_clip-siglip-visual'].spec}&force_image_size=48")
    assert encoder.encode(batch_of(encoder)).tokens_BLD.shape == (3, 36, 32)


def test_images_are_prepared_as_by_the_library(encoders: Mapping[str, Encoder], tmp_path: Path) -> None:
    encoder = encoders["hf-vit"]
    random = torch.Generator().manual_seed(0)
    image = Image.fromarray(torch.randint(256, (50, 70, 3), generator=random, dtype=torch.uint8).numpy())
    theirs = transformers.ViTImageProcessor(size={"height": 32, "width": 32})(image, return_tensors="pt")["pixel_values"]
    ours = encoder.preprocess.finish(encoder.preprocess.batch([encoder.preprocess.item(image)]))["pixels"]
    assert encoder.preprocess.describe()["interpolation"] == "bilinear"
    torch.testing.assert_close(ours, theirs, atol=0.02, rtol=0)  # a grey level of 255, after division by 0.5
