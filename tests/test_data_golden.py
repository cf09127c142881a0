"""Golden values of fingerprints and subsets: runs recognise their data by them, so a change would affect every existing run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mopefuse.config.schema import Data
from mopefuse.data.load import load_data, read_indexes
from mopefuse.data.subsets import choose_few, hold_out, random_order

GOLDEN = json.loads((Path(__file__).parent / "golden" / "data_fingerprints.json").read_text(encoding="utf-8"))


def write_rows(folder: Path) -> None:
    """Write three splits of JSON lines with BMP images, whose bytes do not depend on an image library; one training row is
    bad."""
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (4, 3), (20 * number, 7, 255 - number)).save(folder / f"{number}.bmp")
    for split, first, count in (("train", 0, 8), ("val", 8, 2), ("test", 10, 2)):
        rows = [
            {"id": f"{split}-{i}", "text": f"Text {i % 5}", "img": f"{first + i}.bmp", "label": "ab"[i % 2]}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def spoil(folder: Path) -> None:
    with (folder / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": "train-0", "text": "twice", "img": "1.bmp", "label": "a"}\n')
        file.write('{"id": "lost", "text": "no file", "img": "lost.bmp", "label": "a"}\n{"id": \n')


def leave_out(folder: Path) -> None:
    with (folder / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"id": "imageless", "text": "only a text", "label": "a"}\n')
        file.write('{"id": "textless", "img": "3.bmp", "label": "b"}\n')


def as_one_table(folder: Path) -> None:
    rows = [(split, json.loads(line)) for split in ("train", "val", "test") for line in (folder / f"{split}.jsonl").open()]
    lines = ["part,id,text,img,label", *(f"{split},{','.join(row.values())}" for split, row in rows)]
    (folder / "all.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def as_lists(folder: Path) -> None:
    for split in ("train", "val", "test"):
        lines = [json.loads(line) for line in (folder / f"{split}.jsonl").open()]
        rows = [line | {"label": ["a", line["label"]]} for line in lines]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def as_image_folders(folder: Path) -> None:
    for split in ("train", "val", "test"):
        for line in (folder / f"{split}.jsonl").open():
            row = json.loads(line)
            place = folder / split / row["label"]
            place.mkdir(parents=True, exist_ok=True)
            (folder / row["img"]).rename(place / row["img"])
            (place / row["img"]).with_suffix(".txt").write_text(row["text"], encoding="utf-8")
        (folder / f"{split}.jsonl").unlink()


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "json lines": (None, {}),
    "bad rows skipped": (spoil, {"on_bad": "skip", "max_bad_fraction": 0.5}),
    "rows without a value": (leave_out, {"on_missing": "absent"}),
    "rows without a value left out": (leave_out, {"on_missing": "skip"}),
    "one table": (as_one_table, {"path": "all.csv", "split_col": "part"}),
    "held out": (as_one_table, {"path": "train.jsonl", "val_fraction": 0.25, "test_fraction": 0.25, "seed": 3}),
    "drawn": (None, {"shots": 2, "seed": 1}),
    "several labels": (as_lists, {}),
    "folded labels": (None, {"fold_labels": True}),
    "image folders": (as_image_folders, {}),
}


def facts(folder: Path, change: Any, settings: dict[str, Any]) -> dict[str, str]:
    write_rows(folder)
    if change is not None:
        change(folder)
    config = Data(**{**settings, "path": str(folder / settings.get("path", ""))})
    indexes, _ = read_indexes(config)
    return {f"index {name}": index.digest for name, index in indexes.items()} | load_data(config).fingerprint()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_fingerprints_match_earlier_versions(case: str, tmp_path: Path) -> None:
    assert facts(tmp_path / "data", *CASES[case]) == GOLDEN[case]


def test_subsets_match_earlier_versions() -> None:
    ids = [f"row-{number}" for number in range(20)]
    labels: list[tuple[str, ...]] = [("ab"[number % 3 == 0],) for number in range(20)]
    assert random_order(ids, 5)[:8] == [2, 6, 18, 14, 8, 0, 1, 7]
    assert hold_out(ids, labels, 6, 5)[1] == [1, 2, 6, 8, 14, 18]
    assert choose_few(ids, labels, 5, shots=3, fraction=None) == [0, 2, 6, 8, 14, 18]
