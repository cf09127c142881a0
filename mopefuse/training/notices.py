"""Warnings before training about settings that probably do not do what the user wants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from mopefuse.config.encoder_sides import is_comp
from mopefuse.config.flags import flag_of
from mopefuse.config.schema import RunConfig
from mopefuse.data.base import DataSet
from mopefuse.fusion.base import Fusion

_MIN_ROWS, _MIN_ROWS_OF_A_LABEL = 100, 10  # minimum size of the validation split for tuning thresholds
_NO_THRESHOLD = {
    "class": "each row has one label, and the likeliest is predicted",
    "number": "labels are numbers",
    "mask": "labels are masks, and each pixel has the likeliest class",
    "pair": "rows are pairs, and candidates are ranked",
}


def likely_mistakes(config: RunConfig, data: DataSet, model: Fusion) -> Iterator[str]:
    """A warning for each setting that has no effect, or an effect that is probably not intended."""
    yield from _unread_modalities(data, model)
    yield from _poorly_tuned_thresholds(config, data)
    yield from _settings_without_effect(config, model)
    yield from _duplicate_encoders(model)


def _unread_modalities(data: DataSet, model: Fusion) -> Iterator[str]:
    """Notices about modalities in the data that no encoder reads."""
    specs = {side: str(model.encoder(side).spec) for side in model.uses}
    read = sorted({model.encoder(side).modality for side in model.uses})
    unread = [name for name in data.modalities if name not in read]
    if unread and len(specs) > 1:
        flags = ", ".join(f"--{'comp' if is_comp(side) else side} {spec}" for side, spec in specs.items())
        fix = "to use it, add an encoder for it with --main or --comp"
        yield f"no encoder reads {' or '.join(unread)}: {flags} read {' and '.join(read)}; {fix}"


def _poorly_tuned_thresholds(config: RunConfig, data: DataSet) -> Iterator[str]:
    """Thresholds tuned on few rows, or on few rows of a label, or for single-label data, which has none."""
    if not data.task.uses_thresholds and config.train.threshold != RunConfig(main="", comp="").train.threshold:
        yield f"--threshold {config.train.threshold} has no effect: {_NO_THRESHOLD[data.task.label_kind]}"
        return
    if config.train.threshold != "tuned":
        return
    labels = data.splits["val"].labels
    counts = labels.counts()
    rare = sum(counts.get(label, 0) < _MIN_ROWS_OF_A_LABEL for label in data.labels)
    if len(labels) < _MIN_ROWS or rare:
        which = f"{rare:,} of {len(data.labels):,} labels have fewer than {_MIN_ROWS_OF_A_LABEL} of them"
        what = f"--threshold tuned chooses each label's threshold on {len(labels):,} validation rows, and {which}"
        yield f"{what}: the thresholds may be unreliable; hold out more rows, or use --threshold 0.5"


def _settings_without_effect(config: RunConfig, model: Fusion) -> Iterator[str]:
    if model.task.is_classification and config.regression != RunConfig(main="", comp="").regression:
        yield f"the settings of regression have no effect: the task is {model.task}"
    if not model.task.is_classification:
        labels = {"data.fold_labels": config.data.fold_labels, "data.allow_odd_labels": config.data.allow_odd_labels}
        yield from (f"{flag_of(path)} has no effect: the task is {model.task}" for path, chosen in labels.items() if chosen)
    if not model.task.compares_samples and config.retrieval != RunConfig(main="", comp="").retrieval:
        yield f"the settings of retrieval have no effect: the task is {model.task}"
    for section in model.unused_sections():
        yield f"{config.method} does not use the settings of {section}"


def _duplicate_encoders(model: Fusion) -> Iterator[str]:
    for spec, count in Counter(str(model.encoder(side).spec) for side in model.uses if is_comp(side)).items():
        if count > 1:
            yield f"{spec} is used {count} times as a complementary encoder: all copies give the same features"
