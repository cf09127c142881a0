"""On a GPU: training in bf16, resume, predictions close to the CPU's, memory, attention kernels, torch.compile."""

from __future__ import annotations

import importlib.util
import math
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_pairs
from encoder_cases import TIMM
from tasks_of import SINGLE
from test_fusion import TEXTS, images, open_gates
from test_lora import SMALL_BERT
from test_train import config, log, weights
from torch.nn.attention import SDPBackend, sdpa_kernel

import mopefuse
from mopefuse.core import device as devices
from mopefuse.core.tensor_files import read_tensors, write_tensors
from mopefuse.fusion.base import Fusion
from mopefuse.training.losses import task_loss
from mopefuse.training.optimizer import load_optimizer_state, make_optimizer, optimizer_state
from mopefuse.training.train import train

pytestmark = pytest.mark.cuda

GPU = torch.device("cuda")
SMALL_VIT = f"timm:{TIMM['vit']}"
FUSED_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pairs(tmp_path_factory.mktemp("pairs") / "data", counts={"train": 20, "val": 7, "test": 5})


def bf16() -> AbstractContextManager[object]:
    return devices.autocast("bf16", GPU)


def on_gpu(main: str, comp: str, **options: Any) -> Fusion:
    model = mopefuse.build_fusion(main, comp, 7, **options).to(GPU)
    open_gates(model)
    return model.train()


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in log(run) if "loss" in line]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_continues_like_an_uninterrupted_one(data: Path, tmp_path: Path, precision: str) -> None:
    same = {"device": GPU.type, "train__schedule": "constant", "train__precision": precision}
    train(config(data, train__max_steps=8, **same), tmp_path / "whole")
    train(config(data, train__max_steps=4, **same), tmp_path / "parts")
    result = train(config(data, train__max_steps=8, **same), tmp_path / "parts", resume=True)
    found, need = losses(tmp_path / "parts"), losses(tmp_path / "whole")
    assert len(need) == 8 and all(map(math.isfinite, need))
    assert found == pytest.approx(need, rel=5e-2 if precision == "bf16" else 1e-3)
    assert result["device"] == torch.cuda.get_device_name(GPU)
    parts, whole = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert parts.keys() == whole.keys()
    assert {float(tensor) for name, tensor in parts.items() if name.endswith("/step")} == {8.0}


def test_the_fused_optimiser_state_survives_a_checkpoint(tmp_path: Path) -> None:
    """The step must be on the parameters' device too, or the fused kernel rejects it."""
    model, other = (on_gpu("tiny:vision", "tiny:text") for _ in range(2))
    settings = config(tmp_path, train__lr_comp=1e-2, train__lr_head=1e-2).train
    optimizer, restored = make_optimizer(model, settings), make_optimizer(other, settings)

    def step(fusion: Fusion, by: torch.optim.Optimizer) -> None:
        by.zero_grad()
        torch.manual_seed(0)
        fusion(fusion.collate(images(4), TEXTS[:4]).to(GPU)).logits.square().sum().backward()
        by.step()

    step(model, optimizer)
    names, others = ({id(p): name for name, p in fusion.named_trainable_parameters().items()} for fusion in (model, other))
    write_tensors(tmp_path / "optimizer.safetensors", optimizer_state(optimizer, names))
    other.load_trainable_state_dict(model.trainable_state_dict(), where="memory")
    load_optimizer_state(restored, others, read_tensors(tmp_path / "optimizer.safetensors"), where="file")
    kept = [tensor for entry in restored.state.values() for tensor in entry.values()]
    assert kept and all(tensor.device.type == GPU.type for tensor in kept)
    step(model, optimizer)
    step(other, restored)
    torch.testing.assert_close(other.trainable_state_dict(), model.trainable_state_dict(), atol=1e-5, rtol=1e-4)


