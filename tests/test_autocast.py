"""Half precision: every encoder, method and gate runs, trains and is evaluated under autocast; the head is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from conftest import matrix, thinned
from encoder_cases import TIMM, Case
from fake_cuda import FAKE, autocast, backward, move, moved
from families import FAMILIES
from test_fusion import TEXTS, build, images, open_gates
from test_lora import SMALL_BERT
from torch import Tensor, nn

from mopefuse.config.schema import build_config
from mopefuse.core import registry
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import build_model
from mopefuse.tasks.segmentation import Segmentation

pytest_plugins = ["families"]
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

GATES_AND_TYPES = pytest.mark.parametrize(("gate", "dtype"), [("none", torch.bfloat16), ("zero", torch.float16)], ids=str)


def runs_on_fake_cuda(model: Fusion, dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16)) -> None:
    """Run forward, backward and evaluation in half precision, as training and validation do."""
    batch = model.collate(images(3), TEXTS[:3])
    learns = bool(model.named_trainable_parameters()) and not model.closed_form
    with FAKE:
        move(model)
        on_device = moved(batch)
        for dtype in dtypes:
            model.train()
            with autocast(dtype):
                output = model(on_device)
            logits = [each_BN for each_BN in (output.logits_BN, output.alone_BN) if each_BN is not None]
            assert all(each_BN.dtype == torch.float32 for each_BN in logits)
            if learns:
                backward(torch.cat(logits).square().sum())
                assert all(parameter.grad is not None for parameter in model.trainable_parameters())
                model.zero_grad()
            model.eval()
            with torch.no_grad(), autocast(dtype):
                assert model(on_device).logits.dtype == torch.float32


@GATES_AND_TYPES
@pytest.mark.parametrize("family", matrix([*FAMILIES, "tiny-vision", "tiny-text"], ["hf-bert", "timm-swin-padded"]))
def test_every_encoder_runs_in_half_precision(
    family: str, gate: str, dtype: torch.dtype, cases: Mapping[str, Case]
) -> None:
    spec = family.replace("-", ":") if family.startswith("tiny") else cases[family].spec
    runs_on_fake_cuda(build(spec, "tiny:text", prompts={"gate": gate}), [dtype])


@GATES_AND_TYPES
@pytest.mark.parametrize(
    ("method", "main"),
    thinned([(method, "vit") for method in METHODS] + [(method, "swin") for method in METHODS if "," in method], 12),
)
def test_every_method_runs_in_half_precision(method: str, main: str, gate: str, dtype: torch.dtype) -> None:
    if (main == "swin" and method in INSERTING) or ("warm start" in method and gate == "none"):
        return  # refused when it is built
    options = {**METHODS[method], "prompts": {"gate": gate}}
    runs_on_fake_cuda(build({"vit": VIT, "swin": SWIN}[main], SMALL_BERT, **options), [dtype])


def test_a_fine_tuned_cnn_runs_in_half_precision() -> None:
    runs_on_fake_cuda(build("timm:resnet18?pretrained=false", SMALL_BERT, method="late-concat", tune="full"))


HEADS: dict[str, dict[str, Any]] = {
    "conditional": {},
    "warm start": {"warm_start": "linear"},
    "deeper": {"head_hidden": 8},
    "no norm": {"method": "late-concat", "head_norm": "none"},
    "linear": {"method": "linear"},
    "average": {"method": "linear", "linear": {"features": "average"}},
    "inserting": {"method": "promptfuse"},
    "pmf": {"method": "pmf"},
    "p-sequential": {"method": "p-sequential"},
    "comp-only": {"method": "comp-only"},
    "mlp": {"method": "mlp"},
    "cross-attention": {"method": "cross-attention"},
    "qmf": {"method": "qmf"},
    "map": {"method": "map"},
    "maple": {"method": "maple"},
    "flamingo": {"method": "flamingo", "head_features": "all"},
}


def heads_of(model: Fusion) -> list[nn.Module]:
    heads = [getattr(model, name) for name in model.heads]
    return [one for head in heads for one in (head.values() if isinstance(head, nn.ModuleDict) else [head])]


@pytest.mark.parametrize("name", [*HEADS, "either"])
def test_heads_are_computed_in_float32_under_autocast(name: str) -> None:
    """Each head gives the same result as without autocast for the same input."""
    model = build(**(HEADS | {"either": {"either": True}})[name])
    open_gates(model)
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    for head in heads_of(model):
        head.register_forward_hook(lambda head, args, out: seen.append((head, args[0], out)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model(model.collate(images(4), TEXTS[:4]))
    handed = list(seen)
    assert len(handed) == len(heads_of(model)) and output.logits.dtype == torch.float32
    for head, features_BC, logits_BN in handed:
        assert features_BC.dtype == torch.float32
        assert torch.equal(head(features_BC), logits_BN)
    if output.alone_BN is not None:
        assert output.alone_BN.dtype == torch.float32


@pytest.mark.parametrize("gate", ["none", "zero"])
def test_swin_gives_the_same_output_in_training_and_evaluation_under_autocast(gate: str) -> None:
    model = build(SWIN, "tiny:text", prompts={"gate": gate, "dropout": 0}, router={"noise": False})
    open_gates(model)
    batch = model.collate(images(3), TEXTS[:3])
    with torch.autocast("cpu", torch.bfloat16):
        trained = model(batch).logits
        with torch.no_grad():
            assert torch.equal(model(batch).logits, trained)


@pytest.mark.parametrize("decoder", ["linear", "fpn"])
@pytest.mark.parametrize("method", list(registry.available(registry.SEGMENTATION)))
def test_segmentation_runs_in_half_precision(method: str, decoder: str) -> None:
    task = Segmentation((32, 32), foreground=1)
    values = {"main": VIT, "comp": SMALL_BERT, "method": method, "segmentation": {"decoder": decoder}}
    runs_on_fake_cuda(build_model(build_config(values), 2, task))
    with FAKE:
        outputs, targets = torch.randn(3, 2, 8, 8, device="cuda"), torch.zeros(3, 32, 32, dtype=torch.uint8, device="cuda")
        assert task.loss(outputs.half(), targets).shape == (3,)


@pytest.mark.parametrize("kind", matrix(["int8", "nf4", "fp8"], ["int8"]))
def test_quantised_encoders_run_in_half_precision(kind: str) -> None:
    runs_on_fake_cuda(build(f"{VIT}&quantize={kind}", f"tiny:text?quantize={kind}"))
