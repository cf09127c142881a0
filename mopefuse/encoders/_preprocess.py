"""Preprocessing that the families share: images by an encoder's own size and statistics, texts by its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

_CHARACTERS_PER_TOKEN = 32  # texts are cut to this many characters per token before they are tokenized
_MOST_RATIO = 50  # of the sides of an image; of a longer strip only the middle is resized
_UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class ImagePreprocess:
    """Resize (shorter side to `resize`, or both sides when it is a pair), centre crop to `size`, scale, normalise.

    Augmentation has its place after `reduce` and before `ready`.

    Args:
        size: (height, width) in pixels of what the encoder sees.
        mean, std: per channel, of values scaled to 0..1.
        resize: shorter side in pixels, or (height, width) to be squeezed to.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: int | tuple[int, int]
    interpolation: str = "bicubic"

    def item(self, value: Image.Image) -> Tensor:
        """An image to a (H, W, 3) tensor of 8 bits, which batches small; `finish` normalises it where the encoder is."""
        return self.ready(self.reduce(value))

    def reduce(self, value: Image.Image) -> NDArray[np.uint8]:
        """All of an image that any crop of it needs, resized: what can be kept on disk. (h, w, 3), not yet cropped."""
        image, size = value.convert("RGB"), [self.resize] if isinstance(self.resize, int) else list(self.resize)
        if isinstance(self.resize, int) and max(image.size) > _MOST_RATIO * min(image.size):
            # A strip would grow to gigabytes when its short side is scaled up; only its middle is ever seen.
            most = _MOST_RATIO * min(image.size)
            image = TF.center_crop(image, [min(image.height, most), min(image.width, most)])
        return np.asarray(TF.resize(image, size, v2.InterpolationMode(self.interpolation), antialias=True))

    def ready(self, reduced: NDArray[np.uint8]) -> Tensor:
        """The centre of what `reduce` gave, perhaps augmented since, at the size that the encoder sees."""
        (height, width), (h, w) = self.size, reduced.shape[:2]
        if h < height or w < width:
            reduced = np.asarray(TF.center_crop(Image.fromarray(reduced), [height, width]))  # pads with black
            h, w = height, width
        top, left = round((h - height) / 2), round((w - width) / 2)
        return torch.from_numpy(np.array(reduced[top : top + height, left : left + width]))

    def batch(self, items: Sequence[Tensor]) -> dict[str, Tensor]:
        """``{"pixels": (B, H, W, 3)}`` of 8 bits."""
        return {"pixels": torch.stack(list(items))}

    def finish(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"pixels": (B, 3, H, W)}``, floats, normalised; those that are floats already stay as they are."""
        pixels = inputs["pixels"]
        if pixels.dtype != torch.uint8:
            return dict(inputs)
        scaled = TF.to_dtype(pixels.permute(0, 3, 1, 2).contiguous(), torch.float32, scale=True)
        normalised: Tensor = TF.normalize(scaled, list(self.mean), list(self.std), inplace=True)
        return {**inputs, "pixels": normalised}

    def describe(self) -> dict[str, Any]:
        """Sizes in pixels, statistics of values in 0..1."""
        return {
            "modality": "image",
            "size": list(self.size),
            "resize": self.resize if isinstance(self.resize, int) else list(self.resize),
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }


Tokenize = Callable[[list[str], int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TextPreprocess:
    """Cut in characters, make readable, tokenize and pad a batch.

    Args:
        tokenize: (texts, most tokens) to ids (B, L) and mask (B, L), True where a token is real.
        max_tokens: most tokens of one text, special ones included.
    """

    tokenize: Tokenize
    max_tokens: int
    name: str = ""

    def item(self, value: str) -> str:
        """A text that any tokenizer takes: lone surrogates and control characters become U+FFFD."""
        return self.reduce(value)

    def reduce(self, value: str) -> str:
        """All of a text that can matter: cut in characters before it is tokenized, and made readable."""
        return _UNREADABLE.sub("\ufffd", value[: _CHARACTERS_PER_TOKEN * self.max_tokens])

    def ready(self, reduced: str) -> str:
        """The text as it is; tokens are made of a whole batch."""
        return reduced

    def batch(self, items: Sequence[str]) -> dict[str, Tensor]:
        """``{"ids": (B, L), "mask": (B, L)}``, padded to the longest text of the batch."""
        ids, mask = self.tokenize(list(items), self.max_tokens)
        return {"ids": ids, "mask": mask.bool()}

    def finish(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tokens as they are."""
        return dict(inputs)

    def describe(self) -> dict[str, Any]:
        """The tokenizer's name and the most tokens of one text."""
        return {"modality": "text", "tokenizer": self.name, "max_tokens": self.max_tokens}
