"""The exported graph gives the model's results at every batch size and text length, for every kind of pair."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
from conftest import matrix
from encoder_cases import OPEN_CLIP, sharpen

import mopefuse
from mopefuse.encoders.base import EncoderOutput, Inputs
from mopefuse.export import graph
from mopefuse.export.bundle_maker import TOLERANCE, describe, probe_pairs
from mopefuse.fusion.base import Fusion

BERT = (
    "hf:bert-base?pretrained=false&hidden_size=32&num_hidden_layers=2&num_attention_heads=4&intermediate_size=48"
    "&vocab_size=300"
)
VIT = "timm:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2&embed_dim=48&pretrained=false"
SWIN = (
    "timm:swin_tiny_patch4_window7_224?img_size=56&window_size=4&depths=2,2&num_heads=2,4&embed_dim=16&pretrained=false"
)
PAIRS = {
    "tiny": ("tiny:vision", "tiny:text", {"comp_tuning": {"mode": "prompts"}}),
    "Swin and BERT, dense, as in the papers": (SWIN, BERT, {"gate": "none"}),
    "BERT and ViT, joint router, two of four experts": (BERT, VIT, {"router": {"kind": "joint", "top_m": 2}}),
    "a CNN as the other side": ("tiny:vision", "timm:mobilenetv3_small_050?pretrained=false", {"mapped": 0}),
    "open_clip": (
        "open_clip:mopefuse-graph#visual?pretrained=false",
        "open_clip:mopefuse-graph#text?pretrained=false",
        {},
    ),
    "static prompts only": (VIT, "tiny:text", {"dynamic": 0, "mapped": 0}),
}


@pytest.fixture(scope="module", autouse=True)
def _small_open_clip(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = tmp_path_factory.mktemp("open_clip") / "mopefuse-graph.json"
    config.write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(config)


def build(name: str) -> Fusion:
    main, comp, options = PAIRS[name]
    model = mopefuse.build_fusion(main=main, comp=comp, num_labels=5, experts=4, **options)
    if "static" not in name:
        sharpen(model.encoder("comp"))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_trainable_parameters().items():
            scale = 0.1 if name.startswith(("head.", "reader.")) else 0.3  # with many inputs, 0.3 gives logits of about 100
            parameter.add_(scale * torch.randn(parameter.shape, generator=random))
    return model.eval()


@pytest.mark.parametrize("name", matrix(PAIRS, []))
def test_onnx_predicts_like_the_model(name: str, tmp_path: Path) -> None:
    model = build(name)
    sides = describe(model, tmp_path)
    images, texts = probe_pairs(sides)
    made, lengths = graph.Graph(model, routing=False), graph.fixed_lengths(sides)
    example = made.collate(images[:3], texts[:3])
    graph.save_onnx(graph.trace(made, example, lengths), made, example, lengths, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    rng = np.random.default_rng(0)
    free = [how["max_tokens"] for side, how in sides.items() if how["modality"] == "text" and not lengths[side]]
    shapes = [(batch, 9) for batch in (1, 2, 7, 32)] + [(2, length) for length in (1, 2, 3, 31, 128, 512) if free]
    seen = []
    for batch, wanted in shapes:
        inputs = {}
        for side, how in sides.items():
            if how["modality"] == "image":
                inputs[f"{side}_pixels"] = rng.integers(0, 256, (batch, *how["size"], 3), dtype=np.uint8)
                continue
            length = lengths[side] or min(wanted, how["max_tokens"])
            real = rng.integers(1, length + 1, batch)
            real[0] = length
            inputs[f"{side}_ids"] = rng.integers(0, how["vocabulary"], (batch, length))
            inputs[f"{side}_mask"] = np.arange(length)[None, :] < real[:, None]
        with torch.no_grad():
            logits_BN = made({key: torch.from_numpy(array) for key, array in inputs.items()})[0].numpy()
        declared = {value.name for value in session.get_inputs()}
        found = session.run(None, {key: array for key, array in inputs.items() if key in declared})[0]
        assert found.shape == (batch, 5)
        assert np.abs(found - logits_BN).max() < TOLERANCE, (batch, wanted)
        assert (found.argmax(axis=1) == logits_BN.argmax(axis=1)).all()
        seen.append(logits_BN[0])
    assert np.ptp(np.stack(seen), axis=0).max() > 100 * TOLERANCE, "the predictions are too similar to show differences"


def test_an_encoder_that_cannot_be_traced_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = build("tiny")
    comp = model.encoder("comp")
    plain = comp._encode

    def looks_at_values(inputs: Inputs) -> EncoderOutput:
        return plain({**inputs, "ids": inputs["ids"] + int(inputs["ids"].sum() < 0)})

    monkeypatch.setattr(comp, "_encode", looks_at_values)
    sides = describe(model, tmp_path)
    images, texts = probe_pairs(sides)
    made = graph.Graph(model, routing=False)
    with pytest.raises(mopefuse.errors.EncoderError, match=r"cannot trace .*tiny:text") as caught:
        graph.trace(made, made.collate(images[:3], texts[:3]), graph.fixed_lengths(sides))
    assert caught.value.code == "MF-ENC-56" and "adapter" in caught.value.fix
