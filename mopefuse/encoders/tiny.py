"""``tiny:vision`` and ``tiny:text``: two small transformers whose weights ship with the package, in two variants each.

They serve the digit questions task (`mopefuse.data.sets.digit_questions`) in minutes on a laptop without a network, and the
tests use them. ``scripts/pretrain_tiny.py`` pretrained each on its own modality alone: vision to read four coloured digits,
text to predict masked words. ``tiny:vision-b`` and ``tiny:text-b`` were pretrained with a different seed, so that an encoder
can be swapped for one of the same kind and size. ``tiny:vision-single`` has only seen one digit at a time: its pooled feature
of four digits answers no question about one of them, but its layers recognise a digit once prompts select it. Options:
``?pretrained=false`` for random weights, ``?pool=cls``, ``?pool=mean`` or ``?pool=cls+mean`` for the pooled feature.

Plain pre-norm transformers (An image is worth 16x16 words, https://arxiv.org/abs/2010.11929, scaled down).
Shapes: B batch, L tokens ([CLS] first), P prompt tokens, D width, C = D width of the pooled feature, H heads.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from mopefuse.core.error_codes import EncoderCode
from mopefuse.core.registry import Spec
from mopefuse.encoders import _lora
from mopefuse.encoders._options import option_flag
from mopefuse.encoders._recompute import run_block
from mopefuse.encoders.attention import Prompt, attend, split_heads
from mopefuse.encoders.base import Encoder, EncoderOutput, Inputs
from mopefuse.encoders.pooling import mean_of
from mopefuse.encoders.preprocess import ImagePreprocess, TextPreprocess
from mopefuse.errors import EncoderError, did_you_mean
from mopefuse.modalities import tokens

WEIGHTS = resources.files("mopefuse.encoders") / "weights"
PAD, CLS, MASK, UNKNOWN = range(4)  # ids of the first words of the vocabulary
MAX_TOKENS = 32

_IMAGE, _PATCH = 16, 4


class Shape(NamedTuple):
    """Modality and dimensions of a tiny transformer."""

    modality: str
    width: int
    depth: int
    heads: int
    pool: str  # default of the option `pool`


_VISION, _TEXT = Shape("image", 96, 4, 4, "cls"), Shape("text", 96, 2, 4, "mean")
SHAPES = {"vision": _VISION, "text": _TEXT, "vision-b": _VISION, "text-b": _TEXT, "vision-single": _VISION}


@cache
def words() -> tokens.Words:
    """Word-level tokenizer with the vocabulary of the package."""
    text = (WEIGHTS / "tiny-text-vocabulary.txt").read_text(encoding="utf-8")
    return tokens.Words(tuple(text.split()), begin_id=CLS, unknown_id=UNKNOWN, pad_id=PAD)


def vocabulary() -> dict[str, int]:
    """Ids by word; the first four are special."""
    return words().ids


def tokenize(texts: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Tokenize texts into [CLS] and words: ids (B, L) and mask (B, L), False for padding."""
    ids, mask = tokens.pad(words().rows(texts, max_tokens), PAD)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def save_tokenizer(file: Path) -> dict[str, Any]:
    """Describe the tokenizer, including its words; writes no file. See `TextPreprocess.save`."""
    return {"kind": "words", **asdict(words())}


