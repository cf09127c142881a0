"""MMBT with prompt-tuned encoders: the baseline P-MMBT of Jiang et al., arXiv 2312.03734."""

from __future__ import annotations

from typing import ClassVar

from mopefuse.fusion.mmbt import MMBT


class PMMBT(MMBT):
    """`MMBT` with deep static prompts in both frozen encoders instead of fine-tuning.

    Unlike the paper: the differences of `MMBT`, and prompts are gated unless ``--gate none``. Limit: with ``--static 0`` it
    equals `MMBT` with frozen encoders, bit for bit.
    """

    default_tune: ClassVar[str] = "prompt"
