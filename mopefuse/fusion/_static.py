"""Deep static prompts: the same learned tokens for every sample, new ones at every layer.

Jia et al., Visual Prompt Tuning, https://arxiv.org/abs/2203.12119 (its deep form), as keys and values.
"""

from __future__ import annotations

from mopefuse.config.schema import Prompts, Router
from mopefuse.encoders.base import Encoder
from mopefuse.modalities.base import of
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
    """v, where prompts start in U(-v, v), by the papers' rule for the encoder's modality."""
    return of(encoder.modality).prompt_bound(encoder.patch_size, encoder.widths[0])
