"""The option ``?quantize=``: the weights are torchao's, take as few bytes as promised, and gradients pass through them."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, call, code_of, matrix
from encoder_cases import TIMM, Case
from families import FAMILIES
from test_encoders import batch_of
from test_fusion import TEXTS, images, open_gates
from test_lora import SMALL_BERT, SMALL_VIT
from torch import Tensor, nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, NF4Tensor, quantize_
from torchao.quantization.granularity import PerGroup, PerRow

import mopefuse
from mopefuse.core.parameters import count_parameters
from mopefuse.encoders._quantize import with_quantize
from mopefuse.encoders._quantized_linear import KINDS, QuantizedLinear
from mopefuse.encoders.base import Encoder, create_encoder
from mopefuse.errors import MopefuseError
from mopefuse.fusion.base import Fusion
from mopefuse.testing import check_encoder

pytest_plugins = ["families"]
BYTES = {"int8": 1.125, "fp8": 1.0, "nf4": 0.5}  # of a weight
GRADIENT = {"int8": 0.02, "fp8": 0.08, "nf4": 0.3}  # largest relative error of the gradient of a small model
PAIRS = {
    "ViT and BERT": (f"timm:{TIMM['vit']}", SMALL_BERT),
    "BERT and ViT": (SMALL_BERT, SMALL_VIT),
    "DINOv2 and BERT": (f"timm:{TIMM['dinov2']}", SMALL_BERT),
}
NO_LINEAR = ("hf-gpt2",)
NO_EFFECT = ("timm-swinv2", "timm-swinv2-padded")  # norms after attention begin at 0, and a spec has no other weights


def linear(inputs: int, outputs: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs).requires_grad_(False)


def torchaos(layer: nn.Linear, kind: str) -> Tensor:
    """The weights that torchao itself restores."""
    if kind == "nf4":
        group = math.gcd(layer.weight.numel() // 64, 256)
        return NF4Tensor.from_tensor(layer.weight.detach(), 64, group).get_original_weight()
    own = copy.deepcopy(layer)
    shared = PerRow() if layer.in_features % 32 else PerGroup(32)
    int8 = Int8WeightOnlyConfig(granularity=shared, set_inductor_config=False)
    quantize_(own, int8 if kind == "int8" else Float8WeightOnlyConfig(set_inductor_config=False))
    return own.weight.dequantize()  # type: ignore[no-any-return, operator]


def bytes_of(encoder: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in encoder.parameters())


def built(main: str, comp: str, kind: str = "") -> Fusion:
    torch.manual_seed(0)
    main, comp = (with_quantize(spec, kind) if kind else spec for spec in (main, comp))
    model = mopefuse.build_fusion(main, comp, 7)
    open_gates(model)
    return model.eval()


def gradient(model: Fusion) -> Tensor:
    output = model(model.collate(images(5), TEXTS))
    F.cross_entropy(output.logits, torch.arange(5)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(384, 64), (48, 96)], ids=str)
def test_the_restored_weights_are_those_of_torchao(kind: str, sizes: tuple[int, int]) -> None:
    layer = linear(*sizes)
    quantized = QuantizedLinear(layer, kind)
    assert torch.equal(quantized.weight, torchaos(layer, kind))
    assert not any(p.requires_grad or p.dtype == torch.float8_e4m3fn for p in quantized.parameters())
    assert torch.equal(copy.deepcopy(quantized).weight, quantized.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_takes_as_few_bytes_as_promised(kind: str) -> None:
    layer = linear(512, 512)
    quantized = QuantizedLinear(layer, kind)
    stored = bytes_of(quantized) - bytes_of(layer) + 4 * layer.weight.numel()  # without the bias
    assert BYTES[kind] <= stored / layer.weight.numel() < BYTES[kind] + 0.02
    assert count_parameters(quantized) == count_parameters(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_pass_restores_the_weights_instead_of_keeping_them(kind: str) -> None:
    quantized, x = QuantizedLinear(linear(48, 96), kind), torch.randn(5, 48, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = quantized(x)
    owned = {parameter.untyped_storage().data_ptr() for parameter in quantized.parameters()}
    assert kept and {tensor.untyped_storage().data_ptr() for tensor in kept} <= owned
    expected = F.linear(x, quantized.weight, quantized.bias)
    assert torch.equal(out, expected)
    (ours,), (theirs,) = (torch.autograd.grad(value.square().sum(), x) for value in (out, expected))
    assert torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(quantized(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_it_computes_in_half_precision(kind: str) -> None:
    quantized, x = QuantizedLinear(linear(48, 96), kind), torch.randn(5, 48, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantized(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), quantized(x), atol=0.03, rtol=0.03)


@pytest.mark.parametrize("pair", matrix(PAIRS, ["DINOv2 and BERT"]))
def test_gradients_of_prompts_are_close_to_those_with_floating_point(pair: str) -> None:
    exact = gradient(built(*PAIRS[pair]))
    errors = {kind: float((gradient(built(*PAIRS[pair], kind)) - exact).norm() / exact.norm()) for kind in KINDS}
    assert all(0 < error < GRADIENT[kind] for kind, error in errors.items()), errors


def test_gradients_are_the_same_if_activations_are_recomputed() -> None:
    model = built(*PAIRS["ViT and BERT"], "int8")
    plain = gradient(model)
    model.zero_grad()
    for encoder in model.encoders.values():
        encoder.recompute = True
    assert torch.equal(gradient(model), plain)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_model_with_quantised_encoders_compiles_to_one_graph(kind: str) -> None:
    model = built(*PAIRS["ViT and BERT"], kind)
    batch = model.collate(images(5), TEXTS)
    compiled = torch.compile(lambda given: model(given).logits, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(batch), model(batch).logits)
    torch._dynamo.reset()


CONTRACT = [name for name in FAMILIES if name not in (*NO_LINEAR, *NO_EFFECT)]


@pytest.mark.parametrize("family", matrix(CONTRACT, ["hf-bert", "hf-qwen3", "timm-vit", "open_clip-siglip-text"]))
def test_every_family_satisfies_the_contract_in_8_bits(family: str, cases: Mapping[str, Case]) -> None:
    encoder = check_encoder(with_quantize(cases[family].spec, "int8"))
    assert any(isinstance(module, QuantizedLinear) for module in encoder.modules())
    assert not any(type(module) is nn.Linear for module in encoder.modules())


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
@pytest.mark.parametrize("family", matrix(["hf-bert", "timm-beit", "timm-swin-padded", "open_clip-visual"], ["hf-bert"]))
def test_other_formats_satisfy_the_contract(family: str, kind: str, cases: Mapping[str, Case]) -> None:
    check_encoder(with_quantize(cases[family].spec, kind))


def test_the_output_is_close_to_that_in_floating_point(cases: Mapping[str, Case], encoders: Mapping[str, Encoder]) -> None:
    plain = encoders["hf-bert"]
    inputs = batch_of(plain)
    with torch.no_grad():
        exact = plain.encode(inputs).pooled_BC
        ours = create_encoder(with_quantize(cases["hf-bert"].spec, "int8")).encode(inputs).pooled_BC
    error = (ours - exact).norm() / exact.norm()
    assert 0 < error < 0.02


def test_it_is_another_encoder_in_descriptions_and_caches() -> None:
    encoders = [create_encoder(f"tiny:vision{option}") for option in ("", "?quantize=int8", "?quantize=nf4")]
    assert len({encoder.fingerprint() for encoder in encoders}) == len({encoder.digest() for encoder in encoders}) == 3
    assert [encoder.describe()["model"].get("quantize") for encoder in encoders] == [None, "int8", "nf4"]
    assert "torchao" in encoders[1].describe()["libraries"] and "torchao" not in encoders[0].describe()["libraries"]
    assert str(encoders[1].spec) == "tiny:vision?quantize=int8"
    assert len({count_parameters(encoder) for encoder in encoders}) == 1


@pytest.fixture(scope="module")
def run(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with quantised encoders; tests must not change it."""
    out = tmp_path_factory.mktemp("quantised") / "run"
    specs = (f"{text}?quantize=int8" if text == "tiny:vision" else text for text in TINY)
    specs = (f"{text}?quantize=nf4" if text == "tiny:text" else text for text in specs)
    done = call("train", *specs, "--data", pairs, "--out", out, "--steps", "2")
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_is_loaded_with_the_same_encoders(run: Path, pairs: Path, tmp_path: Path) -> None:
    recorded = json.loads((run / "manifest.json").read_text())["encoders"]
    kinds = {side: facts["description"]["model"]["quantize"] for side, facts in recorded.items()}
    assert kinds == {"main": "int8", "comp": "nf4"}
    files = [tmp_path / f"{name}.csv" for name in "ab"]
    for file in files:
        assert call("predict", run, pairs / "test.jsonl", "-o", file, "--device", "cpu").returncode == 0
    assert files[0].read_text() == files[1].read_text()


