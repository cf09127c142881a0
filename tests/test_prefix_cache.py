"""Training starts at the first prompted layer: what enters it is computed once for each sample, and kept."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, code_of, make_pairs, matrix, ranks, write_rows

from mopefuse.config.schema import Data, RunConfig, build_config
from mopefuse.core import cache
from mopefuse.data import prefixes as module
from mopefuse.data.base import DataSet
from mopefuse.data.collate import Samples
from mopefuse.data.load import load_data
from mopefuse.data.prefixes import Prefixes, split_prefixes
from mopefuse.encoders.base import Prefix, create_encoder
from mopefuse.encoders.tiny import TinyEncoder
from mopefuse.errors import Interrupted
from mopefuse.fusion.build import build_model
from mopefuse.runs.folder import RunFolder
from mopefuse.training.listener import Listener
from mopefuse.training.plan import plan
from mopefuse.training.train import train

CPU = torch.device("cpu")
COUNTS = {"train": 16, "val": 6, "test": 5}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_texts(tmp_path_factory.mktemp("prefixes") / "data")


def make_texts(root: Path) -> Path:
    """Pairs with texts of different lengths."""
    make_pairs(root, counts=COUNTS)
    for split in COUNTS:
        rows = [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]
        texts = [" ".join(["red digit is"] * (1 + number % 4)) + f" {number}" for number in range(len(rows))]
        write_rows(root / f"{split}.jsonl", [row | {"text": text} for row, text in zip(rows, texts, strict=True)])
    return root


def settings(root: Path, prefix: str = "on", **more: Any) -> RunConfig:
    """Images as main, prompts in the last of four layers; keys of `more` are ``section__key``."""
    values: dict[str, Any] = {
        "main": "tiny:vision", "comp": "tiny:text", "device": "cpu",
        "prompts": {"experts": 2, "layers": "last:1"},
        "data": {"path": str(root), "cache_prefix": prefix, "prefix_precision": "float32"},
        "train": {"batch_size": 5, "epochs": 2, "lr": 0.01, "log_every": 1},
    }  # fmt: skip
    for name, value in more.items():
        section, _, key = name.partition("__")
        if key:
            values[section][key] = value
        else:
            values[section] = value
    return build_config(values)


class Notices(Listener):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def on_notice(self, text: str) -> None:
        self.texts.append(text)

    @property
    def about_prefixes(self) -> list[str]:
        return [text for text in self.texts if "layers" in text]


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_course(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    """The same losses and validation losses at every step, up to rounding."""
    first, second = log(one), log(other)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for left, right in zip(first, second, strict=True):
        if "loss" in left:
            assert left["loss"] == pytest.approx(right["loss"], abs=tolerance)
        else:
            assert left["val"] == pytest.approx(right["val"], abs=tolerance)


def prefixes(root: Path, encoder: str = "tiny:vision", layer: int = 3, split: str = "train", **how: Any) -> Prefixes:
    config = settings(root, **how)
    return split_prefixes(create_encoder(encoder), layer, load_data(Data(path=str(root))), split, config, CPU)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modality of each value that is read from the data."""
    found: list[str] = []
    own = DataSet.read

    def count(self: DataSet, split: Any, row: Any, modality: str, config: Any) -> Any:
        found.append(modality)
        return own(self, split, row, modality, config)

    monkeypatch.setattr(DataSet, "read", count)
    return found


@pytest.fixture
def layers_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """(encoder, layer) of every layer of a tiny encoder that runs."""
    found: list[tuple[str, int]] = []
    own = TinyEncoder._run_block

    def count(self: TinyEncoder, block: Any, *rest: Any) -> Any:
        found.append((self.spec.name, list(self.blocks).index(block)))
        return own(self, block, *rest)

    monkeypatch.setattr(TinyEncoder, "_run_block", count)
    return iter([found]).__next__()  # type: ignore[return-value]


# -- the same run, for less


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"main": "tiny:text", "comp": "tiny:vision"},
        {"prompts__film": True, "prompts__mapped": 0, "prompts__dynamic": 0, "prompts__static": 0},
        {"router": {"kind": "joint"}, "train__accumulate": 2},
        {"warm_start": "linear"},
        {"train__checkpoint_activations": True},
        {"data__workers": 2},
        {"train__modality_dropout": 0.4},
    ],
    ids=lambda more: "-".join(more) or "plain",
)
def test_a_run_with_the_cache_takes_the_course_of_one_without(data: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    results = {setting: train(settings(data, setting, **more), tmp_path / setting) for setting in ("on", "off")}
    assert_same_course(tmp_path / "on", tmp_path / "off")
    for split in ("val", "test"):
        assert results["on"]["metrics"][split] == pytest.approx(results["off"]["metrics"][split], abs=1e-5)
