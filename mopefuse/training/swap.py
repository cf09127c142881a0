"""Change an encoder of a trained run and keep what was learned: everything whose meaning and shape survive.

A new complementary encoder leaves prompts, experts and head as they are; what reads its features is new. A new main encoder
of the same widths, heads and depth (ViT-B to DeiT-B, BERT to RoBERTa) leaves everything; of another geometry, what does not
touch its layers. Rows of the head stay with their labels.

Shapes: N labels, F features of the head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mopefuse.config.schema import RunConfig, build_config
from mopefuse.config.setting_paths import merge
from mopefuse.config.sides import Comp, addressed, is_comp, with_specs
from mopefuse.core import distributed
from mopefuse.core.artifact import dump_json, write_atomically
from mopefuse.data.load import load_data
from mopefuse.encoders.base import Encoder, full_spec
from mopefuse.errors import ConfigError
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import build_model, check_names
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.load import elsewhere, load_model
from mopefuse.runs.locate import trained
from mopefuse.training.train import resolved, train
from mopefuse.training.trainer import Listener, Start

Fate = Literal["kept", "projected", "new"]
CPU = torch.device("cpu")


class Inherited(NamedTuple):
    """What became of one tensor of the new model."""

    name: str
    shape: tuple[int, ...]
    fate: Fate
    kept: int  # values that come from the trained run


@dataclass(frozen=True)
class Swap:
    """What a swap kept, and what it cost.

    Args:
        metrics: of validation and test, "before" the swap, right "after" it, "tuned", and trained from "scratch" for as
            many steps; those that were measured.
    """

    inherited: tuple[Inherited, ...]
    metrics: dict[str, dict[str, dict[str, float] | None]]
    encoders: dict[str, str]

    @property
    def share_kept(self) -> float:
        """Of the new model's own values, those that come from the trained run."""
        total = sum(math.prod(entry.shape) for entry in self.inherited)
        return sum(entry.kept for entry in self.inherited) / max(1, total)

    def as_dict(self) -> dict[str, Any]:
        """What swap.json holds."""
        return {
            "encoders": self.encoders,
            "share_kept": self.share_kept,
            "tensors": [{**entry._asdict(), "shape": list(entry.shape)} for entry in self.inherited],
            "metrics": self.metrics,
        }


def swap_encoder(
    run: Path,
    out: Path,
    *,
    main: str | None = None,
    comp: Comp = None,
    data: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    epochs: int = 0,
    warm_up: int = 0,
    scratch: bool = True,
    listener: Listener | None = None,
) -> Swap:
    """A new run in `out` from a trained one, with another encoder, other data, or both.

    Args:
        main, comp: specs of the new encoders; None leaves one as it is. Of several complementary encoders ``2=SPEC`` or, by
            its modality, ``text=SPEC`` says which.
        data: another data set, perhaps with other labels.
        settings: more of the new run's settings, nested.
        epochs: of tuning; 0 leaves the swapped model as it is.
        warm_up: of these, epochs in which only what is new learns.
        scratch: with `epochs`, also train a model from scratch for as many, into ``<out>-scratch``, to compare with.

    Raises:
        ConfigError: nothing is swapped, or `out` is taken. EncoderError: an encoder that does not suit its side.
    """
    if main is None and not comp and data is None:
        raise ConfigError(61, "nothing is swapped", where="swap-encoder", fix="name --main SPEC, --comp SPEC or --data DIR")
    if not 0 <= warm_up <= epochs:
        raise ConfigError(62, f"{warm_up} epochs of warm-up in {epochs} of tuning", where="--warm-up", fix="raise --epochs")
    with distributed.joined():
        distributed.on_main(lambda: RunFolder(out).prepare(resume=False, overwrite=False, fix="name another --out"))
        source = trained(run)
        old = load_model(source, "best", CPU)
        if old.model.closed_form:
            raise ConfigError(
                100, f"{old.config.method} is fitted anew for other encoders", where=str(run), fix="use mopefuse train"
            )
        there = {side: old.model.encoder(side) for side in old.model.uses}
        named = addressed(main, comp, {side: encoder.modality for side, encoder in there.items()})
        config = _new_config(old.config, old.model, named, data=data, settings=settings or {}, epochs=epochs)
        check_names(config)
        labels = distributed.on_main(lambda: load_data(config.data).labels)
        model = build_model(config, len(labels))
        for side in named:
            before, now = there[side].modality, model.encoder(side).modality
            if before != now and listener is not None:
                listener.notice(f"the {side} encoder read {before}, and the new one reads {now}")
        state, inherited = inherit(old.model, model, old.manifest["labels"], labels)
        known = source.result().get("metrics")
        metrics = {"before": known} if known and data is None else {}
        fresh = tuple(entry.name for entry in inherited if entry.fate == "new")
        result = train(config, out, listener=listener, start=Start(state, fresh, warm_up))
        first = next(line for line in RunFolder(out).read_log() if "val" in line)
        metrics["after"] = {"val": first["val"], "test": None if epochs else result["metrics"]["test"]}
        if epochs:
            metrics["tuned"] = result["metrics"]
        if epochs and scratch:
            metrics["scratch"] = train(config, out.with_name(f"{out.name}-scratch"), listener=listener)["metrics"]
        encoders = {side: str(model.encoder(side).spec) for side in model.uses}
        swap = Swap(tuple(inherited), metrics, encoders)
        facts = dump_json({"from": str(run), **swap.as_dict()})
        distributed.on_main(lambda: write_atomically(out / "swap.json", facts))
        return swap


