"""Initial weights of methods with a head on standardised features of the encoders without prompts (`Fusion.standard`).

These are the statistics of the features and, if the model starts fitted (`Fusion.starts_fitted`), what `Fusion.fit` computes.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mopefuse.core import distributed
from mopefuse.core.artifact import dump_json, read_json
from mopefuse.core.atomic_files import write_atomically
from mopefuse.data.collate import FeatureTable
from mopefuse.data.feature_cache import split_features
from mopefuse.data.token_cache import TokenTable, split_tokens
from mopefuse.fusion.regression import FitSettings, Fold, standard_state
from mopefuse.training.trainer import Start, Trainer

FACTS_FILE = "start.json"
"""File of a run with the simple models that were compared at its start."""


def initial_state(trainer: Trainer, given: Start | None = None) -> Start | None:
    """Compute the initial weights of a run, or complete those that are `given`; None for a model that starts from scratch.

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
        buffers = standard_state({side: train.statistics(side) for side in new})
        return start._replace(state=start.state | buffers)
    val, settings = _fold(trainer, "val"), _settings(trainer)
    report = lambda what, share: trainer.listener.on_data_progress(what, round(100 * share), 100)  # noqa: E731
    fitted = distributed.run_on_main(lambda: model.fit(train, val, settings, report))
    trainer.progress.seconds = time.perf_counter() - began
    for line in fitted.notice.splitlines():
        trainer.listener.on_notice(line)
    if fitted.facts:
        file = trainer.run.path / FACTS_FILE
        distributed.run_on_main(lambda: write_atomically(file, dump_json(fitted.facts)))
    return Start({**model.trainable_state_dict(), **fitted.state}, train_from=fitted.train_from, is_baseline=True)


def baselines_at_start(run: Path) -> dict[str, Any] | None:
    """Read the simple models that a run compared at its start; None if it did not."""
    file = run / FACTS_FILE
    return read_json(file) if file.exists() else None


def _settings(trainer: Trainer) -> FitSettings:
    """Settings of the fit."""
    data, config, weights = trainer.data, trainer.config, trainer.class_weights
    return FitSettings(
        labels=data.outputs,
        task=data.task,
        threshold=config.train.threshold,
        balanced=config.train.class_weights == "balanced",
        settings=config.linear,
        class_weights=None if weights is None else weights.cpu(),
        device=trainer.device,
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
    return Fold(features, trainer.data.sparse_targets(split), missing, _tokens(trainer, split))


def _tokens(trainer: Trainer, split: str) -> TokenTable | None:
    """The output tokens of the main encoder, if `fit` takes them and they can be cached."""
    if "main" not in trainer.model.tokens_to_fit:
        return None
    encoder = trainer.model.encoder("main")
    advance = partial(trainer.listener.on_data_progress, f"{encoder.spec.name} on {split}")
    found = split_tokens(encoder, trainer.data, split, trainer.config, trainer.device, advance=advance)
    if isinstance(found, str):
        what = "cross-attention is not among the models compared at the start, because the output tokens are not cached"
        trainer.listener.on_notice(f"{what}: {found}")
        return None
    return found
