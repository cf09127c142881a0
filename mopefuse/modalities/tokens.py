"""Prepare texts for a tokenizer, tokenize without a vocabulary, and pad ids; without torch.

Shapes: B batch, L tokens.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

_CHARACTERS_PER_TOKEN = 32  # texts are truncated to this many characters per token before tokenization
_UNREADABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_WORD = re.compile(r"\w+|[^\w\s]")


def readable(text: str, max_tokens: int) -> str:
    """Truncate a text to what `max_tokens` can cover, and replace lone surrogates and control characters by U+FFFD."""
    return _UNREADABLE.sub("\ufffd", text[: _CHARACTERS_PER_TOKEN * max_tokens])


def split_words(text: str) -> list[str]:
    """Split a lower-cased text into runs of letters and digits, and single other visible characters."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Words:
    """Tokenizes by a list of words: `begin_id`, then the position of each word in the list, or `unknown_id`."""

    words: Sequence[str]
    begin_id: int
    unknown_id: int
    pad_id: int

    @cached_property
    def ids(self) -> dict[str, int]:
        """The id of each word."""
        return {word: number for number, word in enumerate(self.words)}

    def rows(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Tokenize texts; returns the ids of each, at most `max_tokens`."""
        known = self.ids
        return [
            [self.begin_id, *(known.get(word, self.unknown_id) for word in split_words(text))][:max_tokens] for text in texts
        ]


@dataclass(frozen=True)
class HashingVocabulary:
    """Tokenizes without a vocabulary: the id is the crc32 of the lower-cased word modulo `vocabulary`, without special ids.

    For encoders with random weights, in tests and benchmarks.
    """

    vocabulary: int
    begin_id: int
    end_id: int
    pad_id: int

    def rows(self, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
        """Tokenize texts; returns the ids of each, between `begin_id` and `end_id`."""
        assert self.vocabulary > 3, "three special ids and at least one word"
        cut = [split_words(text)[: max_tokens - 2] for text in texts]
        return [[self.begin_id, *map(self._id, words), self.end_id] for words in cut]

    def _id(self, word: str) -> int:
        number = zlib.crc32(word.encode("utf-8", "replace")) % self.vocabulary
        while number in (self.begin_id, self.end_id, self.pad_id):
            number = (number + 1) % self.vocabulary
        return number


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, length: int | None = None
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Pad rows of ids.

    An empty row, which tokenizers without special tokens make of an empty text, counts as one token `pad_id`.

    Args:
        length: L; by default that of the longest row.

    Returns:
        Ids (B, L) and mask (B, L), True at tokens and False at padding.
    """
    rows = [row or [pad_id] for row in rows]
    lengths = np.array([len(row) for row in rows])
    longest = length or int(lengths.max())
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    mask: NDArray[np.bool_] = np.arange(longest)[None, :] < lengths[:, None]
    return ids, mask
