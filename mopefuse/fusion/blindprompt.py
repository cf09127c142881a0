"""BlindPrompt: PromptFuse whose learned tokens see one another only, and so cannot answer for the inputs.

Liang, Zhao and Schütze, https://arxiv.org/abs/2203.08055, the second method of that paper.
"""

from __future__ import annotations

from typing import ClassVar

from mopefuse.fusion.promptfuse import PromptFuse


class BlindPrompt(PromptFuse):
    """`PromptFuse` with an attention mask: learned tokens attend to learned tokens, all others to everything.

    The aligned feature is no learned token: it sees, and is seen. Differences and limit as of `PromptFuse`.
    """

    blind: ClassVar[bool] = True
