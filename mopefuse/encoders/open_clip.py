"""Towers of open_clip: ``open_clip:ViT-B-32/laion2b_s34b_b79k#visual``, ``open_clip:ViT-B-32#text?pretrained=false``.

A tower's pooled feature is its output including the projection. The text tower takes ids of its full context length, as in
pretraining. In CLIP the causal mask keeps padding from affecting the pooled end-of-text token; SigLIP attends to padding
and pools the last token. Ungated prompts are passed to the block's ``nn.MultiheadAttention`` as additional keys and values;
the contribution of gated prompts is added to its output, so that a gate of 0 leaves the output unchanged for any kernel. A
visual tower that is a model of timm (as SigLIP's) is prompted like ``timm:`` encoders.

Options: ``pretrained``, ``weights``, ``max_tokens`` (text), ``size`` (images; positions are interpolated, as with open_clip's
``force_image_size``), ``force_quick_gelu`` as in open_clip.

Shapes: B batch, L tokens, P prompt tokens, D width, H heads, E width of a head.
"""

from __future__ import annotations

import copy
import os
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.factory import load_checkpoint
from open_clip.model import resize_pos_embed
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor

from mopefuse.core import hub as _hub
from mopefuse.core.error_codes import EncoderCode
from mopefuse.core.registry import Spec
from mopefuse.core.tensor_files import check_tensors
from mopefuse.encoders import _open_clip_text, _options, _weights
from mopefuse.encoders._options import option_flag
from mopefuse.encoders._prompted import PromptedEncoder
from mopefuse.encoders._timm_attention import prompt_model
from mopefuse.encoders.attention import Modulation, Prompt, attend_prompts, split_heads
from mopefuse.encoders.base import EncoderOutput, Inputs
from mopefuse.encoders.preprocess import ImagePreprocess
from mopefuse.errors import EncoderError, did_you_mean

_OURS = ("pretrained", "weights", "max_tokens")
_TOWERS = {"visual": "image", "text": "text"}
_CONFIGS = {"visual": "vision_cfg", "text": "text_cfg"}


class OpenCLIPEncoder(PromptedEncoder):
    """One tower of an open_clip model. ``encode`` takes ``{"pixels": (B, 3, H, W)}`` or ``{"ids", "mask": (B, L)}``.

    Raises (on construction):
        EncoderError: unknown model, tag, tower or option, no safetensors weights, or a failed download.
        CheckpointError: ``weights`` is damaged, a pickle, or does not fit.
    """

    libraries = ("open-clip-torch", "timm", "tokenizers", "transformers", "pillow")

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        name, tag, tower = _parse(spec)
        self.modality = _TOWERS[tower]
        config, statistics = _config(spec, name, tag, tower)
        self._architecture = {"tower": tower, **{key: config[key] for key in ("embed_dim", "quick_gelu", _CONFIGS[tower])}}
        model, self.revision = _load(spec, config, name, tag)
        self.backbone: Any = getattr(model, tower)
        if "weights" in spec.options:
            state = _weights.read_float(Path(os.path.expanduser(spec.options["weights"])))
            whole = f"{tower}."
            if any(key.startswith(whole) for key in state):
                state = {key.removeprefix(whole): tensor for key, tensor in state.items() if key.startswith(whole)}
            if tower == "visual" and "size" in spec.options:
                state = _interpolate_positions(state, model)
            _weights.load_strictly(self.backbone, state, where=str(spec))
        if hasattr(self.backbone, "output_tokens"):
            self.backbone.output_tokens = True
        self.feature_width = int(config["embed_dim"])
        if self.modality == "text":
            trained = not _random(spec) or "weights" in spec.options
            length = int(self.backbone.context_length)
            self.preprocess = _open_clip_text.texts(spec, name, config["text_cfg"], length, trained=trained)
        else:
            self.preprocess = _image_preprocess(spec, self.backbone, statistics)
        if isinstance(self.backbone, TimmModel):
            prompt_model(self, self.backbone.trunk)
            self.token_width = self.widths[-1] if self.widths else 0
        else:
            self._prompt_tower()

    def architecture(self) -> dict[str, Any]:
        """Describe the tower's configuration with options applied."""
        return self._architecture

    @classmethod
    def check_name(cls, spec: Spec) -> None:
        """See `Encoder.check_name`."""
        _parse(spec)

    def _prompt_tower(self) -> None:
        blocks, self.unpromptable_reason = _promptable(self.backbone)
        slots = self._prompt_blocks(blocks, [block.ln_1 for block in blocks])
        for block, slot in zip(blocks, slots, strict=True):
            block.prompt_slot = slot
            block.attention = partial(_attention, block)
        self.patch_size = int(getattr(self.backbone, "patch_size", (self.patch_size,))[0])
        self.widths = tuple(int(block.attn.embed_dim) for block in blocks)
        self.heads = tuple(int(block.attn.num_heads) for block in blocks)
        if blocks and getattr(self.backbone, "attn_pool", None) is None:
            self.token_width = self.widths[-1]

    def _run(self, inputs: Inputs) -> EncoderOutput:
        if self.modality == "text":
            self._call.mask_BL = inputs["mask"]
            pooled_BC, tokens_BLD = self.backbone(inputs["ids"])
            return EncoderOutput(pooled_BC, tokens_BLD, inputs["mask"])
        if isinstance(self.backbone, TimmModel) and self.widths:
            features = self.backbone.trunk.forward_features(inputs["pixels"])
            pooled_BC = self.backbone.head(self.backbone.trunk.forward_head(features))
            return EncoderOutput(pooled_BC, features.flatten(1, -2), None)
        out = self.backbone(inputs["pixels"])
        pooled_BC, tokens = out if isinstance(out, tuple) else (out, out[:, None])
        return EncoderOutput(pooled_BC, tokens, None)


