"""Low-rank adaptation of a frozen encoder (LoRA: Hu et al., https://arxiv.org/abs/2106.09685), by peft.

A linear layer W x + b is replaced by W x + b + (alpha / r) B A x, so that the encoder's own code keeps working. Only A and B
are trained. B is initialised to 0: the output is unchanged, bit for bit, before the first step and whenever alpha is 0.

Code that reads a layer's weights without calling the layer would silently ignore LoRA: `adapt` watches one forward pass and
rejects an encoder in which an adapted layer was not called.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from mopefuse.config.method_settings import Lora
from mopefuse.core.dependencies import require
from mopefuse.core.error_codes import EncoderCode
from mopefuse.errors import EncoderError, did_you_mean
from mopefuse.modalities.base import get_modality

if TYPE_CHECKING:
    from mopefuse.encoders.base import Encoder


def is_lora(name: str) -> bool:
    """Whether a tensor of this name is one of LoRA's A and B."""
    return ".lora_A." in name or ".lora_B." in name


def original_name(name: str) -> str:
    """Name that a tensor of an adapted encoder had before `adapt`."""
    return name.replace(".base_layer.", ".")


def names_of(root: nn.Module, modules: Iterable[nn.Module]) -> tuple[str, ...]:
    """Names of modules below `root`."""
    names = {module: name for name, module in root.named_modules()}
    return tuple(names[module] for module in modules)


def adapt(encoder: Encoder, lora: Lora) -> None:
    """Add LoRA to the layers in `lora.targets`, by default to the encoder's `lora_targets`.

    Raises:
        EncoderError: no target layers, a target that is not a linear layer, or one on which LoRA has no effect.
        PackageError: peft is not installed.
    """
    require("peft", extra="lora", what="LoRA")
    from peft import LoraConfig, inject_adapter_in_model

    names = _targets(encoder, lora)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
    inject_adapter_in_model(config, encoder)
    encoder.eval()
    _check_called(encoder, names)


def train_dropout(encoder: nn.Module, mode: bool) -> None:
    """Set training mode of LoRA's dropout."""
    for name, module in encoder.named_modules():
        if name.endswith(".lora_dropout"):
            module.train(mode)


def _targets(encoder: Encoder, lora: Lora) -> list[str]:
    linear = [name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)]
    if lora.targets is None:
        if not encoder.lora_targets:
            what = f"{encoder.spec} has no default layers for LoRA"
            others = sorted({name.rpartition(".")[2] for name in linear})
            fix = f"set lora.targets; its linear layers are {', '.join(others)}" if others else "use --tune probe or full"
            raise EncoderError(EncoderCode.LORA_UNSUPPORTED, what, fix=fix)
        return list(encoder.lora_targets)
    found = {target: [name for name in linear if f".{name}".endswith(f".{target}")] for target in lora.targets}
    for target, names in found.items():
        if not names:
            near = did_you_mean(target, {name.rpartition(".")[2] for name in linear})
            what = f"{encoder.spec} has no linear layer {target!r}"
            raise EncoderError(
                EncoderCode.LORA_NO_SUCH_LAYER, what, where="lora.targets", fix=near or "use --tune probe or full"
            )
    return list(dict.fromkeys(name for names in found.values() for name in names))


def _check_called(encoder: Encoder, names: Iterable[str]) -> None:
    """Encode one sample and check that every adapted layer is called.

    Raises:
        EncoderError: a layer is not called.
    """
    not_called = set(names)
    hooks = [
        encoder.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: not_called.discard(name))
        for name in names
    ]
    preprocess = encoder.preprocess
    inputs = preprocess.batch([preprocess.item(get_modality(encoder.modality).examples()[0])])
    device = next(encoder.parameters()).device
    try:
        with torch.no_grad():
            encoder.encode({name: tensor.to(device) for name, tensor in inputs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    if not_called:
        what = f"LoRA would have no effect on {min(not_called)}: {encoder.spec} uses its weights without calling the layer"
        raise EncoderError(
            EncoderCode.LORA_WITHOUT_EFFECT, what, where="lora.targets", fix="set lora.targets to other linear layers"
        )
