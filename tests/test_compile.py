"""torch.compile: a model is one graph with the results of the uncompiled model, and is compiled once for all steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import make_pairs, matrix
from encoder_cases import OPEN_CLIP, TIMM
from test_fusion import TEXTS, images, open_gates
from test_lora import SMALL_BERT
from test_train import config, log
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import mopefuse
from mopefuse.fusion.base import Fusion
from mopefuse.training.train import train

COMPILER = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
CLIP = "open_clip:mopefuse-tiny#{}?pretrained=false"
PAIRS = {
    "vit and bert": (f"timm:{TIMM['vit']}", SMALL_BERT),
    "bert and vit": (SMALL_BERT, f"timm:{TIMM['vit']}"),
    "swin and bert": (f"timm:{TIMM['swin-padded']}", SMALL_BERT),
    "open_clip": (CLIP.format("visual"), CLIP.format("text")),
    "tiny": ("tiny:vision", "tiny:text"),
}
UNGATED: dict[str, Any] = {"gate": "none"}
JOINT: dict[str, Any] = {"router": {"kind": "joint"}, "comp_tuning": {"mode": "lora"}}
TOKENS: dict[str, Any] = {"condition": "tokens"}
RECOMPUTED: dict[str, Any] = {"train": {"checkpoint_activations": True}}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module", autouse=True)
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("open_clip") / "mopefuse-tiny.json"
    file.write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(file)


def built(pair: str, **options: Any) -> Fusion:
    main, comp = PAIRS[pair]
    model = mopefuse.build_fusion(main, comp, 7, **options)
    open_gates(model)
    return model.train()


def learn(model: Fusion, forward: Any, count: int = 4) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of a batch, with seeded dropout and noise, and the gradients of trainable parameters."""
    model.zero_grad()
    torch.manual_seed(0)
    logits = forward(model.collate(images(count), TEXTS[:count])).logits
    logits.square().sum().backward()
    trained = model.named_trainable_parameters()
    return logits.detach(), {name: tensor.grad.clone() for name, tensor in trained.items() if tensor.grad is not None}


@pytest.mark.parametrize(
    ("pair", "options"),
    [
        pytest.param(pair, options, marks=() if (pair, options) == ("tiny", {}) else pytest.mark.matrix)
        for pair, options in (
            *((pair, {}) for pair in PAIRS),
            ("swin and bert", UNGATED),
            ("vit and bert", RECOMPUTED),
            ("tiny", JOINT),
            ("tiny", TOKENS),
            ("swin and bert", {**TOKENS, "condition_tokens": 0}),
        )
    ],
    ids=str,
)
def test_a_model_in_training_compiles_to_one_graph_with_the_same_results(pair: str, options: dict[str, Any]) -> None:
    """`fullgraph` rejects graph breaks, in the forward and the backward pass."""
    model, counter = built(pair, **options), CompileCounterWithBackend("aot_eager")
    logits, gradients = learn(model, model)
    compiled_logits, compiled_gradients = learn(model, torch.compile(model, backend=counter, fullgraph=True))
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled_logits, logits, atol=1e-5, rtol=1e-4)
    assert compiled_gradients.keys() == gradients.keys()
    torch.testing.assert_close(compiled_gradients, gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pair", matrix(["tiny", "swin and bert"], ["tiny"]))
@pytest.mark.matrix
def test_steps_are_compiled_once_for_each_batch_shape(pair: str) -> None:
    model, counter = built(pair), CompileCounterWithBackend("eager")
    forward, optimizer = torch.compile(model, backend=counter, fullgraph=True), torch.optim.AdamW(model.trainable_parameters())
    counts = []
    for size in (5, 5, 5, 3, 4, 2):
        learn(model, forward, size)
        optimizer.step()
        model.eval()  # as validation does
        model.train()
        counts.append(counter.frame_count)
    assert counts == [1, 1, 1, 2, 2, 2]


@pytest.mark.matrix
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_a_compiled_run_learns_the_same_as_an_uncompiled_one(tmp_path: Path) -> None:
    """Without noise and dropout, which compiled code draws from its own generator."""
    data = make_pairs(tmp_path / "data", counts={"train": 12, "val": 4, "test": 4})
    prompts = {"static": 2, "dynamic": 2, "experts": 4, "layers": "last:1", "dropout": 0}
    settings = {"prompts": prompts, "router__noise": False, "train__max_steps": 2, "train__checkpoint_activations": True}
    train(config(data, **settings), tmp_path / "plain")
    train(config(data, train__compile=True, **settings), tmp_path / "compiled")
    losses = [[line["loss"] for line in log(tmp_path / name) if "loss" in line] for name in ("plain", "compiled")]
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