def test_predictions_are_close_to_those_of_the_cpu(data: Path, tmp_path: Path) -> None:
    train(config(data, train__max_steps=4, train__precision="fp32"), tmp_path / "run")
    cpu, gpu = (mopefuse.load(tmp_path / "run", device=name) for name in ("cpu", GPU.type))
    found, need = ([answer["probabilities"] for answer in model.predict(images(5), TEXTS)] for model in (gpu, cpu))
    for one, other in zip(found, need, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("pair", [(SMALL_VIT, SMALL_BERT), (SMALL_BERT, SMALL_VIT), ("tiny:vision", "tiny:text")], ids=str)
@pytest.mark.parametrize("gate", ["zero", "none"])
def test_bf16_is_close_to_fp32(pair: tuple[str, str], gate: str) -> None:
    model = on_gpu(*pair, gate=gate).eval()
    batch = model.collate(images(4), TEXTS[:4]).to(GPU)
    with torch.no_grad():
        need = model(batch).logits
        with bf16():
            found = model(batch).logits.float()
    torch.testing.assert_close(found, need, atol=0.05 * float(need.abs().max()), rtol=0)


def peak(model: Fusion, *, recompute: bool) -> int:
    """Bytes that one training step adds to the memory in use."""
    for side in model.uses:
        model.encoder(side).recompute = recompute
    batch = model.collate(images(4) * 4, TEXTS[:4] * 4).to(GPU)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with bf16():
        model(batch).logits.float().square().sum().backward()
    torch.cuda.synchronize()
    model.zero_grad()
    return devices.peak_memory(GPU) - before


def test_frozen_convolutions_use_channels_last_on_the_gpu() -> None:
    model = mopefuse.build_fusion("tiny:text", "timm:resnet18?pretrained=false", 7)
    devices.move_to_device(model, GPU)
    convolution = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert model(model.collate(images(4), TEXTS[:4]).to(GPU)).logits.isfinite().all()


def test_activation_checkpointing_takes_less_memory() -> None:
    model = on_gpu("timm:vit_tiny_patch16_224?pretrained=false", SMALL_BERT)
    peak(model, recompute=False)  # memory that libraries allocate once
    assert 0 < peak(model, recompute=True) < peak(model, recompute=False) / 2


@pytest.mark.parametrize("gate", ["zero", "none"])
def test_activation_checkpointing_gives_the_same_gradients(gate: str) -> None:
    """With LoRA's dropout, which a GPU draws from its own generator."""
    tuning = {"comp_tuning": {"mode": "lora"}, "lora": {"dropout": 0.5}}
    model = on_gpu(SMALL_VIT, SMALL_BERT, gate=gate, **tuning)
    found = []
    for recompute in (False, True):
        for side in model.uses:
            model.encoder(side).recompute = recompute
        model.zero_grad()
        torch.manual_seed(0)
        model(model.collate(images(4), TEXTS[:4]).to(GPU)).logits.square().sum().backward()
        found.append({name: ours.grad for name, ours in model.named_trainable_parameters().items() if ours.grad is not None})
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("gate", ["zero", "none"])
@pytest.mark.parametrize("pair", [(SMALL_VIT, SMALL_BERT), (SMALL_BERT, SMALL_VIT)], ids=["vit", "bert"])
def test_prompted_attention_uses_fused_kernels(pair: tuple[str, str], gate: str) -> None:
    """Forward and backward, with padded texts; the plain kernel is disabled, so anything a fused kernel rejects is an error."""
    model = on_gpu(*pair, gate=gate, comp_tuning={"mode": "prompts"})
    batch = model.collate(images(4), TEXTS[:4]).to(GPU)
    with sdpa_kernel(FUSED_KERNELS):
        with bf16():
            logits = model(batch).logits
        logits.float().square().sum().backward()
    assert logits.isfinite().all()
    assert all(ours.grad is None or ours.grad.isfinite().all() for ours in model.trainable_parameters())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch.compile needs triton on a GPU")
def test_a_compiled_step_equals_an_uncompiled_one() -> None:
    """Without noise and dropout, which compiled code draws from its own generator."""
    model = on_gpu("tiny:vision", "tiny:text", dropout=0.0, router={"noise": False})
    batch = replace(model.collate(images(4), TEXTS[:4]).to(GPU), targets=torch.arange(4, device=GPU))
    found = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        with bf16():
            output = forward(batch)
        loss = task_loss(output, batch, SINGLE)
        loss.backward()
        norms = [float(ours.grad.norm()) for ours in model.trainable_parameters() if ours.grad is not None]
        found.append([float(loss.detach()), *norms])
    assert found[1] == pytest.approx(found[0], rel=5e-2, abs=1e-3)
