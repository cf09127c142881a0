"""Encoders of timm: ``timm:vit_base``, ``timm:swin_tiny_patch4_window7_224?img_size=64&window_size=4``.

Models of the classes VisionTransformer (ViT, DeiT, DINOv2, SigLIP), Eva (EVA, EVA-02, DINOv3, Perception Encoder, ViT with
rotary positions), Beit, SwinTransformer and SwinTransformerV2 can be prompted if `_timm_attention` supports their blocks;
every other model of timm provides its pooled feature only.

Options: ``pretrained``, ``weights``, ``pool=own|token|avg|token+avg``, ``mean``, ``std``, ``size`` (positions are
interpolated); others are passed to the model's constructor.

Shapes: B batch, L tokens, D width.
"""

from __future__ import annotations

import inspect
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from torch import nn

from mopefuse.core import hub as _hub
from mopefuse.core.encoder_aliases import ALIASES
from mopefuse.core.error_codes import EncoderCode
from mopefuse.core.registry import Spec
from mopefuse.core.tensor_files import check_tensors
from mopefuse.encoders import _options, _weights
from mopefuse.encoders._options import option_flag
from mopefuse.encoders._prompted import PromptedEncoder
from mopefuse.encoders._timm_attention import prompt_model
from mopefuse.encoders.base import EncoderOutput, Inputs
from mopefuse.encoders.preprocess import ImagePreprocess
from mopefuse.errors import EncoderError, did_you_mean

_OURS = ("pretrained", "weights", "pool", "mean", "std", "size")
_POOLS = ("own", "token", "avg", "token+avg")
_NEVER = {
    "num_classes", "in_chans", "global_pool", "features_only", "out_indices", "checkpoint_path", "pretrained_cfg",
    "pretrained_cfg_overlay", "cache_dir", "scriptable", "exportable", "no_jit", "device", "dtype", "self",
}  # fmt: skip
_BUILDER = {"bn_eps", "bn_momentum", "bn_tf", "drop_rate", "img_size", "pad_type", "channel_multiplier"}


class TimmEncoder(PromptedEncoder):
    """A timm model. ``encode`` takes ``{"pixels": (B, 3, H, W)}``.

    Raises (on construction):
        EncoderError: unknown name or option, no safetensors weights, or a failed download.
        CheckpointError: ``weights`` is damaged, a pickle, or does not fit.
    """

    modality = "image"
    libraries = ("timm", "pillow")

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.backbone, self.spec, self.revision = _load(spec)
        self.feature_width = int(getattr(self.backbone, "head_hidden_size", None) or self.backbone.num_features)
        self.token_width = int(self.backbone.num_features)
        self._prefix = int(getattr(self.backbone, "num_prefix_tokens", 0))
        self._pool = _options.one_of(spec, "pool", "own", _POOLS if self._prefix else ("own", "avg"))
        if self._pool != "own":
            self.feature_width = self.token_width * (1 + ("+" in self._pool))
        self.preprocess = _preprocess(self.backbone, spec)
        prompt_model(self, self.backbone)

    def architecture(self) -> dict[str, Any]:
        """Describe the model's name without the tag of its weights, the constructor's options, and the pooling."""
        options = _options.library_options(self.spec, (*_OURS, "img_size"))  # `preprocess` describes the size
        return {"name": self.spec.name.partition(".")[0], "pool": self._pool, **options}

    @classmethod
    def check_name(cls, spec: Spec) -> None:
        """See `Encoder.check_name`."""
        _check_name(spec)

    def _run(self, inputs: Inputs) -> EncoderOutput:
        features = self.backbone.forward_features(inputs["pixels"])
        if features.dim() == 4:
            last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
            tokens_BLD = features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)
        else:
            tokens_BLD = features if features.dim() == 3 else features[:, None]
        if self._pool == "own":
            return EncoderOutput(self.backbone.forward_head(features, pre_logits=True), tokens_BLD, None)
        found = {"token": tokens_BLD[:, 0], "avg": tokens_BLD[:, self._prefix :].mean(dim=1)}
        return EncoderOutput(torch.cat([found[part] for part in self._pool.split("+")], dim=1), tokens_BLD, None)


def _load(spec: Spec) -> tuple[Any, Spec, str]:
    """Load the model without its classifier; also return the spec with the full name, and the commit of the weights."""
    _check_name(spec)
    pretrained = option_flag(spec, "pretrained", True) and "weights" not in spec.options
    path, commit = _fetch(spec) if pretrained else (None, "")
    overlay = {"file": str(path), "custom_load": False} if path else None
    size = _options.image_size(spec)
    model = _build(spec, pretrained, overlay, None if "weights" in spec.options else size)
    classifiers = model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    for name in classifiers:
        if isinstance(model.get_submodule(name), nn.Linear | nn.Conv2d):
            model.set_submodule(name, nn.Identity())
    if "weights" in spec.options:
        state = _weights.read_float(Path(os.path.expanduser(spec.options["weights"])))
        _weights.load_strictly(model, state, where=str(spec), unused_prefixes=[f"{name}." for name in classifiers])
        if size is not None:  # after loading: the file's positions are for the model's default size
            _set_size(spec, model, size)
    if size is not None:
        _try_size(spec, model, size)
    tag = model.pretrained_cfg.get("tag") if pretrained else None
    full = f"{spec.name}.{tag}" if tag and "." not in spec.name else spec.name
    return model, replace(spec, name=full), commit


