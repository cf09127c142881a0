"""Late concatenation of two prompt-tuned encoders: what prompting gives without letting the modalities meet.

A baseline of Jiang et al., arXiv 2312.03734, there called P-LateConcat.
"""

from __future__ import annotations

from typing import ClassVar

from mopefuse.fusion.late_concat import LateConcat


class PLateConcat(LateConcat):
    """`LateConcat` with deep static prompts in both encoders.

    Equal to the paper's: both encoders frozen, prompts at every layer, features concatenated. Different: prompts are gated
    unless ``--gate none``, and features lose their scale unless ``head_norm: none``. Limit: with ``--static 0`` it is
    `LateConcat`, to the bit.
    """

    own_tune: ClassVar[str] = "prompt"
