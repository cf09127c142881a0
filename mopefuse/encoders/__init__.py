"""Frozen encoders; here is what an encoder of a plugin is made of, see docs/plugins.md. Imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopefuse.encoders._attention import attend, split_heads
    from mopefuse.encoders._base import Encoded, Encoder, Inputs, Insert, Preprocess, Prompt, PromptAt, create_encoder
    from mopefuse.encoders._preprocess import ImagePreprocess, TextPreprocess
    from mopefuse.registry import Spec

__all__ = [
    "Encoded",
    "Encoder",
    "ImagePreprocess",
    "Inputs",
    "Insert",
    "Preprocess",
    "Prompt",
    "PromptAt",
    "Spec",
    "TextPreprocess",
    "attend",
    "create_encoder",
    "split_heads",
]
_PLACES = {
    "attend": "mopefuse.encoders._attention",
    "split_heads": "mopefuse.encoders._attention",
    "ImagePreprocess": "mopefuse.encoders._preprocess",
    "TextPreprocess": "mopefuse.encoders._preprocess",
    "Spec": "mopefuse.registry",
}


def __getattr__(name: str) -> Any:
    """One of `__all__`, which takes torch to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES.get(name, "mopefuse.encoders._base")), name)
