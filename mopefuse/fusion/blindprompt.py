"""BlindPrompt: PromptFuse whose learned tokens attend to one another only, and so cannot depend on the input.

Liang, Zhao and Schütze, https://arxiv.org/abs/2203.08055, the second method of that paper.
"""

from __future__ import annotations

from typing import ClassVar

from mopefuse.fusion.promptfuse import PromptFuse


class BlindPrompt(PromptFuse):
    """`PromptFuse` with an attention mask: learned tokens attend to learned tokens, all others to everything.

    The projected psi is not masked. The differences from the paper and the limit are those of `PromptFuse`.
    """

    blind: ClassVar[bool] = True
