"""The tokenizers of a bundle, without torch and transformers.

Shapes: B batch, L tokens.
"""

from __future__ import annotations

import html
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mopefuse.core.error_codes import CheckpointCode, PackageCode
from mopefuse.errors import CheckpointError, Notice, PackageError
from mopefuse.inference.bundle_runtime import EXPORT_AGAIN, Array
from mopefuse.modalities import tokens

_QUOTES = {0x2018: "'", 0x2019: "'", 0x201A: "'", 0x201B: "'", 0x201C: '"', 0x201D: '"', 0x201E: '"', 0x201F: '"'}
_LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
_WIDE = {0x3000: " "} | {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}


def load_tokenizer(how: Mapping[str, Any], folder: Path) -> Callable[[Sequence[str]], tuple[Array, Array]]:
    """A function from texts to ids and mask (B, L), as preprocess.json describes it.

    Args:
        how: one side of preprocess.json. folder: folder of the bundle, with the tokenizer's file.

    Raises:
        PackageError: tokenizers is not installed. CheckpointError: the tokenizer's file cannot be read.
    """
    own, most = how["tokenizer"], how["max_tokens"]
    rows = _rows(own, folder, most)

    def tokenize(texts: Sequence[str]) -> tuple[Array, Array]:
        return tokens.pad(rows([tokens.readable(text, most) for text in texts]), own["pad_id"], how.get("length"))

    return tokenize


def _rows(own: Mapping[str, Any], folder: Path, most: int) -> Callable[[Sequence[str]], list[list[int]]]:
    kinds: dict[str, type[tokens.Words] | type[tokens.HashingVocabulary]]
    kinds = {"words": tokens.Words, "hashing": tokens.HashingVocabulary}
    if own["kind"] in kinds:
        splitter = kinds[own["kind"]](**{name: value for name, value in own.items() if name != "kind"})
        return lambda texts: splitter.rows(texts, most)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise PackageError(
            PackageCode.PACKAGE_MISSING, "tokenizers is not installed", where=str(folder), fix='pip install "mopefuse[runtime]"'
        ) from None
    try:
        tokenizer = Tokenizer.from_file(str(folder / own["file"]))
    except Exception as error:  # the library raises plain exceptions
        raise CheckpointError(
            CheckpointCode.BUNDLE_UNREADABLE, f"{own['file']} cannot be read: {error}", where=str(folder), fix=EXPORT_AGAIN
        ) from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(most, direction=own["cut"])
    clean = _clip_text() if own.get("clean") == "clip" else str

    def rows(texts: Sequence[str]) -> list[list[int]]:
        return [_until(encoded.ids, own.get("end_id")) for encoded in tokenizer.encode_batch([clean(t) for t in texts])]

    return rows


def _until(ids: list[int], end_id: int | None) -> list[int]:
    return ids if end_id not in ids else ids[: ids.index(end_id) + 1]


def _clip_text() -> Callable[[str], str]:
    """CLIP's own cleaning of texts: encoding repaired by ftfy, HTML entities decoded, single spaces, lower case.

    Without ftfy, its effect on well-encoded text is reproduced here, and one warning states that other text is not repaired.
    """
    repair: Callable[[str], str] = _repaired
    if find_spec("ftfy") is not None:
        from ftfy import fix_text

        repair = fix_text
    return lambda text: " ".join(html.unescape(html.unescape(repair(text))).split()).lower()


def _repaired(text: str) -> str:
    if not text.isascii():
        warnings.warn("ftfy is not installed: text in a broken encoding is not repaired as in training", Notice, stacklevel=2)
    return unicodedata.normalize("NFC", text.translate(_QUOTES | _LIGATURES | _WIDE))
