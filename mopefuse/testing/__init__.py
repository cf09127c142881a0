"""Contract tests for plugins: what mopefuse requires of an encoder, a fusion method, a modality and a task.

    from mopefuse.testing import check_encoder, check_fusion, check_modality, check_task

    def test_my_plugin() -> None:
        check_encoder("mine:small?pretrained=false")
        check_fusion("product", main="tiny:vision", comp="mine:small?pretrained=false")
        check_modality("sensor", values=["0.5 1.0", "3.0"])
        check_task("ordinal", rows=[["low"], ["high"], ["middle"]] * 4, known=["low", "middle", "high"])

Each raises an AssertionError that states what is broken, where, and how to fix it. The built-in encoders, methods,
modalities and tasks pass the same tests.
"""

from __future__ import annotations

from mopefuse.testing.encoder import check_encoder, contract
from mopefuse.testing.fusion import check_fusion
from mopefuse.testing.modality import check_modality
from mopefuse.testing.task import check_task

__all__ = ["check_encoder", "check_fusion", "check_modality", "check_task", "contract"]
