"""Fusion methods. Exports the types that a plugin's method needs (docs/plugins.md), imported on first access."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopefuse.data.base import Batch
    from mopefuse.fusion.base import Fusion, Output

__all__ = ["Batch", "Fusion", "Output"]


def __getattr__(name: str) -> Any:
    """Import a name in `__all__` on first access, because it needs torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("mopefuse.fusion.base"), name)
