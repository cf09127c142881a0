"""The trained weights of a run of the method `conditional`, arranged for all layers at once.

Prompts of all layers of many runs are then a few matrix products (`mopefuse.serving.engine.mixed_prompts`). Runs with equal
`PromptShape` are computed together; numbers of experts, lengths of prompts, labels and hidden units may differ.

Shapes: N prompted layers, S static, P dynamic, M mapped tokens, K experts, C width of a psi, h bottleneck, D width of a layer,
H heads, F features of the head, Y hidden units, L labels, W width and Q queries of the token reader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mopefuse.fusion.base import Fusion
from mopefuse.fusion.conditional import ConditionalFusion
from mopefuse.fusion.token_reader import TokenReader
from mopefuse.fusion.wide_head import WideHead
from mopefuse.prompts.experts import Router
from mopefuse.prompts.stack import LayerPrompts, PromptStack


@dataclass(frozen=True)
class PromptShape:
    """What the prompts of two runs must have in common to be computed together."""

    layers: tuple[int, ...]
    conditions: tuple[str, ...]
    bottleneck: int
    layer_norm: bool
    top_m: int | None
    parts: tuple[bool, ...]  # whether there are static, routed and mapped tokens, FiLM, and gates


@dataclass(frozen=True)
class HeadShape:
    """What the heads of two runs must have in common to be computed together."""

    sides: tuple[str, ...]
    norm: str
    hidden: bool
    reader: tuple[int, ...]  # width, queries and heads of attention; empty without one
    queries: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Trunk:
    """The first part of the mapper for one condition: ``GELU(norm(x @ weight + bias))``."""

    weight_Ch: Tensor
    bias_h: Tensor
    norm_weight_h: Tensor
    norm_bias_h: Tensor


@dataclass(frozen=True, eq=False)
class Linear:
    """``x @ weight + bias`` with several axes of outputs O."""

    weight_IO: Tensor
    bias_O: Tensor


@dataclass(frozen=True, eq=False)
class PromptWeights:
    """Prompts and FiLM of all layers.

    Attributes:
        static_NSD: also holds a single expert, which needs no routing.
        router: by condition (C, N, K); the first has the bias. experts_NKPD: None without routing.
        mappers, films: by condition, with outputs (N, M, D) and (N, 2 D).
        temperature: of the router, without axes.
        weighs_one: whether there is a single expert, whose weight is reported as 1.
    """

    shape: PromptShape
    static_NSD: Tensor | None
    router: tuple[Linear, ...]
    experts_NKPD: Tensor | None
    temperature: Tensor | None
    trunks: tuple[Trunk, ...]
    mappers: tuple[Linear, ...]
    films: tuple[Linear, ...]
    gate_NH: Tensor | None
    weighs_one: bool


@dataclass(frozen=True, eq=False)
class HeadWeights:
    """What becomes logits of pooled features and output tokens.

    Attributes:
        standard: by side, mean and deviation (C,) of its feature; empty without standardisation.
        linear: (F, L). hidden, output: (F, Y) and (Y, L), None without hidden units.
        reader: tensors of the `TokenReader` by name, transposed weights; empty without one.
    """

    shape: HeadShape
    standard: Mapping[str, tuple[Tensor, Tensor]]
    linear: Linear
    hidden: Linear | None
    output: Linear | None
    reader: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class AdapterWeights:
    """All that differs between runs with the same frozen encoders.

    Attributes:
        prompts: None if the main encoder is not prompted. absent: by side, what replaces a missing condition (C,).
        precision: fp32 or bf16, see `mopefuse.core.device.precision`.
    """

    prompts: PromptWeights | None
    head: HeadWeights
    absent: Mapping[str, Tensor]
    precision: str

    @property
    def joint_softmax(self) -> bool:
        """Whether prompts and tokens share one softmax, which has to hold for all rows of a forward pass."""
        shape = None if self.prompts is None else self.prompts.shape
        return shape is not None and any(shape.parts[:3]) and not shape.parts[4]


def can_share(model: Fusion) -> bool:
    """Whether the rows of a model can be predicted together with those of others with the same encoders.

    Not: methods other than `conditional`, tuned encoders, samples without the main modality, token-level conditions, the joint
    router, mixtures of FiLM, noise in evaluation, and main encoders whose layers differ in width (Swin).
    """
    if type(model) is not ConditionalFusion or any(encoder.trainable for encoder in model.encoders.values()):
        return False
    config, main = model.config, model.encoder("main")
    unusual = (
        config.either,
        config.comp_tuning.mode != "frozen",
        len(model.stack.resamplers) > 0,
        model.stack.router is not None and model.stack.router.joint,
        config.prompts.film and config.prompts.film_mixture > 1,
        config.router.noise and config.router.noise_in_eval,
        len({*main.widths}) > 1 or len({*main.heads}) > 1,
        not isinstance(model.head, nn.Linear | WideHead),
    )
    return not any(unusual)


@torch.no_grad()
def take_weights(model: ConditionalFusion, precision: str) -> AdapterWeights:
    """The weights of a model for which `can_share` holds."""
    absent = {side: parameter.detach() for side, parameter in model.absent.items()}
    return AdapterWeights(_prompt_weights(model.stack, model), _head_weights(model), absent, precision)


def _prompt_weights(stack: PromptStack, model: ConditionalFusion) -> PromptWeights | None:
    layers = [layer for layer in stack.layers.values() if isinstance(layer, LayerPrompts)]
    if not layers:
        return None
    width, experts = layers[0].width, model.config.prompts.experts
    dynamic = _stacked([layer.experts_KPD for layer in layers])
    is_routed = dynamic is not None and experts > 1
    fixed = [_stacked([layer.static_SD for layer in layers]), None if dynamic is None or is_routed else dynamic[:, 0]]
    static = [part for part in fixed if part is not None]
    mappers = [[layer.mapper, *layer.mappers.values()] for layer in layers]
    films = [[film.output for film in (layer.film, *layer.films.values())] for layer in layers if layer.film is not None]
    trunks = [trunk for trunk in (stack.trunk, *stack.trunks.values()) if isinstance(trunk, nn.Sequential)]
    gates = _stacked([layer.gate_H for layer in layers])
    has_mapper = layers[0].mapper is not None
    parts = (bool(static), is_routed, has_mapper, bool(films), gates is not None)
    norm = trunks[0][1] if trunks else None
    shape = PromptShape(
        layers=tuple(map(int, stack.layers)),
        conditions=stack.names if trunks or is_routed else (),
        bottleneck=model.config.prompts.bottleneck if trunks else 0,
        layer_norm=isinstance(norm, nn.LayerNorm),
        top_m=model.config.router.top_m if is_routed else None,
        parts=parts,
    )
    return PromptWeights(
        shape=shape,
        static_NSD=torch.cat(static, dim=1) if static else None,
        router=_router(stack.router) if is_routed and stack.router is not None else (),
        experts_NKPD=dynamic if is_routed else None,
        temperature=None if dynamic is None else torch.full((), model.config.router.temperature, device=dynamic.device),
        trunks=tuple(map(_trunk, trunks)),
        mappers=tuple(_of_layers(list(one), (-1, width)) for one in zip(*mappers, strict=True)) if has_mapper else (),
        films=tuple(_of_layers(list(one), (-1,)) for one in zip(*films, strict=True)),
        gate_NH=gates,
        weighs_one=dynamic is not None and not is_routed,
    )


def _stacked(tensors: list[nn.Parameter | None]) -> Tensor | None:
    found = [tensor.detach() for tensor in tensors if tensor is not None]
    return torch.stack(found) if found else None


def _router(router: Router) -> tuple[Linear, ...]:
    weights_NKC: tuple[Tensor, ...] = (router.weight_NKC, *router.others.values())
    bias_NK = router.bias_NK.detach()
    return tuple(Linear(weight.detach().permute(2, 0, 1).contiguous(), bias_NK) for weight in weights_NKC)


def _trunk(trunk: nn.Sequential) -> Trunk:
    linear, norm = trunk[0], trunk[1]
    assert isinstance(linear, nn.Linear)
    assert isinstance(norm, nn.LayerNorm | nn.BatchNorm1d)
    weight_h, bias_h = (part.detach() for part in (norm.weight, norm.bias))
    if isinstance(norm, nn.BatchNorm1d):  # its statistics never change
        assert norm.running_mean is not None and norm.running_var is not None
        weight_h = weight_h / (norm.running_var + norm.eps).sqrt()
        bias_h = bias_h - norm.running_mean * weight_h
    return Trunk(linear.weight.detach().T.contiguous(), linear.bias.detach(), weight_h, bias_h)


def _of_layers(linears: list[Any], outputs: tuple[int, ...]) -> Linear:
    """The linear maps of all layers from one input as one, with outputs (N, O)."""
    weight_hNO = torch.stack([linear.weight.detach().T for linear in linears], dim=1)
    bias_NO = torch.stack([linear.bias.detach() for linear in linears])
    return Linear(weight_hNO.unflatten(2, outputs).contiguous(), bias_NO.unflatten(1, outputs))


def _head_weights(model: ConditionalFusion) -> HeadWeights:
    head, reader = model.head, model.reader
    wide = isinstance(head, WideHead)
    standard = {} if model.standard is None else {side: getattr(model.standard, side) for side in model.standard}
    shape = HeadShape(
        sides=model.head_sides,
        norm="standard" if standard else model.config.head_norm,
        hidden=wide,
        reader=() if reader is None else (*reader.offset_QW.shape[::-1], reader.heads),
        queries=() if reader is None else tuple(reader.query),
    )
    return HeadWeights(
        shape=shape,
        standard={side: (one.mean_C, one.deviation_C) for side, one in standard.items()},
        linear=_linear(head.linear if wide else head),
        hidden=_linear(head.hidden) if wide else None,
        output=_linear(head.output) if wide else None,
        reader={} if reader is None else _reader(reader),
    )


def _linear(module: Any) -> Linear:
    return Linear(module.weight.detach().T.contiguous(), module.bias.detach())


def _reader(reader: TokenReader) -> dict[str, Tensor]:
    state = {name: tensor.detach() for name, tensor in reader.state_dict().items()}
    matrices = {name for name, tensor in state.items() if tensor.dim() == 2 and name != "offset_QW"}
    return {name: tensor.T.contiguous() if name in matrices else tensor for name, tensor in state.items()}
