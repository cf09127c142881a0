"""One modality alone: the baseline that any fusion method must beat.

``--tune`` selects a linear probe of the frozen encoder, deep prompt tuning (Jia et al., https://arxiv.org/abs/2203.12119;
Liu et al., P-Tuning v2, https://arxiv.org/abs/2110.07602; here as keys and values, gated unless ``--gate none``), LoRA (Hu
et al., https://arxiv.org/abs/2106.09685), or fine-tuning.
"""

from __future__ import annotations

from mopefuse.fusion.late_concat import LateConcat


class MainOnly(LateConcat):
    """A head on the main encoder alone: late concatenation with one feature."""

    uses = ("main",)


class CompOnly(LateConcat):
    """A head on the complementary encoder alone."""

    uses = ("comp",)
