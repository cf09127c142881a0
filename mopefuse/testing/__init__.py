"""Contract tests for plugins: what mopefuse requires of an encoder, a fusion method and a modality.

    from mopefuse.testing import check_encoder, check_fusion, check_modality

    def test_my_plugin() -> None:
        check_encoder("mine:small?pretrained=false")
        check_fusion("product", main="tiny:vision", comp="mine:small?pretrained=false")
        check_modality("sensor", values=["0.5 1.0", "3.0"])

Each raises an AssertionError that states what is broken, where, and how to fix it. The built-in encoders, methods and
modalities pass the same tests.
"""

from __future__ import annotations

from mopefuse.testing.encoder import check_encoder, contract
from mopefuse.testing.fusion import check_fusion
from mopefuse.testing.modality import check_modality

__all__ = ["check_encoder", "check_fusion", "check_modality", "contract"]
