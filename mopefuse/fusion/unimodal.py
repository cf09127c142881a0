"""One modality alone: what it knows without the other is the floor that any fusion must beat."""

from __future__ import annotations

from typing import ClassVar

from mopefuse.fusion.late_concat import LateConcat


class MainOnly(LateConcat):
    """A linear probe of the frozen main encoder: late concatenation with one feature."""

    uses: ClassVar[tuple[str, ...]] = ("main",)


class CompOnly(LateConcat):
    """A linear probe of the frozen complementary encoder."""

    uses: ClassVar[tuple[str, ...]] = ("comp",)
