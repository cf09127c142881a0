"""The router has a learning rate of its own, with which its softmax does not saturate before the experts differ."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mopefuse.config.schema import RunConfig, build_config
from mopefuse.fusion.build import build_model
from mopefuse.training.optimizer import make_optimizer
from mopefuse.training.plan import resolve_defaults

ENCODERS = {"main": "tiny:vision", "comp": "tiny:text"}
STEPS = 20
COLOURS = ("red", "green", "blue", "white", "yellow", "black", "grey", "first") * 2


def settings(**values: Any) -> RunConfig:
    return build_config({**ENCODERS, "warm_start": "none", **values})


@pytest.mark.parametrize(("kind", "inputs"), [("cross", ["comp"]), ("joint", ["main", "comp"])])
def test_the_default_rate_depends_on_temperature_and_width(kind: str, inputs: list[str]) -> None:
    config = settings(router={"kind": kind, "temperature": 0.2})
    model = build_model(config, 3)
    config = resolve_defaults(config, model)
    expected = 4 * 0.2 / math.sqrt(max(model.encoder(side).feature_width for side in inputs))
    assert config.router.lr_factor == pytest.approx(expected)
    optimizer = make_optimizer(model, config.train)
    rate = {id(parameter): group["peak"] for group in optimizer.param_groups for parameter in group["params"]}
    assert config.train.lr is not None
    for name, parameter in model.named_trainable_parameters().items():
        if name.startswith("stack."):
            factor = expected if name.startswith("stack.router.") else 1.0
            assert rate[id(parameter)] == pytest.approx(config.train.lr * factor), name


def test_the_papers_and_a_given_value_are_kept() -> None:
    for values, expected in (({"compat": "paper"}, 1.0), ({"compat": "official"}, 1.0), ({"router": {"lr_factor": 0.3}}, 0.3)):
        config = settings(**values)
        assert resolve_defaults(config, build_model(config, 3)).router.lr_factor == expected


def sharpest(factor: float | None) -> float:
    """Mean weight of each sample's largest of 8 experts after some training steps, 1 if a single expert is used."""
    torch.manual_seed(0)
    config = settings(prompts={"experts": 8, "static": 0, "mapped": 0, "film": False}, router={"lr_factor": factor})
    model = build_model(config, 2)
    model.config = config = resolve_defaults(config, model)
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    batch = model.collate([*images], [f"what is the {word} digit" for word in COLOURS])
    optimizer = make_optimizer(model.train(), config.train)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(batch).logits, torch.arange(16) % 2).backward()
        optimizer.step()
    routing_BLK = model.eval()(batch).routing_BLK
    assert routing_BLK is not None
    return routing_BLK.max(dim=-1).values.mean().item()


def test_the_routing_of_a_sample_does_not_saturate_in_the_first_steps() -> None:
    before, small, large = sharpest(1e-9), sharpest(None), sharpest(1.0)
    assert abs(small - before) < 0.1
    assert large > before + 0.3


def test_groups_for_an_optimizer_have_every_trained_parameter_once() -> None:
    model = build_model(settings(), 3)
    groups = model.parameter_groups(1e-2, head=1e-3)
    assert {id(one) for group in groups for one in group["params"]} == {id(one) for one in model.trainable_parameters()}
    rate = {id(one): group["lr"] for group in groups for one in group["params"]}
    assert model.config.router.lr_factor is not None
    expected = {"stack.router.": 1e-2 * model.config.router.lr_factor, "head.": 1e-3, "reader.": 1e-3}
    for name, parameter in model.named_trainable_parameters().items():
        wanted = next((value for start, value in expected.items() if name.startswith(start)), 1e-2)
        assert rate[id(parameter)] == pytest.approx(wanted), name
