"""Measure reading: checking images, reloading an index, and images/s decoded and from the cache.

``python scripts/measure_data.py [--rows 20000] [--main "timm:vit_base?pretrained=false"]``; writes into a temporary
folder only. The images are photographs' equals in cost: 200 x 200 JPEGs of smooth noise, quality 90.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mopefuse.config.schema import Data
from mopefuse.data.collate import Samples, plain_batches
from mopefuse.data.load import load_data
from mopefuse.encoders.base import create_encoder


def make(root: Path, rows: int, side: int = 200) -> None:
    """A training and a validation split of `rows` in all, an image each."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    counts = {"train": rows - rows // 10, "val": rows // 10}
    for split, count in counts.items():
        with (root / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(count):
                name = f"images/{split}-{number}.jpg"
                noise = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8))
                noise.resize((side, side), Image.Resampling.BICUBIC).save(root / name, quality=90)
                row = {"id": f"{split}-{number}", "text": f"photo number {number}", "img": name, "label": "ab"[number % 2]}
                file.write(json.dumps(row) + "\n")


def main() -> None:
    """Print one line per measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--main", default="timm:vit_base?pretrained=false")
    parser.add_argument("--batch", type=int, default=32)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOPEFUSE_CACHE"] = f"{folder}/cache"
        root = Path(folder) / "data"
        make(root, asked.rows)
        config = Data(path=str(root))
        began = time.perf_counter()
        load_data(config)
        print(f"checked {asked.rows} images: {asked.rows / (time.perf_counter() - began):.0f} images/s")
        times = []
        for _ in range(5):
            began = time.perf_counter()
            data = load_data(config)
            times.append(time.perf_counter() - began)
        print(f"index reloaded in {sorted(times)[2]:.3f} s (median of 5)")
        encoder = create_encoder(asked.main)
        samples = Samples(data, "train", {"main": (encoder.modality, encoder.preprocess)}, config)
        some = min(len(samples), 2000)
        rates = {}
        for kind in ("decoded", "cached", "decoded", "cached"):
            if kind == "cached" and not samples.pictures:
                began = time.perf_counter()
                samples.cache_images()
                print(f"decoded into one file: {len(samples) / (time.perf_counter() - began):.0f} images/s")
            kept, samples.pictures = samples.pictures, samples.pictures if kind == "cached" else {}
            began = time.perf_counter()
            for _ in samples.batches(plain_batches(some, asked.batch)):
                pass
            rates[kind] = some / (time.perf_counter() - began)
            samples.pictures = kept
        print(f"read for {encoder.spec}, one process: decoding {rates['decoded']:.0f} images/s, cached {rates['cached']:.0f}")


if __name__ == "__main__":
    main()
