"""The option ``?quantize=int8|nf4|fp8`` of every encoder: its linear layers are stored in 8 or 4 bits.

Everything else stays as it is: embeddings, convolutions, norms, and attention whose projections are not linear layers (the
fused projection of `torch.nn.MultiheadAttention`, as in open_clip's own towers). The weights must stay frozen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from mopefuse.core import registry
from mopefuse.core.dependencies import require
from mopefuse.core.error_codes import EncoderCode
from mopefuse.core.registry import Spec
from mopefuse.encoders import _options
from mopefuse.encoders._quantized_linear import BLOCK, KINDS, QuantizedLinear
from mopefuse.errors import EncoderError

if TYPE_CHECKING:
    from mopefuse.encoders.base import Encoder

OPTION = _options.QUANTIZE


def with_quantize(text: str, kind: str) -> str:
    """A spec with the option set."""
    spec = registry.parse_spec(text)
    return str(replace(spec, options={**spec.options, OPTION: kind}))


def split_option(spec: Spec) -> tuple[Spec, str]:
    """The spec without the option, and its value; empty if it is not set.

    Raises:
        EncoderError: an unknown value.
        PackageError: torchao is not installed.
    """
    if OPTION not in spec.options:
        return spec, ""
    kind = _options.one_of(spec, OPTION, "", KINDS)
    require("torchao", extra="quantize", what=f"?{OPTION}={kind}")
    return replace(spec, options={key: value for key, value in spec.options.items() if key != OPTION}), kind


def quantize(encoder: Encoder, kind: str) -> None:
    """Quantise the linear layers of a frozen encoder in place.

    Raises:
        EncoderError: there are none, or a layer does not fit the format.
    """
    spec = replace(encoder.spec, options={**encoder.spec.options, OPTION: kind})
    linear = {name: module for name, module in encoder.named_modules() if _is_plain_linear(module)}
    if not linear:
        what = f"{encoder.spec} has no linear layers that could be quantised"
        raise EncoderError(EncoderCode.BAD_OPTION, what, where=str(spec), fix=f"remove {OPTION}= from the spec")
    made: dict[nn.Module, QuantizedLinear] = {}
    for name, module in linear.items():
        assert isinstance(module, nn.Linear)
        made[module] = _quantized(module, kind, name, spec)
    for parent in list(encoder.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, name, made[child])
    encoder.spec, encoder.quantized = spec, kind
    encoder.eval()


def require_float(encoder: Encoder, tuning: str) -> None:
    """Check that the weights of an encoder can be tuned.

    Raises:
        EncoderError: they are quantised.
    """
    if encoder.quantized:
        what = f"{tuning} needs the weights of {encoder.spec} in floating point, but {OPTION}={encoder.quantized} is set"
        raise EncoderError(
            EncoderCode.BAD_OPTION, what, where=OPTION, fix=f"remove {OPTION}= from the spec, or leave the encoder frozen"
        )


def _is_plain_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _quantized(linear: nn.Linear, kind: str, name: str, spec: Spec) -> QuantizedLinear:
    size = linear.weight.numel()
    layer = f"the layer {name.removeprefix('backbone.')} ({linear.out_features} x {linear.in_features})"
    if kind == "nf4" and size % BLOCK:
        what = f"{layer} has {size:,} weights, which nf4 cannot divide into blocks of {BLOCK}"
        raise EncoderError(EncoderCode.BAD_OPTION, what, where=str(spec), fix=f"use {OPTION}=int8")
    quantized = QuantizedLinear(linear, kind)
    if not torch.isfinite(quantized.weight).all():
        what = f"{layer} cannot be represented as {kind}"
        raise EncoderError(EncoderCode.BAD_OPTION, what, where=str(spec), fix=f"remove {OPTION}= from the spec")
    return quantized
