"""Run a frozen encoder on many samples, in batches that fit into memory and have little padding.

Shapes: B batch, b part of a batch, L tokens, D width of a layer, C width of the pooled feature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mopefuse.encoders.base import Encoder, EncoderOutput, Inputs, Prefix, run_frozen

_MAX_ELEMENTS = 64 * 3 * 224 * 224  # maximum size of one input tensor of a batch
_MAX_SAMPLES = 32  # larger chunks are not faster on a CPU and need more padding


def encode_pooled(encoder: Encoder, inputs: Inputs) -> Tensor:
    """Compute pooled features (B, C) of a frozen encoder.

    A sample's feature depends on the other samples only by rounding.
    """
    pooled_BC: Tensor | None = None
    for index_b, part in _chunks(encoder, inputs):
        part_bC = run_frozen(encoder, part).pooled_BC
        if pooled_BC is None:
            pooled_BC = part_bC.new_empty(len(next(iter(inputs.values()))), part_bC.shape[1])
        pooled_BC[index_b.to(part_bC.device)] = part_bC
    assert pooled_BC is not None, "an empty batch"
    return pooled_BC


class Outputs(NamedTuple):
    """Pooled features (B, C), and the output tokens (L, D) of each sample, without padding."""

    pooled_BC: Tensor
    tokens: list[Tensor]


def encode_prefixes(
    encoder: Encoder, inputs: Inputs, layer: int, *, outputs: bool = False
) -> tuple[list[Tensor], Outputs | None]:
    """Compute the tokens (L, D) of each sample that enter a layer, without padding (see `token_counts`).

    Args:
        outputs: also run the other layers, and return what `encode_pooled` and `encode_tokens` do.
    """
    found: dict[int, Tensor] = {}
    pooled_C: dict[int, Tensor] = {}
    tokens: dict[int, Tensor] = {}
    counts_B = token_counts(encoder, inputs)
    for index_b, part in _chunks(encoder, inputs):
        numbers = index_b.tolist()
        if outputs:
            prefix, encoded = run_and_record(encoder, part, layer)
            pooled_C.update(zip(numbers, encoded.pooled_BC, strict=True))
            tokens.update(zip(numbers, _unpadded(encoded), strict=True))
        else:
            prefix = encoder.compute_prefix(part, layer)
        for number, tokens_LD in zip(numbers, prefix.tokens_BLD, strict=True):
            found[number] = tokens_LD if counts_B is None else tokens_LD[: int(counts_B[number])]
    order = range(len(found))
    others = Outputs(torch.stack([pooled_C[at] for at in order]), [tokens[at] for at in order]) if outputs else None
    return [found[at] for at in order], others


@torch.no_grad()
def run_and_record(encoder: Encoder, inputs: Inputs, layer: int) -> tuple[Prefix, EncoderOutput]:
    """Run all layers; returns the tokens that enter one of them (see `Encoder.compute_prefix`), and the output."""
    seen: dict[int, Tensor] = {}

    def record(at: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> None:
        if at == layer:
            seen[at] = tokens_BLD

    encoded = encoder.encode(inputs, record)
    return Prefix(layer, seen[layer]), encoded


def encode_tokens(encoder: Encoder, inputs: Inputs) -> list[Tensor]:
    """Compute the output tokens (L, D) of each sample, without padding."""
    found: dict[int, Tensor] = {}
    for index_b, part in _chunks(encoder, inputs):
        found.update(zip(index_b.tolist(), _unpadded(run_frozen(encoder, part)), strict=True))
    return [found[number] for number in range(len(found))]


def _unpadded(encoded: EncoderOutput) -> list[Tensor]:
    """The output tokens (L, D) of each sample, without padding."""
    tokens_BLD, mask_BL = encoded.tokens_BLD, encoded.mask_BL
    return [tokens_LD if mask_BL is None else tokens_LD[mask_BL[place]] for place, tokens_LD in enumerate(tokens_BLD)]


@torch.no_grad()
def can_continue(encoder: Encoder, inputs: Inputs, prefix: Prefix) -> bool:
    """Whether an encoder can start at a prefix of `inputs` and has one token per mask entry.

    A plugin's encoder may be unable to start at a prefix.
    """
    seen: dict[int, Tensor] = {}
    start = prefix._replace(tokens_BLD=prefix.tokens_BLD + 1)

    def record(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> None:
        seen[layer] = tokens_BLD

    encoder.encode(inputs, record, start=start)
    starts = min(seen, default=-1) == prefix.layer and torch.equal(seen[prefix.layer], start.tokens_BLD)
    return starts and inputs.get("mask", prefix.tokens_BLD[..., 0]).shape == prefix.tokens_BLD.shape[:2]


def token_counts(encoder: Encoder, inputs: Inputs) -> Tensor | None:
    """Count the tokens of each sample (B,), on the CPU; None if all have the same number.

    Padding is not counted, except by encoders with a fixed length, some of which attend to it.
    """
    if "mask" not in inputs or getattr(encoder.preprocess, "length", None) is not None:
        return None
    return inputs["mask"].sum(dim=1).cpu()


def _chunks(encoder: Encoder, inputs: Inputs) -> Iterator[tuple[Tensor, Inputs]]:
    """Split a batch into chunks of samples of similar length, to save padding: the numbers of the samples, and their inputs.

    Padding must be on the right; inputs of an encoder with a fixed length are not shortened.
    """
    counts_B = token_counts(encoder, inputs)
    order_B = torch.arange(len(next(iter(inputs.values())))) if counts_B is None else counts_B.argsort(stable=True)
    largest = max(tensor[0].numel() for tensor in inputs.values())
    for index_b in order_B.split(max(1, min(_MAX_SAMPLES, _MAX_ELEMENTS // largest))):
        part = {name: tensor[index_b.to(tensor.device)] for name, tensor in inputs.items()}
        if counts_B is not None:
            padded, longest = inputs["mask"].shape[1], int(counts_B[index_b].max())
            part = {name: tensor[:, :longest] if tensor.shape[1:2] == (padded,) else tensor for name, tensor in part.items()}
        yield index_b, part
