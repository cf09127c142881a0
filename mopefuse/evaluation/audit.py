"""Does a model use each modality? Metrics with that input shuffled or blank, and without each kind of prompt.

Shapes: S samples of the split, N labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopefuse.config.encoder_sides import is_comp
from mopefuse.config.schema import RunConfig
from mopefuse.core import device as devices
from mopefuse.core.precision import normalize_feature
from mopefuse.data.base import DataSet, Keys
from mopefuse.data.collate import Samples, blank_input
from mopefuse.data.perturbed import BlankSamples, ShuffledSamples, draw_derangement
from mopefuse.data.subsets import random_order
from mopefuse.encoders.base import run_frozen
from mopefuse.evaluation.split import prepare_samples, run_split, split_metrics
from mopefuse.fusion.base import Fusion
from mopefuse.metrics.bootstrap import difference
from mopefuse.metrics.names import write_change, write_metric, write_number
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds
from mopefuse.runs.load import open_run
from mopefuse.tasks.base import Task

Advance = Callable[[str, int, int], None]  # (condition, samples done, samples in all)
MAX_SAMPLES = 2000
"""Default number of samples of an audit."""
_RESAMPLES = 1000


@dataclass(frozen=True)
class Condition:
    """The metrics of a model with an input altered or a kind of prompt removed.

    Args:
        name: "as is", "shuffled", "blank", or the kind of prompt that was removed.
        modality: the modality that was shuffled or blank; empty for other conditions.
        metrics: as in an evaluation.
        changed: share of the samples whose prediction differs from "as is".
        lost: drop of the checkpoint-selection metric from "as is".
        low, high: 95 % interval of `lost`, from a paired bootstrap over the samples.
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
    def is_significant(self) -> bool:
        """Whether `lost` differs from 0: its interval does not contain 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Audit:
    """Which inputs and prompts a model depends on.

    Args:
        samples: number of samples that the audit used, out of `total` in the split.
        task: what a label is.
        modalities: modalities of the complementary inputs. main: that of the main input; empty if the model does not read
            it, or nothing else, or reads the same modality as a complementary one.
        read: whether the model reads complementary inputs at all. alone: whether it reads nothing else.
        same: modality to the share of samples whose shuffled input equals their own.
        conditions: "as is" first.
    """

    split: str
    samples: int
    total: int
    task: Task
    modalities: tuple[str, ...]
    main: str
    read: bool
    alone: bool
    same: dict[str, float]
    conditions: tuple[Condition, ...]

    @property
    def metric(self) -> str:
        """The metric that selects checkpoints."""
        return self.task.metric

    @property
    def modality(self) -> str:
        """The complementary modalities, in words."""
        return " and ".join(self.modalities)

    def __getitem__(self, name: str) -> Condition:
        """The first condition with this name."""
        return self.condition(name)

    def condition(self, name: str, modality: str = "") -> Condition:
        """The condition with this name and modality; the first with this name if no modality is given."""
        return next(one for one in self.conditions if one.name == name and modality in ("", one.modality))

    @property
    def verdict(self) -> str:
        """The result in words, a sentence for each modality."""
        if not self.read:
            return f"The model ignores the {self.modality}: none of its prompts depend on it."
        return " ".join(self._verdict(modality) for modality in (*self.modalities, self.main) if modality)

    def _verdict(self, other: str) -> str:
        shuffled, blank_input = self.condition("shuffled", other), self.condition("blank", other)
        before = write_number(self.metric, self["as is"].metrics[self.metric])
        after, empty = (write_metric(self.metric, one.metrics[self.metric]) for one in (shuffled, blank_input))
        change = f"with another sample's {other}, {self.task.metric_title} goes from {before} to {after}"
        change += f", and with none to {empty}"
        if self.alone and len(self.modalities) == 1:
            return f"The {other} is the only input that the model uses: {change}."
        if shuffled.is_significant and shuffled.lost > 0:
            return f"The model uses the {other}: {change}."
        if shuffled.is_significant:
            return f"The {other} misleads the model: {change}."
        return f"There is no sign that the model uses the {other}: {change} ({self._noise(shuffled)})."

    def _noise(self, shuffled: Condition) -> str:
        """How small a loss the audit could have detected, in words."""
        if shuffled.low == shuffled.high and not self.task.is_classification:
            return "no prediction changes"
        if shuffled.low == shuffled.high:
            # The rule of three: Hanley and Lippman-Hand, "If nothing goes wrong, is everything all right?", JAMA 1983.
            unseen = min(100.0, 300 / self.samples)
            return f"nothing changed; with {self.samples:,} samples, a drop of up to {unseen:.1f} points could go undetected"
        low, high = (write_number(self.metric, end, signed=True) for end in (shuffled.low, shuffled.high))
        interval = f"95 % interval {low} to {high}, {self.samples:,} samples"
        return f"a loss of {write_change(self.metric, shuffled.lost, signed=False)} is within noise: {interval}"

    def as_dict(self) -> dict[str, Any]:
        """Everything but the logits."""
        facts = ("split", "samples", "total", "metric", "modality", "main", "read", "same", "verdict")
        shown = ("name", "modality", "metrics", "changed", "lost", "low", "high")
        rows = [
            {**{name: getattr(condition, name) for name in shown}, "matters": condition.is_significant}
            for condition in self.conditions
        ]
        return {**{name: getattr(self, name) for name in facts}, "conditions": rows}


def audit(
    run: str | Path,
    *,
    split: str = "test",
    data: Path | None = None,
    checkpoint: str = "best",
    device: str = "auto",
    max_samples: int | None = MAX_SAMPLES,
    seed: int = 0,
    advance: Advance = lambda name, done, total: None,
) -> Audit:
    """Audit a run, or an adapter with `data`; see `audit_model`.

    Raises:
        CheckpointError: no such run. DataError: no such split, bad rows, unknown labels.
    """
    opened = open_run(run, split, data, checkpoint=checkpoint, device=device)
    return audit_model(
        opened.model,
        opened.data,
        split,
        opened.config,
        opened.device,
        thresholds=opened.thresholds,
        max_samples=max_samples,
        seed=seed,
        advance=advance,
    )


def audit_model(
    model: Fusion,
    data: DataSet,
    split: str,
    config: RunConfig,
    device: torch.device,
    *,
    thresholds: Thresholds = THRESHOLD,
    max_samples: int | None = MAX_SAMPLES,
    seed: int = 0,
    as_is_SN: Tensor | None = None,
    advance: Advance = lambda name, done, total: None,
) -> Audit:
    """The metrics of a model as is, with each input shuffled and blank, and without each kind of prompt.

    Inputs of a model that reads only one side are left as they are, unless that side is complementary.

    Args:
        model: on `device`. thresholds: decision thresholds of multi-label data.
        max_samples: number of samples to draw; None for all.
        seed: seed of the draw and of the shuffle, in which no sample keeps its own input.
        as_is_SN: logits of the whole split with unaltered inputs, if they are known.
    """
    total = len(data.splits[split].rows)
    if max_samples is not None and total > max_samples:
        data, chosen = subsample(data, split, max_samples, seed)
        as_is_SN = None if as_is_SN is None else as_is_SN[chosen]
    samples = prepare_samples(model, data, split, config, device)
    partner_S = draw_derangement(len(samples), seed)
    sides = _complementary_sides(model, data)
    read = any(sides.values())
    main = _main_modality(model, sides) if read else ""
    altered_sides = {**sides, **({main: ["main"]} if main else {})}

    def logits_of(condition: str, altered: Samples, without: str = "") -> Tensor:
        with model.without_prompts(without) if without else nullcontext():
            report = lambda done, total: advance(condition, done, total)  # noqa: E731
            return run_split(model, data, split, config, device, samples=altered, advance=report).logits_SN

    logits = {("as is", ""): logits_of("as is", samples) if as_is_SN is None else as_is_SN}
    for name, own in altered_sides.items() if read else ():
        logits["shuffled", name] = logits_of(f"another {name}", ShuffledSamples(samples, own, partner_S))
        blank = BlankSamples(samples, own, *_blank_features(model, own, config, device))
        logits["blank", name] = logits_of(f"no {name}", blank)
    logits |= {(kind, ""): logits_of(kind, samples, without=kind) for kind in model.prompt_kinds}
    return Audit(
        split=split,
        samples=len(samples),
        total=total,
        task=data.task,
        modalities=tuple(sides),
        main=main,
        read=read,
        alone=all(is_comp(side) for side in model.reads),
        same={name: _share_kept(data.splits[split].keys[name], partner_S) for name in altered_sides},
        conditions=tuple(
            _condition(name, modality, value_SN, logits["as is", ""], data, split, thresholds)
            for (name, modality), value_SN in logits.items()
        ),
    )


def subsample(data: DataSet, split: str, count: int, seed: int) -> tuple[DataSet, list[int]]:
    """`data` with only `count` samples of a split, drawn with `seed`, and the positions of these samples."""
    chosen = sorted(random_order([row.id for row in data.splits[split].rows], seed)[:count])
    return replace(data, splits={**data.splits, split: data.splits[split].select_rows(chosen)}), chosen


def _share_kept(keys_S: Keys, partner_S: Tensor) -> float:
    """The share of samples whose input equals that of their partner."""
    return float((keys_S == keys_S[partner_S.numpy()]).mean())


def _complementary_sides(model: Fusion, data: DataSet) -> dict[str, list[str]]:
    """By modality, the complementary sides that the model reads; without any encoder, a modality that main does not read."""
    names = list(dict.fromkeys(model.encoder(side).modality for side in model.uses if is_comp(side)))
    if not names:
        main = model.encoder("main").modality
        names = [next((name for name in data.modalities if name != main), main)]
    return {name: [side for side in model.reads if is_comp(side) and model.encoder(side).modality == name] for name in names}


def _main_modality(model: Fusion, complementary: Iterable[str]) -> str:
    """The modality of the main input; empty if the model does not read it, or if it is among the complementary ones."""
    modality = model.encoder("main").modality if "main" in model.reads else ""
    return "" if modality in complementary else modality


@torch.no_grad()
def _blank_features(
    model: Fusion, sides: Sequence[str], config: RunConfig, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The pooled feature (1, C) and the normalised output tokens of a blank input, of the sides that are frozen."""
    features, tokens = {}, {}
    for side in sides:
        if side in model.frozen:
            encoder = model.encoder(side)
            inputs = encoder.preprocess.batch([blank_input(encoder.modality, encoder.preprocess)])
            with devices.autocast(config.train.precision, device):
                encoded = run_frozen(encoder, {name: tensor.to(device) for name, tensor in inputs.items()})
            values_BLC, mask_BL = encoded.tokens_BLD, encoded.mask_BL
            mask_BL = torch.ones_like(values_BLC[..., 0], dtype=torch.bool) if mask_BL is None else mask_BL
            features[side] = encoded.pooled_BC.float().cpu()
            tokens[side] = {"values_BLC": normalize_feature(values_BLC).cpu(), "mask_BL": mask_BL.cpu()}
    return features, tokens


def _condition(
    name: str, modality: str, logits_SN: Tensor, as_is_SN: Tensor, data: DataSet, split: str, thresholds: Thresholds
) -> Condition:
    targets, task = data.targets(split), data.task
    before, after = (task.outcome(outputs_SN, targets, thresholds) for outputs_SN in (as_is_SN, logits_SN))
    lost = difference([before], [after], task.metric, resamples=_RESAMPLES)
    changed = float(task.changed(as_is_SN, logits_SN, thresholds).float().mean())
    return Condition(
        name=name,
        metrics=split_metrics(logits_SN, data, split, thresholds),
        changed=changed,
        lost=lost.value,
        low=lost.low,
        high=lost.high,
        logits_SN=logits_SN,
        modality=modality,
    )

