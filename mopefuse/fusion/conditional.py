"""Conditional prompt tuning: the complementary modality conditions the prompts of the main one at every layer.

Jiang et al., arXiv 2312.03734, revised as MoPE, arXiv 2403.10568. Prompts enter as keys and values, which equals the
papers' inserted tokens (`gate: none`) or adds a gated attention of their own (`gate: zero`, not in the papers). With
`warm_start: linear`, not in the papers either, the head also takes the complementary feature, and begins as the method
`linear`: what validation then selects is never worse there than logistic regression, and the difference is the prompts'.

Of several complementary encoders, which the papers do not have, each gives a condition. What a sample lacks is a learned one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mopefuse.config.schema import Prompts, RunConfig
from mopefuse.core.precision import apply_exactly
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder
from mopefuse.errors import ConfigError
from mopefuse.fusion._static import initial_bound, static_stack
from mopefuse.fusion.base import Fusion, Output
from mopefuse.prompts.stack import PromptStack, scaleless, with_lengths


class ConditionalFusion(Fusion):
    """Complementary encoder, main encoder, prompt stack, head.

    Limits: no static, dynamic or mapped prompt is the method `main-only`, a linear probe of the main encoder; one
    expert is plain conditional prompting; static prompts alone are deep prompt tuning, blind to the other modality.

    Raises:
        ConfigError: the complementary encoder is to be tuned, but nothing looks at it; a warm start with prompts that are
            not gated, or with a deeper head.
        EncoderError: the main encoder has no layer to prompt, or the complementary one has none and is to be prompted,
            or no projection that LoRA holds for and is to be adapted.
    """

    several: ClassVar[bool] = True
    parts: ClassVar[dict[str, str]] = {
        r"^stack\.router\.": "router",
        r"^stack\..*static_SD$": "static prompts",
        r"^stack\..*experts_KPD$": "prompt experts",
        r"^stack\.(trunk|.*mapper)": "mapper",
        r"^stack\..*gate_H$": "gates",
        r"^comp\d*_stack\.": "complementary prompts",
        r"^head_comp\.": "head of the complementary side alone",
        **Fusion.parts,
    }

    sections: ClassVar[tuple[str, ...]] = ("warm_start", "prompts", "router", "comp_tuning")
    bonds: ClassVar[dict[str, str]] = {
        **Fusion.bonds,
        r"^stack\.layers\.": "main",
        r"^stack\.router\.of_main": "main",
        r"^stack\.router\.(weight_NKC|bias_NK|of_comp_NQC)$": "comp features",
        r"^stack\.router\.others\.(\w+)$": r"\1 features",
        r"^stack\.trunk\.0\.": "comp features",
        r"^stack\.trunks\.(\w+)\.0\.": r"\1 features",
        r"^(comp\d*)_stack\.": r"\1",
    }

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        main = self.encoder("main")
        main.require_promptable(fix="use it as --comp instead")
        prompts = self.resolve(config).prompts
        assert prompts.init is not None
        widths = {side: self.encoder(side).feature_width for side in self.comps}
        self.stack = PromptStack(
            prompts, config.router, widths=main.widths, heads=main.heads, conditions=widths, bound=prompts.init
        )
        if config.warm_start == "linear":
            _refuse_cold(config)
            self.begin_as_regression(num_labels)
        else:
            self.head = self.make_head(main.feature_width, num_labels)
        self.head_comp = self.make_head(sum(widths.values()), num_labels) if config.either else None
        blind = self.stack.blind and self.standard is None and self.head_comp is None
        if blind and config.comp_tuning.mode != "frozen":
            raise ConfigError(
                14,
                "nothing looks at the complementary encoder that is to be tuned",
                where="comp_tuning",
                fix="add dynamic or mapped prompts",
            )
        for side in self.comps:
            self._begin_tuning(side, prompts.gate)
        if blind:
            self.reads = ("main",)
        elif config.comp_tuning.mode == "frozen":
            self.frozen = self.comps
        self.learn_absence([side for side in self.does_without if side in self.reads and side != "main"])

    def _begin_tuning(self, side: str, gate: Literal["none", "zero"]) -> None:
        """Let a complementary encoder learn as `comp_tuning` says."""
        encoder, how = self.encoder(side), self.config.comp_tuning
        if how.mode == "prompts":
            encoder.require_promptable(fix="use it as --comp_tuning.mode=frozen instead")
            prompts = Prompts(static=how.length, gate=gate, dropout=self.config.prompts.dropout)
            self.add_module(f"{side}_stack", static_stack(prompts, encoder))
        elif how.mode == "full":
            encoder.tune()
        elif how.mode == "lora":
            encoder.adapt(self.config.lora)

    @property
    def does_without(self) -> tuple[str, ...]:
        """With `either` also the main side, whose samples are answered by a head of the others alone."""
        found = super().does_without
        return found if found or not self.config.either else ("main",)

    @property
    def comps(self) -> tuple[str, ...]:
        """The complementary sides."""
        return self.uses[1:]

    @property
    def head_sides(self) -> tuple[str, ...]:
        """The main encoder alone, which was asked by the others; all after a warm start."""
        return ("main",) if self.standard is None else self.uses

    @property
    def heads(self) -> dict[str, tuple[str, ...]]:
        """With `either` also one of the complementary sides alone."""
        return super().heads | ({} if self.head_comp is None else {"head_comp": self.comps})

    def unused_sections(self) -> list[str]:
        """Also the settings of the regression, where there is none."""
        unused = super().unused_sections()
        return [section for section in unused if section != "linear" or self.standard is None]

    def resolve(self, config: RunConfig) -> RunConfig:
        """`config` with the papers' lengths and initial bound of the prompts where none are given."""
        main = self.encoder("main")
        prompts = with_lengths(config.prompts, main.modality)
        bound = prompts.init or initial_bound(main)
        return config.model_copy(update={"prompts": prompts.model_copy(update={"init": bound})})

    @property
    def prompt_kinds(self) -> tuple[str, ...]:
        """Of static, dynamic and mapped, those that the main encoder has."""
        return self.stack.kinds

    def without(self, kind: str) -> AbstractContextManager[None]:
        """Answer without the static, dynamic or mapped prompts of the main encoder."""
        return self.stack.without(kind)

    def psi(self, side: str, batch: Batch) -> Tensor:
        """What a complementary encoder says of each sample, (B, C)."""
        if side in self.frozen:
            return self.feature(side, batch)
        stack = getattr(self, f"{side}_stack", None)
        return self.encoder(side).encode(batch.inputs[side], stack and stack.condition({})).pooled_BC

    def forward(self, batch: Batch) -> Output:
        """Logits (B, N) and the routing of each routed layer."""
        psi_BC = {side: self.psi(side, batch) for side in self.comps if side in self.reads}
        conditions_BC = {side: self.or_absent(side, scaleless(psi), batch) for side, psi in psi_BC.items()}
        conditioned = self.stack.condition(conditions_BC) if len(self.stack.layers) else None
        pooled_BC = self.encoder("main").encode(batch.inputs["main"], conditioned).pooled_BC
        features = (pooled_BC,) if self.standard is None else (pooled_BC, *psi_BC.values())
        logits_BN = self.classify(*features, batch=batch)
        alone_BN = None
        if self.head_comp is not None:
            alone_BN = apply_exactly(self.head_comp, torch.cat(list(conditions_BC.values()), dim=-1))
            if "main" in batch.missing:
                logits_BN = torch.where(batch.missing["main"][:, None], alone_BN.to(logits_BN.dtype), logits_BN)
        return Output(logits_BN, conditioned.routing() if conditioned else None, alone_BN)


def _refuse_cold(config: RunConfig) -> None:
    """Refuse a warm start of a model that would not begin as the regression."""
    if config.prompts.gate != "zero":
        raise ConfigError(
            101, "ungated prompts change the encoder from the first step", where="prompts.gate", fix="use --gate zero"
        )
    if config.either:
        what = "a regression on all encoders is no answer without the main one"
        raise ConfigError(146, what, where="--either", fix="leave --warm-start or --either out")
    if config.head_hidden:
        raise ConfigError(102, "a regression is no deeper head", where="head_hidden", fix="leave head_hidden at 0")
