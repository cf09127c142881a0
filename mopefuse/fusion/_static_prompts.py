"""Deep static prompts: learned tokens that are the same for every sample and different at every layer.

Jia et al., Visual Prompt Tuning, https://arxiv.org/abs/2203.12119 (VPT-Deep), inserted as keys and values.
"""

from __future__ import annotations

from mopefuse.config.schema import Prompts, Router
from mopefuse.encoders.base import Encoder
from mopefuse.modalities.base import get_modality
from mopefuse.prompts.stack import PromptStack, fill_prompt_lengths


def build_static_stack(prompts: Prompts, encoder: Encoder) -> PromptStack:
    """Build an encoder's static prompts from the settings `prompts`; the stack has no layers if their length is 0.

    Raises:
        ConfigError: `prompts.layers` names a layer that the encoder does not have.
    """
    alone = fill_prompt_lengths(prompts, encoder.modality).model_copy(update={"dynamic": 0, "mapped": 0, "film": False})
    return PromptStack(
        alone,
        Router(),
        widths=encoder.widths,
        heads=encoder.heads,
        conditions={},
        bound=prompts.init or initial_bound(encoder),
    )


def initial_bound(encoder: Encoder) -> float:
    """Bound v of the initial distribution U(-v, v) of prompts, by the papers' rule for the encoder's modality."""
    return get_modality(encoder.modality).prompt_bound(encoder.patch_size, encoder.widths[0])
