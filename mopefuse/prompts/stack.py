"""Conditions for every layer of the main encoder: static, dynamic and mapped prompts, and FiLM.

Jiang et al., arXiv 2312.03734; MoPE, arXiv 2403.10568. The stack is independent of any encoder: it takes layer widths and
head counts, and provides the callback ``prompt_at(layer, tokens, mask)``. `gate: zero` and the normalisation of psi, the
conditioning feature, differ from the papers; both are settings. Several complementary modalities, which the papers do not
cover, each have their own psi: the router sums their scores, and each contributes its own mapped prompt, scale and shift.

FiLM (`mopefuse.prompts.film`) scales and shifts what the attention of a layer reads. It shares the trunk of the mapped prompt.

With `condition: tokens`, also beyond the papers, the mapped prompt is computed from the output tokens of each complementary
encoder (`mopefuse.prompts.resampler`) in place of its psi; router and FiLM still read psi.

Shapes: B batch, N prompted layers, S static, P dynamic, M mapped tokens, K experts, C width of a psi, D width of a layer,
H heads, h width of the mapper's bottleneck, R tokens of a condition, 1 for psi.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config.schema import Prompts as PromptConfig
from mopefuse.config.schema import Router as RouterConfig
from mopefuse.core.error_codes import ConfigCode
from mopefuse.core.precision import apply_in_own_type
from mopefuse.core.threads import PerThread
from mopefuse.encoders.attention import Modulation, Prompt
from mopefuse.errors import ConfigError
from mopefuse.modalities.base import get_modality
from mopefuse.prompts.experts import Routed, Router, mix
from mopefuse.prompts.film import Film
from mopefuse.prompts.resampler import ConditionTokens, Resampler, make_trunk

KINDS = ("static", "dynamic", "mapped", "film")


class LayerPrompts(nn.Module):
    """Learned prompts and FiLM of one layer of width D. A prompt of length 0 has no parameters.

    Args:
        bound: prompts are initialised from U(-bound, bound).
        dynamic: P, 0 for a layer without routing.
        top_m: experts that are mixed per sample; None mixes all.
        others: names of conditions beyond the first, each of which has its own mapped prompt and FiLM.
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
        self.film = Film(config, width) if config.film else None
        self.films = nn.ModuleDict({name: Film(config, width) for name in others if config.film})
        has_tokens = bool(static or dynamic or config.mapped)
        self.gate_H = nn.Parameter(torch.zeros(heads)) if config.gate == "zero" and has_tokens else None

    def modulation(self, trunks_Bh: Sequence[Tensor]) -> Modulation | None:
        """Scale and shift of the layer, (B, D) each, summed over the conditions; None without FiLM."""
        if self.film is None:
            return None
        outputs = [film(trunk_Bh) for film, trunk_Bh in zip((self.film, *self.films.values()), trunks_Bh, strict=True)]
        scale_BD, shift_BD = torch.stack(outputs).sum(dim=0).chunk(2, dim=-1)
        return Modulation(scale_BD, shift_BD)

    def forward(
        self, batch: int, weights_BK: Tensor | None, conditions_BRh: Sequence[Tensor] = (), without: str = ""
    ) -> Tensor | None:
        """Build the layer's prompt, (B, S + P + R * M, D) with the mapped tokens last; None if it is empty.

        Args:
            batch: B.
            weights_BK: expert weights, for a layer with dynamic prompts.
            conditions_BRh: what each condition's mapper reads; each of the R is mapped to M tokens.
            without: one of `KINDS` to leave out; empty for none.
        """
        parts = []
        if self.static_SD is not None and without != "static":
            parts.append(self.static_SD.expand(batch, -1, -1))
        if self.experts_KPD is not None and without != "dynamic":
            assert weights_BK is not None
            mixed = mix(weights_BK.to(self.experts_KPD.dtype), self.experts_KPD.flatten(1), self.top_m)
            parts.append(mixed.unflatten(1, (self.dynamic, self.width)))
        if self.mapper is not None and without != "mapped":
            for mapper, condition_BRh in zip((self.mapper, *self.mappers.values()), conditions_BRh, strict=True):
                mapped = F.gelu(mapper(condition_BRh)).unflatten(2, (self.mapped, self.width))
                parts.append(mapped.flatten(1, 2))
        return torch.cat([part.to(parts[-1].dtype) for part in parts], dim=1) if parts else None

    def prompt_mask(self, mask_BR: Tensor | None, length: int) -> Tensor | None:
        """The mask of a prompt of `length` tokens, whose last are mapped from conditions with the mask `mask_BR`."""
        if mask_BR is None:
            return None
        mask_BM = mask_BR.repeat_interleave(self.mapped, dim=1) if self.mapped > 1 else mask_BR
        return F.pad(mask_BM, (length - mask_BM.shape[1], 0), value=True)


