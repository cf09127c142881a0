"""MaPLe: prompts of a text encoder, and prompts of an image encoder that are a linear function of them.

Khattak et al., MaPLe: Multi-modal Prompt Learning, https://arxiv.org/abs/2210.03117.

Shapes: B batch, P prompt tokens, D width of a layer, H heads, N labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from mopefuse.config.schema import RunConfig
from mopefuse.core.precision import apply_in_own_type
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, Prompt, PromptAt
from mopefuse.fusion._static_prompts import build_static_stack
from mopefuse.fusion._text_and_image import text_and_image_sides
from mopefuse.fusion.base import Fusion, Output
from mopefuse.prompts.stack import select_layers


class MaPLe(Fusion):
    """Deep prompts of the text encoder are learned; a linear layer for each maps them to those of the image encoder.

    Layer i of one encoder is coupled with layer i of the other, whichever of them is main. A head takes both features.

    As in the paper: learned text prompts of 2 tokens in the first layers, image prompts that are a linear function of them,
    another in each layer, frozen encoders; meant for CLIP's two encoders. Unlike the paper: each sample has a text of its own,
    and a head classifies both features, where the paper compares the image with the names of the classes; any two encoders with
    promptable layers will do; outputs of prompts are dropped after each layer, so that they do not act beyond the prompted
    layers; prompts are gated unless ``--gate none`` and initialised by the rule of the other methods; all layers that both
    encoders have are prompted unless ``--layers first:9``, the paper's choice. Limits: with ``--static 0`` or gates of 0 it
    equals `late-concat` of frozen encoders; with mappings of weight 0 it is `p-late-concat` in the same layers, with the
    bias as each token of the image prompt; bit for bit.

    Raises:
        ConfigError: `prompts.layers` names a layer that one of the encoders does not have.
        EncoderError: an encoder has no promptable layer, or there is not one of text and one of images.
    """

    sections: ClassVar[tuple[str, ...]] = ("prompts",)
    parts: ClassVar[dict[str, str]] = {
        r"^stack\..*static_SD$": "text prompts",
        r"^mappings\.": "mappings to image prompts",
        r"gates?_H(\.\d+)?$": "gates",
        **Fusion.parts,
    }

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        self.text, self.image = text_and_image_sides(self)
        text, image = self.encoder(self.text), self.encoder(self.image)
        for encoder in (text, image):
            encoder.require_promptable(fix="use --method late-concat")
        common = min(len(text.widths), len(image.widths))
        layers = select_layers(config.prompts.layers, common, owner="the encoder with fewer layers")
        self.stack = build_static_stack(config.prompts.model_copy(update={"layers": layers}), text)
        self.dropout = nn.Dropout(config.prompts.dropout)
        self.mappings, self.gates_H = nn.ModuleDict(), nn.ParameterDict()
        for name in self.stack.layers:
            layer = int(name)
            self.mappings[name] = nn.Linear(text.widths[layer], image.widths[layer])
            if config.prompts.gate == "zero":
                self.gates_H[name] = nn.Parameter(torch.zeros(image.heads[layer]))
        self.frozen = () if len(self.stack.layers) else self.uses
        self.head = self.make_head(text.feature_width + image.feature_width, num_labels)

    def dependency_of(self, name: str) -> str:
        """Dependency of a trainable tensor, see `dependencies`: text prompts on the text encoder, the rest on the other."""
        part = name.partition(".")[0]
        return {"stack": self.text, "mappings": self.image, "gates_H": self.image}.get(part) or super().dependency_of(name)

    def image_prompt(self, layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt | None:
        """The image prompt of a layer, from the text prompt of the same layer."""
        name = str(layer)
        if name not in self.mappings:
            return None
        text_PD = self.stack.layers[name].static_SD
        assert isinstance(text_PD, Tensor)
        mapped_PD = apply_in_own_type(self.mappings[name], text_PD)
        prompt_BPD: Tensor = self.dropout(mapped_PD.expand(tokens_BLD.shape[0], -1, -1))
        return Prompt(prompt_BPD.to(tokens_BLD.dtype), self.gates_H.get(name, None))

    def forward(self, batch: Batch) -> Output:
        """Compute logits (B, N)."""
        if self.frozen:
            return Output(self.classify(*(self.pooled_feature(side, batch) for side in self.uses)))
        prompts: dict[str, PromptAt] = {self.text: self.stack.condition({}), self.image: self.image_prompt}
        encoded = (self.encoder(side).encode(batch.inputs[side], prompts[side]) for side in self.uses)
        return Output(self.classify(*(one.pooled_BC for one in encoded)))