def _check_name(spec: Spec) -> None:
    architecture, _, tag = spec.name.partition(".")
    if not timm.is_model(architecture):
        raise EncoderError(
            EncoderCode.UNKNOWN_MODEL,
            f"unknown timm model {spec.name!r}",
            where=str(spec),
            fix=did_you_mean(architecture, [*timm.list_models(), *ALIASES["timm"]]),
        )
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise EncoderError(
            EncoderCode.UNKNOWN_MODEL,
            f"timm has no weights {tag!r} of {architecture}",
            where=str(spec),
            fix=did_you_mean(tag, tags) or "add ?pretrained=false or ?weights=FILE",
        )


def _fetch(spec: Spec) -> tuple[Path, str]:
    """Fetch the safetensors file of a pretrained model; also return its commit. timm itself would fall back to a pickle."""
    config = timm.get_pretrained_cfg(spec.name)
    repo = getattr(config, "hf_hub_id", None)
    if not repo:
        raise _hub.no_safetensors_error(f"timm:{spec.name}", str(spec))
    repo = f"{repo}{spec.name if '.' in spec.name else f'{spec.name}.{config.tag}'}" if repo.endswith("/") else repo
    name = config.hf_hub_filename or "model.safetensors"
    safe = {"open_clip_pytorch_model.bin": "open_clip_model.safetensors", "pytorch_model.bin": "model.safetensors"}
    repo, _, revision = repo.partition("@")
    path = _hub.fetch(repo, safe.get(name, name), revision or None, where=str(spec))
    if path is None or path.suffix != ".safetensors":
        raise _hub.no_safetensors_error(repo, str(spec))
    check_tensors(path)
    return path, path.parent.name


def _set_size(spec: Spec, model: Any, size: tuple[int, int]) -> None:
    """Interpolate the positions of a model; one without positions (a CNN) supports any size."""
    if not hasattr(model, "set_input_size"):
        return
    stages = getattr(model, "layers", None)  # stages of a Swin, whose window size is kept
    windows = {} if stages is None else {"window_size": int(stages[0].blocks[0].window_size[0])}
    try:
        model.set_input_size(img_size=size, **windows)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise _options.cannot_resize(spec, error) from error


@torch.no_grad()
def _try_size(spec: Spec, model: Any, size: tuple[int, int]) -> None:
    """Check that the model runs on images of a size.

    Raises:
        EncoderError: it does not.
    """
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None:
        _options.require_patches(spec, size, int(patch[0]) if isinstance(patch, tuple) else int(patch))
    try:
        model.eval().forward_features(torch.zeros(1, 3, *size))
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise _options.cannot_resize(spec, error) from error


def _build(spec: Spec, pretrained: bool, overlay: dict[str, Any] | None, size: tuple[int, int] | None) -> Any:
    options = _options.library_options(spec, _OURS)
    if size is not None and "img_size" in _accepted(timm.create_model(spec.name.partition(".")[0])):
        options["img_size"] = size
    for key in options:
        if key in _NEVER:
            raise _options.unknown_option(spec, key, _accepted(timm.create_model(spec.name)))
    try:
        model = timm.create_model(spec.name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if not options:
            raise
        accepted = _accepted(timm.create_model(spec.name))
        for key in set(options) - accepted:
            raise _options.unknown_option(spec, key, accepted) from error
        raise EncoderError(
            EncoderCode.CANNOT_BUILD,
            f"timm cannot build {spec.name} with {options}: {error}",
            where=str(spec),
            fix="remove these options from the spec",
        ) from error
    for key in set(options) - _accepted(model):  # silently ignored by timm
        raise _options.unknown_option(spec, key, _accepted(model))
    return model


def _accepted(model: nn.Module) -> set[str]:
    """Options that the constructor of a model accepts."""
    names = {
        name
        for kind in type(model).__mro__
        if "__init__" in vars(kind) and kind.__module__.startswith("timm")
        for name, parameter in inspect.signature(vars(kind)["__init__"]).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    return (names | (_BUILDER - {"img_size"} if "img_size" not in names else _BUILDER)) - _NEVER


def _preprocess(model: Any, spec: Spec) -> ImagePreprocess:
    """Build preprocessing from the model's size, statistics and crop (`timm.data.resolve_model_data_config`)."""
    config = resolve_model_data_config(model)
    size = tuple(config["input_size"][1:])
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    requested = _options.image_size(spec)
    if requested is not None:
        size = requested
    elif "img_size" in spec.options and built_for is not None:
        size = (built_for, built_for) if isinstance(built_for, int) else tuple(built_for)
    scaled = tuple(math.floor(side / config["crop_pct"]) for side in size)
    shorter = size[0] == size[1] and config["crop_mode"] != "squash"
    return ImagePreprocess(
        size=(int(size[0]), int(size[1])),
        mean=_options.per_channel(spec, "mean", config["mean"]),
        std=_options.per_channel(spec, "std", config["std"]),
        resize=scaled[0] if shorter else (scaled[0], scaled[1]),
        interpolation=config["interpolation"],
    )
