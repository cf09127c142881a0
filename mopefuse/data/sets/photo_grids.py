"""Generate photo grids from a data set of labelled photos: a task in which a text decides where in the image to look.

An image shows n x n photos, and the text asks for the one in some position. The label is that photo's label. Neither the image
alone, nor the text alone, nor a pooled feature of an image encoder that was never taught to distinguish positions can answer.

Photos of each split come from the same split of the source. A photo of the source's training split never occurs in another.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from mopefuse.config.schema import Data
from mopefuse.core.error_codes import DataCode
from mopefuse.data.base import DataSet
from mopefuse.data.generated import write_generated
from mopefuse.data.load import load_data
from mopefuse.data.options import Option, with_options
from mopefuse.errors import DataError

SPLITS = ("train", "val", "test")
QUESTIONS = (
    "what is {}?",
    "the product at the {}",
    "which category is {}",
    "{}",
    "look at the {} photo",
    "what kind of object do you see {}?",
)
_ROWS = {2: (("top", "upper"), ("bottom", "lower")), 3: (("top", "upper"), ("middle", "center"), ("bottom", "lower"))}
_COLUMNS = {2: ("left", "right"), 3: ("left", "center", "right")}


class _Photos:
    """The photos of a split that do not occur in the training split of the source, unless it is that split."""

    def __init__(self, data: DataSet, split: str, config: Data) -> None:
        self._data, self._split, self._config = data, data.splits[split], config
        keys, missing = self._split.keys["image"], self._split.is_missing("image")
        known = set() if split == "train" else set(data.splits["train"].keys["image"].tolist())
        numbers = [number for number, key in enumerate(keys.tolist()) if not missing[number] and key not in known]
        self.rows = [self._split.rows[number] for number in numbers]
        self._scaled: dict[tuple[int, int], Image.Image] = {}

    def scaled(self, number: int, side: int) -> Image.Image:
        """A photo, cropped to a square of `side` pixels."""
        if (number, side) not in self._scaled:
            photo = self._data.read(self._split, self.rows[number], "image", self._config)
            self._scaled[number, side] = ImageOps.fit(photo, (side, side))
        return self._scaled[number, side]

    def label(self, number: int) -> str:
        """The label of a photo."""
        return str(self.rows[number].labels[0])


@with_options(
    Option("photos", None, "Data set with labelled photos: a folder or a table that train reads."),
    Option("grid", 2, "Photos in each row and column of an image: 2 or 3.", minimum=2),
    Option("size", 112, "Width and height of an image in pixels.", minimum=16),
    Option("train", 3000, "Rows of the training split.", minimum=1),
    Option("val", 400, "Rows of the validation split.", minimum=1),
    Option("test", 1000, "Rows of the test split.", minimum=1),
)
def make(
    folder: Path,
    *,
    photos: str | None = None,
    grid: int = 2,
    size: int = 112,
    seed: int = 0,
    train: int = 3000,
    val: int = 400,
    test: int = 1000,
) -> dict[str, int]:
    """Write the data set: ``{train,val,test}.jsonl``, ``images/<split>/<number>.png`` and ``dataset.json``.

    Args:
        folder: must be new or empty, or already contain the same data set (then nothing is written).
        photos: data set with one label per photo and the splits train, val and test.
        grid: n, the number of photos in each row and column.
        size: width and height of an image in pixels.
        train, val, test: rows of each split. Each has its own image.

    Returns:
        The rows of each split.

    Raises:
        DataError: no photos are named, they have several labels each or lack a split, or the grid is neither 2 nor 3.
    """
    if photos is None:
        raise DataError(DataCode.BAD_PREPARE_OPTION, "photo grids need photos", where="--photos", fix="add --photos DIR")
    if grid not in _ROWS:
        raise DataError(DataCode.BAD_PREPARE_OPTION, f"--grid cannot be {grid}", where="--grid", fix="use 2 or 3")
    config = Data(path=photos, on_missing="absent")
    data = load_data(config, require=SPLITS)
    if data.task.name != "single-label":
        what = "photo grids need photos with one label each, and these have several"
        raise DataError(DataCode.BAD_PREPARE_OPTION, what, where=photos, fix="use a different data set as --photos")
    counts = {"train": train, "val": val, "test": test}
    about = {"dataset": "photo-grids", "version": 1, "seed": seed, "grid": grid, "size": size, "rows": counts}
    about["photos"] = data.fingerprint()

    def write(building: Path) -> None:
        for split, rows in counts.items():
            _write_split(building, split, _Photos(data, split, config), (rows, grid, size), seed)

    write_generated(folder, about, write)
    return counts


def _write_split(folder: Path, split: str, photos: _Photos, shape: tuple[int, int, int], seed: int) -> None:
    """Write the images and the table of a split.

    Args:
        shape: rows of the table, photos in each row of an image, and the size of an image in pixels.
    """
    rows, grid, size = shape
    draw, places = random.Random(f"{split} {grid} {seed}"), place_names(grid)
    (folder / "images" / split).mkdir(parents=True)
    with open(folder / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as lines:
        for number in range(rows):
            chosen = [draw.randrange(len(photos.rows)) for _ in range(grid * grid)]
            name = f"images/{split}/{number:06d}.png"
            compose(photos, chosen, size).save(folder / name)
            place = draw.randrange(grid * grid)
            text = draw.choice(QUESTIONS).format(draw.choice(places[place]))
            row = {"id": f"{split}-{number:06d}", "text": text, "img": name, "label": photos.label(chosen[place])}
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def place_names(grid: int) -> list[list[str]]:
    """The names of each place, row by row: ["top left", "upper left"], ..."""
    return [[f"{row} {column}" for row in rows] for rows in _ROWS[grid] for column in _COLUMNS[grid]]


def compose(photos: _Photos, chosen: Sequence[int], size: int) -> Image.Image:
    """Compose an image of photos, row by row."""
    grid = round(len(chosen) ** 0.5)
    edges = [round(edge * size / grid) for edge in range(grid + 1)]
    image = Image.new("RGB", (size, size), "white")
    for cell, number in enumerate(chosen):
        y, x = divmod(cell, grid)
        width, height = edges[x + 1] - edges[x], edges[y + 1] - edges[y]
        image.paste(photos.scaled(number, max(width, height)).crop((0, 0, width, height)), (edges[x], edges[y]))
    return image
