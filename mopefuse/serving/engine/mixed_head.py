"""Logits of a batch whose rows belong to different runs, from pooled features and output tokens.

Shapes: B rows, U runs, R rows of a run, L tokens, A width of a token, C width of a feature, F features of a head, Y hidden
units, W width, Q queries and H heads of the token reader, N labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mopefuse.core.precision import normalize_feature, to_float32
from mopefuse.serving.engine.adapter_weights import HeadShape, HeadWeights, Linear
from mopefuse.serving.engine.grouped import Groups, multiply, stack_padded


def classify(
    heads: Sequence[HeadWeights],
    pooled_BC: Mapping[str, Tensor],
    absent: Mapping[str, tuple[Tensor, Tensor]],
    tokens_BLA: Tensor,
    mask_BL: Tensor | None,
) -> list[tuple[list[int], Tensor]]:
    """The logits of the rows whose heads have one shape: the numbers of these rows, and (B, N) for the largest N of them.

    Args:
        heads: of each row. pooled_BC: pooled feature of each side.
        absent: by side that some row lacks, True for these rows (B,), and what replaces their normalised features (B, C).
        tokens_BLA, mask_BL: output of the main encoder.
    """
    by_shape: dict[HeadShape, list[int]] = {}
    for row, head in enumerate(heads):
        by_shape.setdefault(head.shape, []).append(row)
    found = []
    for numbers in by_shape.values():
        whole = len(numbers) == len(heads)

        def take(x_BX: Tensor, rows: list[int] | None = None if whole else numbers) -> Tensor:
            return x_BX if rows is None else x_BX[rows]

        pooled = {side: take(feature_BC) for side, feature_BC in pooled_BC.items()}
        lacking = {side: (take(missing_B), take(value_BC)) for side, (missing_B, value_BC) in absent.items()}
        own = [heads[row] for row in numbers]
        mask = None if mask_BL is None else take(mask_BL)
        found.append((numbers, _logits(own, pooled, lacking, take(tokens_BLA), mask)))
    return found


def _logits(
    heads: Sequence[HeadWeights],
    pooled_BC: Mapping[str, Tensor],
    absent: Mapping[str, tuple[Tensor, Tensor]],
    tokens_BLA: Tensor,
    mask_BL: Tensor | None,
) -> Tensor:
    """Logits (B, N) of rows whose heads have one shape, filled up with 0 to the largest N."""
    runs = list({id(head): head for head in heads}.values())
    order = {id(head): at for at, head in enumerate(runs)}
    groups = Groups([order[id(head)] for head in heads], tokens_BLA.device)
    shape = runs[0].shape
    features_BC = {side: _normalised(runs, groups, side, pooled_BC[side]) for side in shape.sides}
    for side in features_BC.keys() & absent.keys():
        missing_B, value_BC = absent[side]
        features_BC[side] = torch.where(missing_B[:, None], value_BC, features_BC[side])
    parts = [groups.split(feature_BC) for feature_BC in features_BC.values()]
    if shape.reader:
        psi_URC = {side: groups.split(features_BC[side]) for side in shape.queries}
        mask = None if mask_BL is None else groups.split(mask_BL)
        parts.append(_read(runs, psi_URC, groups.split(normalize_feature(tokens_BLA)), mask))
    x_URF = torch.cat(parts, dim=-1)
    logits_URN = _apply([run.linear for run in runs], x_URF)
    hidden, output = ([part for run in runs if (part := getattr(run, name)) is not None] for name in ("hidden", "output"))
    if hidden:
        logits_URN = logits_URN + _apply(output, F.gelu(_apply(hidden, x_URF)))
    return groups.join(logits_URN)


def _normalised(runs: Sequence[HeadWeights], groups: Groups, side: str, pooled_BC: Tensor) -> Tensor:
    pooled_BC = to_float32(pooled_BC)
    norm = runs[0].shape.norm
    if norm == "standard":
        mean_BC, deviation_BC = (groups.repeat(stack_padded([run.standard[side][number] for run in runs])) for number in (0, 1))
        return (pooled_BC - mean_BC) / deviation_BC
    return F.layer_norm(pooled_BC, pooled_BC.shape[-1:]) if norm == "layer" else pooled_BC


def _apply(linears: Sequence[Linear], x_URI: Tensor) -> Tensor:
    """``x @ weight + bias`` of each run; outputs that a run does not have are 0."""
    product_URO = multiply(x_URI, [linear.weight_IO for linear in linears])
    return product_URO + stack_padded([linear.bias_O for linear in linears])[:, None]


def _read(runs: Sequence[HeadWeights], psi_URC: Mapping[str, Tensor], tokens_URLA: Tensor, mask_URL: Tensor | None) -> Tensor:
    """What each run reads from the tokens, (U, R, Q W); see `mopefuse.fusion.token_reader.TokenReader`."""
    heads = runs[0].shape.reader[2]
    readers = [run.reader for run in runs]

    def each(name: str) -> Tensor:
        return stack_padded([reader[name] for reader in readers])

    normed_URLA = F.layer_norm(tokens_URLA, tokens_URLA.shape[-1:])
    normed_URLA = normed_URLA * each("norm.weight")[:, None, None] + each("norm.bias")[:, None, None]
    length = normed_URLA.shape[2]
    flat_UXA = normed_URLA.flatten(1, 2)
    key_UXW, value_UXW = (
        multiply(flat_UXA, [reader[f"{name}.weight"] for reader in readers]) + each(f"{name}.bias")[:, None]
        for name in ("key", "value")
    )
    asked = [multiply(psi, [reader[f"query.{side}.weight"] for reader in readers]) for side, psi in psi_URC.items()]
    query_URQW = sum(asked[1:], asked[0])[:, :, None] + each("offset_QW")[:, None]

    def split(x_BXW: Tensor) -> Tensor:
        split_BHXE: Tensor = x_BXW.unflatten(-1, (heads, -1))
        return split_BHXE.transpose(1, 2)

    count = query_URQW.shape[0] * query_URQW.shape[1]
    queries, keys, values = (
        split(x.reshape(count, x_length, -1))
        for x, x_length in ((query_URQW, query_URQW.shape[2]), (key_UXW, length), (value_UXW, length))
    )
    mask = None if mask_URL is None else mask_URL.flatten(0, 1)[:, None, None]
    read = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
    joined_URX: Tensor = read.transpose(1, 2).flatten(1).unflatten(0, query_URQW.shape[:2])
    return joined_URX