class PromptStack(nn.Module):
    """All prompts and FiLM layers of one encoder.

    Args:
        config: with prompt lengths filled in (`fill_prompt_lengths`).
        widths, heads: of every promptable layer of the encoder.
        conditions: width C of each psi by the name of its condition; empty if all prompts are static.
        bound: prompts are initialised from U(-bound, bound).
        tokens: width of the tokens of each condition, if the mapped prompts are computed from these; empty for psi.

    Raises:
        ConfigError: `prompts.layers` names a layer that the encoder does not have.
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
        tokens: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        assert config.static is not None and config.dynamic is not None
        any_prompt = bool(config.static + config.dynamic + config.mapped + config.film)
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
        self.resamplers = nn.ModuleDict()  # by the name of each condition, if its tokens are mapped
        if tokens and config.mapped and chosen:
            self.resamplers.update({name: Resampler(config, tokens[name]) for name in self.names})
        if ((config.mapped and not tokens) or config.film) and chosen:
            self.trunk, *others = (make_trunk(config, width) for width in conditions.values())
            self.trunks.update(dict(zip(self.names[1:], others, strict=True)))

    @property
    def conditional(self) -> bool:
        """Whether the prompts depend on the conditions."""
        return self.reads_psi or len(self.resamplers) > 0

    @property
    def reads_psi(self) -> bool:
        """Whether anything depends on the psi of the conditions: router, FiLM, or mapped prompts without `tokens`."""
        return self.router is not None or self.trunk is not None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The `KINDS` of prompts that at least one layer has."""
        present = (
            any(getattr(layer, name) is not None for layer in self.layers.values())
            for name in ("static_SD", "experts_KPD", "mapper", "film")
        )
        return tuple(kind for kind, has_any in zip(KINDS, present, strict=True) if has_any)

    @contextmanager
    def without_prompts(self, kind: str) -> Iterator[None]:
        """Disable the prompts of one kind in the current thread within the context; parameters are unchanged."""
        assert kind in self.kinds
        with self._removed.set(kind):
            yield

    def add_missing_tokens(self, names: Sequence[str]) -> None:
        """Add a trainable token to the resampler of each of `names`, for samples that lack its modality."""
        for name in names if len(self.resamplers) else ():
            resampler = self.resamplers[name]
            assert isinstance(resampler, Resampler)
            resampler.add_missing_token()

    def condition(
        self, psi_BC: Mapping[str, Tensor], tokens: Mapping[str, ConditionTokens] | None = None
    ) -> ConditionedPrompts:
        """Condition the prompts on one batch.

        Args:
            psi_BC: normalised psi (`mopefuse.core.precision.normalize_feature`) of each condition, so that encoders of any
                feature scale can be exchanged; may be empty if all prompts are static.
            tokens: of each condition, if the stack was built with `tokens`.
        """
        return ConditionedPrompts(self, psi_BC, tokens or {})


