"""Rows of different runs in one forward pass: every answer equals that of the run alone."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mopefuse
from mopefuse.errors import MopefuseError
from mopefuse.fusion.base import Fusion
from mopefuse.inference.predict import Predictor
from mopefuse.serving.engine import grouped
from mopefuse.serving.engine.adapter_weights import can_share
from mopefuse.serving.engine.engine import Engine, EngineSettings
from mopefuse.serving.engine.request import Request
from mopefuse.serving.engine.resident import Alone
from mopefuse.serving.engine.shared_pair import SharedPair

VISION, TEXT = "tiny:vision", "tiny:text"
SHARED: dict[str, dict[str, Any]] = {  # names of adapters, and how they differ from the defaults
    "default": {},
    "experts": {"experts": 3, "static": 2, "dynamic": 5, "mapped": 2},
    "one-expert": {"experts": 1, "film": False},
    "no-film": {"film": False, "experts": 8, "num_labels": 7},
    "film-alone": {"static": 0, "dynamic": 0, "mapped": 0},
    "static-alone": {"static": 3, "dynamic": 0, "mapped": 0, "film": False, "head_features": "main"},
    "mapped-alone": {"static": 0, "dynamic": 0, "mapped": 3, "film": False},
    "no-prompts": {"static": 0, "dynamic": 0, "mapped": 0, "film": False, "head_features": "all"},
    "last-layers": {"layers": "last:2", "num_labels": 2},
    "top-2": {"experts": 6, "router": {"top_m": 2}},
    "warmer": {"experts": 6, "router": {"temperature": 1.0}, "bottleneck": 5},
    "batch-norm": {"mapper_norm": "batch-frozen"},
    "linear-head": {"head_hidden": 0, "head_features": "all", "num_labels": 11},
    "wide-head": {"head_hidden": 9, "head_features": "all", "head_norm": "none"},
    "main-head": {"head_features": "main"},
    "reader": {"head_features": "tokens", "cross_attention": {"queries": 2, "width": 16, "heads": 2}},
    "standardised": {"warm_start": "auto"},
    "numbers": {"task": "regression", "num_labels": 1},
    "several-labels": {"task": "multi-label", "num_labels": 5},
    "absent": {"train": {"modality_dropout": 0.2}},
    "joint-softmax": {"gate": "none"},
    "joint-softmax-lengths": {"gate": "none", "experts": 2, "static": 1, "dynamic": 2, "layers": "first:2"},
}
ALONE: dict[str, dict[str, Any]] = {
    "joint-router": {"router": {"kind": "joint"}},
    "film-mixture": {"prompts": {"film_mixture": 2}},
    "token-condition": {"condition": "tokens"},
    "late-concat": {"method": "late-concat"},
    "prompted-comp": {"comp_tuning": {"mode": "prompts"}},
    "either": {"either": True, "train": {"modality_dropout": 0.2}},
    "lora": {"comp_tuning": {"mode": "lora"}},
    "lora-of-both": {"method": "late-concat", "tune": "lora"},
}


def randomised(seed: int, **settings: Any) -> Fusion:
    """A model whose trained parameters, gates and FiLM included, are all random."""
    settings = {"main": VISION, "comp": TEXT, "num_labels": 4, "seed": seed, **settings}
    model = mopefuse.build_fusion(**settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.trainable_state_dict().items():
            if "keys" not in name:
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(noise.abs() + 0.5 if "deviation" in name else tensor + 0.1 * noise)
    return model


def save(folder: Path, adapters: dict[str, dict[str, Any]], **common: Any) -> None:
    for seed, (name, settings) in enumerate(adapters.items()):
        model = randomised(seed, **{**common, **settings})
        mopefuse.save_adapter(model, folder / name, labels=[f"label {number}" for number in range(model.num_labels)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("adapters")
    save(where, {**SHARED, **ALONE})
    return where


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def samples(names: Sequence[str], *, each: int = 3, seed: int = 0) -> list[Request]:
    """Requests for all of some models in random order, with texts of different lengths."""
    drawn = random.Random(seed)
    words = "read the top right green digit please now and then again".split()
    found = [
        Request(name, {"image": picture(drawn.randrange(9)), "text": " ".join(words[: drawn.randrange(1, 11)])}, routing=True)
        for name in names
        for _ in range(each)
    ]
    drawn.shuffle(found)
    return found


@functools.cache
def predictor_of(adapter: Path) -> Predictor:
    return mopefuse.load(adapter)


def expected(folder: Path, request: Request) -> dict[str, Any]:
    """The prediction of the model alone for the sample alone."""
    image, text = request.values.get("image"), request.values.get("text")
    pixels = None if image is None else Image.open(io.BytesIO(image))  # type: ignore[arg-type]
    return predictor_of(folder / request.model).predict([pixels], [text], top=request.top, routing=request.routing)[0]


def numbers(prediction: object) -> Iterator[float]:
    if isinstance(prediction, dict):
        for key in sorted(prediction):
            yield from numbers(prediction[key])
    elif isinstance(prediction, list):
        for part in prediction:
            yield from numbers(part)
    elif isinstance(prediction, float):
        yield prediction


def assert_equal(answer: object, wanted: dict[str, Any]) -> None:
    assert isinstance(answer, dict), answer
    assert answer.keys() == wanted.keys()
    np.testing.assert_allclose([*numbers(answer)], [*numbers(wanted)], atol=1e-5, rtol=1e-5)
    assert answer.get("label") == wanted.get("label")


@pytest.mark.parametrize("cache_mb", [pytest.param(0, marks=pytest.mark.matrix, id="no-cache"), pytest.param(8, id="cache")])
def test_one_forward_pass_for_many_runs_equals_each_alone(folder: Path, cache_mb: int) -> None:
    engine = Engine(EngineSettings(adapters=str(folder), cache_mb=cache_mb))
    for seed in range(2):
        requests = samples([*SHARED, *ALONE], seed=seed)
        for request, answer in zip(requests, engine.predict(requests), strict=True):
            assert_equal(answer, expected(folder, request))
    assert engine.stats()["batches_failed"] == 0


def test_runs_that_can_share_do(folder: Path) -> None:
    engine = Engine(EngineSettings(adapters=str(folder)))
    engine.predict(samples([*SHARED, *ALONE], each=1))
    residents = {name: engine._models.get(engine.catalogue.find(name)) for name in (*SHARED, *ALONE)}
    shared = {residents[name].executor for name in SHARED}
    assert len(shared) == 1 and isinstance(next(iter(shared)), SharedPair)
    assert all(isinstance(residents[name].executor, Alone) for name in ALONE)
    encoders = next(iter(shared)).encoders["main"]  # type: ignore[attr-defined]
    owners = {name: residents[name].executor.model.fusion.main for name in ALONE}  # type: ignore[attr-defined]
    assert {name for name, one in owners.items() if one is not encoders} == {"lora", "lora-of-both"}


def test_one_forward_pass_serves_a_mixed_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(EngineSettings(adapters=str(folder)))
    gated = [name for name in SHARED if not name.startswith("joint-softmax")]
    engine.predict(samples(gated, each=1))
    residents = [engine._models.get(engine.catalogue.find(name)) for name in gated]
    main = residents[0].executor.encoders["main"]  # type: ignore[attr-defined]
    calls: list[str] = []
    encode = type(main)._encode

    def count(encoder: Any, inputs: Any) -> Any:
        calls.append(encoder.modality)
        return encode(encoder, inputs)

    monkeypatch.setattr(type(main), "_encode", count)
    requests = samples(gated)
    engine.predict(requests)
    assert calls.count("image") == 1
    calls.clear()
    engine.predict(requests)
    assert calls == ["image"], "psi of all texts is known"


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("main", "comp"),
    [
        (TEXT, VISION),
        ("timm:test_vit?pretrained=false&size=32", TEXT),
        (VISION, [TEXT, VISION]),
    ],
    ids=["text-is-main", "timm", "two-comps"],
)
def test_other_pairs(tmp_path: Path, main: str, comp: Any) -> None:
    torch.manual_seed(0)
    chosen = ("default", "experts", "no-film", "reader", "last-layers", "absent", "joint-softmax", "joint-softmax-lengths")
    save(tmp_path, {name: SHARED[name] for name in chosen}, main=main, comp=comp)
    engine = Engine(EngineSettings(adapters=str(tmp_path)))
    for _ in range(2):  # computed, and from the cache
        requests = samples(chosen)
        for request, answer in zip(requests, engine.predict(requests), strict=True):
            assert_equal(answer, expected(tmp_path, request))
    assert engine.stats()["batches_failed"] == 0


def test_layers_of_different_widths_run_alone() -> None:
    swin = "timm:swin_tiny_patch4_window7_224?img_size=32&window_size=4&depths=2,2&num_heads=2,4&embed_dim=16&pretrained=false"
    assert can_share(randomised(0)) and not can_share(randomised(0, main=swin))


def test_rows_without_a_modality(folder: Path) -> None:
    engine = Engine(EngineSettings(adapters=str(folder)))
    requests = samples(["default", "absent", "reader", "either"], each=2)
    lacking = [Request(name, {"image": picture(1)}) for name in ("absent", "either")]
    lacking.append(Request("either", {"text": "read the red digit"}))
    answers = engine.predict([*requests, *lacking])
    for request, answer in zip([*requests, *lacking], answers, strict=True):
        assert_equal(answer, expected(folder, request))
    refused, other = engine.predict([Request("default", {"image": picture(1)}), requests[0]])
    assert isinstance(refused, MopefuseError) and refused.code == "MF-DATA-100" and "no text" in refused.what
    assert_equal(other, expected(folder, requests[0]))


def test_stacked_and_separate_products_are_equal() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(2, inputs, *outputs) for inputs, outputs in ((5, (3, 4)), (7, (2, 4)), (4, (3, 1)))]
    x_UZRI = torch.randn(3, 2, 6, 7)
    product = grouped.multiply(x_UZRI, weights, leading=1)
    stacked = grouped.stack_padded(weights).flatten(2 + 1)
    for at, weight in enumerate(weights):
        own = torch.einsum("zri,zi...->zr...", x_UZRI[at, ..., : weight.shape[1]], weight)
        padded = torch.zeros_like(product[at])
        padded[:, :, : own.shape[2], : own.shape[3]] = own
        torch.testing.assert_close(product[at], padded)
    assert stacked.shape == (3, 2, 7, 12)
