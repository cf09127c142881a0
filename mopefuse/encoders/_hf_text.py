"""Text preprocessing of transformers' encoders: their tokenizer, or a hashing tokenizer for random weights without one.

Shapes: B batch, L tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopefuse.core.error_codes import EncoderCode
from mopefuse.errors import EncoderError
from mopefuse.modalities import tokens

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model",
)  # fmt: skip
VOCABULARIES = {"tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model"}
POOLING_FILES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")


class TokenizerWrapper:
    """Wraps a transformers tokenizer; pads on the right, despite the tokenizer's own setting, to `length` if it is set."""

    def __init__(self, tokenizer: Any, pad_id: int, length: int | None = None) -> None:
        self.tokenizer, self.pad_id, self.length = tokenizer, pad_id, length

    def __call__(self, texts: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        rows = self.tokenizer(texts, truncation=True, max_length=max_tokens, padding=False)["input_ids"]
        return pad_rows(rows, self.pad_id, self.length)

    def save(self, file: Path) -> dict[str, Any]:
        """Write the tokenizer in the format of the library tokenizers; see `TextPreprocess.save`.

        Raises:
            EncoderError: the tokenizer is implemented in Python and has no such format.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise EncoderError(
                EncoderCode.NO_TOKENIZER,
                f"{type(self.tokenizer).__name__} cannot be saved without transformers",
                fix="use a model that has a tokenizer.json",
            )
        file.write_text(backend.to_str(), encoding="utf-8")
        return {"kind": "file", "pad_id": self.pad_id, "cut": self.tokenizer.truncation_side}


class HashingTokenizer:
    """Maps words to ids without a vocabulary, see `tokens.HashingVocabulary`."""

    def __init__(self, hashing: tokens.HashingVocabulary) -> None:
        self.hashing = hashing
        self.length: int | None = None

    def __call__(self, texts: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        return pad_rows(self.hashing.rows(texts, max_tokens), self.hashing.pad_id, self.length)

    def save(self, file: Path) -> dict[str, Any]:
        """Describe the tokenizer; writes no file. See `TextPreprocess.save`."""
        return {"kind": "hashing", **asdict(self.hashing)}


def pad_rows(rows: list[list[int]], pad_id: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Pad rows of ids to ids (B, L) and mask (B, L), False for padding; L is `length` or the longest row's."""
    ids, mask = tokens.pad(rows, pad_id, length)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def hashing_for(config: Mapping[str, Any]) -> HashingTokenizer:
    """Build the hashing tokenizer for a configuration.

    Special ids default to BERT's, or to the last ids of a smaller vocabulary. CLIP pools at the end token, which is the
    configuration's or the highest id.
    """
    size = int(config["vocab_size"])
    begin = _first(config, ("bos_token_id", "cls_token_id"), 101 if size > 103 else size - 2, size)
    end = _first(config, ("eos_token_id", "sep_token_id"), 102 if size > 103 else size - 1, size)
    if config.get("model_type") == "clip_text_model" and config.get("eos_token_id") == 2:
        end = size - 1  # configurations written before transformers 4.31: the highest id marks the end
    return HashingTokenizer(tokens.HashingVocabulary(size, begin, end, _first(config, ("pad_token_id",), 0, size)))


def _first(config: Mapping[str, Any], keys: tuple[str, ...], default: int, size: int) -> int:
    named = [config[key] for key in keys if isinstance(config.get(key), int) and config[key] >= 0]
    return min(named[0] if named else default, size - 1)


def padding_id(config: Mapping[str, Any], tokenizer: Any) -> int:
    """The id of padding, which also stands for an empty text: that of the end of a text if none is named, as in many decoders.

    Its value has no effect on padding, which is masked.
    """
    named = (config.get("pad_token_id"), tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((number for number in named if isinstance(number, int) and 0 <= number < int(config["vocab_size"])), 0)


def limit_of(config: Mapping[str, Any]) -> int:
    """Maximum number of tokens by an encoder's positions; RoBERTa's positions start after its padding id."""
    positions = int(config.get("max_position_embeddings") or 512)
    offset = "roberta" in str(config.get("model_type")) or config.get("model_type") in ("camembert", "mpnet")
    return positions - (int(config.get("pad_token_id") or 0) + 1 if offset else 0)


def declared_pool(folder: Path | None, where: str) -> str | None:
    """Pooling that a sentence-transformers folder declares: ``mean``, ``cls``, ``last``; None in other folders.

    Raises:
        EncoderError: another pooling.
    """
    modules, pooling = (read_json(folder / name) if folder else None for name in POOLING_FILES[:2])
    if not modules or not pooling:
        return None
    declared = {key.removeprefix("pooling_mode_") for key, on in pooling.items() if on is True and "pooling_mode_" in key}
    declared |= {str(pooling["pooling_mode"])} if "pooling_mode" in pooling else set()
    names = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls", "lasttoken": "last"}
    if len(declared) != 1 or not declared <= names.keys():
        raise EncoderError(
            EncoderCode.UNSUITABLE,
            f"unsupported sentence-transformers pooling: {' and '.join(sorted(declared)) or 'not named'}",
            where=where,
            fix="add ?pool=mean, ?pool=cls or ?pool=last",
        )
    return names[declared.pop()]


def declared_length(folder: Path | None) -> int | None:
    """Maximum number of tokens that a sentence-transformers folder declares; None if it does not."""
    length = ((read_json(folder / POOLING_FILES[2]) if folder else None) or {}).get("max_seq_length")
    return length if isinstance(length, int) and length >= 2 else None


def read_json(path: Path) -> Any:
    """Read a JSON file; None if there is no such file.

    Raises:
        EncoderError: the file is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(EncoderCode.BAD_CONFIG, f"{path} is not JSON: {error}", fix="download the file again") from error
