"""Does a model use its other modality? Its metric with that input as is, exchanged, blank, and without each kind of prompt.

Shapes: S samples of the split, N labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import one_hot

from mopefuse.config.schema import RunConfig
from mopefuse.config.sides import is_comp
from mopefuse.core import device as devices
from mopefuse.data.altered import Blank, Shuffled, derangement
from mopefuse.data.base import DataSet
from mopefuse.data.collate import Samples, blank
from mopefuse.data.load import load_data
from mopefuse.data.subsets import order_of
from mopefuse.encoders.base import run_frozen
from mopefuse.evaluation.split import prepared, run_split, split_metrics
from mopefuse.fusion.base import Fusion
from mopefuse.metrics import classification as metrics
from mopefuse.metrics.bootstrap import Outcome, difference
from mopefuse.metrics.gates import selected_metric
from mopefuse.runs.load import elsewhere, load_model, with_labels
from mopefuse.runs.locate import trained

Advance = Callable[[str, int, int], None]  # (of which condition, samples done, samples in all)
MOST = 2000
"""Samples that are looked at, unless another number is given."""
_RESAMPLES = 1000


@dataclass(frozen=True)
class Condition:
    """How a model answers when something was taken away.

    Args:
        name: as is, shuffled, blank, or the kind of prompt that was left out.
        modality: that was shuffled or blank.
        metrics: as those of an evaluation.
        changed: share of the samples that get another answer than as is.
        lost: what the metric that selects checkpoints is as is, less what it is here.
        low, high: 95 % interval of `lost`, by a paired bootstrap over the samples.
        logits_SN: of every sample.
    """

    name: str
    metrics: dict[str, float]
    changed: float
    lost: float
    low: float
    high: float
    logits_SN: Tensor = field(repr=False, compare=False)
    modality: str = ""

    @property
    def matters(self) -> bool:
        """Whether `lost` is more than noise: its interval does not reach 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Audit:
    """What a model depends on.

    Args:
        split: that was looked at. samples: so many of it. total: that it has.
        metric: the one that selects checkpoints.
        modalities: of the complementary inputs.
        read: whether the model looks at them at all. alone: whether it looks at nothing else.
        same: modality to the share of samples whose input was exchanged for an equal one.
        conditions: as is first.
    """

    split: str
    samples: int
    total: int
    metric: str
    modalities: tuple[str, ...]
    read: bool
    alone: bool
    same: dict[str, float]
    conditions: tuple[Condition, ...]

    @property
    def modality(self) -> str:
        """Of the complementary inputs, in words."""
        return " and ".join(self.modalities)

    def __getitem__(self, name: str) -> Condition:
        """The condition of a name; of several modalities the first."""
        return self.of(name)

    def of(self, name: str, modality: str = "") -> Condition:
        """The condition of a name and a modality."""
        return next(one for one in self.conditions if one.name == name and modality in ("", one.modality))

    @property
    def verdict(self) -> str:
        """What the numbers mean, in a sentence for each modality."""
        if not self.read:
            return f"The model does not look at the {self.modality}: nothing in its prompts depends on it."
        return " ".join(self._verdict(modality) for modality in self.modalities)

    def _verdict(self, other: str) -> str:
        shuffled, blank = self.of("shuffled", other), self.of("blank", other)
        before, after, empty = (100 * one.metrics[self.metric] for one in (self["as is"], shuffled, blank))
        name = "accuracy" if self.metric == "accuracy" else "macro-F1"
        fell = f"with another sample's {other}, {name} goes from {before:.1f} to {after:.1f} %"
        fell += f", and with none to {empty:.1f} %"
        if self.alone and len(self.modalities) == 1:
            return f"The {other} is all that the model looks at: {fell}."
        if shuffled.matters and shuffled.lost > 0:
            return f"The model uses the {other}: {fell}."
        if shuffled.matters:
            return f"The {other} misleads the model: {fell}."
        return f"There is no sign that the model uses the {other}: {fell} ({self._noise(shuffled)})."

    def _noise(self, shuffled: Condition) -> str:
        """How sure it is that nothing was lost, in words."""
        if shuffled.low == shuffled.high:
            # The rule of three: Hanley and Lippman-Hand, "If nothing goes wrong, is everything all right?", JAMA 1983.
            unseen = min(100.0, 300 / self.samples)
            return f"nothing changed; with {self.samples:,} samples a loss of up to {unseen:.1f} points can go unseen"
        low, high = 100 * shuffled.low, 100 * shuffled.high
        interval = f"95 % interval {low:+.1f} to {high:+.1f}, {self.samples:,} samples"
        return f"a loss of {100 * shuffled.lost:.1f} points is within noise: {interval}"

    def as_dict(self) -> dict[str, Any]:
        """Everything but the logits."""
        facts = ("split", "samples", "total", "metric", "modality", "read", "same", "verdict")
        rows = [
            {
                name: getattr(condition, name)
                for name in ("name", "modality", "metrics", "changed", "lost", "low", "high", "matters")
            }
            for condition in self.conditions
        ]
        return {**{name: getattr(self, name) for name in facts}, "conditions": rows}


def audit(
    run: Path,
    *,
    split: str = "test",
    data: Path | None = None,
    checkpoint: str = "best",
    device: str = "auto",
    most: int | None = MOST,
    seed: int = 0,
    advance: Advance = lambda name, done, total: None,
) -> Audit:
    """What a run, or an adapter with `data`, depends on; see `audit_model`.

    Raises:
        CheckpointError: no such run. DataError: no such split, bad rows, unknown labels.
    """
    target = devices.resolve(device)
    loaded = load_model(trained(run), checkpoint, target)
    where = elsewhere(loaded.config.data, data)
    dataset = with_labels(load_data(where, require=(split,)), loaded.manifest, split)
    found: dict[str, Any] = {"thresholds": loaded.thresholds, "most": most, "seed": seed, "advance": advance}
    return audit_model(loaded.model, dataset, split, loaded.config, target, **found)


