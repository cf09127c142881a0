"""Half precision: every encoder, method and gate runs, learns and is evaluated under autocast; the head is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoder_cases import TIMM, Case
from fake_cuda import FakeTensorMode, autocast, backward, move, moved
from test_encoders import FAMILIES, cases  # noqa: F401 (a fixture)
from test_fusion import TEXTS, build, images, open_gates
from test_lora import SMALL_BERT

from mopefuse import registry
from mopefuse.fusion._base import Fusion

VIT, SWIN = f"timm:{TIMM['vit']}", f"timm:{TIMM['swin-padded']}"
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in registry.available(registry.FUSION)},
    "conditional, joint router": {"router": {"kind": "joint"}},
    "conditional, either": {"either": True},
    "conditional, warm start": {"warm_start": "linear", "prompts": {"gate": "zero"}},
    **{f"conditional, comp {mode}": {"comp_tuning": {"mode": mode}} for mode in ("prompts", "full", "lora")},
    **{f"late-concat, {tune}": {"method": "late-concat", "tune": tune} for tune in ("prompt", "full", "lora")},
    "linear, average": {"method": "linear", "linear": {"features": "average"}},
    "a deeper head": {"head_hidden": 8},
}
INSERTING = ("sequential", "mmbt", "p-mmbt", "promptfuse", "blindprompt", "pmf")


def runs_on_fake_cuda(model: Fusion) -> None:
    """Forward, backward and evaluation in both half precisions, as training and validation do them."""
    batch = model.collate(images(3), TEXTS[:3])
    learns = bool(model.ours()) and not model.closed_form
    with FakeTensorMode():
        move(model)
        on_device = moved(batch)
        for dtype in (torch.bfloat16, torch.float16):
            model.train()
            with autocast(dtype):
                logits_BN = model(on_device).logits
            assert logits_BN.dtype == torch.float32
            if learns:
                backward(logits_BN.square().sum())
                assert all(parameter.grad is not None for parameter in model.ours().values())
                model.zero_grad()
            model.eval()
            with torch.no_grad(), autocast(dtype):
                assert model(on_device).logits.dtype == torch.float32


@pytest.mark.parametrize("gate", ["none", "zero"])
@pytest.mark.parametrize("family", [*FAMILIES, "tiny-vision", "tiny-text"])
def test_every_encoder_runs_in_half_precision(family: str, gate: str, cases: dict[str, Case]) -> None:  # noqa: F811
    spec = family.replace("-", ":") if family.startswith("tiny") else cases[family].spec
    runs_on_fake_cuda(build(spec, "tiny:text", prompts={"gate": gate}))


@pytest.mark.parametrize("gate", ["none", "zero"])
@pytest.mark.parametrize("main", ["vit", "swin"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_in_half_precision(method: str, main: str, gate: str) -> None:
    if (main == "swin" and method in INSERTING) or ("warm start" in method and gate == "none"):
        return  # refused when it is built
    options = {**METHODS[method], "prompts": {"gate": gate}}
    runs_on_fake_cuda(build({"vit": VIT, "swin": SWIN}[main], SMALL_BERT, **options))


def test_a_cnn_that_is_tuned_runs_in_half_precision() -> None:
    runs_on_fake_cuda(build("timm:resnet18?pretrained=false", SMALL_BERT, method="late-concat", tune="full"))
