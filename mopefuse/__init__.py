"""Fuse two modalities with frozen pretrained encoders: conditional prompts, mixed from prompt experts.

``build_fusion(main=SPEC, comp=SPEC, num_labels=N)`` gives an `nn.Module`; the command line is ``mopefuse --help``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopefuse.fusion.build import build_fusion

__version__ = "0.1.0"
__all__ = ["__version__", "build_fusion"]


def __getattr__(name: str) -> Any:
    """`build_fusion` brings torch, so it is imported when it is asked for."""
    if name == "build_fusion":
        from mopefuse.fusion.build import build_fusion

        return build_fusion
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