def _interpolate_positions(state: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Interpolate the positions among a visual tower's weights to the model's image size."""
    whole = {f"visual.{key}": tensor for key, tensor in state.items()}
    resize_pos_embed(whole, model)
    return {key.removeprefix("visual."): tensor for key, tensor in whole.items()}


def _attention(
    self: Any, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
) -> Tensor:
    """`ResidualAttentionBlock.attention` with the prompt in the slot."""
    prompt: Prompt | None = self.prompt_slot.pop()
    modulation: Modulation | None = self.prompt_slot.pop_modulation()
    q_x = q_x if modulation is None else modulation.apply(q_x)
    if prompt is None or prompt.gate_H is not None:
        out: Tensor = ResidualAttentionBlock.attention(self, q_x=q_x, k_x=k_x, v_x=v_x, attn_mask=attn_mask)
        return out if prompt is None else out + _attend_gated(self.attn, q_x, prompt)
    kv_x = torch.cat([prompt.tokens_BPD, q_x], dim=1)
    mask = None if attn_mask is None else F.pad(attn_mask.to(q_x.dtype), (prompt.tokens_BPD.shape[1], 0))
    hidden_BK: Tensor | None = None  # added to the scores of keys
    if prompt.mask_BP is not None:
        visible_BK = F.pad(prompt.mask_BP, (0, q_x.shape[1]), value=True)
        hidden_BK = torch.zeros_like(visible_BK, dtype=q_x.dtype).masked_fill(~visible_BK, -torch.inf)
    attended: Tensor = self.attn(q_x, kv_x, kv_x, need_weights=False, attn_mask=mask, key_padding_mask=hidden_BK)[0]
    return attended


def _attend_gated(attn: Any, x_BLD: Tensor, prompt: Prompt) -> Tensor:
    """Compute the term that gated prompts add to the attention's output, whose projection is linear: (B, L, D)."""
    assert prompt.gate_H is not None
    query_weight, kv_weight = attn.in_proj_weight.split([attn.embed_dim, 2 * attn.embed_dim])
    query_bias, kv_bias = attn.in_proj_bias.split([attn.embed_dim, 2 * attn.embed_dim])
    q = split_heads(F.linear(x_BLD, query_weight, query_bias), attn.num_heads)
    k, v = (split_heads(p, attn.num_heads) for p in F.linear(prompt.tokens_BPD, kv_weight, kv_bias).chunk(2, dim=-1))
    added = attend_prompts(q, k, v, prompt.gate_H, mask_BP=prompt.mask_BP).transpose(1, 2).flatten(2)
    return F.linear(added, attn.out_proj.weight)


def _promptable(tower: Any) -> tuple[list[Any], str]:
    """Find the promptable blocks, in order; if there are none, return the reason."""
    known = type(tower) is VisionTransformer or (type(tower) is TextTransformer and tower.cls_emb is None)
    blocks = list(tower.transformer.resblocks) if known else []
    if blocks and all(type(block) is ResidualAttentionBlock for block in blocks):
        return blocks, ""
    return [], f"has a tower that cannot be prompted ({type(tower).__name__}); usable as --comp (pooled feature)"


def _parse(spec: Spec) -> tuple[str, str, str]:
    """Split a spec's name into model, tag of its weights and tower."""
    model, _, tower = spec.name.partition("#")
    name, _, tag = model.partition("/")
    if tower not in _TOWERS:
        raise EncoderError(
            EncoderCode.TOWER_NOT_NAMED,
            f"{spec.name} names no tower",
            where=str(spec),
            fix=f"write {spec.scheme}:{model}#visual or {spec.scheme}:{model}#text",
        )
    if name not in open_clip.list_models():
        raise EncoderError(
            EncoderCode.UNKNOWN_MODEL,
            f"unknown open_clip model {name!r}",
            where=str(spec),
            fix=did_you_mean(name, open_clip.list_models()),
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags and not _random(spec):
        raise EncoderError(
            EncoderCode.UNKNOWN_MODEL,
            f"open_clip has no weights {tag!r} of {name}" if tag else f"{spec.name} names no weights",
            where=str(spec),
            fix=(did_you_mean(tag, tags) if tags else "") or "add ?pretrained=false or ?weights=FILE",
        )
    return name, tag, tower


def _random(spec: Spec) -> bool:
    return not option_flag(spec, "pretrained", True) or "weights" in spec.options


def _config(spec: Spec, name: str, tag: str, tower: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load the model's configuration with options applied, and the statistics of its images."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    statistics = open_clip.get_pretrained_cfg(name, tag) or {
        "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic", "resize_mode": "shortest",
    }  # fmt: skip
    text = config["text_cfg"]
    why = "needs a text model that open_clip does not bundle" if text.get("hf_model_name") else ""
    why = why or ("has a decoder" if "multimodal_cfg" in config else "")
    why = why or (_open_clip_text.find_unsupported_setting(text) if tower == "text" else "")
    if why:
        fix = "use a CLIP or SigLIP model with open_clip's own text tower, or the same encoder through hf: or timm:"
        raise EncoderError(EncoderCode.UNSUITABLE, f"{name}#{tower} {why}", where=str(spec), fix=fix)
    options = _options.library_options(spec, ("pretrained", "weights"))
    own = ("max_tokens",) if tower == "text" else ("size", "force_image_size")
    accepted = ("pretrained", "weights", "force_quick_gelu", *own)
    for key in options:
        if key not in accepted:
            raise _options.unknown_option(spec, key, accepted)
    size = _options.image_size(spec)
    if size is not None or "force_image_size" in options:
        config["vision_cfg"]["image_size"] = size or options["force_image_size"]
        patch = config["vision_cfg"].get("patch_size")
        if size is not None and isinstance(patch, int):
            _options.require_patches(spec, size, patch)
    quick = statistics.get("quick_gelu", config.get("quick_gelu", False))
    config["quick_gelu"] = bool(options.get("force_quick_gelu", quick))
    config.pop("custom_text", None)
    return config, statistics


def _load(spec: Spec, config: dict[str, Any], name: str, tag: str) -> tuple[Any, str]:
    """Build the model; also return the commit of its weights."""
    path = None if _random(spec) else _fetch(spec, name, tag)
    try:
        model = open_clip.CustomTextCLIP(**config)
        if path is not None:
            load_checkpoint(model, str(path))
        if {"size", "force_image_size"} & spec.options.keys() and isinstance(model.visual, TimmModel):
            model.visual.set_input_size(config["vision_cfg"]["image_size"])  # its constructor does not resize the trunk
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise EncoderError(
            EncoderCode.CANNOT_BUILD,
            f"open_clip cannot build {name}: {error}",
            where=str(spec),
            fix="remove the options after ? from the spec",
        ) from error
    return model, path.parent.name if path else ""


def _fetch(spec: Spec, name: str, tag: str) -> Path:
    """Fetch the safetensors file of a tag. open_clip itself would fall back to a pickle."""
    hub = open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "")
    repo, _, filename = hub.rpartition("/") if hub.count("/") > 1 else (hub, "", "")
    wanted = [Path(filename).with_suffix(".safetensors").name] if filename else []
    for candidate in [*wanted, "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"] if repo else []:
        path = _hub.fetch(repo, candidate, where=str(spec))
        if path is not None:
            check_tensors(path)
            return path
    raise _hub.no_safetensors_error(repo or f"{name}/{tag}", str(spec))


def _image_preprocess(spec: Spec, tower: Any, statistics: dict[str, Any]) -> ImagePreprocess:
    """Build preprocessing from the tower's size and the statistics of its weights."""
    side = tower.image_size
    size = (int(side), int(side)) if isinstance(side, int) else (int(side[0]), int(side[1]))
    mode = statistics["resize_mode"]
    if mode not in ("shortest", "squash"):
        what = f"{spec.name} has the unsupported resize mode {mode!r}"
        raise EncoderError(EncoderCode.UNSUITABLE, what, where=str(spec), fix="use weights with resize mode shortest or squash")
    shorter = mode == "shortest" and size[0] == size[1]
    mean, std = statistics["mean"], statistics["std"]
    return ImagePreprocess(
        size=size,
        mean=(mean[0], mean[1], mean[2]),
        std=(std[0], std[1], std[2]),
        resize=size[0] if shorter else size,
        interpolation="bicubic" if statistics["interpolation"] == "random" else statistics["interpolation"],
    )
