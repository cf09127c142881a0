"""Every family of encoders by name, built when a test first needs it and shared by all tests of a process.

A test module that names this one in `pytest_plugins` has the fixtures `cases` and `encoders`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import pytest
from encoder_cases import HF, TIMM, TOWERS, Case, add_open_clip_models, hf_case, open_clip_case, save_hf, sharpen, timm_case

from mopefuse.encoders.base import Encoder, create_encoder

Value = TypeVar("Value")
FAMILIES = [
    *(f"hf-{kind}" for kind in HF),
    *(f"timm-{name}" for name in TIMM),
    *(f"open_clip-{kind}{tower}" for kind in TOWERS for tower in ("visual", "text")),
]
QUICK = ("hf-bert", "hf-qwen3", "timm-vit", "timm-swin-padded", "open_clip-visual", "open_clip-text")
"""One of each kind: bidirectional and causal text, image tokens and windows, both towers of open_clip."""


class Lazy(Mapping[str, Value]):
    """A mapping whose values are created when they are first accessed."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Value]) -> None:
        self._names, self._make = tuple(names), make
        self._made: dict[str, Value] = {}

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._made:
            self._made[name] = self._make(name)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Case]:
    """The cases of `FAMILIES`."""
    root: Path = tmp_path_factory.mktemp("encoders")
    add_open_clip_models(root)

    def make(family: str) -> Case:
        library, name = family.split("-", 1)
        if library == "hf":
            save_hf(name, root / name)
            return hf_case(root / name)
        if library == "timm":
            return timm_case(name)
        kind = next(kind for kind in TOWERS for tower in ("visual", "text") if name == kind + tower)
        return open_clip_case(name.removeprefix(kind), kind)

    return Lazy(FAMILIES, make)


@pytest.fixture(scope="session")
def encoders(cases: Mapping[str, Case]) -> Mapping[str, Encoder]:
    """Encoders of `FAMILIES`, with weights for which differences show; tests must not change them."""

    def make(family: str) -> Encoder:
        encoder = create_encoder(cases[family].spec)
        if not family.startswith("hf-"):  # those were saved with such weights
            sharpen(encoder.backbone)  # type: ignore[arg-type]
        return encoder

    return Lazy(FAMILIES, make)
