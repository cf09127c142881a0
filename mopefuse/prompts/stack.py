"""The prompts of every layer of the main encoder: static, dynamic and mapped, conditioned on the other modality.

Jiang et al., arXiv 2312.03734; MoPE, arXiv 2403.10568. The stack knows no encoder: it is told widths and heads, and
answers ``prompt_at(layer, tokens, mask)``. Differences from the papers are settings: `gate: zero` and the norm of psi.
With several complementary modalities each has its own psi: the router adds up what all of them say, and each gives a mapped
prompt of its own. With one it is the papers' model.

Shapes: B batch, N prompted layers, S static, P dynamic, M mapped tokens, K experts, C width of a psi, D width of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config.schema import Prompts as PromptConfig
from mopefuse.config.schema import Router as RouterConfig
from mopefuse.core.precision import apply_in_own_type, exact
from mopefuse.core.threads import PerThread
from mopefuse.encoders.attention import Prompt
from mopefuse.errors import ConfigError
from mopefuse.modalities.base import of
from mopefuse.prompts.experts import Routed, Router, mix

KINDS = ("static", "dynamic", "mapped")


class LayerPrompts(nn.Module):
    """What one layer of width D learns. A part of length 0 has no parameters.

    Args:
        others: names of conditions beyond the first, each with a mapped prompt of its own.
    """

    def __init__(
        self,
        config: PromptConfig,
        *,
        width: int,
        heads: int,
        bound: float,
        dynamic: int,
        top_m: int | None = None,
        others: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.dynamic, self.mapped, self.width, self.top_m = dynamic, config.mapped, width, top_m
        static = config.static or 0
        self.static_SD = nn.Parameter(torch.empty(static, width).uniform_(-bound, bound)) if static else None
        self.experts_KPD = (
            nn.Parameter(torch.empty(config.experts, dynamic, width).uniform_(-bound, bound)) if dynamic else None
        )
        self.mapper = nn.Linear(config.bottleneck, config.mapped * width) if config.mapped else None
        self.mappers = nn.ModuleDict(
            {name: nn.Linear(config.bottleneck, config.mapped * width) for name in others if config.mapped}
        )
        self.gate_H = nn.Parameter(torch.zeros(heads)) if config.gate == "zero" else None

    def forward(
        self, batch: int, weights_BK: Tensor | None, trunks_Bh: Sequence[Tensor] = (), without: str = ""
    ) -> Tensor | None:
        """The layer's prompt, (B, S + P + M, D), or what is left of it `without` one of `KINDS`; None for nothing.

        Args:
            trunks_Bh: of each condition; each gives M tokens.
        """
        parts = []
        if self.static_SD is not None and without != "static":
            parts.append(self.static_SD.expand(batch, -1, -1))
        if self.experts_KPD is not None and without != "dynamic":
            assert weights_BK is not None
            mixed = mix(weights_BK.to(self.experts_KPD.dtype), self.experts_KPD.flatten(1), self.top_m)
            parts.append(mixed.unflatten(1, (self.dynamic, self.width)))
        if self.mapper is not None and without != "mapped":
            for mapper, trunk_Bh in zip((self.mapper, *self.mappers.values()), trunks_Bh, strict=True):
                parts.append(F.gelu(mapper(trunk_Bh)).unflatten(1, (self.mapped, self.width)))
        return torch.cat([part.to(parts[-1].dtype) for part in parts], dim=1) if parts else None


class PromptStack(nn.Module):
    """All prompts of one encoder.

    Args:
        config: lengths must be numbers by now (`with_lengths`).
        widths, heads: of every promptable layer of the encoder.
        conditions: name of each condition to the width C of its psi; none where all prompts are static.
        bound: prompts start in U(-bound, bound).

    Raises:
        ConfigError: `layers` names one that the encoder does not have.
    """

    def __init__(
        self,
        config: PromptConfig,
        router: RouterConfig,
        *,
        widths: Sequence[int],
        heads: Sequence[int],
        conditions: Mapping[str, int],
        bound: float,
    ) -> None:
        super().__init__()
        assert config.static is not None and config.dynamic is not None
        any_prompt = bool(config.static + config.dynamic + config.mapped)
        chosen = select_layers(config.layers, len(widths)) if any_prompt else ()
        starts = set() if config.route_stage_starts else stage_starts(widths)
        self.routed = tuple(i for i in chosen if config.dynamic and i not in starts)
        self.dropout = nn.Dropout(config.dropout)
        self._removed = PerThread()  # one of `KINDS`
        self.names = tuple(conditions)
        self.layers = nn.ModuleDict()
        for i in chosen:
            self.layers[str(i)] = LayerPrompts(
                config,
                width=widths[i],
                heads=heads[i],
                bound=bound,
                dynamic=config.dynamic if i in self.routed else 0,
                top_m=router.top_m,
                others=self.names[1:],
            )
        self.router: Router | None = None
        if self.routed:
            self.router = Router(
                router, conditions=conditions, widths=[widths[i] for i in self.routed], experts=config.experts
            )
        self.trunk: nn.Sequential | None = None
        self.trunks = nn.ModuleDict()
        if config.mapped and chosen:
            self.trunk, *others = (_trunk(config, width) for width in conditions.values())
            self.trunks.update(dict(zip(self.names[1:], others, strict=True)))

    @property
    def blind(self) -> bool:
        """Whether the prompts are the same whatever the condition is."""
        return self.router is None and self.trunk is None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of `KINDS`, the prompts that some layer has."""
        there = (
            any(getattr(layer, name) is not None for layer in self.layers.values())
            for name in ("static_SD", "experts_KPD", "mapper")
        )
        return tuple(kind for kind, has in zip(KINDS, there, strict=True) if has)

    @contextmanager
    def without(self, kind: str) -> Iterator[None]:
        """Leave out the prompts of one kind in this thread, as if they had never been there; what was learned stays."""
        assert kind in self.kinds
        with self._removed.set(kind):
            yield

    def condition(self, psi_BC: Mapping[str, Tensor]) -> Conditioned:
        """The prompts of one batch.

        Args:
            psi_BC: of each condition, without its scale (`scaleless`), so that encoders of any feature scale can be exchanged;
                may be empty where all prompts are static.
        """
        return Conditioned(self, psi_BC)


