"""Sequential fusion by prompts: the complementary feature is one prompt token of the main encoder's first layer.

The baseline P-SequentialFuse of Jiang et al., arXiv 2312.03734.
Shapes: B batch, L tokens, P prompt tokens, C width of psi, D width of the main encoder's first layer, H its heads, N labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from mopefuse.config.schema import RunConfig
from mopefuse.core.precision import apply_in_own_type, normalize_feature
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, Prompt
from mopefuse.fusion._tuned_encoders import TunedFusion
from mopefuse.fusion.base import Output


class PSequential(TunedFusion):
    """Adds the projected psi to the static prompts of the main encoder's first layer; both encoders are prompted.

    As in the paper: the modalities interact at the first layer only, through one token. Unlike the paper: psi is
    normalised, and prompts are gated unless ``--gate none``; at the first layer psi and the static prompts share a gate.
    Limits: with gates of 0 it equals `main-only`, bit for bit; with ``--gate none --static 0`` it is a token inserted into
    the first layer and dropped after it.

    Raises:
        EncoderError: an encoder that does not support prompts.
    """

    always_uses_prompts: ClassVar[bool] = True  # for the gate of psi
    default_tune: ClassVar[str] = "prompt"
    parts: ClassVar[dict[str, str]] = {r"^project\.": "projection", r"^gate_H$": "gates", **TunedFusion.parts}
    dependencies: ClassVar[dict[str, str]] = {**TunedFusion.dependencies, r"^project\.": "comp features", r"^gate_H$": "main"}

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        main, comp = self.encoder("main"), self.encoder("comp")
        main.require_promptable(fix="use it as --comp instead")
        self.frozen = tuple(side for side in self.frozen if side == "comp")
        self.project = nn.Linear(comp.feature_width, main.widths[0])
        shared = "main" in self.stacks and "0" in self.stacks["main"].layers  # type: ignore[operator]
        gated = config.prompts.gate == "zero" and not shared
        self.gate_H = nn.Parameter(torch.zeros(main.heads[0])) if gated else None
        self.head = self.make_head(main.feature_width, num_labels)

    @property
    def head_sides(self) -> tuple[str, ...]:
        """The main encoder alone."""
        return ("main",)

    def forward(self, batch: Batch) -> Output:
        """Compute logits (B, N)."""
        psi_B1D = apply_in_own_type(self.project, normalize_feature(self.pooled("comp", batch)))[:, None]
        static = self.prompts("main")

        def prompt_at(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt | None:
            prompt = static(layer, tokens_BLD, mask_BL) if static is not None else None
            if layer > 0:
                return prompt
            token_B1D = psi_B1D.to(tokens_BLD.dtype)
            if prompt is None:
                return Prompt(token_B1D, self.gate_H)
            return prompt._replace(tokens_BPD=torch.cat([prompt.tokens_BPD, token_B1D], dim=1))

        return Output(self.classify(self.encoder("main").encode(batch.inputs["main"], prompt_at).pooled_BC))
