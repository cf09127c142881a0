"""Dropping patches of the main encoder in training (`prompts.token_dropout`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pairs, matrix, plain_config
from test_encoders import batch_of, prompts_for
from test_fusion import TEXTS, build, images, open_gates
from torch import Tensor, nn

from mopefuse.core.tensor_files import read_tensors
from mopefuse.encoders.base import Encoder, Prefix, Prompt
from mopefuse.errors import ConfigError
from mopefuse.runs.folder import RunFolder
from mopefuse.training.train import train

pytest_plugins = ["families"]
DROP = {"prompts": {"token_dropout": 0.5}}


def test_a_random_part_of_the_patches_of_each_sample_is_dropped_and_no_leading_token() -> None:
    torch.manual_seed(0)
    tokens_BLD = torch.arange(3 * 12).view(3, 12, 1).float()
    kept = Prefix(2, tokens_BLD).drop_tokens(0.5, leading=2)
    assert (kept.layer, kept.tokens_BLD.shape) == (2, (3, 7, 1))
    assert torch.equal(kept.tokens_BLD[:, :2], tokens_BLD[:, :2])
    index_BL = kept.tokens_BLD[..., 0] - 12 * torch.arange(3)[:, None]
    assert (index_BL.diff(dim=1) > 0).all(), "in order, none twice"
    assert len({tuple(row) for row in index_BL.tolist()}) == 3, "each sample loses others"
    assert Prefix(2, tokens_BLD).drop_tokens(0.999, leading=2).tokens_BLD.shape[1] == 3


CAN = ("timm-vit", "hf-vit", "hf-dinov2", "hf-clip_vision_model")


@pytest.mark.parametrize("family", matrix(CAN, ("timm-vit", "hf-dinov2")))
def test_the_remaining_layers_run_on_any_part_of_the_patches(family: str, encoders: Mapping[str, Encoder]) -> None:
    """The rest of the layers depends neither on the place of a token nor on other samples, and prompts still apply."""
    encoder = encoders[family]
    assert encoder.leading_tokens is not None
    inputs, prompts = batch_of(encoder), prompts_for(encoder)
    prompt_at = lambda i, tokens, mask: Prompt(prompts[i], torch.ones(encoder.heads[i]))  # noqa: E731
    with torch.no_grad():
        prefix = encoder.compute_prefix(inputs, 1)
        whole = encoder.encode(inputs, prompt_at, start=prefix)
        torch.manual_seed(1)
        kept = prefix.drop_tokens(0.5, encoder.leading_tokens)
        some = encoder.encode(inputs, prompt_at, start=kept)
        patches = torch.arange(encoder.leading_tokens, kept.tokens_BLD.shape[1])
        order = torch.cat([torch.arange(encoder.leading_tokens), patches.flip(0)])
        turned = encoder.encode(inputs, prompt_at, start=Prefix(1, kept.tokens_BLD[:, order]))
        first = {name: value[:1] for name, value in inputs.items()}
        alone = encoder.encode(first, first_of(prompt_at), start=Prefix(1, kept.tokens_BLD[:1]))
    assert some.tokens_BLD.shape[1] == kept.tokens_BLD.shape[1] < whole.tokens_BLD.shape[1]
    assert not torch.allclose(some.pooled_BC, whole.pooled_BC, atol=1e-4)
    torch.testing.assert_close(turned.pooled_BC, some.pooled_BC, atol=1e-4, rtol=1e-4)  # no layer depends on the place
    torch.testing.assert_close(alone.pooled_BC, some.pooled_BC[:1], atol=1e-4, rtol=1e-4)


def first_of(prompt_at: Any) -> Any:
    def at(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt:
        prompt = prompt_at(layer, tokens_BLD, mask_BL)
        return prompt._replace(tokens_BPD=prompt.tokens_BPD[:1])

    return at


def logits(model: nn.Module, seed: int) -> Tensor:
    torch.manual_seed(seed)
    with torch.no_grad():
        found: Tensor = model(model.collate(images(5), TEXTS)).logits
    return found


def test_tokens_are_dropped_in_training_only() -> None:
    model, whole = build(**DROP, dropout=0.0), build(dropout=0.0)
    whole.load_state_dict(model.state_dict())
    for one in (model, whole):
        open_gates(one)
    assert torch.equal(logits(model, 0), logits(whole, 0))
    for one in (model, whole):
        one.train()
        one.config = one.config.model_copy(update={"router": one.config.router.model_copy(update={"noise": False})})
    assert not torch.allclose(logits(model, 0), logits(model, 1))


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_run_resumes_bit_for_bit(tmp_path: Path, cache: str) -> None:
    data = make_pairs(tmp_path / "data", counts={"train": 12, "val": 6})

    def settings(epochs: int) -> Any:
        prompts = {"static": 2, "dynamic": 0, "token_dropout": 0.5, "layers": "last:2"}
        values = {"main": "tiny:vision", "comp": "tiny:text", "prompts": prompts, "device": "cpu"}
        return plain_config(
            values
            | {"data": {"path": str(data), "cache_prefix": cache}}
            | {"train": {"epochs": epochs, "batch_size": 6, "schedule": "constant"}}
        )

    train(settings(2), tmp_path / "whole")
    train(settings(1), tmp_path / "parts")
    train(settings(2), tmp_path / "parts", resume=True)
    folders = [RunFolder(tmp_path / name).checkpoint("last")[0] for name in ("whole", "parts")]
    one, other = (read_tensors(folder / "weights.safetensors") for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "options",
    [
        {"main": "tiny:text", "comp": "tiny:vision"},
        {"main": "timm:swin_tiny_patch4_window7_224?pretrained=false"},
        {"train": {"compile": True}},
    ],
    ids=["text", "windows", "compiled"],
)
def test_where_tokens_cannot_be_dropped_it_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refused:
        build(**DROP, **options)
    assert refused.value.number == 147 and "prompts.token_dropout" in refused.value.fix
