"""Describe a data set: sizes of its splits, frequency of labels, length of texts.

Shapes: T measured texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mopefuse.config.schema import Data as DataConfig
from mopefuse.data.columns import Layout
from mopefuse.data.findings import Finding, finding_at
from mopefuse.data.index import Index
from mopefuse.data.rows import Rows
from mopefuse.modalities.base import get_modality
from mopefuse.modalities.masks import file_kind, ids_in

MAX_TEXTS = 20_000  # maximum number of texts whose length is measured
TOKENS_PER_WORD = 1.3  # an estimate, for English and subword vocabularies
LIMITS = (77, 512)  # tokens that CLIP and BERT read
REPLACED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
"""Characters that the preprocessing of encoders replaces by U+FFFD."""

_EVERY = 256  # texts between two calls of `Advance`
Advance = Callable[[str, int, int], None]


class Tokens(NamedTuple):
    """How an encoder counts tokens.

    Args:
        encoder: its spec. limit: maximum number of tokens that it reads, including special ones.
        measure: returns, for each text, its number of tokens and whether it is longer than `limit`.
    """

    encoder: str
    limit: int
    measure: Callable[[list[str]], list[tuple[int, bool]]]


@dataclass
class Texts:
    """The lengths of texts; if there are many, an evenly spaced sample is measured.

    Args:
        total: number of texts.
        tokens_T: empty without an encoder.
        cut: number of measured texts with more than `limit` tokens.
    """

    total: int = 0
    characters_T: list[int] = field(default_factory=list)
    words_T: list[int] = field(default_factory=list)
    tokens_T: list[int] = field(default_factory=list)
    cut: int = 0
    encoder: str = ""
    limit: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Convert to plain values; shares are of the measured texts."""
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
    """Read every text once: measure lengths, and find texts that are empty or have characters that are replaced.

    Args:
        tokens: token counter of the encoder that will read them; None measures characters and words only.
        advance: called with ("texts", number read, total number).
    """
    total = _count_texts(indexes)
    texts = Texts(total, encoder=tokens.encoder if tokens else "", limit=tokens.limit if tokens else 0)
    measured = set(np.linspace(0, total - 1, min(total, MAX_TEXTS)).astype(int).tolist())
    found: list[Finding] = []
    batch: list[str] = []
    for number, (index, row, text) in enumerate(_iterate_texts(indexes, config)):
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


def _count_texts(indexes: Mapping[str, Index]) -> int:
    texts = (values for index in indexes.values() for name, values in index.values.items() if _is_text(name))
    return sum(int((~values.is_missing()).sum()) for values in texts)


def _is_text(modality: str) -> bool:
    return not get_modality(modality).is_file


def _iterate_texts(indexes: Mapping[str, Index], config: DataConfig) -> Iterator[tuple[Index, int, str]]:
    for index in indexes.values():
        names = [name for name in index.values if _is_text(name)]
        for number, row in enumerate(rows_of(index, config) if names else ()):
            yield from ((index, number, text) for name in names if (text := row.values[name]) is not None)


def rows_of(index: Index, config: DataConfig) -> Rows:
    """All rows of an index, including those whose file is bad."""
    return Rows(
        store=index.store,
        lines_S=index.lines_S,
        labels=index.labels,
        split=index.split,
        layout=Layout.from_config([*index.values], config),
    )


def _oddities(index: Index, row: int, text: str) -> Iterator[Finding]:
    replaced = REPLACED.findall(text)
    if not text.strip():
        yield finding_at(index, row, "empty-text", "the text is empty")
    if replaced:
        listed = ", ".join(f"U+{ord(character):04X}" for character in sorted(set(replaced))[:3])
        message = f"the text has characters that are replaced ({len(replaced)}, such as {listed})"
        yield finding_at(index, row, "replaced-characters", message)


def describe_split(index: Index, bad_rows: int) -> dict[str, Any]:
    """Count rows, labels and files of a split; find its smallest and largest picture, in pixels, and the bytes of files."""
    infos, masks = [info for files in index.files.values() for info in files.infos], index.masks
    sides = {(info.width, info.height) for info in infos if info.width}
    by_area = sorted(sides, key=lambda side: (side[0] * side[1], side))
    return {
        "file": index.file,
        "rows": len(index.lines_S) + len(index.row_problems),
        "bad_rows": bad_rows,
        **{file_kind(name).plural: len(files.names) for name, files in index.files.items()},
        "labels": len(index.labels.counts() if masks is None else {one for info in masks.infos for one in ids_in(info)}),
        "rows_without_label": index.labels.count_unlabelled(),
        "pixels": {"smallest": list(by_area[0]), "largest": list(by_area[-1])} if by_area else None,
        "bytes": sum(max(0, info.size) for info in infos),
    }


def count_labels(indexes: Mapping[str, Index], labels: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Count the rows of each label in each split, labels most frequent in training first; includes labels without rows."""
    counts = {split: Counter(index.labels.counts()) for split, index in indexes.items()}
    every_label = dict.fromkeys([*labels, *(label for count in counts.values() for label in count)])
    rows_of_label = {label: {split: count[label] for split, count in counts.items()} for label in every_label}
    return dict(sorted(rows_of_label.items(), key=lambda item: (-item[1].get("train", 0), -sum(item[1].values()), item[0])))


def find_extremes(counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """The most frequent and the rarest label of the first split, and the ratio of their frequencies."""
    split = next((name for count in counts.values() for name in count), "")
    ranked = sorted(((count[split], label) for label, count in counts.items() if count.get(split)), reverse=True)
    if not ranked:
        return {"of": split, "most_frequent": None, "rarest": None, "ratio": None}
    (most, frequent), (least, rare) = ranked[0], ranked[-1]
    return {
        "of": split,
        "most_frequent": {"label": frequent, "rows": most},
        "rarest": {"label": rare, "rows": least},
        "ratio": most / least,
    }
