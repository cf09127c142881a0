"""Late concatenation of two prompt-tuned encoders: prompting without interaction between the modalities.

The baseline P-LateConcat of Jiang et al., arXiv 2312.03734.
"""

from __future__ import annotations

from typing import ClassVar

from mopefuse.fusion.late_concat import LateConcat


class PLateConcat(LateConcat):
    """`LateConcat` with deep static prompts in both encoders.

    As in the paper: both encoders are frozen, every layer has prompts, features are concatenated. Unlike the paper: prompts
    are gated unless ``--gate none``, and features are normalised unless ``head_norm: none``. Limit: with ``--static 0`` it
    equals `LateConcat`, bit for bit.
    """

    default_tune: ClassVar[str] = "prompt"
