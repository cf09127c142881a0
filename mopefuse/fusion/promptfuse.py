"""PromptFuse: learned input tokens and one aligned feature teach a frozen encoder to read the other modality.

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
from mopefuse.encoders.base import Encoder, Insert
from mopefuse.fusion._inserting import InsertingFusion
from mopefuse.fusion._static import initial_bound


class PromptFuse(InsertingFusion):
    """``inserted.prompts`` learned tokens and psi, projected, ahead of the main encoder's own; both encoders are frozen.

    Equal to the paper's: tokens at the input only, that pass through all layers. Different: classification by a linear head
    on the pooled feature instead of an answer in words; the projection of psi learns; tokens have no position. Limit: without
    learned tokens it is `Sequential` with frozen encoders, to the bit.
    """

    sections: ClassVar[tuple[str, ...]] = (*InsertingFusion.sections, "inserted")
    prompts_always: ClassVar[bool] = True  # the bound of learned tokens
    blind: ClassVar[bool] = False  # whether learned tokens see one another only

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders, num_labels)
        main, count = self.encoder("main"), config.inserted.prompts
        bound = config.prompts.init or initial_bound(main)
        self.prompt_PD = nn.Parameter(torch.empty(count, main.widths[0]).uniform_(-bound, bound)) if count else None

    def inserted(self, batch: Batch) -> Insert:
        """The learned tokens, and psi as one more."""
        psi_B1D = self.projected(self.pooled("comp", batch))[:, None]
        if self.prompt_PD is None:
            return Insert(psi_B1D)
        prompt_BPD = self.prompt_PD.to(psi_B1D.dtype).expand(psi_B1D.shape[0], -1, -1)
        return Insert(torch.cat([prompt_BPD, psi_B1D], dim=1), blind=prompt_BPD.shape[1] if self.blind else 0)
