"""Generate digit captions: pairs for a search that has to know which colour belongs to which digit.

An image has two handwritten digits in two of four colours, as in `mopefuse.data.sets.digit_questions`, and a caption names them
("the red digit is 7, the blue digit is 4"). The next image has the same digits, written by others, in exchanged colours. The
two captions have the same words, so embeddings that only know which digits and colours occur confuse them. Rows have no label.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mopefuse.data.generated import write_generated
from mopefuse.data.options import Option, with_options
from mopefuse.data.sets.digit_questions import COLOURS, SOURCE, SPLITS, check_counts, handwriting, paint

_CELLS = 4


def captions(split: str, rows: int, seed: int) -> Iterator[tuple[str, Any]]:
    """Yield the caption and the image (16, 16, 3) of each row of a split; a pure function of the arguments."""
    random, names = np.random.default_rng([seed, 2, SPLITS.index(split)]), tuple(COLOURS)
    _, values, digits = handwriting(split)
    for row in range(rows):
        if row % 2 == 0:
            two, cells = random.choice(10, 2, replace=False), random.choice(_CELLS, 2, replace=False)
            colours = random.choice(_CELLS, 2, replace=False)
        else:
            colours = colours[::-1]
        values_1488 = np.zeros((1, _CELLS, 8, 8), values.dtype)
        colours_14 = np.zeros((1, _CELLS), np.int64)
        for digit, cell, colour in zip(two, cells, colours, strict=True):
            values_1488[0, cell] = values[random.choice(np.flatnonzero(digits == digit))]
            colours_14[0, cell] = colour
        named = sorted(zip(colours.tolist(), two.tolist(), strict=True))
        yield ", ".join(f"the {names[colour]} digit is {digit}" for colour, digit in named), paint(values_1488, colours_14)[0]


@with_options(
    Option("train", 6000, "Rows of the training split.", minimum=1),
    Option("val", 400, "Rows of the validation split.", minimum=1),
    Option("test", 400, "Rows of the test split.", minimum=1),
)
def make(folder: Path, *, seed: int = 0, train: int = 6000, val: int = 400, test: int = 400) -> dict[str, int]:
    """Write the data set; arguments and errors are those of `mopefuse.data.sets.digit_questions.make`."""
    counts = check_counts({"train": train, "val": val, "test": test}, seed)
    about = {"dataset": "digit-captions", "version": 1, "seed": seed, "rows": counts, "source": SOURCE}

    def write(building: Path) -> None:
        for split, rows in counts.items():
            (building / "images" / split).mkdir(parents=True)
            with open(building / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as lines:
                for number, (text, image) in enumerate(captions(split, rows, seed)):
                    name = f"images/{split}/{number:06d}.png"
                    Image.fromarray(image).save(building / name)
                    lines.write(json.dumps({"id": f"{split}-{number:06d}", "text": text, "img": name}) + "\n")

    write_generated(folder, about, write)
    return counts