def test_a_run_is_not_loaded_with_encoders_in_floating_point(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("tiny:vision?quantize=int8", "tiny:vision"))
    assert code_of(lambda: mopefuse.load(tmp_path / "run", device="cpu")) == "MF-CKPT-08"


@pytest.mark.matrix
@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_a_run_is_exported_in_any_form(form: str, run: Path, pairs: Path, tmp_path: Path) -> None:
    done = call("export", run, "-o", tmp_path / "bundle", "--format", form)
    assert done.returncode == 0 and "100.0 %" in done.stderr + done.stdout, done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tune": "lora", "method": "late-concat"}, "LoRA needs the weights"),
        ({"tune": "full", "method": "late-concat"}, "full tuning needs the weights"),
        ({"comp_tuning": {"mode": "lora"}}, "LoRA needs the weights"),
    ],
    ids=str,
)
def test_quantised_encoders_cannot_be_tuned(options: dict[str, Any], words: str) -> None:
    with pytest.raises(MopefuseError, match=words) as caught:
        mopefuse.build_fusion("tiny:vision?quantize=int8", "tiny:text?quantize=int8", 7, **options)
    assert "remove quantize=" in caught.value.fix


@pytest.mark.parametrize(
    ("spec", "what", "fix"),
    [
        ("tiny:vision?quantize=int4", "quantize=int4 is not supported", "use int8 or nf4 or fp8"),
        (f"{SMALL_BERT}&quantise=int8", "has no option 'quantise'", "did you mean quantize?"),
        ("timm:resnet18?pretrained=false&quantize=int8", "has no linear layers", "remove quantize="),
        (
            "timm:vit_tiny_patch16_224?depth=1&embed_dim=36&num_heads=3&mlp_ratio=1&pretrained=false&quantize=nf4",
            r"the layer blocks.0.attn.qkv \(108 x 36\) has 3,888 weights",
            "use quantize=int8",
        ),
    ],
)
def test_what_cannot_be_quantised_is_refused(spec: str, what: str, fix: str) -> None:
    with pytest.raises(MopefuseError, match=what) as caught:
        create_encoder(spec)
    assert fix in caught.value.fix


def test_weights_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopefuse.encoders._quantized_linear._QUANTIZE", {"int8": broken})
    with pytest.raises(MopefuseError, match="cannot be represented as int8"):
        create_encoder("tiny:vision?quantize=int8")


def broken(layer: nn.Linear) -> dict[str, Tensor]:
    return {"codes": layer.weight.to(torch.int8), "scales": torch.full((layer.out_features, 1), torch.nan)}


def test_fp8_is_refused_on_devices_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopefuse.encoders._quantized_linear._WITHOUT_FP8", ("cpu",))
    with pytest.raises(MopefuseError, match="PyTorch has no fp8 on cpu") as caught:
        create_encoder("tiny:vision?quantize=fp8")
    assert "quantize=int8" in caught.value.fix
    create_encoder("tiny:vision?quantize=int8")


def test_without_torchao_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "torchao" else found(name, *more))
    with pytest.raises(MopefuseError, match="needs torchao") as caught:
        create_encoder("tiny:vision?quantize=int8")
    assert caught.value.fix == 'pip install "mopefuse[quantize]"'
