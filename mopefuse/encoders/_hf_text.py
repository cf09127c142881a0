"""Texts for transformers' encoders: their tokenizer, or a hashing one where random weights have none.

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

from mopefuse.core import error_numbers as _numbers
from mopefuse.errors import EncoderError
from mopefuse.modalities import tokens

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model",
)  # fmt: skip
VOCABULARIES = {"tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model"}
POOLING_FILES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")


class Tokenize:
    """A transformers tokenizer. Padding is done here: on the right, whatever the tokenizer's own habit, to `length` if any."""

    def __init__(self, tokenizer: Any, pad_id: int, length: int | None = None) -> None:
        self.tokenizer, self.pad_id, self.length = tokenizer, pad_id, length

    def __call__(self, texts: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        rows = self.tokenizer(texts, truncation=True, max_length=max_tokens, padding=False)["input_ids"]
        return padded(rows, self.pad_id, self.length)

    def save(self, file: Path) -> dict[str, Any]:
        """Write the tokenizer as the library tokenizers reads it; see `TextPreprocess.save`.

        Raises:
            EncoderError: the tokenizer is one of transformers' own in Python, which nothing else can read.
        """
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise EncoderError(
                _numbers.NO_TOKENIZER,
                f"{type(self.tokenizer).__name__} cannot be taken out of transformers",
                fix="use a model that has a tokenizer.json",
            )
        file.write_text(backend.to_str(), encoding="utf-8")
        return {"kind": "file", "pad_id": self.pad_id, "cut": self.tokenizer.truncation_side}


class HashingTokenize:
    """Words to ids without a vocabulary, see `tokens.Hashing`."""

    def __init__(self, hashing: tokens.Hashing) -> None:
        self.hashing = hashing
        self.length: int | None = None

    def __call__(self, texts: list[str], max_tokens: int) -> tuple[Tensor, Tensor]:
        return padded(self.hashing.rows(texts, max_tokens), self.hashing.pad_id, self.length)

    def save(self, file: Path) -> dict[str, Any]:
        """Nothing to write; see `TextPreprocess.save`."""
        return {"kind": "hashing", **asdict(self.hashing)}


def padded(rows: list[list[int]], pad_id: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows of ids to ids (B, L) and mask (B, L), True where real; L is `length`, or that of the longest row."""
    ids, mask = tokens.pad(rows, pad_id, length)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def hashing_for(config: Mapping[str, Any]) -> HashingTokenize:
    """The hashing tokenizer with a configuration's special ids; BERT's where it names none, the last ids where those do
    not fit its vocabulary. CLIP pools at the end token: it is the configuration's, or the highest id."""
    size = int(config["vocab_size"])
    begin = _first(config, ("bos_token_id", "cls_token_id"), 101 if size > 103 else size - 2, size)
    end = _first(config, ("eos_token_id", "sep_token_id"), 102 if size > 103 else size - 1, size)
    if config.get("model_type") == "clip_text_model" and config.get("eos_token_id") == 2:
        end = size - 1  # configurations written before transformers 4.31: the highest id marks the end
    return HashingTokenize(tokens.Hashing(size, begin, end, _first(config, ("pad_token_id",), 0, size)))


def _first(config: Mapping[str, Any], keys: tuple[str, ...], default: int, size: int) -> int:
    named = [config[key] for key in keys if isinstance(config.get(key), int)]
    return min(named[0] if named else default, size - 1)


def limit_of(config: Mapping[str, Any]) -> int:
    """Most tokens that an encoder has positions for; RoBERTa counts positions from its padding id on."""
    positions = int(config.get("max_position_embeddings") or 512)
    offset = "roberta" in str(config.get("model_type")) or config.get("model_type") in ("camembert", "mpnet")
    return positions - (int(config.get("pad_token_id") or 0) + 1 if offset else 0)


def declared_pool(folder: Path | None, where: str) -> str | None:
    """What a sentence-transformers folder declares: ``mean``, ``cls``, ``last``; None in other folders.

    Raises:
        EncoderError: another way of pooling.
    """
    modules, pooling = (read_json(folder / name) if folder else None for name in POOLING_FILES[:2])
    if not modules or not pooling:
        return None
    declared = {key.removeprefix("pooling_mode_") for key, on in pooling.items() if on is True and "pooling_mode_" in key}
    declared |= {str(pooling["pooling_mode"])} if "pooling_mode" in pooling else set()
    names = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls", "lasttoken": "last"}
    if len(declared) != 1 or not declared <= names.keys():
        raise EncoderError(
            _numbers.UNSUITABLE,
            f"its sentence-transformers pooling is {' and '.join(sorted(declared)) or 'not named'}",
            where=where,
            fix="add ?pool=mean, ?pool=cls or ?pool=last",
        )
    return names[declared.pop()]


def declared_length(folder: Path | None) -> int | None:
    """The most tokens that a sentence-transformers folder declares."""
    length = ((read_json(folder / POOLING_FILES[2]) if folder else None) or {}).get("max_seq_length")
    return length if isinstance(length, int) and length >= 2 else None


def read_json(path: Path) -> Any:
    """The content of a JSON file, None if there is no such file.

    Raises:
        EncoderError: it is not JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EncoderError(_numbers.BAD_CONFIG, f"{path} is not JSON: {error}", fix="fetch the file again") from error
