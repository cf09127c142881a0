"""What the probe accepts, on a model whose attention gets its inputs in known ways; and what it rejects, and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_utils import AttentionInterface

from mopefuse.encoders._hf_attention import ATTENTION
from mopefuse.encoders.probe import Site, find_sites

B, L, H, G, E = 2, 12, 4, 2, 8
D = 24


class Attention(nn.Module):
    """Attention with every variation that models have, each of which can be enabled."""

    def __init__(self, **habits: Any) -> None:
        super().__init__()
        self.habits = habits
        self.num_key_value_groups = H // G
        self.q, self.k, self.v = nn.Linear(D, H * E), nn.Linear(D, G * E), nn.Linear(D, G * E)
        self.fused, self.pair = nn.Linear(D, (H + 2 * G) * E), nn.Linear(D, 2 * G * E)
        self.key_norm, self.all_norm = nn.LayerNorm(E), nn.RMSNorm(G * E)
        self.out = nn.Linear(H * E, D)
        for norm in (self.key_norm, self.all_norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        form = self.habits.get("form", "separate")
        if form == "triple":
            q, k, v = self.fused(x).split([H * E, G * E, G * E], dim=-1)
        elif form == "by head":
            heads = self.fused(x).unflatten(-1, (G, H // G + 2, E))
            q, k, v = heads[..., :-2, :].flatten(-3), heads[..., -2, :].flatten(-2), heads[..., -1, :].flatten(-2)
        elif form == "pair":
            q, (k, v) = self.q(x), self.pair(x).chunk(2, dim=-1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        k = self.all_norm(k) if self.habits.get("norm") == "all" else k
        q, k, v = (part.unflatten(-1, (-1, E)).transpose(1, 2) for part in (q, k, v))
        return q, self.key_norm(k) if self.habits.get("norm") == "head" else k, v

    def forward(self, x: Tensor) -> Tensor:
        windows = self.habits.get("windows")
        if windows == "of an image":
            x = x.unflatten(1, (3, L // 3)).transpose(1, 2).flatten(0, 1)  # tokens in another order, images apart
        elif windows == "mixed":
            x = x.unflatten(1, (3, L // 3)).transpose(0, 1).flatten(0, 1)  # windows of all images in turn
        q, k, v = self.project(x)
        if self.habits.get("rotary"):
            angle = torch.arange(k.shape[2])[:, None] / torch.arange(1, E // 2 + 1)
            q, k = (
                torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)
                for a, b in (part.chunk(2, dim=-1) for part in (q, k))
            )
        k = k * self.habits.get("times", 1.0)
        v = v.roll(1, dims=2) if self.habits.get("shifted") else v
        attend = AttentionInterface()[ATTENTION]
        out, _ = attend(self, q, k, v, None, is_causal=False, **self.habits.get("more", {}))
        return self.out(out.flatten(2).reshape(B, L, -1))


class Layer(nn.Module):
    def __init__(self, **habits: Any) -> None:
        super().__init__()
        self.before, self.attention, self.habits = nn.LayerNorm(D), Attention(**habits), habits
        self.mix = nn.Conv1d(D, D, 3, padding=1)
        nn.init.uniform_(self.before.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        ahead = self.habits.get("ahead", "norm")
        inner = self.before(x) if ahead == "norm" else self.mix(x.transpose(1, 2)).transpose(1, 2) if ahead == "mix" else x
        for _ in range(self.habits.get("times_attended", 1)):
            x = x + self.attention(inner)
        return x


class Model(nn.Module):
    def __init__(self, layers: int = 2, **habits: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        many = [Layer(**habits) for _ in range(layers)]
        self.layers = nn.ModuleList(many) if layers > 1 else many[0]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers if isinstance(self.layers, nn.ModuleList) else [self.layers]:
            x = layer(x)
        return x


def probe(**habits: Any) -> tuple[list[Site], str, Model]:
    model = Model(**habits).eval()
    tokens = torch.randn(B, L, D, generator=torch.Generator().manual_seed(1))
    return *find_sites(model, lambda: model(tokens)), model


@pytest.mark.parametrize("norm", [None, "head", "all"])
@pytest.mark.parametrize("form", ["separate", "pair", "triple", "by head"])
def test_projections_are_found_however_they_are_implemented(form: str, norm: str | None) -> None:
    sites, fault, model = probe(form=form, norm=norm, rotary=True)
    assert not fault and [site.block for site in sites] == list(model.layers)  # type: ignore[arg-type]
    prompt = torch.randn(B, 3, D)
    for site, layer in zip(sites, model.layers, strict=True):  # type: ignore[arg-type]
        _, key, value = layer.attention.project(layer.before(prompt))  # type: ignore[operator, union-attr]
        assert site.norm is layer.before and (site.width, site.heads) == (D, H)
        found = site.project(layer.before(prompt))  # type: ignore[operator]
        torch.testing.assert_close(found, (key.repeat_interleave(H // G, 1), value.repeat_interleave(H // G, 1)))
        assert (site.query is not None) == (form in ("separate", "pair"))


@pytest.mark.parametrize(("habits", "norm"), [({"ahead": "nothing"}, False), ({}, True), ({"windows": "of an image"}, True)])
def test_the_norm_ahead_of_attention_is_found(habits: dict[str, Any], norm: bool) -> None:
    sites, fault, model = probe(**habits)
    assert not fault
    assert [site.norm for site in sites] == [layer.before if norm else None for layer in model.layers]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("habits", "reason"),
    [
        ({"ahead": "mix"}, "no projection of its tokens, normed or not, gives the values"),
        ({"shifted": True}, "no projection of its tokens, normed or not, gives the values"),
        ({"windows": "mixed"}, "no projection of its tokens, normed or not, gives the values"),
        ({"times": 2.0}, "no projection of its tokens gives the keys"),
        ({"times": 2.0, "rotary": True}, "no projection of its tokens gives the keys"),
        ({"times_attended": 2}, "calls attention more than once"),
        ({"more": {"s_aux": torch.zeros(H)}}, "its attention uses s_aux"),
        ({"layers": 1}, "is not in a list of layers"),
    ],
)
def test_a_layer_that_cannot_be_verified_is_refused_with_the_reason(habits: dict[str, Any], reason: str) -> None:
    sites, fault, _ = probe(**habits)
    assert sites == [] and reason in fault


def test_a_model_that_does_not_call_the_attention_function_is_refused_with_that_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    sites, fault = find_sites(model, lambda: model(torch.zeros(1, 4)))
    assert sites == [] and "none of its layers calls transformers' attention function" in fault


def test_the_probe_leaves_no_hooks_in_the_model() -> None:
    _, _, model = probe()
    assert not any(hasattr(module, "prompt_slot") for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
