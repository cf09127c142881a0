"""An encoder can start from the output of its first layers, and then does not run those layers again."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from conftest import matrix
from test_encoders import batch_of, prompts_for
from torch.nn.utils.rnn import pad_sequence

from mopefuse.encoders._prompted import PromptedEncoder
from mopefuse.encoders.base import Encoder, Prefix, Prompt
from mopefuse.encoders.frozen import can_continue, encode_pooled, encode_prefixes, encode_tokens, token_counts

pytest_plugins = ["families"]
CHOSEN = ("hf-bert", "hf-albert", "hf-swin", "hf-dinov2", "timm-vit", "timm-swin-padded", "open_clip-text", "open_clip-visual")


@pytest.mark.parametrize("family", matrix(CHOSEN, ("hf-bert", "timm-swin-padded")))
def test_layers_before_the_prefix_do_not_run(family: str, encoders: Mapping[str, Encoder]) -> None:
    encoder = encoders[family]
    assert isinstance(encoder, PromptedEncoder)
    inputs, prompts, last = batch_of(encoder), prompts_for(encoder), len(encoder.widths) - 1
    with torch.no_grad():
        expected = encoder.encode(inputs, lambda i, tokens, mask: Prompt(prompts[i]) if i == last else None)
    prefix = encoder.compute_prefix(inputs, last)
    if "mask" not in inputs:
        inputs = encoder.blank_inputs(3)
    runs: list[int] = []
    handles = [
        module.register_forward_hook(lambda *_: runs.append(1))
        for module in {slot.block for slot in encoder._slots}
        for module in module.modules()
        if isinstance(module, torch.nn.LayerNorm)
    ]
    try:
        with torch.no_grad():
            continued = encoder.encode(inputs, lambda i, tokens, mask: Prompt(prompts[i]), start=prefix)
        once = len(runs)
        runs.clear()
        with torch.no_grad():
            encoder.encode(batch_of(encoder), lambda i, tokens, mask: Prompt(prompts[i]))
    finally:
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(continued.pooled_BC, expected.pooled_BC, atol=1e-5, rtol=1e-5)
    assert once > 0 and once * (last + 1) == len(runs)


@pytest.mark.parametrize("family", matrix(CHOSEN, ("timm-vit",)))
def test_a_half_precision_prefix_is_converted_to_the_type_of_the_weights(family: str, encoders: Mapping[str, Encoder]) -> None:
    encoder = encoders[family]
    inputs = batch_of(encoder)
    prefix = encoder.compute_prefix(inputs, 1)
    with torch.no_grad():
        whole = encoder.encode(inputs).pooled_BC
        half = encoder.encode(inputs, start=Prefix(1, prefix.tokens_BLD.half())).pooled_BC
    assert half.dtype == whole.dtype
    torch.testing.assert_close(half, whole, atol=0.02, rtol=0.02)
    assert not torch.equal(half, whole)


@pytest.mark.parametrize("family", matrix(CHOSEN, ("hf-bert", "open_clip-text")))
def test_tokens_are_stored_without_padding(family: str, encoders: Mapping[str, Encoder]) -> None:
    encoder = encoders[family]
    inputs, last = batch_of(encoder), len(encoder.widths) - 1
    assert can_continue(encoder, inputs, encoder.compute_prefix(inputs, last))
    kept, none = encode_prefixes(encoder, inputs, last)
    assert none is None
    again, outputs = encode_prefixes(encoder, inputs, last, outputs=True)
    assert outputs is not None and torch.equal(outputs.pooled_BC, encode_pooled(encoder, inputs))
    assert all(map(torch.equal, outputs.tokens, encode_tokens(encoder, inputs)))
    assert all(map(torch.equal, again, kept))
    assert all(len(tokens_LD) > 0 and tokens_LD.shape[1] == encoder.widths[last] for tokens_LD in kept)
    padded_BLD = pad_sequence(kept, batch_first=True)
    if "mask" not in inputs:
        inputs = encoder.blank_inputs(len(kept))
    elif token_counts(encoder, inputs) is not None:
        assert [len(tokens_LD) for tokens_LD in kept] == inputs["mask"].sum(dim=1).tolist()
    with torch.no_grad():
        continued = encoder.encode(inputs, start=Prefix(last, padded_BLD)).pooled_BC
        whole = encoder.encode(batch_of(encoder)).pooled_BC
    torch.testing.assert_close(continued, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_with_recomputed_activations_early_blocks_do_not_run(encoders: Mapping[str, Encoder], recompute: bool) -> None:
    encoder = copy.deepcopy(encoders["timm-vit"])
    assert isinstance(encoder, PromptedEncoder)
    encoder.recompute = recompute
    prefix = encoder.compute_prefix(batch_of(encoder), 1)
    runs: list[int] = []
    encoder._slots[0].block.norm1.register_forward_hook(lambda *_: runs.append(1))  # type: ignore[union-attr, operator]
    encoder.encode(encoder.blank_inputs(3), start=prefix)
    assert runs == []


def test_a_failed_prefix_leaves_no_state(encoders: Mapping[str, Encoder]) -> None:
    encoder = encoders["timm-vit"]
    inputs = batch_of(encoder)
    with torch.no_grad():
        plain = encoder.encode(inputs).pooled_BC
        encoder.compute_prefix(inputs, 1)
        assert torch.equal(encoder.encode(inputs).pooled_BC, plain)