def scaleless(psi_BC: Tensor) -> Tensor:
    """psi with a mean of 0 and a variance of 1 over its width, in float32; zeros stay zeros."""
    return F.layer_norm(exact(psi_BC), psi_BC.shape[-1:], eps=1e-8)


class Conditioned:
    """The answer to ``prompt_at`` for one batch; `routed` collects the routing of each routed layer on the way."""

    def __init__(self, stack: PromptStack, psi_BC: Mapping[str, Tensor]) -> None:
        self.stack = stack
        self.routed: list[Routed] = []
        each_BC = [] if stack.blind else [psi_BC[name] for name in stack.names]
        self._said_BNX = stack.router.conditioned(each_BC) if stack.router is not None else None
        trunks = () if stack.trunk is None else (stack.trunk, *stack.trunks.values())
        self._trunks_Bh = [apply_in_own_type(trunk, one_BC) for trunk, one_BC in zip(trunks, each_BC, strict=False)]

    def __call__(self, layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt | None:
        """The prompt of a layer; None where it has none."""
        stack, name = self.stack, str(layer)
        if name not in stack.layers:
            return None
        prompts = stack.layers[name]
        assert isinstance(prompts, LayerPrompts)
        weights_BK = None
        if prompts.dynamic:
            assert stack.router is not None and self._said_BNX is not None
            routed = stack.router(self._said_BNX, stack.routed.index(layer), tokens_BLD, mask_BL)
            self.routed.append(routed)
            weights_BK = routed.weights_BK
        prompt_BPD = prompts(tokens_BLD.shape[0], weights_BK, self._trunks_Bh, stack._removed.value or "")
        if prompt_BPD is None:
            return None
        return Prompt(stack.dropout(prompt_BPD).to(tokens_BLD.dtype), prompts.gate_H)

    def routing(self) -> Tensor | None:
        """Noise-free weights (B, N, K) of all routed layers, after the forward pass; None without routing."""
        return torch.stack([routed.clean_BK for routed in self.routed], dim=1) if self.routed else None


def _trunk(config: PromptConfig, width: int) -> nn.Sequential:
    norm = nn.LayerNorm if config.mapper_norm == "layer" else _FrozenBatchNorm
    return nn.Sequential(nn.Linear(width, config.bottleneck), norm(config.bottleneck), nn.GELU())


class _FrozenBatchNorm(nn.BatchNorm1d):
    """The released code keeps its batch norm in evaluation mode: its statistics stay those of a standard normal."""

    def train(self, mode: bool = True) -> _FrozenBatchNorm:
        return super().train(False)


def with_lengths(config: PromptConfig, modality: str) -> PromptConfig:
    """`config` with the papers' prompt lengths where none is given: 6 for an image encoder, 4 for others."""
    length = of(modality).prompt_length
    return config.model_copy(
        update={
            "static": length if config.static is None else config.static,
            "dynamic": length if config.dynamic is None else config.dynamic,
        }
    )


def select_layers(layers: str | Sequence[int], count: int) -> tuple[int, ...]:
    """Indices that ``all``, ``first:N``, ``last:N`` or a list stands for among `count` layers.

    Raises:
        ConfigError: an index or number that the encoder does not have.
    """
    if not isinstance(layers, str):
        chosen = tuple(sorted(set(layers)))
    elif layers == "all":
        chosen = tuple(range(count))
    else:
        end, _, number = layers.partition(":")
        chosen = tuple(range(int(number)) if end == "first" else range(count - int(number), count))
    if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
        raise ConfigError(
            7, f"the main encoder has {count} layers, 0 to {count - 1}; got {layers}", where="prompts.layers", fix="name those"
        )
    return chosen


def stage_starts(widths: Sequence[int]) -> set[int]:
    """First blocks of the stages of an encoder whose width changes; empty for one of a single width."""
    starts = {i for i in range(1, len(widths)) if widths[i] != widths[i - 1]}
    return starts | {0} if starts else set()
