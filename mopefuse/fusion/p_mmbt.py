"""MMBT with prompt-tuned encoders: a baseline of Jiang et al., arXiv 2312.03734, there called P-MMBT."""

from __future__ import annotations

from typing import ClassVar

from mopefuse.fusion.mmbt import MMBT


class PMMBT(MMBT):
    """`MMBT` with deep static prompts in both frozen encoders, in place of fine-tuning.

    Different from the paper's: as `MMBT`, and prompts are gated unless ``--gate none``. Limit: with ``--static 0`` it is `MMBT`
    with frozen encoders, to the bit.
    """

    own_tune: ClassVar[str] = "prompt"
