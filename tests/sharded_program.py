"""Compares sharded encoders with whole ones; run by several processes, see `test_sharding`.

Arguments: a folder for the models of transformers, written before, and the names of families (`encoder_cases.every_spec`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mopefuse.core import distributed
from mopefuse.encoders.attention import InsertedTokens, Modulation, Prompt
from mopefuse.encoders.base import Encoder, EncoderOutput, Inputs, create_encoder, run_frozen
from mopefuse.encoders.sharding import make_mesh, shard, uneven_calls
from mopefuse.errors import EncoderError, MopefuseError

SHARE = 0.75  # largest part of the weights that one of two processes may keep; odd numbers of rows are padded


def build(spec: str) -> Encoder:
    torch.manual_seed(1)
    return create_encoder(spec)


def inputs_of(encoder: Encoder, count: int = 3) -> Inputs:
    random = np.random.default_rng(count)
    values: dict[str, list[Any]] = {
        "text": ["the quick brown fox", "dogs", "two lazy cats keep sleeping over a brown dog"],
        "image": [Image.fromarray(random.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(count)],
    }
    return encoder.preprocess.batch([encoder.preprocess.item(value) for value in values[encoder.modality][:count]])


class Tensors:
    """Prompts, gates, modulations and inserted tokens that require gradients, the same for every call."""

    def __init__(self, encoder: Encoder, count: int) -> None:
        random = torch.Generator().manual_seed(2)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random).requires_grad_()

        self.prompts = [draw(count, 2, width) for width in encoder.widths]
        self.gates = [draw(heads) for heads in encoder.heads]
        self.scales = [draw(count, width) for width in encoder.widths]
        self.inserted = draw(count, 2, encoder.widths[0]) if encoder.supports_inserted_tokens else None

    def prompt_at(self, layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt:
        modulation = Modulation(self.scales[layer], self.scales[layer].cos())
        return Prompt(self.prompts[layer], self.gates[layer], modulation)

    def gradients(self) -> list[Tensor]:
        every = [*self.prompts, *self.gates, *self.scales, *([] if self.inserted is None else [self.inserted])]
        found = [torch.zeros(0) if one.grad is None else one.grad for one in every]
        for one in every:
            one.grad = None
        return found


def learn(encoder: Encoder, inputs: Inputs, tensors: Tensors, *, insert: bool, half: bool) -> list[Tensor]:
    """Outputs and gradients of one step."""
    inserted = None if tensors.inserted is None or not insert else InsertedTokens(tensors.inserted)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        out = encoder.encode(inputs, tensors.prompt_at, inserted)
        loss = out.pooled_BC.float().square().sum() + out.tokens_BLD.float().sin().sum()
    loss.backward()
    return [*outputs(out), *tensors.gradients()]


def outputs(out: EncoderOutput) -> list[Tensor]:
    return [out.pooled_BC.detach(), out.tokens_BLD.detach()]


def same(found: list[Tensor], wanted: list[Tensor], what: str, *, half: bool = False) -> None:
    """Gathered weights are equal bit for bit, but another place in memory may change how a product is rounded."""
    assert len(found) == len(wanted)
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        if torch.equal(one, other):
            continue
        difference = float((one - other).norm() / other.norm())
        assert difference < (1e-2 if half else 1e-5), f"{what}: tensor {number} differs by {difference:.1e}"


def compare(name: str, spec: str) -> None:
    whole, sharded = build(spec), build(spec)
    total = sum(parameter.numel() for parameter in whole.parameters())
    fingerprint = whole.fingerprint()
    shard(sharded, make_mesh(torch.device("cpu")))
    assert sharded.fingerprint() == fingerprint
    kept = sum(parameter.to_local().numel() for parameter in sharded.parameters())  # type: ignore[attr-defined]
    assert kept < SHARE * total, f"{name}: a process keeps {kept} of {total} weights"
    inputs = inputs_of(whole)
    same(outputs(run_frozen(sharded, inputs)), outputs(run_frozen(whole, inputs)), f"{name}: without prompts")
    # one process has more to do than the others
    with uneven_calls(sharded):
        for count in range(1, 2 + distributed.rank() % 3):
            part = inputs_of(whole, count)
            same(outputs(run_frozen(sharded, part)), outputs(run_frozen(whole, part)), f"{name}: {count} samples")
    if not whole.widths:
        return
    tensors = Tensors(whole, 3)
    for recompute in (False, True):
        whole.recompute = sharded.recompute = recompute
        for insert in (False, True):
            for half in (False, True):
                found, wanted = (learn(one, inputs, tensors, insert=insert, half=half) for one in (sharded, whole))
                same(found, wanted, f"{name}: recompute {recompute}, inserted {insert}, bf16 {half}", half=half)
    last = len(whole.widths) - 1
    prefixes = [one.compute_prefix(inputs, last) for one in (sharded, whole)]
    same([prefixes[0].tokens_BLD], [prefixes[1].tokens_BLD], f"{name}: prefix")
    with torch.no_grad():
        found, wanted = (outputs(one.encode(inputs, None, None, prefixes[1])) for one in (sharded, whole))
    same(found, wanted, f"{name}: from a prefix")
    if whole.supports_inserted_tokens:
        with pytest.raises(EncoderError, match="its layers cannot run on their own"):
            sharded.run_layer(0, prefixes[1].tokens_BLD)


def main() -> None:
    torch.set_num_threads(1)
    specs = json.loads((Path(sys.argv[1]) / "specs.json").read_text())
    if any(spec.startswith("open_clip:") for spec in specs.values()):
        import encoder_cases  # noqa: F401  # registers a model with timm
        import open_clip

        for file in Path(sys.argv[1]).glob("mopefuse-*tiny.json"):
            open_clip.add_model_config(file)
    with distributed.process_group():
        for name, spec in specs.items():
            compare(name, spec)
        # an error of one process reaches it after the others have finished
        encoder = build("tiny:text")
        shard(encoder, make_mesh(torch.device("cpu")))
        try:
            with uneven_calls(encoder):
                if distributed.rank() == 0:
                    raise MopefuseError(1, "")
                run_frozen(encoder, inputs_of(encoder))
        except MopefuseError:
            assert distributed.rank() == 0
        distributed.barrier()


main()
