"""Run a model over a split: every sample once, regardless of the number of processes.

Shapes: S samples of the split, N labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mopefuse.config.schema import RunConfig
from mopefuse.core import distributed
from mopefuse.core.formatting import several, size
from mopefuse.data.base import DataSet
from mopefuse.data.collate import FeatureTable, Samples
from mopefuse.data.feature_cache import split_features
from mopefuse.data.modality_dropout import ModalityDropout
from mopefuse.data.token_cache import TokenTable, split_tokens
from mopefuse.evaluation.outputs import Advance, ModelOutputs, SplitOutput, collect
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import require_rows
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds
from mopefuse.modalities.base import get_modality


def model_outputs(
    model: Fusion,
    data: DataSet,
    split: str,
    config: RunConfig,
    device: torch.device,
    *,
    samples: Samples | None = None,
    advance: Advance = lambda done, total: None,
) -> ModelOutputs:
    """The outputs of a model for a split, each sample in one process only, computed while they are iterated over.

    Args:
        samples: samples of this split, prepared for the model; None to prepare them here.
    """
    samples = samples or prepare_samples(model, data, split, config, device)
    return ModelOutputs(model, samples, config, device, labels=data.outputs, advance=advance)


def run_split(
    model: Fusion,
    data: DataSet,
    split: str,
    config: RunConfig,
    device: torch.device,
    *,
    samples: Samples | None = None,
    with_routing: bool = False,
    advance: Advance = lambda done, total: None,
) -> SplitOutput:
    """The output of a model for a whole split, the same in every process; for large splits see `model_outputs`.

    Args:
        samples: samples of this split, prepared for the model; None to prepare them here.
        with_routing: also return the expert weights of each sample.

    Raises:
        NumericError: a logit is not finite, as after training diverged.
    """
    outputs = model_outputs(model, data, split, config, device, samples=samples, advance=advance)
    return collect(outputs, data, split, with_routing=with_routing)


def prepare_samples(
    model: Fusion,
    data: DataSet,
    split: str,
    config: RunConfig,
    device: torch.device,
    *,
    training: bool = False,
    prefixes: Mapping[str, FeatureTable] | None = None,
    notice: Callable[[str], None] = lambda text: None,
    reading: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Samples:
    """The samples of a split for a model; features of frozen encoders are computed here, and cached for later runs.

    Args:
        training: with augmentation and modality dropout, if they are configured.
        prefixes: by side, outputs of the encoder's first layers, see `mopefuse.data.prefix_cache`.
        notice: called with what was computed or found in the cache.
        reading: called with what is being computed, how much of it is done, and how much there is.
    """
    require_rows(model, data.modalities)
    tables = _cached_features(model, data, split, config, device, training, notice, reading)
    options: dict[str, Any] = {"seed": config.seed, "training": training, "prefixes": prefixes, **tables}
    samples = Samples(data, split, model.readers(), config.data, **options)
    model.require_modalities(samples.lacking, where=split)
    if config.data.cache_images:
        advance = partial(reading, f"decoding {split}")
        if distributed.world_size() > 1:
            distributed.run_on_each_node(lambda: samples.cache_images(advance))
        samples.cache_images(advance)
    if not (training and config.train.modality_dropout):
        return samples
    dropped = [side for side in model.droppable_sides if side in model.reads]
    return ModalityDropout(samples, dropped, config.train.modality_dropout) if dropped else samples


def _cached_features(
    model: Fusion,
    data: DataSet,
    split: str,
    config: RunConfig,
    device: torch.device,
    training: bool,
    notice: Callable[[str], None],
    reading: Callable[[str, int, int], None],
) -> dict[str, dict[str, Any]]:
    """The pooled features, and the output tokens, of frozen encoders that need not run; see `prepare_samples`."""
    features: dict[str, FeatureTable] = {}
    tokens: dict[str, TokenTable] = {}
    for side in model.frozen if config.data.cache_features else ():
        encoder = model.encoder(side)
        if training and get_modality(encoder.modality).is_picture and config.data.augment != "none":
            continue
        advance = partial(reading, f"{encoder.spec.name} on {split}")
        if side in model.reads_tokens:
            found = split_tokens(encoder, data, split, config, device, advance=advance)
            if isinstance(found, str):
                notice(f"{split}: output tokens of {encoder.spec} are computed in every step, because {found}")
                continue
            tokens[side] = found
            notice(f"{split}: output tokens of {encoder.spec} take {size(found.size)}, {found.origin}")
        features[side] = pooled = split_features(encoder, data, split, config, device, advance=advance)
        modality = encoder.modality
        what = several(pooled.different, f"distinct {modality}", f"distinct {get_modality(modality).plural}")
        notice(f"{split}: {what} encoded once by {encoder.spec}, {pooled.origin}")
    return {"features": features, "tokens": tokens}


def split_metrics(
    logits_SN: Tensor, data: DataSet, split: str, thresholds: Thresholds = THRESHOLD
) -> dict[str, float]:
    """Metrics from the logits of a split."""
    return data.task.compute(logits_SN, data.targets(split), thresholds)
