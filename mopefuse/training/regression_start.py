"""Initial weights of methods with a head on standardised features of the encoders without prompts (`Fusion.standard`).

These are the statistics of the features and, if the head starts as a logistic regression (`Fusion.starts_fitted`), its
weights.
"""

from __future__ import annotations

import time
from functools import partial

import torch

from mopefuse.core import distributed
from mopefuse.data.collate import FeatureTable
from mopefuse.data.features import split_features
from mopefuse.fusion.regression import FitSettings, Fold
from mopefuse.training.trainer import Start, Trainer


def regression_start(trainer: Trainer, given: Start | None = None) -> Start | None:
    """The initial weights of a run, computed here or `given`; None for a model that starts from scratch.

    Args:
        given: those of a swapped model, whose head is kept; only the feature statistics of a new encoder are computed.
    """
    model = trainer.model
    if model.standard is None:
        return given
    began = time.perf_counter()
    train = _fold(trainer, "train")
    if given is not None or not model.starts_fitted:
        start = given or Start(model.trainable_state_dict())
        new = [side for side in model.standard if given is None or f"standard.{side}.mean_C" in given.fresh]
        buffers = {f"standard.{side}.{name}": t for side in new for name, t in train.statistics(side).items()}
        return start._replace(state=start.state | buffers)
    val, purpose = _fold(trainer, "val"), _purpose(trainer)
    report = lambda what, share: trainer.listener.on_data_progress(what, round(100 * share), 100)  # noqa: E731
    state, chosen = distributed.run_on_main(lambda: model.fit(train, val, purpose, report))
    trainer.progress.seconds = time.perf_counter() - began
    strengths = ", ".join(f"C {value:g} on {name}" for name, value in chosen.items())
    trainer.listener.on_notice(f"logistic regression, chosen on validation: {strengths}")
    return Start({**model.trainable_state_dict(), **state})


def _purpose(trainer: Trainer) -> FitSettings:
    """What the regression is fitted for."""
    data, config = trainer.data, trainer.config
    return FitSettings(
        labels=len(data.labels),
        multi_label=data.multi_label,
        threshold=config.train.threshold,
        balanced=config.train.class_weights == "balanced",
        settings=config.linear,
    )


def _fold(trainer: Trainer, split: str) -> Fold:
    """Features and targets of a split."""
    samples = trainer.train_samples if split == "train" else trainer.val_samples
    features: dict[str, FeatureTable] = {}
    for side in trainer.model.standard or ():
        table = samples.features.get(side)
        if table is None:  # the encoder will be prompted, or training augments its images
            encoder = trainer.model.encoder(side)
            advance = partial(trainer.listener.on_data_progress, f"{encoder.spec.name} on {split}")
            table = split_features(encoder, trainer.data, split, trainer.config, trainer.device, advance=advance)
        features[side] = table
    missing = {side: torch.from_numpy(samples.lacking[side]) for side in features if side in samples.lacking}
    return Fold(features, trainer.data.sparse_targets(split), missing)
