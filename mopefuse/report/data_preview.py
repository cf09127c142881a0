"""A contact sheet of a split: pictures, texts and labels of rows drawn so that every class is seen."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mopefuse.config.schema import Data as DataConfig
from mopefuse.data.index import Index
from mopefuse.data.subsets import random_order
from mopefuse.data.summary import rows_of
from mopefuse.modalities.file_source import FileSource
from mopefuse.modalities.files import processor_count
from mopefuse.report.data_pictures import Picture
from mopefuse.report.pages import render
from mopefuse.report.row_values import other_files, picture_name, picture_of, text_of

_START = 300  # characters of a text that are shown at first
_MAX_CHARACTERS = 20_000  # characters of a text that is expanded


@dataclass(frozen=True)
class Card:
    """One row on the sheet."""

    id: str
    where: str
    image: str
    picture: Picture | None
    problem: str  # why the image cannot be shown
    files: list[str]  # files of the row other than the image
    labels: tuple[str, ...]
    text: str
    start: str
    rest: bool  # whether there is more text than `start`
    more: str  # note if even `text` is not the whole text


def preview_page(
    index: Index, files: FileSource, config: DataConfig, *, name: str, rows: int, seed: int
) -> tuple[str, int]:
    """The sheet as HTML, and how many rows are on it.

    Args:
        rows: maximum number of rows. seed: random seed of their choice.
    """
    read = rows_of(index, config)

    def card(number: int) -> Card:
        row = read[number]
        mask = row.labels[0] if index.masks is not None else ""
        found = picture_of(row, files, max_pixels=config.max_pixels, mask=mask)
        whole = text_of(row)
        text, length = whole[:_MAX_CHARACTERS], len(whole)
        return Card(
            row.id,
            f"{index.file}:{row.line}",
            picture_name(row),
            found if found.address else None,
            found.instead,
            other_files(row),
            row.labels,
            text,
            text[:_START],
            length > _START,
            f"… and {length - _MAX_CHARACTERS:,} characters more" if length > _MAX_CHARACTERS else "",
        )

    with ThreadPoolExecutor(processor_count()) as pool:
        cards = list(pool.map(card, draw(index.ids, index.labels, rows, seed)))
    facts: dict[str, Any] = {"rows": len(index.ids), "no_rows": len(index.row_problems)}
    return render("preview.html", data=name, split=index.split, seed=seed, cards=cards, **facts), len(cards)


def draw(ids: Sequence[str], labels: Sequence[tuple[str, ...]], most: int, seed: int) -> list[int]:
    """Numbers of rows: one of each class in turn until there are enough, then sorted by class.

    A row with several labels counts for the rarest of them. Only the rows and `seed` decide, not their order.
    """
    frequency = Counter(label for row in labels for label in row)
    by_class: defaultdict[str, list[int]] = defaultdict(list)
    for row in random_order(ids, seed):
        by_class[min(labels[row], key=lambda label: (frequency[label], label), default="")].append(row)
    turns = sorted((turn, name, row) for name, rows in by_class.items() for turn, row in enumerate(rows))
    return [row for _, row in sorted((name, row) for _, name, row in turns[:most])]
