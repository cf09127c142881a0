"""PromptFuse: learned input tokens and one projected feature adapt a frozen encoder to the other modality.

Liang, Zhao and Schütze, Modular and Parameter-Efficient Multimodal Fusion with Prompting, https://arxiv.org/abs/2203.08055.
Shapes: B batch, P learned tokens, D width of the main encoder's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import nn

from mopefuse.config.schema import RunConfig
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, InsertedTokens
from mopefuse.fusion._inserting import InsertingFusion
from mopefuse.fusion._static_prompts import initial_bound


class PromptFuse(InsertingFusion):
    """Inserts ``inserted.prompts`` learned tokens and the projected psi ahead of the main tokens; both encoders are frozen.

    As in the paper: tokens are inserted at the input only and pass through all layers. Unlike the paper: a linear head on
    the pooled feature classifies instead of generated text; the projection of psi is trained; inserted tokens have no
    position embeddings. Limit: without learned tokens it equals `Sequential` with frozen encoders, bit for bit.
    """

    sections: ClassVar[tuple[str, ...]] = (*InsertingFusion.sections, "inserted")
    always_uses_prompts: ClassVar[bool] = True  # for the initial bound of learned tokens
    blind: ClassVar[bool] = False  # whether learned tokens attend to one another only

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders, num_labels)
        main, count = self.encoder("main"), config.inserted.prompts
        bound = config.prompts.init or initial_bound(main)
        self.prompt_PD = nn.Parameter(torch.empty(count, main.widths[0]).uniform_(-bound, bound)) if count else None

    def build_insert(self, batch: Batch) -> InsertedTokens:
        """Concatenate the learned tokens and the projected psi."""
        psi_B1D = self.project_features(self.pooled("comp", batch))[:, None]
        if self.prompt_PD is None:
            return InsertedTokens(psi_B1D)
        prompt_BPD = self.prompt_PD.to(psi_B1D.dtype).expand(psi_B1D.shape[0], -1, -1)
        return InsertedTokens(torch.cat([prompt_BPD, psi_B1D], dim=1), blind=prompt_BPD.shape[1] if self.blind else 0)
