"""What is in a data set: sizes of its splits, how often each label comes, how long texts are.

Shapes: T texts that were measured.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.data.columns import Layout
from mopefuse.data.findings import Finding, at
from mopefuse.data.index import Index
from mopefuse.data.rows import Rows
from mopefuse.modalities.base import of

MOST_TEXTS = 20_000  # whose length is measured
TOKENS_PER_WORD = 1.3  # an estimate, for English and subword vocabularies
LIMITS = (77, 512)  # tokens that CLIP and BERT take
REPLACED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""What encoders' preprocessing reads as U+FFFD."""

_EVERY = 256  # texts between two calls of `Advance`
Advance = Callable[[str, int, int], None]
Lengths = NDArray[np.int64]


class Tokens(NamedTuple):
    """How an encoder counts a text.

    Args:
        encoder: its spec. limit: most tokens that it reads, special ones included.
        measure: of texts, each one's number of tokens and whether it is longer than `limit`.
    """

    encoder: str
    limit: int
    measure: Callable[[list[str]], list[tuple[int, bool]]]


@dataclass
class Texts:
    """How long texts are; of very many, an evenly spaced sample."""

    total: int = 0
    characters_T: list[int] = field(default_factory=list)
    words_T: list[int] = field(default_factory=list)
    tokens_T: list[int] = field(default_factory=list)  # where an encoder counts
    cut: int = 0  # texts that are longer than `limit`
    encoder: str = ""
    limit: int = 0  # tokens

    def as_dict(self) -> dict[str, Any]:
        """Plain values; shares are of the measured texts."""
        measured = len(self.words_T)
        facts: dict[str, Any] = {"total": self.total, "measured": measured, "sampled": measured < self.total}
        if not measured:
            return facts
        facts |= {"characters": _summary(self.characters_T), "words": _summary(self.words_T)}
        if self.encoder:
            facts |= {"encoder": self.encoder, "limit": self.limit, "tokens": _summary(self.tokens_T)}
            facts["cut"] = {"texts": self.cut, "share": self.cut / measured}
        else:
            estimated_T = TOKENS_PER_WORD * np.array(self.words_T)
            over = {str(limit): float((estimated_T > limit).mean()) for limit in LIMITS}
            facts["estimate"] = {"tokens_per_word": TOKENS_PER_WORD, "share_over": over}
        return facts


def _summary(lengths_T: list[int]) -> dict[str, int]:
    median, high = (round(float(value)) for value in np.percentile(lengths_T, (50, 95)))
    return {"median": median, "p95": high, "longest": max(lengths_T)}


def read_texts(
    indexes: Mapping[str, Index], config: DataConfig, tokens: Tokens | None, advance: Advance
) -> tuple[Texts, list[Finding]]:
    """Read every text once: lengths, and texts that are empty or have characters that no encoder sees.

    Args:
        tokens: of the encoder that is to read them.
        advance: told of ("texts", read, to read).
    """
    total = _total(indexes)
    texts = Texts(total, encoder=tokens.encoder if tokens else "", limit=tokens.limit if tokens else 0)
    measured = set(np.linspace(0, total - 1, min(total, MOST_TEXTS)).astype(int).tolist())
    found: list[Finding] = []
    batch: list[str] = []
    for number, (index, row, text) in enumerate(_each(indexes, config)):
        found += _oddities(index, row, text)
        if number in measured:
            texts.characters_T.append(len(text))
            texts.words_T.append(len(text.split()))
            batch += [text] if tokens else []
        if tokens and (len(batch) == _EVERY or (batch and number + 1 == total)):
            for length, is_cut in tokens.measure(batch):
                texts.tokens_T.append(length)
                texts.cut += is_cut
            batch = []
        if (number + 1) % _EVERY == 0 or number + 1 == total:
            advance("texts", number + 1, total)
    return texts, found


def _total(indexes: Mapping[str, Index]) -> int:
    """How many texts there are."""
    read = (each for index in indexes.values() for name, each in index.values.items() if _is_read(name))
    return sum(int((~each.lacks()).sum()) for each in read)


def _is_read(modality: str) -> bool:
    return not of(modality).is_file


def _each(indexes: Mapping[str, Index], config: DataConfig) -> Iterator[tuple[Index, int, str]]:
    for index in indexes.values():
        read = [name for name in index.values if _is_read(name)]
        for number, row in enumerate(rows_of(index, config) if read else ()):
            yield from ((index, number, text) for name in read if (text := row.values[name]) is not None)


def rows_of(index: Index, config: DataConfig) -> Rows:
    """All rows of an index, also those whose file is bad."""
    layout = Layout.of([*index.values], config)
    return Rows(index.content, index.places_S2, index.lines_S, index.labels, index.split, layout)


def _oddities(index: Index, row: int, text: str) -> Iterator[Finding]:
    strange = REPLACED.findall(text)
    empty = not text.strip()
    if not strange and not empty:
        return
    if empty:
        yield at(index, row, "empty-text", "the text is empty")
    if strange:
        named = ", ".join(f"U+{ord(character):04X}" for character in sorted(set(strange))[:3])
        yield at(index, row, "replaced-characters", f"the text has characters that are replaced ({len(strange)}, as {named})")


def describe_split(index: Index, bad_rows: int) -> dict[str, Any]:
    """Counts of a split and of its files, the smallest and largest of its pictures by pixels, and the files' size in bytes."""
    looks = [look for each in index.files.values() for look in each.looks]
    sides = {(look.width, look.height) for look in looks if look.width}
    by_area = sorted(sides, key=lambda side: (side[0] * side[1], side))
    return {
        "file": index.file,
        "rows": len(index.lines_S) + len(index.row_problems),
        "bad_rows": bad_rows,
        **{of(name).plural: len(each.names) for name, each in index.files.items()},
        "labels": len(index.labels.counts()),
        "rows_without_label": index.labels.without(),
        "pixels": {"smallest": list(by_area[0]), "largest": list(by_area[-1])} if by_area else None,
        "bytes": sum(max(0, look.size) for look in looks),
    }


def balance(indexes: Mapping[str, Index], labels: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """How often each label comes in each split, most frequent in training first; also labels that no row has."""
    counts = {split: Counter(index.labels.counts()) for split, index in indexes.items()}
    every = dict.fromkeys([*labels, *(label for count in counts.values() for label in count)])
    listed = {label: {split: count[label] for split, count in counts.items()} for label in every}
    return dict(sorted(listed.items(), key=lambda item: (-item[1].get("train", 0), -sum(item[1].values()), item[0])))


def extremes(counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """The most frequent and the rarest label that the first split has, and how many times as frequent it is."""
    split = next((name for count in counts.values() for name in count), "")
    there = sorted(((count[split], label) for label, count in counts.items() if count.get(split)), reverse=True)
    if not there:
        return {"of": split, "most_frequent": None, "rarest": None, "ratio": None}
    (most, frequent), (least, rare) = there[0], there[-1]
    return {
        "of": split,
        "most_frequent": {"label": frequent, "rows": most},
        "rarest": {"label": rare, "rows": least},
        "ratio": most / least,
    }
