"""Generate digit questions: a data set that needs both modalities, made from real handwriting.

An image shows four different handwritten digits in four colours, one per cell of a 2 x 2 grid; a text asks for one of them by
its position or by its colour (eight kinds of question). The label is that digit. The image alone leaves four equally likely
answers (accuracy 0.25), the text alone ten (0.10).

The digits are scikit-learn's copy of the UCI "Optical Recognition of Handwritten Digits" test set (1,797 samples of
8 x 8 pixels; E. Alpaydin and C. Kaynak, CC BY 4.0). The split of each sample is fixed, regardless of the seed, so
that a model pretrained on `handwriting("train")` has never seen a digit of the other splits.

Shapes: N images or samples, 8 and 16 pixels, 4 cells (top left, top right, bottom left, bottom right) or colours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mopefuse.core.error_codes import DataCode
from mopefuse.data.generated import write_generated
from mopefuse.data.options import Option, with_options
from mopefuse.errors import DataError

Array = NDArray[Any]

SPLITS = ("train", "val", "test")
QUESTIONS_PER_IMAGE = 4  # questions of different kinds, out of eight

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
}
PLACES = (  # names of each cell's position, in the order of the cells
    ("top left", "upper left"),
    ("top right", "upper right"),
    ("bottom left", "lower left"),
    ("bottom right", "lower right"),
)

TRAIN_TEMPLATES = {  # used in every split
    "place": (
        "what is the {} number?",
        "which digit is at the {}?",
        "read the digit at the {}",
        "read the {} number",
        "tell me the number in the {} corner",
        "what does the {} cell say?",
        "name the digit in the {} corner",
        "the {} digit, please",
        "look at the {}: which number is it?",
        "which number do you see at the {}?",
        "in the picture, what is at the {}?",
        "someone asks for the {} digit",
        "what value does the {} cell have?",
        "can you read the {} number?",
    ),
    "colour": (
        "what is the {} number?",
        "which digit is {}?",
        "read the {} digit",
        "read the number written in {}",
        "tell me the {} number",
        "what does the {} digit say?",
        "name the digit in {}",
        "the {} digit, please",
        "look at the {} one: which number is it?",
        "which number do you see in {}?",
        "in the picture, what is the {} number?",
        "someone asks for the {} digit",
        "what value does the digit in {} have?",
        "can you read the {} number?",
    ),
}
TEST_ONLY_TEMPLATES = {  # used in the test split in addition to those above
    "place": (
        "can you make out the digit in the {} part of the picture?",
        "someone wrote a number at the {}; what is it?",
        "{} corner: name the number",
        "give me the value of the digit in the {}",
    ),
    "colour": (
        "can you make out the digit painted in {}?",
        "someone wrote a number in {}; what is it?",
        "{} ink: name the number",
        "give me the value of the {} digit",
    ),
}

_PERCENT = {"train": range(70), "val": range(70, 80), "test": range(80, 100)}  # per cent of the UCI samples
SOURCE = "UCI Optical Recognition of Handwritten Digits (E. Alpaydin, C. Kaynak; CC BY 4.0), by scikit-learn load_digits"


class Question(NamedTuple):
    """One row: `image` is the number of the image in its split, `label` the digit that the text asks for."""

    image: int
    text: str
    label: int


class Split(NamedTuple):
    """The questions of one split, and what its images are composed of."""

    samples_N4: Array  # UCI sample in each cell
    digits_N4: Array  # digit in each cell
    colours_N4: Array  # index into `COLOURS`
    questions: list[Question]


@cache
def _uci() -> tuple[Array, Array]:
    """Load all samples: values 0..16 of shape (1797, 8, 8), digits of shape (1797,)."""
    from sklearn.datasets import load_digits  # slow to import

    bunch = load_digits()
    return bunch.images.astype(np.uint8), bunch.target.astype(np.int64)


def _percentile(index: int) -> int:
    """A fixed number 0..99, evenly distributed, that decides the split of a UCI sample."""
    return int.from_bytes(hashlib.sha256(f"digit {index}".encode()).digest()[:4], "big") % 100


@cache
def handwriting(split: str) -> tuple[Array, Array, Array]:
    """The UCI samples of a split, disjoint from other splits: indices (N,), values 0..16 (N, 8, 8) and digits (N,)."""
    values, digits = _uci()
    indices = np.array([index for index in range(len(digits)) if _percentile(index) in _PERCENT[split]])
    return indices, values[indices], digits[indices]


def paint(values_N488: Array, colours_N4: Array) -> Array:
    """Paint digits (values 0..16) in colours (index into `COLOURS`) on black; returns 8-bit RGB images (N, 16, 16, 3)."""
    palette_C3 = np.array(list(COLOURS.values()), dtype=np.uint16)
    cells = values_N488[..., None].astype(np.uint16) * palette_C3[colours_N4][:, :, None, None] // 16
    grid: Array = cells.astype(np.uint8).reshape(-1, 2, 2, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(-1, 16, 16, 3)


def compose(split: str, rows: int, seed: int) -> Split:
    """Compose the images and questions of a split; a pure function of its arguments."""
    random = np.random.default_rng([seed, SPLITS.index(split)])
    indices, _, digits = handwriting(split)
    by_digit = [indices[digits == digit] for digit in range(10)]
    count = -(-rows // QUESTIONS_PER_IMAGE)
    digits_N4 = random.permuted(np.tile(np.arange(10), (count, 1)), axis=1)[:, :4]
    samples_N4 = np.array([[random.choice(by_digit[digit]) for digit in four] for four in digits_N4])
    colours_N4 = random.permuted(np.tile(np.arange(4), (count, 1)), axis=1)
    questions = []
    for image in range(count):
        for kind in random.permutation(8)[:QUESTIONS_PER_IMAGE]:
            aspect, number = ("place", kind) if kind < 4 else ("colour", kind - 4)
            cell = number if aspect == "place" else int(np.flatnonzero(colours_N4[image] == number)[0])
            names = PLACES[number] if aspect == "place" else tuple(COLOURS)[number : number + 1]
            templates = TRAIN_TEMPLATES[aspect] + (TEST_ONLY_TEMPLATES[aspect] if split == "test" else ())
            text = str(random.choice(templates)).format(random.choice(names))
            questions.append(Question(image, text, int(digits_N4[image, cell])))
    return Split(samples_N4, digits_N4, colours_N4, questions[:rows])


@with_options(
    Option("train", 16000, "Rows of the training split.", minimum=1),
    Option("val", 1000, "Rows of the validation split.", minimum=1),
    Option("test", 2000, "Rows of the test split.", minimum=1),
)
def make(
    folder: Path, *, seed: int = 0, train: int = 16000, val: int = 1000, test: int = 2000
) -> dict[str, int]:
    """Write the data set: ``{train,val,test}.jsonl``, ``images/<split>/<number>.png`` and ``dataset.json``.

    Args:
        folder: must be new or empty, or already contain the same data set (then nothing is written).
        seed: seed of compositions and phrasings; the same arguments give the same bytes.
        train, val, test: rows of each split. Four rows share an image.

    Returns:
        The number of rows of each split.

    Raises:
        DataError: a count is not positive, or the folder contains something else.
    """
    counts = check_counts({"train": train, "val": val, "test": test}, seed)
    about = {"dataset": "digit-questions", "version": 1, "seed": seed, "rows": counts, "source": SOURCE}

    def write(building: Path) -> None:
        for split, rows in counts.items():
            write_split(building, split, compose(split, rows, seed), lambda content, question: str(question.label))

    write_generated(folder, about, write)
    return counts


def check_counts(counts: dict[str, int], seed: int) -> dict[str, int]:
    """Return the numbers of rows of each split, if they can be made.

    Raises:
        DataError: one is not positive, or the seed is negative.
    """
    if min(counts.values()) < 1 or seed < 0:
        raise DataError(
            DataCode.CANNOT_MAKE_SPLITS,
            f"cannot make splits of {counts} rows with seed {seed}",
            fix="make at least one row of each split",
        )
    return counts


def values_of(content: Split) -> Array:
    """The values 0..16 of the digits (N, 4, 8, 8)."""
    values: Array = _uci()[0][content.samples_N4]
    return values


def write_images(folder: Path, split: str, content: Split) -> None:
    """Write the images of a split, ``images/<split>/<number>.png``."""
    images = folder / "images" / split
    images.mkdir(parents=True)
    for number, pixels in enumerate(paint(values_of(content), content.colours_N4)):
        Image.fromarray(pixels).save(images / f"{number:06d}.png")


def write_split(folder: Path, split: str, content: Split, label_of: Callable[[Split, Question], Any]) -> None:
    """Write the images and the table of a split.

    Args:
        label_of: returns the label of a question as JSON takes it.
    """
    write_images(folder, split, content)
    with open(folder / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as lines:
        for number, question in enumerate(content.questions):
            row = {
                "id": f"{split}-{number:06d}",
                "text": question.text,
                "img": f"images/{split}/{question.image:06d}.png",
                "label": label_of(content, question),
            }
            lines.write(json.dumps(row) + "\n")
