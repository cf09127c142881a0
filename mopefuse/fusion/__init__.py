"""Fusion methods; here is what one of a plugin is made of, see docs/plugins.md. Imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopefuse.data.base import Batch
    from mopefuse.fusion.base import Fusion, Output

__all__ = ["Batch", "Fusion", "Output"]


def __getattr__(name: str) -> Any:
    """One of `__all__`, which takes torch to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("mopefuse.fusion.base"), name)
