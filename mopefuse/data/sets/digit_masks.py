"""Generate digit masks: referring segmentation, in which a text names a digit by where it is relative to another.

Images are those of `mopefuse.data.sets.digit_questions`: four handwritten digits in four colours. A text asks for the
neighbour of the digit of one colour ("which digit is at the left of the red one?"). The label is a mask of the pixels of that
neighbour. Neither its place nor its colour is named, so which pixels are meant depends on what else is in the image.

Shapes: N images, 8 and 16 pixels, 4 cells or colours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mopefuse.data.generated import write_generated
from mopefuse.data.options import Option, with_options
from mopefuse.data.sets.digit_questions import (
    COLOURS,
    QUESTIONS_PER_IMAGE,
    SOURCE,
    SPLITS,
    Split,
    check_counts,
    compose,
    values_of,
    write_images,
)

_INK = 6  # value, of 16, from which a pixel belongs to its digit
_SIDES = {"left": 1, "right": 1, "top": 2, "bottom": 2}  # of an anchor, and what its cell differs by (exclusive or)
TRAIN_TEMPLATES = (  # used in every split
    "which digit is at the {side} of the {colour} one?",
    "look at the digit at the {side} of the {colour} one",
    "read the number at the {side} of the {colour} digit",
    "what is at the {side} of the {colour} number?",
    "the digit at the {side} of the {colour} one, please",
    "in the picture, look at the number at the {side} of the {colour} digit",
)
TEST_ONLY_TEMPLATES = (
    "can you make out the digit at the {side} of the {colour} one?",
    "someone wrote a number at the {side} of the {colour} digit",
)


class Reference(NamedTuple):
    """One row: the number of the image in its split, the text, and the cell of the digit that it asks for."""

    image: int
    text: str
    cell: int


def refer(content: Split, split: str, rows: int, seed: int) -> list[Reference]:
    """Draw the texts of a split; a pure function of its arguments."""
    random = np.random.default_rng([seed, 1, SPLITS.index(split)])
    templates = TRAIN_TEMPLATES + (TEST_ONLY_TEMPLATES if split == "test" else ())
    found = []
    for image, colours_4 in enumerate(content.colours_N4):
        asked = [(side, cell) for side in _SIDES for cell in _cells_at(side)]
        for number in random.permutation(len(asked))[:QUESTIONS_PER_IMAGE]:
            side, cell = asked[number]
            anchor = tuple(COLOURS)[colours_4[cell ^ _SIDES[side]]]
            found.append(Reference(image, str(random.choice(templates)).format(side=side, colour=anchor), cell))
    return found[:rows]


def _cells_at(side: str) -> tuple[int, int]:
    """The two cells that have a neighbour for which they are at this side."""
    return {"left": (0, 2), "right": (1, 3), "top": (0, 1), "bottom": (2, 3)}[side]


@with_options(
    Option("train", 8000, "Rows of the training split.", minimum=1),
    Option("val", 500, "Rows of the validation split.", minimum=1),
    Option("test", 1000, "Rows of the test split.", minimum=1),
)
def make(folder: Path, *, seed: int = 0, train: int = 8000, val: int = 500, test: int = 1000) -> dict[str, int]:
    """Write the data set; arguments and errors are those of `mopefuse.data.sets.digit_questions.make`.

    The masks are ``masks/<split>/<number>-<cell>.png`` with 1 for the pixels of the digit, else 0.
    """
    counts = check_counts({"train": train, "val": val, "test": test}, seed)
    about = {"dataset": "digit-masks", "version": 1, "seed": seed, "rows": counts, "source": SOURCE}

    def write(building: Path) -> None:
        for split, rows in counts.items():
            content = compose(split, rows, seed)
            write_images(building, split, content)
            _write_rows(building, split, content, refer(content, split, rows, seed))

    write_generated(folder, about, write)
    return counts


def _write_rows(folder: Path, split: str, content: Split, references: list[Reference]) -> None:
    """Write the masks and the table of a split."""
    (folder / "masks" / split).mkdir(parents=True)
    ink_N488 = values_of(content) >= _INK
    with open(folder / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as lines:
        for number, (image, text, cell) in enumerate(references):
            mask = f"masks/{split}/{image:06d}-{cell}.png"
            if not (folder / mask).exists():
                pixels = np.zeros((2, 8, 2, 8), dtype=np.uint8)
                pixels[cell // 2, :, cell % 2] = ink_N488[image, cell]
                Image.fromarray(pixels.reshape(16, 16)).save(folder / mask)
            row = {"id": f"{split}-{number:06d}", "text": text, "img": f"images/{split}/{image:06d}.png", "label": mask}
            lines.write(json.dumps(row) + "\n")