class ConditionedPrompts:
    """The ``prompt_at`` callback for one batch; `routed` collects the routing of each routed layer during the forward pass."""

    def __init__(
        self, stack: PromptStack, psi_BC: Mapping[str, Tensor], tokens: Mapping[str, ConditionTokens]
    ) -> None:
        self.stack = stack
        self.routed: list[Routed] = []
        each_BC = [psi_BC[name] for name in stack.names] if stack.reads_psi else []
        self._scores_BNX = stack.router.score_conditions(each_BC) if stack.router is not None else None
        trunks = () if stack.trunk is None else (stack.trunk, *stack.trunks.values())
        self._trunks_Bh = [apply_in_own_type(trunk, one_BC) for trunk, one_BC in zip(trunks, each_BC, strict=False)]
        self._mapped_BRh, self._mask_BR = self._mapped_conditions(tokens)

    def _mapped_conditions(self, tokens: Mapping[str, ConditionTokens]) -> tuple[list[Tensor], Tensor | None]:
        """What the mappers read of each condition, and the mask of all of it side by side; None without padding."""
        resamplers = self.stack.resamplers
        if not len(resamplers):
            return [trunk_Bh[:, None] for trunk_Bh in self._trunks_Bh], None
        found = [resampler(tokens[name]) for name, resampler in resamplers.items()]
        if all(mask_BR is None for _, mask_BR in found):
            return [one_BRh for one_BRh, _ in found], None
        masks = [one.new_ones(one.shape[:2], dtype=torch.bool) if mask is None else mask for one, mask in found]
        return [one_BRh for one_BRh, _ in found], torch.cat(masks, dim=1)

    def __call__(self, layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt | None:
        """Build the condition of a layer; None if it has none."""
        stack, name = self.stack, str(layer)
        if name not in stack.layers:
            return None
        prompts = stack.layers[name]
        assert isinstance(prompts, LayerPrompts)
        weights_BK = None
        if prompts.dynamic:
            assert stack.router is not None and self._scores_BNX is not None
            routed = stack.router(self._scores_BNX, stack.routed.index(layer), tokens_BLD, mask_BL)
            self.routed.append(routed)
            weights_BK = routed.weights_BK
        removed = str(stack._removed.value or "")
        prompt_BPD = prompts(tokens_BLD.shape[0], weights_BK, self._mapped_BRh, removed)
        modulation = None if removed == "film" else prompts.modulation(self._trunks_Bh)
        if prompt_BPD is None:
            return None if modulation is None else Prompt(tokens_BLD[:, :0], modulation=modulation)
        mask_BP = None if removed == "mapped" else prompts.prompt_mask(self._mask_BR, prompt_BPD.shape[1])
        return Prompt(stack.dropout(prompt_BPD).to(tokens_BLD.dtype), prompts.gate_H, modulation, mask_BP)

    def routing(self) -> Tensor | None:
        """Noise-free weights (B, N, K) of all routed layers, available after the forward pass; None without routing."""
        return torch.stack([routed.clean_BK for routed in self.routed], dim=1) if self.routed else None


def fill_prompt_lengths(config: PromptConfig, modality: str) -> PromptConfig:
    """Return `config` with unset prompt lengths replaced by the papers': 6 for an image encoder, 4 for others."""
    length = get_modality(modality).prompt_length
    return config.model_copy(
        update={
            "static": length if config.static is None else config.static,
            "dynamic": length if config.dynamic is None else config.dynamic,
        }
    )


def select_layers(layers: str | Sequence[int], count: int, owner: str = "the main encoder") -> tuple[int, ...]:
    """Resolve ``all``, ``first:N``, ``last:N``, ``last:1/N`` or a list to sorted indices among the `count` layers of `owner`.

    A fraction is rounded up.

    Raises:
        ConfigError: an index or N that exceeds the number of layers.
    """
    if not isinstance(layers, str):
        chosen = tuple(sorted(set(layers)))
    elif layers == "all":
        chosen = tuple(range(count))
    else:
        end, _, number = layers.partition(":")
        length = -(-count // int(number[2:])) if number.startswith("1/") else int(number)
        chosen = tuple(range(length) if end == "first" else range(count - length, count))
    if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
        raise ConfigError(
            ConfigCode.LAYER_OUT_OF_RANGE,
            f"{owner} has {count} layers, 0 to {count - 1}; got {layers}",
            where="prompts.layers",
            fix=f"use layers from 0 to {count - 1}, or all",
        )
    return chosen


def stage_starts(widths: Sequence[int]) -> set[int]:
    """First layer of each stage of an encoder whose width changes between stages; empty if all layers have one width."""
    starts = {i for i in range(1, len(widths)) if widths[i] != widths[i - 1]}
    return starts | {0} if starts else set()
