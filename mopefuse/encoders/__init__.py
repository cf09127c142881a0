"""Frozen encoders. Exports the types that a plugin's encoder needs (docs/plugins.md), imported on first access."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mopefuse.core.registry import Spec
    from mopefuse.encoders._hf_architectures import BuiltIn, Family
    from mopefuse.encoders._hf_model import TransformersEncoder
    from mopefuse.encoders._hf_source import Source
    from mopefuse.encoders.attention import attend, split_heads
    from mopefuse.encoders.base import (
        Encoder,
        EncoderOutput,
        Inputs,
        InsertedTokens,
        Modulation,
        Preprocess,
        Prompt,
        PromptAt,
        create_encoder,
    )
    from mopefuse.encoders.pooling import mean_of
    from mopefuse.encoders.preprocess import ImagePreprocess, TextPreprocess

__all__ = [
    "BuiltIn",
    "Encoder",
    "EncoderOutput",
    "Family",
    "ImagePreprocess",
    "Inputs",
    "InsertedTokens",
    "Modulation",
    "Prefix",
    "Preprocess",
    "Prompt",
    "PromptAt",
    "Source",
    "Spec",
    "TextPreprocess",
    "TransformersEncoder",
    "attend",
    "create_encoder",
    "mean_of",
    "split_heads",
]
_MODULES = {
    "BuiltIn": "mopefuse.encoders._hf_architectures",
    "Family": "mopefuse.encoders._hf_architectures",
    "Source": "mopefuse.encoders._hf_source",
    "TransformersEncoder": "mopefuse.encoders._hf_model",
    "mean_of": "mopefuse.encoders.pooling",
    "attend": "mopefuse.encoders.attention",
    "split_heads": "mopefuse.encoders.attention",
    "ImagePreprocess": "mopefuse.encoders.preprocess",
    "TextPreprocess": "mopefuse.encoders.preprocess",
    "Spec": "mopefuse.core.registry",
}


def __getattr__(name: str) -> Any:
    """Import a name in `__all__` on first access, because it needs torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES.get(name, "mopefuse.encoders.base")), name)
