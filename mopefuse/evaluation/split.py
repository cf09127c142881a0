"""Run a model over a split: every sample once, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mopefuse.config.schema import Data as DataConfig
from mopefuse.config.schema import RunConfig
from mopefuse.core import distributed
from mopefuse.data.base import DataSet, Row
from mopefuse.data.collate import Samples
from mopefuse.data.columns import require_column
from mopefuse.data.features import split_features
from mopefuse.data.missing import Dropped
from mopefuse.evaluation.answers import Advance, Answer, Answers, Said, collect
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import require_rows
from mopefuse.inference.bundle import Bundle
from mopefuse.metrics import classification as metrics
from mopefuse.modalities.base import by_argument, of


def ask_split(
    bundle: Bundle,
    data: DataSet,
    split: str,
    config: DataConfig,
    *,
    batch: int = 32,
    advance: Advance = lambda done, total: None,
) -> Iterator[Answer]:
    """The answers of an exported bundle to all samples of a split, in its order."""
    for name in bundle.modalities:
        require_column("the bundle", name, data.modalities, where=str(bundle.folder))
    rows = data.splits[split].rows
    for first in range(0, len(rows), batch):
        group = rows[first : first + batch]
        values = {name: [_read(data, split, row, name, config) for row in group] for name in bundle.modalities}
        logits_BN = torch.from_numpy(bundle.run(bundle.collate(**by_argument(values)))[0])
        yield Answer(torch.arange(first, first + len(group)), logits_BN)
        advance(first + len(group), len(rows))


def _read(data: DataSet, split: str, row: Row, modality: str, config: DataConfig) -> Any:
    return None if row.values[modality] is None else data.read(data.splits[split], row, modality, config)


def answers_to(
    model: Fusion,
    data: DataSet,
    split: str,
    config: RunConfig,
    device: torch.device,
    *,
    samples: Samples | None = None,
    advance: Advance = lambda done, total: None,
) -> Answers:
    """The answers of a model to all samples of a split, each in one process only, computed while they are read.

    Args:
        samples: of this split, prepared for the model.
    """
    samples = samples or prepared(model, data, split, config, device)
    return Answers(model, samples, config, device, labels=len(data.labels), advance=advance)


def run_split(
    model: Fusion,
    data: DataSet,
    split: str,
    config: RunConfig,
    device: torch.device,
    *,
    samples: Samples | None = None,
    each: bool = False,
    advance: Advance = lambda done, total: None,
) -> Said:
    """All samples of a split once, in its order; every process gets the whole. Of large splits see `answers_to`.

    Args:
        samples: of this split, prepared for the model. each: keep the routing of each sample, too.

    Raises:
        NumericError: a logit is not finite, as after a step that made the model diverge.
    """
    answers = answers_to(model, data, split, config, device, samples=samples, advance=advance)
    return collect(answers, data, split, each=each)


def prepared(
    model: Fusion,
    data: DataSet,
    split: str,
    config: RunConfig,
    device: torch.device,
    *,
    training: bool = False,
    notice: Callable[[str], None] = lambda text: None,
    reading: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Samples:
    """The samples of a split for a model; what nothing can change is computed here, once, and kept for other runs.

    Args:
        notice: told what was kept or found. reading: told of what is being computed, how much is done, and of how much.
    """
    require_rows(model, data.modalities)
    features = {}
    for side in model.frozen if config.data.cache_features else ():
        encoder = model.encoder(side)
        if not (training and of(encoder.modality).is_picture and config.data.augment != "none"):
            told = partial(reading, f"{encoder.spec.name} on {split}")
            features[side] = split_features(encoder, data, split, config, device, advance=told)
            what = f"{features[side].different:,} different {of(encoder.modality).plural}"
            notice(f"{split}: {what} encoded once by {encoder.spec}, {features[side].origin}")
    samples = Samples(data, split, model.readers(), config.data, features=features, seed=config.seed, training=training)
    model.require_all_but(samples.lacking, where=split)
    if config.data.cache_images:
        told = partial(reading, f"decoding {split}")
        if distributed.world_size() > 1:
            distributed.on_main(lambda: samples.cache_images(told))
        samples.cache_images(told)
    dropped = [side for side in model.may_lack if side in model.reads] if training and config.train.modality_dropout else []
    return Dropped(samples, dropped, config.train.modality_dropout) if dropped else samples


def split_metrics(
    logits_SN: Tensor, data: DataSet, split: str, thresholds: metrics.Thresholds = metrics.THRESHOLD
) -> dict[str, float]:
    """Metrics from the logits of a split."""
    return metrics.compute(logits_SN, data.targets(split), multi_label=data.multi_label, thresholds=thresholds)
