"""Conditional prompt tuning: the complementary modality conditions the prompts of the main one at every layer.

Jiang et al., arXiv 2312.03734, revised as MoPE, arXiv 2403.10568. Prompts enter as keys and values, which equals the
papers' inserted tokens (`gate: none`) or adds a gated attention of their own (`gate: zero`, not in the papers).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor

from mopefuse.config import Prompts, Router, RunConfig
from mopefuse.data._base import Batch
from mopefuse.encoders._base import Encoder
from mopefuse.errors import ConfigError
from mopefuse.fusion._base import Fusion, Output
from mopefuse.prompts.stack import PromptStack, with_lengths


class ConditionalFusion(Fusion):
    """Complementary encoder, main encoder, prompt stack, head.

    Limits: no static, dynamic or mapped prompt is the method `main-only`, a linear probe of the main encoder; one
    expert is plain conditional prompting; static prompts alone are deep prompt tuning, blind to the other modality.

    Raises:
        ConfigError: the complementary encoder is to be tuned, but no prompt looks at it.
        EncoderError: the main encoder has no layer to prompt, or the complementary one has none and is to be prompted.
    """

    parts: ClassVar[dict[str, str]] = {
        r"^stack\.router\.": "router",
        r"^stack\..*static_SD$": "static prompts",
        r"^stack\..*experts_KPD$": "prompt experts",
        r"^stack\.(trunk|.*mapper)\.": "mapper",
        r"^stack\..*gate_H$": "gates",
        r"^comp_stack\.": "complementary prompts",
        **Fusion.parts,
    }

    sections: ClassVar[tuple[str, ...]] = ("prompts", "router", "comp_tuning")
    bonds: ClassVar[dict[str, str]] = {
        r"^stack\.layers\.": "main",
        r"^stack\.router\.of_main": "main",
        r"^stack\.router\.(weight_NKC|bias_NK|of_comp_NQC)$": "comp features",
        r"^stack\.trunk\.0\.": "comp features",
        r"^comp_stack\.": "comp",
    }

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        main, comp = self.encoder("main"), self.encoder("comp")
        main.require_promptable(fix="use it as --comp instead")
        prompts = self.resolve(config).prompts
        assert prompts.init is not None
        self.stack = PromptStack(
            prompts,
            config.router,
            widths=main.widths,
            heads=main.heads,
            condition_width=comp.feature_width,
            bound=prompts.init,
        )
        self.head = self.make_head(main.feature_width, num_labels)
        self.comp_stack: PromptStack | None = None
        if self.stack.blind and config.comp_tuning.mode != "frozen":
            raise ConfigError(
                14,
                "nothing looks at the complementary encoder that is to be tuned",
                where="comp_tuning",
                fix="add dynamic or mapped prompts",
            )
        if config.comp_tuning.mode == "prompts":
            comp.require_promptable(fix="use it as --comp_tuning.mode=frozen instead")
            static = Prompts(
                static=config.comp_tuning.length,
                dynamic=0,
                mapped=0,
                gate=config.prompts.gate,
                dropout=config.prompts.dropout,
            )
            self.comp_stack = PromptStack(
                static,
                Router(),
                widths=comp.widths,
                heads=comp.heads,
                condition_width=comp.feature_width,
                bound=initial_bound(comp),
            )
        elif config.comp_tuning.mode == "full":
            comp.tune()
        elif self.stack.blind:
            self.reads = ("main",)
        else:
            self.frozen = ("comp",)

    @property
    def head_sides(self) -> tuple[str, ...]:
        """The main encoder alone; it was asked by the other one."""
        return ("main",)

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

    def psi(self, batch: Batch) -> Tensor:
        """The complementary representation, (B, C); zeros where no prompt looks at it."""
        if "comp" not in self.reads:
            first = next(iter(batch.inputs["main"].values()))
            return torch.zeros(first.shape[0], self.encoder("comp").feature_width, device=first.device)
        if "comp" in self.frozen:
            return self.feature("comp", batch)
        if self.comp_stack is None:
            return self.encoder("comp").encode(batch.inputs["comp"]).pooled_BC
        inputs = batch.inputs["comp"]
        first = next(iter(inputs.values()))
        blind_BC = torch.zeros(first.shape[0], self.encoder("comp").feature_width, device=first.device)
        return self.encoder("comp").encode(inputs, self.comp_stack.condition(blind_BC)).pooled_BC

    def forward(self, batch: Batch) -> Output:
        """Logits (B, N) and the routing of each routed layer."""
        if not len(self.stack.layers):
            return Output(self.classify(self.encoder("main").encode(batch.inputs["main"]).pooled_BC))
        conditioned = self.stack.condition(self.psi(batch))
        encoded = self.encoder("main").encode(batch.inputs["main"], conditioned)
        return Output(self.classify(encoded.pooled_BC), conditioned.routing())


def initial_bound(encoder: Encoder) -> float:
    """Prompts start in U(-v, v): v = sqrt(6 / (3 patch^2 + width)) for images, 0.3 for text, as in the papers."""
    if encoder.modality != "image":
        return 0.3
    return float((6 / (3 * encoder.patch_size**2 + encoder.widths[0])) ** 0.5)
