"""Data sets with gaps, and small runs on them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import PLAIN, call, write_rows
from safetensors.torch import load_file

_SMALL = ("--main", "tiny:vision", "--comp", "tiny:text", "--experts", 3, "--device", "cpu", "--batch", 8, "--seed", 1, *PLAIN)


def holes(pairs: Path, root: Path, *, column: str) -> Path:
    """Copy a data set, removing the value of a column from every third row of each split."""
    shutil.copytree(pairs, root)
    for split in ("train", "val", "test"):
        rows = [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]
        for row in rows[::3]:
            row[column] = None
        write_rows(root / f"{split}.jsonl", rows)
    return root


def train(data: Path, out: Path, *more: object) -> Any:
    """Train the tiny encoders on a data set."""
    return call("train", *_SMALL, "--data", data, "--out", out, *more)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Read the weights of a checkpoint."""
    return load_file(folder / "weights.safetensors")
