"""Deep static prompts: the same learned tokens for every sample, new ones at every layer.

Jia et al., Visual Prompt Tuning, https://arxiv.org/abs/2203.12119 (its deep form), as keys and values.
"""

from __future__ import annotations

from mopefuse.config import Prompts, Router
from mopefuse.encoders._base import Encoder
from mopefuse.prompts.stack import PromptStack, with_lengths


def static_stack(prompts: Prompts, encoder: Encoder) -> PromptStack:
    """The static prompts that `prompts` asks for, for an encoder; without layers if their length is 0.

    Raises:
        ConfigError: `prompts.layers` names one that the encoder does not have.
    """
    alone = with_lengths(prompts, encoder.modality).model_copy(update={"dynamic": 0, "mapped": 0})
    return PromptStack(
        alone,
        Router(),
        widths=encoder.widths,
        heads=encoder.heads,
        conditions={},
        bound=prompts.init or initial_bound(encoder),
    )


def initial_bound(encoder: Encoder) -> float:
    """Prompts start in U(-v, v): v = sqrt(6 / (3 patch^2 + width)) for images, 0.3 for text, as in the papers."""
    if encoder.modality != "image":
        return 0.3
    return float((6 / (3 * encoder.patch_size**2 + encoder.widths[0])) ** 0.5)
