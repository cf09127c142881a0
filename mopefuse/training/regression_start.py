"""What is fitted before the first step: a regression on features of the encoders as they are, and their statistics.

Only models whose head takes standardised features (`Fusion.standard`) have such a beginning.
"""

from __future__ import annotations

import time
from functools import partial

import torch

from mopefuse.core import distributed
from mopefuse.data.collate import Table
from mopefuse.data.features import split_features
from mopefuse.fusion.regression import Fold, How
from mopefuse.training.trainer import Start, Trainer


def start(trainer: Trainer, given: Start | None = None) -> Start | None:
    """Where a run begins: fitted here, or as `given`; None for a model that begins from scratch.

    Args:
        given: of a swapped model, whose head is kept; only the statistics of an encoder that is new to it are computed.
    """
    model, data, config = trainer.model, trainer.data, trainer.config
    if model.standard is None:
        return given
    began = time.perf_counter()
    train = _fold(trainer, "train")
    if given is not None:
        new = [side for side in model.standard if f"standard.{side}.mean_C" in given.fresh]
        found = {f"standard.{side}.{name}": t for side in new for name, t in train.statistics(side).items()}
        return given._replace(state=given.state | found)
    val = _fold(trainer, "val")
    balanced = config.train.class_weights == "balanced"
    how = How(len(data.labels), data.multi_label, config.train.threshold, balanced, config.linear)
    report = lambda what, share: trainer.listener.reading(what, round(100 * share), 100)  # noqa: E731
    state, chosen = distributed.on_main(lambda: model.fit(train, val, how, report))
    trainer.progress.seconds = time.perf_counter() - began
    said = ", ".join(f"C {value:g} on {name}" for name, value in chosen.items())
    trainer.listener.notice(f"logistic regression, chosen on validation: {said}")
    return Start({**model.own_state(), **state})


def _fold(trainer: Trainer, split: str) -> Fold:
    samples = trainer.train_samples if split == "train" else trainer.val_samples
    features: dict[str, Table] = {}
    for side in trainer.model.standard or ():
        table = samples.features.get(side)
        if table is None:  # of an encoder that will be prompted, or of images that training will see augmented
            encoder = trainer.model.encoder(side)
            told = partial(trainer.listener.reading, f"{encoder.spec.name} on {split}")
            table = split_features(encoder, trainer.data, split, trainer.config, trainer.device, advance=told)
        features[side] = table
    missing = {side: torch.from_numpy(samples.lacking[side]) for side in features if side in samples.lacking}
    return Fold(features, trainer.data.sparse_targets(split), missing)
