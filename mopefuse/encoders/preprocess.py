"""Preprocessing shared by all families: images with an encoder's size and statistics, texts with its tokenizer.

Shapes: B batch, H and W height and width in pixels, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mopefuse.errors import EncoderError
from mopefuse.modalities import pixels, tokens


@dataclass(frozen=True)
class ImagePreprocess:
    """Resizes (the shorter side to `resize`, or both sides if it is a pair), centre-crops to `size`, scales, normalises.

    Augmentation is applied between `reduce` and `ready`.

    Attributes:
        size: (height, width) of the encoder's input, in pixels.
        mean, std: per channel, of values scaled to 0..1.
        resize: shorter side in pixels, or (height, width) without keeping the aspect ratio.
        interpolation: name of a Pillow filter.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: int | tuple[int, int]
    interpolation: str = "bicubic"

    def item(self, value: Image.Image) -> Tensor:
        """Convert an image to a uint8 tensor (H, W, 3); it stays 8-bit until `finish` normalises it on the device."""
        return self.ready(self.reduce(value))

    def reduce(self, value: Image.Image) -> NDArray[np.uint8]:
        """Resize an image without cropping it: uint8 array (height, width, 3), which may be cached."""
        return pixels.shrink(value.convert("RGB"), self.resize, self.interpolation)

    def ready(self, reduced: NDArray[np.uint8]) -> Tensor:
        """Crop the centre of a resized and possibly augmented image: (H, W, 3)."""
        return torch.from_numpy(pixels.centre(reduced, self.size).copy())

    def batch(self, items: Sequence[Tensor]) -> dict[str, Tensor]:
        """Stack images: ``{"pixels": (B, H, W, 3)}``, uint8."""
        return {"pixels": torch.stack(list(items))}

    def finish(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Normalise uint8 pixels: ``{"pixels": (B, 3, H, W)}``; floating-point pixels are returned unchanged."""
        images = inputs["pixels"]
        if images.dtype != torch.uint8:
            return dict(inputs)
        scaled = images.permute(0, 3, 1, 2).contiguous().float().mul_(1 / 255)
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return {**inputs, "pixels": scaled.sub_(mean).div_(std)}

    def describe(self) -> dict[str, Any]:
        """Describe sizes in pixels and statistics of values in 0..1."""
        return {
            "modality": "image",
            "size": list(self.size),
            "resize": self.resize if isinstance(self.resize, int) else list(self.resize),
            "interpolation": self.interpolation,
            "mean": list(self.mean),
            "std": list(self.std),
        }


_EXAMPLES = (
    "", "a", "A photo of two cats.", "Don't STOP: naïve café, Straße!", "  several   spaces\tand\nlines ", "3.14 is not 1,000",
    "internationalisation antidisestablishmentarianism", "日本語のテキスト", "мир и война", "emoji 🎉👩‍👩‍👧",
    "<s> [CLS] </s> <|endoftext|>", " ".join(["word"] * 1024),
)  # fmt: skip
Tokenize = Callable[[list[str], int], tuple[Tensor, Tensor]]
Save = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class TextPreprocess:
    """Truncates texts by characters, replaces unreadable characters, tokenizes and pads a batch.

    Attributes:
        tokenize: maps texts and a maximum number of tokens to ids (B, L) and mask (B, L), False for padding.
        max_tokens: maximum number of tokens of a text, including special ones.
        name: name of the tokenizer.
        vocabulary: size of the vocabulary; ids are below it.
        save: writes what `mopefuse.inference.bundle` needs to tokenize in the same way to a file, and returns its
            description for preprocess.json; None if that is not possible, so that the encoder cannot be exported.
        length: fixed length to which every text is padded; None for the longest of the batch.
    """

    tokenize: Tokenize
    max_tokens: int
    name: str = ""
    vocabulary: int = 0
    save: Save | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        self.tokenize(["a"], self.max_tokens)  # libraries initialise a tokenizer on first use, which is not thread-safe

    def item(self, value: str) -> str:
        """Prepare one text: truncate it, and replace lone surrogates and control characters by U+FFFD."""
        return self.reduce(value)

    def reduce(self, value: str) -> str:
        """Truncate a text to the characters that `max_tokens` can cover, and replace unreadable characters."""
        return tokens.readable(value, self.max_tokens)

    def ready(self, reduced: str) -> str:
        """Return the text unchanged; `batch` tokenizes it."""
        return reduced

    def batch(self, items: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize texts: ``{"ids": (B, L), "mask": (B, L)}``, padded to `length` or to the longest text."""
        ids, mask = self.tokenize(list(items), self.max_tokens)
        return {"ids": ids, "mask": mask.bool()}

    def finish(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs unchanged."""
        return dict(inputs)

    def digests(self) -> dict[str, str]:
        """Identify the tokenizer: digests of the ids of example texts, and of its saved state if it can be saved."""
        found = {"examples": hashlib.sha256()}
        for tensor in self.batch([self.item(text) for text in _EXAMPLES]).values():
            found["examples"].update(f"{tuple(tensor.shape)}".encode() + tensor.long().numpy().tobytes())
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tokenizer"
            try:
                facts = {} if self.save is None else self.save(file)
            except EncoderError:  # a tokenizer in Python cannot be saved and is identified by the examples alone
                facts = {}
            if facts:
                content = json.dumps(facts, sort_keys=True, default=str).encode()
                found["state"] = hashlib.sha256(content + (file.read_bytes() if file.is_file() else b""))
        return {name: digest.hexdigest()[:16] for name, digest in found.items()}

    def describe(self) -> dict[str, Any]:
        """Describe the tokenizer by its name and `max_tokens`."""
        return {"modality": "text", "tokenizer": self.name, "max_tokens": self.max_tokens}
