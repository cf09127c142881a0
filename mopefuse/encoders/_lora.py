"""Low-rank adaptation of a frozen encoder (LoRA: Hu et al., https://arxiv.org/abs/2106.09685), by peft.

A linear layer W x + b becomes W x + b + (alpha / r) B A x, in its place, so that an encoder's own code goes on working. A
and B alone learn. B starts at 0: an encoder begins as it was, to the bit, and stays so where alpha is 0.

Code that reads a layer's weights without calling it would lose what LoRA adds, and nobody would notice: `adapt` listens to
one forward pass, and refuses an encoder in which an adapted layer was not called.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from mopefuse.config.schema import Lora
from mopefuse.core import error_numbers as _numbers
from mopefuse.core.dependencies import require
from mopefuse.errors import EncoderError, did_you_mean
from mopefuse.modalities.base import of

if TYPE_CHECKING:
    from mopefuse.encoders.base import Encoder


def is_lora(name: str) -> bool:
    """Whether a tensor of this name is one that LoRA learns."""
    return ".lora_A." in name or ".lora_B." in name


def original(name: str) -> str:
    """The name that a tensor of an adapted encoder had before."""
    return name.replace(".base_layer.", ".")


def names_of(root: nn.Module, modules: Iterable[nn.Module]) -> tuple[str, ...]:
    """The names of modules below `root`."""
    names = {module: name for name, module in root.named_modules()}
    return tuple(names[module] for module in modules)


def adapt(encoder: Encoder, lora: Lora) -> None:
    """Put A and B beside the layers that `lora` names, or those that the encoder names.

    Raises:
        EncoderError: no layer is named, or one that is no linear layer, or that LoRA would be lost on.
        PackageError: peft is not installed.
    """
    require("peft", extra="lora", what="LoRA")
    from peft import LoraConfig, inject_adapter_in_model

    names = _targets(encoder, lora)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
    inject_adapter_in_model(config, encoder)
    encoder.eval()
    _refuse_unheard(encoder, names)


def train_dropout(encoder: nn.Module, mode: bool) -> None:
    """LoRA's own dropout in training mode, or not."""
    for name, module in encoder.named_modules():
        if name.endswith(".lora_dropout"):
            module.train(mode)


def _targets(encoder: Encoder, lora: Lora) -> list[str]:
    linear = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    if lora.targets is None:
        if not encoder.lora_targets:
            what = f"{encoder.spec} has no query and value projections that LoRA is known to hold for"
            others = sorted({name.rpartition(".")[2] for name in linear})
            fix = f"set lora.targets: its linear layers are {', '.join(others)}" if others else "tune it in another way"
            raise EncoderError(_numbers.LORA_UNKNOWN, what, fix=fix)
        return list(encoder.lora_targets)
    found = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in lora.targets}
    for target, names in found.items():
        if not names:
            near = did_you_mean(target, {name.rpartition(".")[2] for name in linear})
            what = f"{encoder.spec} has no linear layer {target!r}"
            raise EncoderError(_numbers.LORA_NO_LAYER, what, where="lora.targets", fix=near or "tune it in another way")
    return list(dict.fromkeys(name for names in found.values() for name in names))


def _refuse_unheard(encoder: Encoder, names: Iterable[str]) -> None:
    """Encode one sample, and refuse the encoder if a layer was not called."""
    silent = set(names)
    hooks = [
        encoder.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: silent.discard(name))
        for name in names
    ]
    preprocess = encoder.preprocess
    inputs = preprocess.batch([preprocess.item(of(encoder.modality).examples()[0])])
    device = next(encoder.parameters()).device
    try:
        with torch.no_grad():
            encoder.encode({name: tensor.to(device) for name, tensor in inputs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    if silent:
        what = f"the weights of {min(silent)} in {encoder.spec} are read without calling it: LoRA would have no effect there"
        raise EncoderError(_numbers.LORA_UNHEARD, what, where="lora.targets", fix="name other linear layers")
