"""Prompts as the papers define them: tokens that are inserted into every layer and whose outputs are dropped.

`insert_prompts` rewires a plain library model; it shares no code with `mopefuse.encoders`. In Swin, tokens are inserted
into every window, one by one, with zero position bias and nothing masked. Where positions are rotations, the inserted are
among the tokens that the library does not rotate.

Shapes: B batch, L tokens, P prompt tokens, D width, W windows per image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HF_LAYERS = (
    "BertLayer", "RobertaLayer", "XLMRobertaLayer", "ElectraLayer", "TransformerBlock", "ViTLayer", "DeiTLayer",
    "CLIPEncoderLayer", "ModernBertEncoderLayer", "SiglipEncoderLayer", "BeitLayer", "Dinov2Layer", "Dinov2WithRegistersLayer",
    "DINOv3ViTLayer", "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "GPT2Block",
)  # fmt: skip
TIMM_LAYERS = ("Block", "ResPostBlock", "EvaBlock", "EvaBlockPostNorm", "SwinTransformerBlock", "SwinTransformerV2Block")


def insert_prompts(model: nn.Module, prompts: Sequence[Tensor]) -> nn.Module:
    """Return `model` with ``prompts[i]`` (B, P, D_i) inserted into its i-th layer; its own forward pass is unchanged."""
    names = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in (*HF_LAYERS, *TIMM_LAYERS, "ResidualAttentionBlock", "SwinLayer")
    ]
    shared = [module for module in model.modules() if type(module).__name__ == "AlbertLayer"]
    if shared:
        shared[0].forward = _Again(shared[0].forward, prompts)  # type: ignore[assignment]
        return model
    assert len(names) == len(prompts), names
    for name, prompt in zip(names, prompts, strict=True):
        layer: Any = model.get_submodule(name)
        if type(layer).__name__ == "SwinTransformerBlock":
            layer.attn = _InWindows(layer.attn, layer.norm1(prompt))
        elif type(layer).__name__ == "SwinTransformerV2Block":
            layer.attn = _InWindows(layer.attn, prompt)
        elif type(layer).__name__ == "SwinLayer":
            layer.attention = _InWindows(layer.attention, layer.layernorm_before(prompt))
        else:
            model.set_submodule(name, _InSequence(layer, prompt))
    return model


class _Again:
    """The forward pass of a layer that runs several times, each time with the next prompt."""

    def __init__(self, own: Any, prompts: Sequence[Tensor]) -> None:
        self.own, self.left = own, list(prompts)

    def __call__(self, x_BLD: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
        layer = _InSequence(self.own, self.left.pop(0))
        return layer(x_BLD, mask, **kwargs)


class _InSequence(nn.Module):
    """A layer over [prompt; tokens] that returns only the tokens."""

    def __init__(self, layer: Any, prompt_BPD: Tensor) -> None:
        super().__init__()
        self.layer, self.prompt_BPD = layer, prompt_BPD
        if getattr(layer, "relative_position_bias", None) is not None:  # BEiT in transformers
            layer.relative_position_bias.register_forward_hook(lambda module, args, out: self._padded(out))
        attention: Any = getattr(layer, "attn", None)
        if hasattr(attention, "num_prefix_tokens"):
            attention.num_prefix_tokens += prompt_BPD.shape[1]
        if getattr(attention, "relative_position_bias_table", None) is not None:
            padded = self._padded(attention._get_rel_pos_bias())
            attention._get_rel_pos_bias = lambda: padded

    def __getattr__(self, name: str) -> Any:
        """Look up what the model reads from its layers."""
        return super().__getattr__(name) if name in ("layer", "_modules") else getattr(super().__getattr__("layer"), name)

    def forward(self, x_BLD: Tensor, *args: Any, **kwargs: Any) -> Any:
        count, length = self.prompt_BPD.shape[1], x_BLD.shape[1]
        args = tuple(self._padded(arg) for arg in args)
        kwargs = {key: value if key == "rope" else self._padded(value) for key, value in kwargs.items()}
        if kwargs.get("is_causal"):  # transformers: a flag in place of the mask
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            kwargs["is_causal"] = False
            if not any(isinstance(arg, Tensor) for arg in args):
                args = (self._padded(causal[None, None]),)
        out = self.layer(torch.cat([self.prompt_BPD, x_BLD], dim=1), *args, **kwargs)
        return out[:, count:] if isinstance(out, Tensor) else (out[0][:, count:], *out[1:])

    def get_weight_dtype(self) -> torch.dtype:
        """Called by open_clip on its first block."""
        return torch.float32

    def _padded(self, mask: Any) -> Any:
        """Extend square masks: every token attends to the prompt; rows of the prompt do not matter, as its outputs are dropped.

        A pair of cosines and sines turns tokens to their positions, and a prompt by nothing.
        """
        if isinstance(mask, tuple) and len(mask) == 2 and all(isinstance(part, Tensor) for part in mask):
            cosine, sine = mask
            count = self.prompt_BPD.shape[1]
            return F.pad(cosine, (0, 0, count, 0), value=1.0), F.pad(sine, (0, 0, count, 0))
        if not isinstance(mask, Tensor) or mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
            return mask
        count = self.prompt_BPD.shape[1]
        return F.pad(mask, (count, 0, count, 0), value=1.0 if mask.dtype == torch.bool else 0.0)


class _InWindows(nn.Module):
    """Window attention over [prompt; window] for every window of every image, one by one."""

    def __init__(self, attention: Any, normed_BPD: Tensor) -> None:
        super().__init__()
        self.attention, self.normed_BPD = attention, normed_BPD

    def forward(self, x_NLD: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
        batch, count = self.normed_BPD.shape[:2]
        windows = x_NLD.shape[0] // batch
        outs = []
        for number, window_LD in enumerate(x_NLD):
            row = torch.cat([self.normed_BPD[number // windows], window_LD])[None]
            shift = None if mask is None else F.pad(mask[None, number % windows], (count, 0, count, 0))
            outs.append(self._one(row, shift, count, **kwargs))
        out = torch.cat(outs)[:, count:]
        return out if type(self.attention).__name__ == "WindowAttention" else (out, None)

    def _one(self, row: Tensor, shift: Tensor | None, count: int, **kwargs: Any) -> Tensor:
        if hasattr(self.attention, "cpb_mlp"):
            return self._one_v2(row, shift, count)
        timm = type(self.attention).__name__ == "WindowAttention"
        own = self.attention._get_rel_pos_bias if timm else self.attention.relative_position_bias
        padded = F.pad(own(), (count, 0, count, 0))
        if timm:
            self.attention._get_rel_pos_bias = lambda: padded
        else:
            self.attention.relative_position_bias = _Fixed(padded)
        try:
            out = self.attention(row, shift, **kwargs)
        finally:
            if timm:
                del self.attention._get_rel_pos_bias
            else:
                self.attention.relative_position_bias = own
        attended: Tensor = out if isinstance(out, Tensor) else out[0]
        return attended


    def _one_v2(self, row: Tensor, shift: Tensor | None, count: int) -> Tensor:
        """Attend within one window. In timm's Swin V2, all pairs of positions look up a bias: inserted tokens use one that its
        sigmoid makes 0."""
        own = self.attention
        places = (own.cpb_mlp, own.relative_position_index, own.window_size)
        table = own.cpb_mlp(own.relative_coords_table).flatten(0, 2)
        own.cpb_mlp = _Fixed(torch.cat([table, torch.full_like(table[:1], -torch.inf)]))
        own.relative_position_index = F.pad(own.relative_position_index, (count, 0, count, 0), value=len(table))
        own.window_size = (1, row.shape[1])
        try:
            attended: Tensor = own(row, shift)
        finally:
            own.cpb_mlp, own.relative_position_index, own.window_size = places
        return attended


class _Fixed(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *args: Any) -> Tensor:
        return self.value
