"""Benchmark of reading samples: decoding and resizing images for an encoder, and reading them from the cache."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mopefuse.bench.timing import Advance, Times
from mopefuse.config.schema import Data
from mopefuse.data.collate import Samples
from mopefuse.data.load import load_data
from mopefuse.encoders.base import create_encoder


def bench_loader(
    main: str,
    *,
    images: int = 256,
    side: int = 512,
    batch: int = 32,
    workers: int = 0,
    rounds: int = 3,
    advance: Advance = lambda what, done, total: None,
) -> dict[str, Times]:
    """Time reading generated JPEGs of `side` by `side` pixels for an image encoder: "decoded" and "cached".

    Raises:
        EncoderError: an encoder that cannot be created.
    """
    encoder = create_encoder(main)
    readers = {"main": (encoder.modality, encoder.preprocess)}
    seconds: dict[str, list[float]] = {"decoded": [], "cached": []}
    with tempfile.TemporaryDirectory() as folder:
        _write(Path(folder), images, side)
        data = load_data(Data(path=folder))
        for number in range(rounds + 1):
            for name in seconds:
                advance(name, number, rounds + 1)
                samples = Samples(data, "train", readers, Data(path=folder, workers=workers))
                if name == "cached":
                    samples.cache_images()
                keys = [[(0, index) for index in range(first, min(first + batch, images))] for first in range(0, images, batch)]
                start = time.perf_counter()
                for _ in samples.batches(keys):
                    pass
                if number:
                    seconds[name].append(time.perf_counter() - start)
    return {name: Times.from_seconds(each) for name, each in seconds.items()}


def _write(folder: Path, images: int, side: int) -> None:
    random = np.random.default_rng(0)
    (folder / "images").mkdir()
    for split in ("train", "val"):
        rows = []
        for number in range(images if split == "train" else 2):
            low = random.integers(256, size=(side // 16, side // 16, 3), dtype=np.uint8)
            name = f"images/{split}-{number}.jpg"
            Image.fromarray(low).resize((side, side), Image.Resampling.BICUBIC).save(folder / name, quality=90)
            rows.append({"id": f"{split}-{number}", "text": f"text {number}", "img": name, "label": "ab"[number % 2]})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