def _new_config(
    config: RunConfig,
    model: Fusion,
    named: Mapping[str, str],
    *,
    data: Path | None,
    settings: Mapping[str, Any],
    epochs: int,
) -> RunConfig:
    for side in named:
        if side not in model.uses:
            raise ConfigError(63, f"{config.method} has no {side} encoder", where=f"--{side}", fix="swap the other one")
    config = with_specs(config, {side: str(full_spec(spec)) for side, spec in named.items()})
    values = config.model_dump(mode="json")
    if named:
        for section, key in _from_encoders(config, model):
            values[section][key] = None
    values["data"] = elsewhere(config.data, data).model_dump(mode="json")
    values["train"] |= {"epochs": epochs, "max_steps": None}
    return build_config(merge(values, dict(settings)))


def _from_encoders(config: RunConfig, model: Fusion) -> list[tuple[str, str]]:
    """The settings that nobody chose: their values follow from the encoders, so that they are resolved anew for others."""
    found = []
    chosen = (("prompts", "init"), ("pmf", "bottleneck"), ("train", "lr"), ("train", "lr_comp"), ("train", "lr_head"))
    for section, key in chosen:
        mine = getattr(config, section)
        blank = config.model_copy(update={section: mine.model_copy(update={key: None})})
        if getattr(getattr(resolved(blank, model), section), key) == getattr(mine, key):
            found.append((section, key))
    return found


def inherit(
    old: Fusion, new: Fusion, old_labels: Sequence[str], new_labels: Sequence[str]
) -> tuple[dict[str, Tensor], list[Inherited]]:
    """The new model's own state with everything of the old one that still means the same, and what became of each tensor.

    What a tensor hangs on is for the method to say (`Fusion.bonds`).
    """
    known = old.own_state()
    state: dict[str, Tensor] = {}
    inherited = []
    for name, tensor in new.own_state().items():
        value, kept = tensor.clone(), 0
        if name.partition(".")[0] in new.heads:
            kept = _carry_head(name, value, known, old, new, old_labels, new_labels)
        elif name in known and known[name].shape == value.shape and _survives(new.bond(name), old, new):
            value.copy_(known[name])
            kept = value.numel()
        fate: Fate = "new" if not kept else "kept" if kept == value.numel() else "projected"
        state[name] = value
        inherited.append(Inherited(name, tuple(tensor.shape), fate, kept))
    return state, inherited


def _survives(bond: str, old: Fusion, new: Fusion) -> bool:
    """Whether what a tensor hangs on is still there; see `Fusion.bonds`."""
    side, _, how = bond.partition(" ")
    if not side:
        return True
    if side not in old.uses:
        return False
    mine, theirs = new.encoder(side), old.encoder(side)
    return str(mine.spec) == str(theirs.spec) if how == "features" else same_geometry(theirs, mine)


def same_geometry(one: Encoder, other: Encoder) -> bool:
    """Whether two encoders have as many layers, of the same widths and heads, and features of the same width."""
    return (one.widths, one.heads, one.feature_width, one.modality) == (
        other.widths,
        other.heads,
        other.feature_width,
        other.modality,
    )


def _carry_head(
    name: str,
    value: Tensor,
    known: Mapping[str, Tensor],
    old: Fusion,
    new: Fusion,
    old_labels: Sequence[str],
    new_labels: Sequence[str],
) -> int:
    """Copy the rows of labels and the columns of encoders that are still there; how many values that is."""
    source = known.get(name)
    if source is None or source.dim() != value.dim():
        return 0
    head, kind = name.partition(".")[0], name.rpartition(".")[2]
    layers = sorted(other for other in known if other.startswith(f"{head}.") and other.endswith(kind))
    rows = [(row, row) for row in range(min(len(source), len(value)))]
    if name == layers[-1]:
        rows = [(old_labels.index(label), row) for row, label in enumerate(new_labels) if label in old_labels]
    columns = [(0, 0)] if any(_survives(_features(side), old, new) for side in new.heads[head]) else []
    if value.dim() == 2 and columns:
        every = [(column, column) for column in range(min(source.shape[1], value.shape[1]))]
        columns = _columns(head, old, new) if name == layers[0] else every
    if not rows or not columns:
        return 0
    pick = torch.tensor(rows).T, torch.tensor(columns).T
    if value.dim() == 1:
        value[pick[0][1]] = source[pick[0][0]]
        return len(rows)
    value[pick[0][1][:, None], pick[1][1]] = source[pick[0][0][:, None], pick[1][0]]
    return len(rows) * len(columns)


def _features(side: str) -> str:
    """What columns of a head hang on: a main encoder is exchanged for one that is much like it, any other is not."""
    return f"{side} features" if is_comp(side) else side


def _columns(head: str, old: Fusion, new: Fusion) -> list[tuple[int, int]]:
    """Columns of a head (theirs, ours) for features of encoders that are still there."""
    begins, theirs = {}, 0
    for side in old.heads[head]:
        begins[side], theirs = theirs, theirs + old.encoder(side).feature_width
    columns: list[tuple[int, int]] = []
    mine = 0
    for side in new.heads[head]:
        width = new.encoder(side).feature_width
        if side in begins and _survives(_features(side), old, new):
            columns += [(begins[side] + column, mine + column) for column in range(width)]
        mine += width
    return columns
