"""Transfer the weights of a trained model to one with another encoder or other labels, where they still apply.

An encoder that was quantised, or no longer is, keeps everything. A new complementary encoder keeps prompts, experts and head;
only weights that read its features are new. A new main encoder with the same widths, heads and depth (ViT-B to DeiT-B, BERT
to RoBERTa) keeps everything; one with another geometry keeps only what does not depend on its layers. Rows of the head stay
with their labels.

Shapes: N labels, F features of the head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mopefuse.config.encoder_sides import is_comp
from mopefuse.encoders._quantize import split_option
from mopefuse.encoders.base import Encoder
from mopefuse.fusion.base import Fusion

Origin = Literal["kept", "partial", "new"]


class Transferred(NamedTuple):
    """The origin of one tensor of the new model.

    Args:
        kept: number of its values that come from the trained run.
    """

    name: str
    shape: tuple[int, ...]
    origin: Origin
    kept: int


def transfer_weights(
    old: Fusion, new: Fusion, old_labels: Sequence[str], new_labels: Sequence[str]
) -> tuple[dict[str, Tensor], list[Transferred]]:
    """The trainable state of the new model, with all tensors of the old one that keep their meaning, and each one's origin.

    The method defines what the meaning of a tensor depends on (`Fusion.dependencies`).
    """
    known, heads = old.trainable_state_dict(), _Heads(old, new, old_labels, new_labels)
    state: dict[str, Tensor] = {}
    transferred = []
    for name, tensor in new.trainable_state_dict().items():
        value, kept = tensor.clone(), 0
        if name.partition(".")[0] in new.heads:
            kept = heads.copy_known(name, value, known)
        elif name in known and known[name].shape == value.shape and _encoder_stays(new.dependency_of(name), old, new):
            value.copy_(known[name])
            kept = value.numel()
        origin: Origin = "new" if not kept else "kept" if kept == value.numel() else "partial"
        state[name] = value
        transferred.append(Transferred(name=name, shape=tuple(tensor.shape), origin=origin, kept=kept))
    return state, transferred


def same_geometry(one: Encoder, other: Encoder) -> bool:
    """Whether two encoders have as many layers, of the same widths and heads, and features of the same width."""
    return (one.widths, one.heads, one.feature_width, one.modality) == (
        other.widths,
        other.heads,
        other.feature_width,
        other.modality,
    )


def _encoder_stays(dependency: str, old: Fusion, new: Fusion) -> bool:
    """Whether the encoder that a tensor depends on is still there; see `Fusion.dependencies`."""
    side, _, aspect = dependency.partition(" ")
    if not side:
        return True
    if side not in old.uses:
        return False
    before, after = old.encoder(side), new.encoder(side)
    return _same_weights(before, after) if aspect == "features" else same_geometry(before, after)


def _same_weights(one: Encoder, other: Encoder) -> bool:
    """Whether two encoders differ in the format of their weights at most."""
    first, second = (str(split_option(encoder.spec)[0]) for encoder in (one, other))
    return first == second


def _feature_dependency(side: str) -> str:
    """Dependency of a head's columns: any main encoder of the same geometry will do, only the same complementary one."""
    return f"{side} features" if is_comp(side) else side


@dataclass(frozen=True)
class _Heads:
    """Carries over the rows of labels and the columns of encoders that both models have."""

    old: Fusion
    new: Fusion
    old_labels: Sequence[str]
    new_labels: Sequence[str]

    def copy_known(self, name: str, value: Tensor, known: Mapping[str, Tensor]) -> int:
        """Copy from the trained state `known` into `value`, a tensor of a head; returns the number of values copied."""
        source = known.get(name)
        if source is None or source.dim() != value.dim():
            return 0
        head, kind = name.partition(".")[0], name.rpartition(".")[2]
        layers = sorted(other for other in known if other.startswith(f"{head}.") and other.endswith(kind))
        rows = self._rows(min(len(source), len(value)), is_last=name == layers[-1])
        if value.dim() == 1:
            columns = [(0, 0)]
        elif name == layers[0]:
            columns = self._columns(head, source.shape[1], value.shape[1])
        else:
            columns = [(column, column) for column in range(min(source.shape[1], value.shape[1]))]
        if not rows or not columns or not self._has_inherited_columns(head):
            return 0
        (old_rows, new_rows), (old_columns, new_columns) = torch.tensor(rows).T, torch.tensor(columns).T
        if value.dim() == 1:
            value[new_rows] = source[old_rows]
        else:
            value[new_rows[:, None], new_columns] = source[old_rows[:, None], old_columns]
        return len(rows) * len(columns)

    def _rows(self, common: int, *, is_last: bool) -> list[tuple[int, int]]:
        """(old, new) rows that correspond: those of the same label in the last layer, of the same position in others."""
        if not is_last:
            return [(row, row) for row in range(common)]
        labels = self.old_labels
        return [(labels.index(label), row) for row, label in enumerate(self.new_labels) if label in labels]

    def _columns(self, head: str, old_width: int, new_width: int) -> list[tuple[int, int]]:
        """(old, new) columns of the first layer, for features of the encoders that survive.

        Columns that follow those of all encoders, for what the method computes from them, are kept if there are as many.
        """
        begins, width_before = {}, 0
        for side in self.old.heads[head]:
            begins[side], width_before = width_before, width_before + self.old.encoder(side).feature_width
        columns: list[tuple[int, int]] = []
        begin = 0
        for side in self.new.heads[head]:
            width = self.new.encoder(side).feature_width
            if side in begins and _encoder_stays(_feature_dependency(side), self.old, self.new):
                columns += [(begins[side] + column, begin + column) for column in range(width)]
            begin += width
        rest = range(old_width - width_before)
        if len(rest) == new_width - begin:
            columns += [(width_before + column, begin + column) for column in rest]
        return columns

    def _has_inherited_columns(self, head: str) -> bool:
        return any(_encoder_stays(_feature_dependency(side), self.old, self.new) for side in self.new.heads[head])
