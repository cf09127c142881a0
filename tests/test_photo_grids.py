"""The generated data set photo-grids."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import call
from PIL import Image

from mopefuse.config.schema import Data
from mopefuse.data.load import load_data
from mopefuse.data.sets.photo_grids import make, place_names
from mopefuse.errors import DataError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of one colour each, so that a place in a grid shows its label; the first one of test is also in train."""
    folder = tmp_path_factory.mktemp("photos")
    for split, level in (("train", 1.0), ("val", 0.8), ("test", 0.6)):
        with open(folder / f"{split}.jsonl", "w") as lines:
            for label, colour in COLOURS.items():
                name = f"{split}-{label}.png"
                shade = tuple(int(channel * (1.0 if (split, label) == ("test", "red") else level)) for channel in colour)
                Image.new("RGB", (40, 30), shade).save(folder / name)
                lines.write(json.dumps({"text": "a photo", "img": name, "label": label}) + "\n")
    return folder


@pytest.mark.parametrize("grid", [2, 3])
def test_the_label_is_that_of_the_photo_at_the_place_in_the_text(photos: Path, tmp_path: Path, grid: int) -> None:
    counts = make(tmp_path / "grids", photos=str(photos), grid=grid, size=50, train=40, val=5, test=30)
    assert counts == {"train": 40, "val": 5, "test": 30}
    data = load_data(Data(path=str(tmp_path / "grids")), require=("train", "val", "test"))
    seen = set()
    for line in (tmp_path / "grids" / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        place = next(n for n, names in enumerate(place_names(grid)) if any(name in row["text"] for name in names))
        pixels = np.asarray(Image.open(tmp_path / "grids" / row["img"]))
        assert pixels.shape == (50, 50, 3)
        y, x = (int((part + 0.5) * 50 / grid) for part in divmod(place, grid))
        assert tuple(pixels[y, x]) == COLOURS[row["label"]], row
        seen.add(place)
    assert len(seen) == grid * grid and len(data.splits["test"].rows) == 30


def test_training_photos_are_in_no_other_split(photos: Path, tmp_path: Path) -> None:
    make(tmp_path / "grids", photos=str(photos), size=50, train=4, val=4, test=40)
    rows = [json.loads(line) for line in (tmp_path / "grids" / "test.jsonl").read_text().splitlines()]
    assert {row["label"] for row in rows} == {"green", "blue"}, "the red photo of test is one of train"


def test_the_same_arguments_give_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make(tmp_path / name, photos=str(photos), size=32, seed=seed, train=6, val=2, test=2)
    facts = [json.loads((tmp_path / name / "dataset.json").read_text())["sha256"] for name in "abc"]
    assert facts[0] == facts[1] != facts[2]


@pytest.mark.parametrize(("given", "fix"), [((), "add --photos DIR"), (("--grid", "4"), "use 2 or 3")])
def test_impossible_arguments_are_refused(photos: Path, tmp_path: Path, given: tuple[str, ...], fix: str) -> None:
    options = () if not given else ("--photos", photos, *given)
    done = call("data", "make", "photo-grids", tmp_path / "grids", *options)
    assert done.returncode == 4 and fix in done.stderr and "Traceback" not in done.stderr


def test_photos_without_a_test_split_are_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("train.jsonl", "val.jsonl"):
        (tmp_path / "photos" / name).write_text((photos / name).read_text())
    with pytest.raises(DataError):
        make(tmp_path / "grids", photos=str(tmp_path / "photos"))
