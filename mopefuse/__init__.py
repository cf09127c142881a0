"""Fuse two modalities with frozen pretrained encoders: conditional prompts, mixed from prompt experts.

``build_fusion(main=SPEC, comp=SPEC, num_labels=N)`` gives an `nn.Module`, ``load(RUN).predict(images, texts)`` asks a
trained run; the command line is ``mopefuse --help``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopefuse.fusion.build import build_fusion
    from mopefuse.inference.predict import load

__version__ = "0.1.0"
__all__ = ["__version__", "build_fusion", "load"]


def __getattr__(name: str) -> Any:
    """What is heavy to import is imported when it is asked for."""
    if name == "build_fusion":
        from mopefuse.fusion.build import build_fusion

        return build_fusion
    if name == "load":
        from mopefuse.inference.predict import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
