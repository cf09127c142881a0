"""Write a data set with many rows and labels that share a few image files, to save disk space.

``python scripts/make_large_data.py OUT --rows 1000000 --labels 10000 --multi-label``; every row has its own text, and label
frequencies are proportional to 1 / rank, as in real data; every label occurs in training at least once.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

IMAGES = 8
SPLITS = {"train": 0.9, "val": 0.05, "test": 0.05}
_WORDS = ("red", "green", "blue", "yellow", "digit", "what", "is", "the", "left", "right", "upper", "lower")
_AT_ONCE = 10_000  # rows whose labels are drawn together


def make(out: Path, *, rows: int, labels: int, multi_label: bool, table: str = "jsonl", seed: int = 0) -> dict[str, int]:
    """Write the splits and images of a data set, and return the number of rows of each split.

    Args:
        rows: of all splits together; training must have at least one for each of `labels`.
        table: jsonl, or csv with labels separated by ``|``.
    """
    counts = {name: max(1, round(share * rows)) for name, share in SPLITS.items()}
    counts["train"] = rows - counts["val"] - counts["test"]
    if counts["train"] < labels:
        raise SystemExit(f"{labels} labels need at least {labels} training rows, got {counts['train']}")
    random = np.random.default_rng(seed)
    (out / "images").mkdir(parents=True)
    for number in range(IMAGES):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(out / "images" / f"{number}.png")
    for split, count in counts.items():
        with (out / f"{split}.{table}").open("w", encoding="utf-8", newline="") as file:
            found = _rows(split, count, labels, multi_label, random)
            if table == "jsonl":
                file.writelines(json.dumps(row) + "\n" for row in found)
            else:
                cells = csv.DictWriter(file, ("id", "text", "img", "label"))
                cells.writeheader()
                cells.writerows(row | {"label": "|".join(row["label"])} if multi_label else row for row in found)
    return counts


def _rows(split: str, count: int, labels: int, multi_label: bool, random: np.random.Generator) -> Iterator[dict[str, Any]]:
    share = 1 / np.arange(1, labels + 1)
    edges = np.cumsum(share / share.sum())
    names = [f"label {hashlib.blake2b(str(number).encode(), digest_size=6).hexdigest()}" for number in range(labels)]
    for start in range(0, count, _AT_ONCE):
        size = min(_AT_ONCE, count - start)
        drawn = np.minimum(np.searchsorted(edges, random.random((size, 4))), labels - 1).tolist()
        several = random.integers(1, 5, size).tolist()
        words = random.integers(0, len(_WORDS), (size, 6)).tolist()
        for i, number in enumerate(range(start, start + size)):
            first = number if split == "train" and number < labels else drawn[i][0]
            chosen = dict.fromkeys([first, *drawn[i][1 : several[i]]]) if multi_label else [first]
            row_labels = [names[label] for label in chosen]
            text = " ".join([*(_WORDS[word] for word in words[i]), split, str(number)])
            label: Any = row_labels if multi_label else row_labels[0]
            yield {"id": f"{split}-{number}", "text": text, "img": f"images/{number % IMAGES}.png", "label": label}


def main() -> None:
    """Write a data set and print its size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of all splits: 90 %% train, 5 %% val, 5 %% test")
    parser.add_argument("--labels", type=int, default=10_000)
    parser.add_argument("--multi-label", action="store_true", help="one to four labels a row instead of one")
    parser.add_argument("--table", choices=("jsonl", "csv"), default="jsonl")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts = make(
        arguments.out,
        rows=arguments.rows,
        labels=arguments.labels,
        multi_label=arguments.multi_label,
        table=arguments.table,
        seed=arguments.seed,
    )
    sizes = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print(f"{arguments.out}: {sizes}; {arguments.labels:,} labels")


if __name__ == "__main__":
    main()