class Block(nn.Module):
    """A pre-norm transformer block. A prompt is normed like tokens and contributes keys and values only."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor, mask: Tensor | None = None, prompt: Prompt | None = None) -> Tensor:
        """Compute output tokens (B, L, D).

        Args:
            mask: boolean, broadcastable to (B, H, L, L).
        """
        read_BLD = self.norm1(x_BLD) if prompt is None else prompt.modulate(self.norm1(x_BLD))
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(read_BLD).chunk(3, dim=-1))
        if prompt is None or not prompt.tokens_BPD.shape[1]:
            attended_BHLE = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            keys_values = self._keys_values(prompt.tokens_BPD)
            attended_BHLE = attend(
                q, k, v, *keys_values, gate_H=prompt.gate_H, mask=mask, prompt_mask_BP=prompt.mask_BP
            )
        x_BLD = x_BLD + self.proj(attended_BHLE.transpose(1, 2).flatten(2))
        out_BLD: Tensor = x_BLD + self.fc2(F.gelu(self.fc1(self.norm2(x_BLD))))
        return out_BLD

    def _keys_values(self, tokens_BPD: Tensor) -> tuple[Tensor, Tensor]:
        _, keys, values = self.qkv(self.norm1(tokens_BPD)).chunk(3, dim=-1)
        return split_heads(keys, self.heads), split_heads(values, self.heads)


class PatchEmbed(nn.Module):
    """Embeds images (B, 3, 16, 16) as [CLS] and 16 patches of 4 x 4 pixels, row by row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patch = nn.Linear(3 * _PATCH**2, width)
        self.cls_D = nn.Parameter(torch.randn(width) * 0.02)
        self.position_LD = nn.Parameter(torch.randn(1 + (_IMAGE // _PATCH) ** 2, width) * 0.02)

    def forward(self, inputs: Inputs) -> tuple[Tensor, None]:
        """Return tokens (B, 17, D) and no mask."""
        patches_BL = F.unfold(inputs["pixels"], _PATCH, stride=_PATCH).transpose(1, 2)
        tokens_BLD = self.patch(patches_BL)
        cls_B1D = self.cls_D.expand(tokens_BLD.shape[0], 1, -1)
        return torch.cat([cls_B1D, tokens_BLD], dim=1) + self.position_LD, None


class WordEmbed(nn.Module):
    """Embeds word ids (B, L), [CLS] first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.word = nn.Embedding(len(vocabulary()), width)
        self.position_LD = nn.Parameter(torch.randn(MAX_TOKENS, width) * 0.02)
        nn.init.normal_(self.word.weight, std=0.02)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Return tokens (B, L, D) and their mask (B, L)."""
        ids_BL = inputs["ids"]
        return self.word(ids_BL) + self.position_LD[: ids_BL.shape[1]], inputs["mask"]


class TinyEncoder(Encoder):
    """One of `SHAPES`.

    Raises:
        EncoderError: an unknown name, option or value of an option; missing or damaged weights.
    """

    libraries = ("pillow",)

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.check_name(spec)
        known = ("pretrained", "pool")
        for option in spec.options.keys() - set(known):
            raise EncoderError(
                EncoderCode.UNKNOWN_TINY_OPTION,
                f"tiny has no option {option!r}",
                where=str(spec),
                fix=did_you_mean(option, known),
            )
        shape = SHAPES[spec.name]
        self.pool = spec.options.get("pool", shape.pool)
        if self.pool not in ("cls", "mean", "cls+mean"):
            raise EncoderError(
                EncoderCode.BAD_TINY_POOLING,
                f"tiny has no pooling {self.pool!r}",
                where=str(spec),
                fix="use pool=cls, pool=mean or pool=cls+mean",
            )
        self.patch_size, self.supports_inserted_tokens = _PATCH, True
        self.leading_tokens = 1 if shape.modality == "image" else None
        self.modality, self.token_width = shape.modality, shape.width
        self.feature_width = shape.width * (1 + ("+" in self.pool))
        self.widths, self.heads = (shape.width,) * shape.depth, (shape.heads,) * shape.depth
        self.preprocess = _preprocess(shape.modality)
        self.embed = PatchEmbed(shape.width) if shape.modality == "image" else WordEmbed(shape.width)
        self.blocks = nn.ModuleList(Block(shape.width, shape.heads) for _ in range(shape.depth))
        self.norm = nn.LayerNorm(shape.width)
        self.lora_targets = _lora.names_of(self, (m for name, m in self.named_modules() if name.endswith(".qkv")))
        if option_flag(spec, "pretrained", True):
            self._load(f"tiny-{spec.name}.safetensors")

    def architecture(self) -> dict[str, Any]:
        """Describe the shape and the pooling."""
        return {**SHAPES[self.spec.name]._asdict(), "pool": self.pool}

    @classmethod
    def check_name(cls, spec: Spec) -> None:
        """See `Encoder.check_name`."""
        if spec.name not in SHAPES:
            raise EncoderError(
                EncoderCode.UNKNOWN_TINY_MODEL,
                f"unknown encoder tiny:{spec.name}",
                fix=did_you_mean(f"tiny:{spec.name}", [f"tiny:{name}" for name in SHAPES]),
            )

    def _encode(self, inputs: Inputs) -> EncoderOutput:
        x_BLD, mask_BL = self.embed(inputs)
        mask, all_BL, insert = None if mask_BL is None else mask_BL[:, None, None], mask_BL, self._call.insert
        if insert is not None:
            x_BLD, all_BL = insert.prepend_to(x_BLD), insert.extend_mask(mask_BL)
            mask = insert.attention_mask(mask, x_BLD.shape[1])
        first, x_BLD = self._resume(x_BLD)
        for layer, block in list(enumerate(self.blocks))[first:]:
            prompt = self._request_prompt(layer, x_BLD, all_BL)
            x_BLD = x_BLD if prompt is None else prompt.add_to(x_BLD)
            x_BLD = self._run_block(block, x_BLD, mask, prompt)
        if insert is not None:
            x_BLD = x_BLD[:, insert.tokens_BPD.shape[1] :]
        x_BLD = self.norm(x_BLD)
        return EncoderOutput(self._pooled(x_BLD, mask_BL), x_BLD, mask_BL)

    def _run_layer(self, layer: int, tokens_BLD: Tensor, mask_B11K: Tensor | None, prompt: Prompt | None) -> Tensor:
        return self._run_block(self.blocks[layer], tokens_BLD, mask_B11K, prompt)

    def _run_block(self, block: nn.Module, x_BLD: Tensor, mask: Tensor | None, prompt: Prompt | None) -> Tensor:
        out_BLD: Tensor = run_block(block, x_BLD, mask, prompt, recompute=self.recompute, trainable=self.trainable)
        return out_BLD

    def _pooled(self, x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        if self.pool == "cls":
            return x_BLD[:, 0]
        mean_BD = x_BLD.mean(dim=1) if mask_BL is None else mean_of(x_BLD, mask_BL)
        return mean_BD if self.pool == "mean" else torch.cat([x_BLD[:, 0], mean_BD], dim=1)

    def _load(self, file: str) -> None:
        try:
            tensors = load((WEIGHTS / file).read_bytes())
            self.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        except (OSError, SafetensorError, RuntimeError) as error:
            raise EncoderError(
                EncoderCode.WEIGHTS_UNREADABLE,
                f"cannot load the weights of {self.spec}: {error}",
                where=file,
                fix="reinstall mopefuse",
            ) from error


def _preprocess(modality: str) -> ImagePreprocess | TextPreprocess:
    if modality == "text":
        return TextPreprocess(tokenize, MAX_TOKENS, "words of tiny-text-vocabulary.txt", len(vocabulary()), save_tokenizer)
    size = (_IMAGE, _IMAGE)
    return ImagePreprocess(size, mean=(0.15, 0.15, 0.08), std=(0.3, 0.3, 0.25), resize=size)
