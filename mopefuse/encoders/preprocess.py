"""Preprocessing that the families share: images by an encoder's own size and statistics, texts by its tokenizer."""

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
        return pixels.shrink(value.convert("RGB"), self.resize, self.interpolation)

    def ready(self, reduced: NDArray[np.uint8]) -> Tensor:
        """The centre of what `reduce` gave, perhaps augmented since, at the size that the encoder sees."""
        return torch.from_numpy(pixels.centre(reduced, self.size).copy())

    def batch(self, items: Sequence[Tensor]) -> dict[str, Tensor]:
        """``{"pixels": (B, H, W, 3)}`` of 8 bits."""
        return {"pixels": torch.stack(list(items))}

    def finish(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{"pixels": (B, 3, H, W)}``, floats, normalised; those that are floats already stay as they are."""
        images = inputs["pixels"]
        if images.dtype != torch.uint8:
            return dict(inputs)
        scaled = images.permute(0, 3, 1, 2).contiguous().float().mul_(1 / 255)
        mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (self.mean, self.std))
        return {**inputs, "pixels": scaled.sub_(mean).div_(std)}

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


_EXAMPLES = (
    "", "a", "A photo of two cats.", "Don't STOP: naïve café, Straße!", "  several   spaces\tand\nlines ", "3.14 is not 1,000",
    "internationalisation antidisestablishmentarianism", "日本語のテキスト", "мир и война", "emoji 🎉👩‍👩‍👧",
    "<s> [CLS] </s> <|endoftext|>", " ".join(["word"] * 1024),
)  # fmt: skip
Tokenize = Callable[[list[str], int], tuple[Tensor, Tensor]]
Save = Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class TextPreprocess:
    """Cut in characters, make readable, tokenize and pad a batch.

    Args:
        tokenize: (texts, most tokens) to ids (B, L) and mask (B, L), True where a token is real.
        max_tokens: most tokens of one text, special ones included.
        vocabulary: ids are below it.
        save: write what `mopefuse.inference.bundle` needs to tokenize in the same way to a file, and describe it for
            preprocess.json; None where that is not possible, and then the encoder cannot be exported.
        length: the one length that the encoder takes, to which every text is padded; None for any.
    """

    tokenize: Tokenize
    max_tokens: int
    name: str = ""
    vocabulary: int = 0
    save: Save | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        self.tokenize(["a"], self.max_tokens)  # libraries set a tokenizer up on its first use, which threads must not share

    def item(self, value: str) -> str:
        """A text that any tokenizer takes: lone surrogates and control characters become U+FFFD."""
        return self.reduce(value)

    def reduce(self, value: str) -> str:
        """All of a text that can matter: cut in characters before it is tokenized, and made readable."""
        return tokens.readable(value, self.max_tokens)

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

    def digests(self) -> dict[str, str]:
        """What tells its tokenizer from others: digests of the ids of example texts, and of its saved state if it has one."""
        found = {"examples": hashlib.sha256()}
        for tensor in self.batch([self.item(text) for text in _EXAMPLES]).values():
            found["examples"].update(f"{tuple(tensor.shape)}".encode() + tensor.long().numpy().tobytes())
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tokenizer"
            try:
                facts = {} if self.save is None else self.save(file)
            except EncoderError:  # a tokenizer written in Python: its examples have to do
                facts = {}
            if facts:
                said = json.dumps(facts, sort_keys=True, default=str).encode()
                found["state"] = hashlib.sha256(said + (file.read_bytes() if file.is_file() else b""))
        return {name: digest.hexdigest()[:16] for name, digest in found.items()}

    def describe(self) -> dict[str, Any]:
        """The tokenizer's name and the most tokens of one text."""
        return {"modality": "text", "tokenizer": self.name, "max_tokens": self.max_tokens}