def audit_model(
    model: Fusion,
    data: DataSet,
    split: str,
    config: RunConfig,
    device: torch.device,
    *,
    thresholds: metrics.Thresholds = metrics.THRESHOLD,
    most: int | None = MOST,
    seed: int = 0,
    as_is_SN: Tensor | None = None,
    advance: Advance = lambda name, done, total: None,
) -> Audit:
    """The metrics of a model as is, with its complementary input exchanged and blank, and without each kind of prompt.

    Args:
        model: on `device`. thresholds: of multi-label data.
        most: samples to look at, drawn by `seed`; None for all. seed: also of the exchange, which moves every sample's input.
        as_is_SN: what the model says of the whole split as it is, if that is known.
    """
    total = len(data.splits[split].rows)
    if most is not None and total > most:
        data, chosen = drawn(data, split, most, seed)
        as_is_SN = None if as_is_SN is None else as_is_SN[chosen]
    samples = prepared(model, data, split, config, device)
    partner_S = derangement(len(samples), seed)
    sides = {name: [s for s in model.reads if is_comp(s) and model.encoder(s).modality == name] for name in _read(model, data)}
    keys = {name: data.splits[split].keys[name] for name in sides}

    def said(name: str, asked: Samples, without: str = "") -> Tensor:
        with model.without(without) if without else nullcontext():
            told = lambda done, total: advance(name, done, total)  # noqa: E731
            return run_split(model, data, split, config, device, samples=asked, advance=told).logits_SN

    read = any(sides.values())
    logits = {("as is", ""): said("as is", samples) if as_is_SN is None else as_is_SN}
    for name, own in sides.items() if read else ():
        logits["shuffled", name] = said(f"another {name}", Shuffled(samples, own, partner_S))
        logits["blank", name] = said(f"no {name}", Blank(samples, own, _blank_features(model, own, config, device)))
    logits |= {(kind, ""): said(kind, samples, without=kind) for kind in model.prompt_kinds}
    plain_SN = logits["as is", ""]
    return Audit(
        split,
        len(samples),
        total,
        selected_metric(multi_label=data.multi_label),
        tuple(sides),
        read,
        all(is_comp(side) for side in model.reads),
        {name: float((own == own[partner_S.numpy()]).mean()) for name, own in keys.items()},
        tuple(
            _condition(name, modality, value_SN, plain_SN, data, split, thresholds)
            for (name, modality), value_SN in logits.items()
        ),
    )


def drawn(data: DataSet, split: str, most: int, seed: int) -> tuple[DataSet, list[int]]:
    """The data with only `most` samples of a split, drawn by `seed`, and which ones these are."""
    chosen = sorted(order_of([row.id for row in data.splits[split].rows], seed)[:most])
    return replace(data, splits={**data.splits, split: data.splits[split].part(chosen)}), chosen


def _read(model: Fusion, data: DataSet) -> tuple[str, ...]:
    """The modalities of the complementary encoders, or one that the main encoder does not read where there are none."""
    found = dict.fromkeys(model.encoder(side).modality for side in model.uses if is_comp(side))
    if found:
        return tuple(found)
    main = model.encoder("main").modality
    return (next((name for name in data.modalities if name != main), main),)


@torch.no_grad()
def _blank_features(model: Fusion, sides: Sequence[str], config: RunConfig, device: torch.device) -> dict[str, Tensor]:
    features = {}
    for side in sides:
        if side in model.frozen:
            encoder = model.encoder(side)
            inputs = encoder.preprocess.batch([blank(encoder.modality, encoder.preprocess)])
            with devices.autocast(config.train.precision, device):
                found_1C = run_frozen(encoder, {name: tensor.to(device) for name, tensor in inputs.items()}).pooled_BC
            features[side] = found_1C.float().cpu()
    return features


def _condition(
    name: str, modality: str, logits_SN: Tensor, as_is_SN: Tensor, data: DataSet, split: str, thresholds: metrics.Thresholds
) -> Condition:
    targets = data.targets(split)
    actual_SN = targets.bool() if data.multi_label else one_hot(targets, logits_SN.shape[-1]).bool()
    before_SN, after_SN = (_answers(value, thresholds, data.multi_label) for value in (as_is_SN, logits_SN))
    actual = _sparse(actual_SN)
    before, after = (Outcome(_sparse(given_SN), actual) for given_SN in (before_SN, after_SN))
    lost = difference([before], [after], selected_metric(multi_label=data.multi_label), resamples=_RESAMPLES)
    changed = float((before_SN != after_SN).any(dim=-1).float().mean())
    found = split_metrics(logits_SN, data, split, thresholds)
    return Condition(name, found, changed, lost.value, lost.low, lost.high, logits_SN, modality)


def _sparse(labels_SN: Tensor) -> csr_array:
    return csr_array(labels_SN.numpy().astype(np.float64))


def _answers(logits_SN: Tensor, thresholds: metrics.Thresholds, multi_label: bool) -> Tensor:
    """Which labels are given (S, N)."""
    if multi_label:
        return metrics.over(metrics.probabilities(logits_SN, multi_label=True), thresholds)
    return one_hot(logits_SN.argmax(dim=-1), logits_SN.shape[-1]).bool()
