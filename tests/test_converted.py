"""A model as an ordinary torch module: saved and loaded as a whole, copied, and converted to another floating-point type."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import matrix
from encoder_cases import Case
from families import FAMILIES, QUICK
from test_autocast import METHODS as EVERY_METHOD
from test_fusion import TEXTS, build, images, open_gates
from torch import Tensor

from mopefuse.data.base import Batch
from mopefuse.fusion.base import Fusion

pytest_plugins = ["families"]
TYPES = (torch.bfloat16, torch.float16, torch.float64)
METHODS = [name for name in EVERY_METHOD if name not in ("mmbt", "p-mmbt")]  # which need the text as main encoder
LOAD = """
import sys, torch
torch.set_num_threads(1)  # as in the tests, for bitwise equality
model = torch.load(sys.argv[1], weights_only=False)
batch, wanted = torch.load(sys.argv[2], weights_only=False)
with torch.no_grad():
    for name, one in model.items():
        assert torch.equal(one(batch[name]).logits, wanted[name]), name
print(len(model))
"""


def model_of(family: str, cases: Mapping[str, Case]) -> Fusion:
    model = build(cases[family].spec, "tiny:text")
    open_gates(model)
    return model


def method(name: str) -> Fusion:
    model = build("tiny:vision", "tiny:text", **EVERY_METHOD[name])
    open_gates(model)
    return model


@torch.no_grad()
def predict_logits(model: Fusion) -> Tensor:
    return model(model.collate(images(3), TEXTS[:3])).logits


def assert_loads_elsewhere(models: dict[str, Fusion], folder: Path) -> None:
    """Check that a new process, which imports only torch, gets the same logits, bit for bit."""
    batches: dict[str, Batch] = {name: model.collate(images(3), TEXTS[:3]) for name, model in models.items()}
    torch.save(models, folder / "models.pt")
    torch.save((batches, {name: predict_logits(model) for name, model in models.items()}), folder / "expected.pt")
    files = [str(folder / "models.pt"), str(folder / "expected.pt")]
    done = subprocess.run([sys.executable, "-c", LOAD, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(len(models))


@pytest.mark.process
@pytest.mark.parametrize("library", ["hf", "timm", "open_clip"])
def test_every_encoder_is_saved_whole(library: str, cases: Mapping[str, Case], tmp_path: Path) -> None:
    families = [family for family in FAMILIES if family.startswith(library)]
    assert_loads_elsewhere({family: model_of(family, cases) for family in families}, tmp_path)


@pytest.mark.matrix
def test_every_method_is_saved_whole(tmp_path: Path) -> None:
    assert_loads_elsewhere({name: method(name) for name in METHODS}, tmp_path)


def test_what_was_loaded_prepares_and_learns_as_before(tmp_path: Path) -> None:
    model = method("conditional")
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(predict_logits(again), predict_logits(model))
    again(again.collate(images(3), TEXTS[:3])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in again.trainable_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def check_types(model: Fusion) -> None:
    """Check that outputs are finite in each type, and closer to float32 the more digits a type has."""
    wanted = predict_logits(model)
    scale = float(wanted.abs().max())
    for dtype in TYPES:
        found = predict_logits(copy.deepcopy(model).to(dtype))
        assert found.isfinite().all() and found.dtype in (dtype, torch.float32), dtype
        off = float((found.double() - wanted.double()).abs().max())
        assert off < {torch.bfloat16: 0.5, torch.float16: 0.1, torch.float64: 1e-3}[dtype] * max(1.0, scale), (dtype, off)
    assert torch.equal(predict_logits(model), wanted), "the copied model is unchanged"


@pytest.mark.parametrize("family", matrix(FAMILIES, QUICK))
def test_every_encoder_can_be_converted(family: str, cases: Mapping[str, Case]) -> None:
    check_types(model_of(family, cases))


@pytest.mark.parametrize("family", matrix([name for name in FAMILIES if "swin" in name], ["timm-swin-padded"]))
def test_windows_without_prompts_can_be_converted(family: str, cases: Mapping[str, Case]) -> None:
    check_types(build(cases[family].spec, "tiny:text", method="late-concat"))


@pytest.mark.parametrize("gate", ["none", "zero"])
@pytest.mark.parametrize("name", matrix(METHODS, ["conditional", "pmf", "late-concat, lora"]))
def test_every_method_can_be_converted(name: str, gate: str) -> None:
    if "warm start" in name and gate == "none":
        return  # refused when it is built
    options = {"prompts": {"gate": gate}, **EVERY_METHOD[name]}
    model = build("tiny:vision", "tiny:text", **options)
    open_gates(model)
    check_types(model)


@pytest.mark.process
@pytest.mark.parametrize("name", ["mmbt", "p-mmbt"])
def test_methods_that_read_images_among_words_can_be_saved_and_converted(name: str, tmp_path: Path) -> None:
    model = build("tiny:text", "tiny:vision", method=name)
    check_types(model)
    assert_loads_elsewhere({name: model}, tmp_path)
