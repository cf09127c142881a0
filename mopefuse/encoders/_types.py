"""The types around an encoder: its input, its output, its preprocessing, and the state of one call.

Shapes: B batch, L tokens, D width of a layer, C width of the pooled feature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mopefuse.encoders.attention import InsertedTokens, Modulation, Prompt

Inputs = dict[str, Tensor]
PromptAt = Callable[[int, Tensor, "Tensor | None"], "Prompt | None"]
"""Maps a layer index, the layer's input tokens (B, L, D) and their mask (B, L) to the layer's prompt."""


class EncoderOutput(NamedTuple):
    """Output of an encoder."""

    pooled_BC: Tensor  # pooled by the encoder's own method: [CLS], mean, EOT, ...
    tokens_BLD: Tensor  # output of the last layer, without prompts
    mask_BL: Tensor | None  # False for padding; None without padding


class Prefix(NamedTuple):
    """The output of the first layers for a batch, from which `Encoder.encode` can continue; see `Encoder.compute_prefix`.

    Attributes:
        layer: the first layer that still has to run.
        tokens_BLD: the tokens that enter it, of any floating-point type.
    """

    layer: int
    tokens_BLD: Tensor

    def drop_tokens(self, fraction: float, leading: int) -> Prefix:
        """Drop a random fraction of the tokens of each sample, except the first `leading`; at least one other remains.

        Liu et al., PatchDropout: Economizing Vision Transformers Using Patch Dropout, WACV 2023 (arXiv 2208.07220); there,
        patches are dropped ahead of the first layer.
        """
        batch, length, width = self.tokens_BLD.shape
        others = length - leading
        kept = max(1, round(others * (1 - fraction)))
        first_BL = torch.arange(leading, device=self.tokens_BLD.device).expand(batch, -1)
        random_BL = torch.rand(batch, others, device=self.tokens_BLD.device).argsort(dim=1)[:, :kept]
        index_BL = torch.cat([first_BL, leading + random_BL.sort(dim=1).values], dim=1)
        return self._replace(tokens_BLD=self.tokens_BLD.gather(1, index_BL[..., None].expand(-1, -1, width)))


class Call:
    """State of one call of `Encoder.encode` or `Encoder.run_layer`. Each thread has its own.

    Attributes:
        skip: whether the block that runs now precedes `start`.
        mask_BL: mask of the texts being encoded, False for padding; None without padding.
        pending: prompts that a block's attention has not used yet, by the number of their slot, see `_prompted`.
        modulations: modulations that a block's attention has not used yet, likewise.
        runs: how often the block of each slot has run.
    """

    def __init__(
        self, prompt_at: PromptAt | None = None, insert: InsertedTokens | None = None, start: Prefix | None = None
    ) -> None:
        self.prompt_at, self.insert, self.start = prompt_at, insert, start
        self.skip = False
        self.mask_BL: Tensor | None = None
        self.pending: dict[int, Prompt] = {}
        self.modulations: dict[int, Modulation] = {}
        self.runs: dict[int, int] = {}


class Preprocess(Protocol):
    """Converts raw values of one modality to an encoder's input, with its image size, statistics or tokenizer."""

    def item(self, value: Any) -> Any:
        """Prepare one raw value (in a data worker): `reduce`, then `ready`."""

    def reduce(self, value: Any) -> Any:
        """Do the deterministic part of `item`, whose result may be cached: resize an image to 8 bits, truncate a text."""

    def ready(self, reduced: Any) -> Any:
        """Do the rest of `item`, after augmentation: crop an image."""

    def batch(self, items: Sequence[Any]) -> Inputs:
        """Collate prepared values into the tensors that `Encoder.encode` takes, with first dimension B."""

    def finish(self, inputs: Mapping[str, Tensor]) -> Inputs:
        """Do what is best done on the encoder's device, called by `Encoder.encode`: normalise 8-bit pixels."""

    def describe(self) -> dict[str, Any]:
        """Plain values for `encoders inspect` and for exported artifacts."""
