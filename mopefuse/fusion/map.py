"""MAP: missing-aware prompts, a separate set for each combination of modalities that a sample can lack.

Lee et al., Multimodal Prompting with Missing Modalities for Visual Recognition, https://arxiv.org/abs/2303.03369.

Shapes: B batch, J cases, P prompt tokens, D width of a layer, N labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from mopefuse.config.schema import RunConfig
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, Prompt, PromptAt
from mopefuse.fusion._static_prompts import build_static_stack
from mopefuse.fusion.base import Fusion, Output
from mopefuse.prompts.stack import PromptStack, fill_prompt_lengths


class MAP(Fusion):
    """Deep prompts in all encoders, chosen for each sample by what it lacks; a head takes all pooled features.

    A case of an encoder is a set of the other modalities that can be missing in training: complete and without comp for the
    main encoder; with ``--either`` also complete and without main for the complementary one. Each has its own prompts in
    every prompted layer. The feature of a side that a sample lacks is replaced by a learned vector.

    As in the paper: prompts for each case, attached to several layers of frozen transformers, 16 tokens long; only they and
    the classifier are trained. Unlike the paper: two encoders instead of one transformer that reads text and image together,
    so that the encoder of a missing modality has no prompts for that case, and a learned vector replaces its output for a
    dummy input; outputs of prompts are dropped after each layer, where the paper's input-level prompts stay; prompts are
    gated unless ``--gate none``; all layers have prompts unless ``--layers first:6``, the paper's choice for 12 layers. Limits:
    if nothing is missing in training, it equals `p-late-concat`; with ``--static 0`` it equals `late-concat`; both bit for bit.

    Raises:
        ConfigError: `either` without training samples that lack the main modality.
        EncoderError: an encoder that has no promptable layer.
    """

    supports_multiple_comps: ClassVar[bool] = True
    sections: ClassVar[tuple[str, ...]] = ("prompts",)
    parts: ClassVar[dict[str, str]] = {
        r"^stacks\..*static_SD$": "missing-aware prompts",
        r"^stacks\..*gate_H$": "gates",
        **Fusion.parts,
    }
    dependencies: ClassVar[dict[str, str]] = {**Fusion.dependencies, r"^stacks\.(\w+)\.": r"\1"}

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        self.add_optional_missing_embeddings()
        self.stacks = nn.ModuleDict()
        for side in self.uses:
            encoder = self.encoder(side)
            encoder.require_promptable(fix="use --method late-concat")
            length = fill_prompt_lengths(config.prompts, encoder.modality).static
            assert length is not None
            prompts = config.prompts.model_copy(update={"static": self.count_cases(side) * length})
            if length:
                self.stacks[side] = build_static_stack(prompts, encoder)
        self.frozen = () if self.stacks else self.uses
        self.head = self.make_head(sum(self.encoder(side).feature_width for side in self.uses), num_labels)

    def others(self, side: str) -> tuple[str, ...]:
        """A side of each modality that may be missing while the encoder of `side` has an input."""
        side_of = {self.encoder(other).modality: other for other in reversed(self.optional_sides)}
        return tuple(sorted(other for modality, other in side_of.items() if modality != self.encoder(side).modality))

    def count_cases(self, side: str) -> int:
        """J of a side."""
        return 1 << len(self.others(side))

    def prompts(self, side: str, batch: Batch) -> PromptAt:
        """The prompts of a side, for what each sample of a batch lacks."""
        stack = self.stacks[side]
        assert isinstance(stack, PromptStack)
        every = stack.condition({})

        def prompt_at(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt | None:
            prompt = every(layer, tokens_BLD, mask_BL)
            if prompt is None:
                return None
            each_BJPD = prompt.tokens_BPD.unflatten(1, (self.count_cases(side), -1))
            return prompt._replace(tokens_BPD=self.choose(side, each_BJPD, batch))

        return prompt_at

    def choose(self, side: str, each_BJPD: Tensor, batch: Batch) -> Tensor:
        """The prompt of each sample's case (B, P, D): in case 0 no side is missing; a missing `others[i]` adds 2**i."""
        for other in reversed(self.others(side)):
            there_BJPD, lacking_BJPD = each_BJPD.chunk(2, dim=1)
            missing_B = batch.missing.get(other)
            each_BJPD = there_BJPD
            if missing_B is not None:
                each_BJPD = torch.where(missing_B[:, None, None, None], lacking_BJPD, there_BJPD)
        return each_BJPD.squeeze(1)

    def pooled(self, side: str, batch: Batch) -> Tensor:
        """Pooled feature (B, C) of a side."""
        if side in self.frozen:
            return self.pooled_feature(side, batch)
        return self.encoder(side).encode(batch.inputs[side], self.prompts(side, batch)).pooled_BC

    def forward(self, batch: Batch) -> Output:
        """Compute logits (B, N)."""
        return Output(self.classify(*(self.pooled(side, batch) for side in self.uses), batch=batch))
