"""A modulation of a layer equals the unmodified library model whose attention gets scaled and shifted tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from conftest import matrix
from encoder_cases import Case
from test_encoders import batch_of, prompts_for
from torch import Tensor, nn

from mopefuse.encoders.base import Encoder, Modulation, Prompt, PromptAt

pytest_plugins = ["families"]
PROJECTIONS = {  # modules whose input becomes queries, keys and values
    "hf-bert": r"attention\.self\.(query|key|value)$",
    "hf-clip_text_model": r"self_attn\.(q|k|v)_proj$",
    "hf-swin": r"attention\.(q|k|v)_proj$",
    "hf-dinov2": r"attention\.(q|k|v)_proj$",
    "timm-vit": r"attn\.qkv$",
    "timm-swin-padded": r"attn\.qkv$",
    "open_clip-visual": r"ln_1$",
}


def modulations_for(encoder: Encoder) -> list[Modulation]:
    random = torch.Generator().manual_seed(4)
    return [Modulation(*(torch.randn(3, width, generator=random) for _ in range(2))) for width in encoder.widths]


def at_every_layer(modulations: list[Modulation]) -> PromptAt:
    return lambda layer, tokens_BLD, mask_BL: Prompt(tokens_BLD[:, :0], modulation=modulations[layer])


def modulated(model: nn.Module, pattern: str, modulations: list[Modulation]) -> nn.Module:
    """The library's model with hooks that scale and shift, numbered by layer in module order."""
    found = [(name, module) for name, module in model.named_modules() if re.search(pattern, name)]
    layers = list(dict.fromkeys(re.sub(pattern, "", name) for name, _ in found))
    assert len(layers) == len(modulations)

    def change(modulation: Modulation, x: Tensor) -> Tensor:
        windows = x.shape[0] // 3
        scale, shift = (part.repeat_interleave(windows, 0).reshape(len(x), *[1] * (x.dim() - 2), -1) for part in modulation)
        return x + x * scale + shift

    def of_input(modulation: Modulation) -> Callable[..., Any]:
        return lambda module, args: (change(modulation, args[0]), *args[1:])

    def of_output(modulation: Modulation) -> Callable[..., Any]:
        return lambda module, args, out: change(modulation, out)

    for name, module in found:
        modulation = modulations[layers.index(re.sub(pattern, "", name))]
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(of_output(modulation))
        else:
            module.register_forward_pre_hook(of_input(modulation))
    return model


@pytest.mark.parametrize("family", matrix(tuple(PROJECTIONS), ("hf-bert", "timm-vit", "timm-swin-padded")))
def test_a_modulation_equals_scaled_and_shifted_inputs_of_the_projections(
    family: str, cases: Mapping[str, Case], encoders: Mapping[str, Encoder]
) -> None:
    case, encoder = cases[family], encoders[family]
    inputs, modulations = batch_of(encoder), modulations_for(encoder)
    with torch.no_grad():
        ours = encoder.encode(inputs, at_every_layer(modulations))
        pooled, tokens = case.call(modulated(case.plain(encoder), PROJECTIONS[family], modulations), inputs)
    real = torch.ones(tokens.shape[:2], dtype=torch.bool) if ours.mask_BL is None else ours.mask_BL
    torch.testing.assert_close(ours.pooled_BC, pooled, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(ours.tokens_BLD[real], tokens[real], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("gate", [False, True])
def test_a_modulation_does_not_affect_the_prompt_of_its_layer(gate: bool, encoders: Mapping[str, Encoder]) -> None:
    """With a scale of -1 and no shift, every query is the projection's bias, but the keys of the prompt still differ."""
    encoder = encoders["timm-vit"]
    inputs, prompts = batch_of(encoder), prompts_for(encoder)
    off = [Modulation(torch.full((3, width), -1.0), torch.zeros(3, width)) for width in encoder.widths]
    gates = [torch.ones(heads) if gate else None for heads in encoder.heads]
    with torch.no_grad():
        one = encoder.encode(inputs, lambda i, tokens, mask: Prompt(prompts[i], gates[i], off[i]))
        other = encoder.encode(inputs, lambda i, tokens, mask: Prompt(prompts[i].flip(-1), gates[i], off[i]))
    assert not torch.allclose(one.pooled_BC, other.pooled_BC)


def test_recomputed_activations_keep_the_modulation(encoders: Mapping[str, Encoder]) -> None:
    encoder = encoders["timm-swin-padded"]
    gradients = []
    for encoder.recompute in (False, True):
        modulations = [Modulation(*(part.requires_grad_() for part in one)) for one in modulations_for(encoder)]
        out = encoder.encode(batch_of(encoder), at_every_layer(modulations))
        out.pooled_BC.square().sum().backward()
        gradients.append([part.grad for one in modulations for part in one])
    encoder.recompute = False
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
