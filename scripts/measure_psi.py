"""Measure the effect of caching psi: time of the second epoch with and without, and the difference of the weights.

``python scripts/measure_psi.py [--main SPEC] [--comp SPEC]``; random weights and data, in a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from mopefuse.config.schema import build_config
from mopefuse.core.artifact import dump_json
from mopefuse.training.train import train
from mopefuse.training.trainer import Listener, Progress


class Clock(Listener):
    """Records the time at which each validation ends."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def on_validation(self, progress: Progress, found: dict[str, float], *, best: bool) -> None:
        """Record the time."""
        self.ended.append(time.perf_counter())


def make(root: Path, counts: dict[str, int], words: int) -> None:
    """Write splits with images of noise and texts of `words` random words."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for split, count in counts.items():
        rows = []
        for number in range(count):
            name = f"images/{split}-{number}.jpg"
            Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(root / name)
            text = " ".join(f"w{word}" for word in rng.integers(0, 10_000, words))
            rows.append(dump_json({"text": text, "img": name, "label": "ab"[number % 2]}).replace("\n", ""))
        (root / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> None:
    """Print the time of the second epoch with and without caching, their ratio, and the largest difference of a weight."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--main", default="timm:swin_base?pretrained=false")
    parser.add_argument("--comp", default="hf:bert-base?pretrained=false&max_tokens=64")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOPEFUSE_CACHE"] = f"{folder}/cache"
        root = Path(folder) / "data"
        make(root, {"train": arguments.rows, "val": arguments.batch}, 80)
        seconds, weights = {}, {}
        for cached in (False, True):
            values = {
                "main": arguments.main,
                "comp": arguments.comp,
                "device": arguments.device,
                "data": {"path": str(root), "cache_features": cached},
                "train": {"epochs": 2, "batch_size": arguments.batch},
            }
            clock = Clock()
            torch.manual_seed(0)
            train(build_config(values), Path(folder) / str(cached), listener=clock)
            seconds[cached] = clock.ended[1] - clock.ended[0]
            last = max((Path(folder) / str(cached) / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
            weights[cached] = load_file(last / "weights.safetensors")
            print(f"psi {'cached' if cached else 'computed'}: second epoch {seconds[cached]:.1f} s", flush=True)
        difference = max(float((weights[True][name] - tensor).abs().max()) for name, tensor in weights[False].items())
        print(f"ratio {seconds[True] / seconds[False]:.2f}, largest difference of a final weight {difference:.1e}")


if __name__ == "__main__":
    main()
