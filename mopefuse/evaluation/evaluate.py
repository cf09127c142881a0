"""Evaluate a run: every sample of a split once, whatever the number of processes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopefuse.core import device as devices
from mopefuse.core import distributed
from mopefuse.metrics import classification as metrics
from mopefuse.evaluation.answers import Advance, Answer, Answers, Evaluation, Said, collect, judge
from mopefuse.core.artifact import read_tensors
from mopefuse.config.schema import Data as DataConfig
from mopefuse.config.schema import RunConfig, build_config
from mopefuse.data.base import DataSet, Row
from mopefuse.data.collate import Samples
from mopefuse.data.columns import require_column
from mopefuse.data.features import split_features
from mopefuse.data.load import load_data, names_splits
from mopefuse.data.missing import Dropped
from mopefuse.encoders.base import full_spec
from mopefuse.encoders.description import SOURCES, differences, other_versions
from mopefuse.errors import CheckpointError, DataError, Notice
from mopefuse.fusion.base import Fusion, fresh_encoders
from mopefuse.fusion.build import build_model, require_rows
from mopefuse.modalities.base import by_argument, of
from mopefuse.inference.bundle import Bundle
from mopefuse.config.recipe import changed_data, read_saved
from mopefuse.runs.folder import RunFolder
from mopefuse.config.sides import Comp, addressed, specs, with_specs
from mopefuse.runs.locate import kind_of, locate, trained


def evaluate(
    run: Path,
    *,
    split: str = "test",
    data: Path | None = None,
    layout: Mapping[str, Any] | None = None,
    checkpoint: str = "best",
    device: str = "auto",
    main: str | None = None,
    comp: Comp = None,
    predictions: Path | None = None,
    advance: Advance = lambda done, total: None,
) -> Evaluation:
    """Evaluate a checkpoint of a run on a split of its data set, or of another with the same labels.

    Args:
        run: folder of a run, an adapter or a bundle; the latter two know of no data set.
        layout: of `data`, see `elsewhere`.
        main, comp: specs, where the same weights go by another name here; see `mopefuse.config.sides.addressed`.
        predictions: a file that they are written to as they come, see `mopefuse.evaluation.predictions`.

    Raises:
        CheckpointError: no such run, or encoders other than it was trained with. DataError: unknown labels, bad rows.
    """
    run = locate(run)
    if kind_of(run) == "bundle":
        bundle = Bundle(run, device)
        config = build_config(read_saved(run / "config.yaml"), source=str(run))
        known = {"labels": bundle.labels, "multi_label": bundle.multi_label}
        where = elsewhere(config.data, data, layout)
        dataset = with_labels(load_data(where, require=(split,), advance=advance), known, split)
        asked = ask_split(bundle, dataset, split, where, advance=advance)
        return judge(asked, dataset, split, bundle.thresholds, predictions=predictions, together=False)
    target = devices.resolve(device)
    loaded = load_model(trained(run), checkpoint, target, main=main, comp=comp)
    where = elsewhere(loaded.config.data, data, layout)
    dataset = with_labels(load_data(where, require=(split,), advance=advance), loaded.manifest, split)
    answers = answers_to(loaded.model, dataset, split, loaded.config, target, advance=advance)
    return judge(answers, dataset, split, loaded.thresholds, predictions=predictions)


def elsewhere(config: DataConfig, path: Path | None, layout: Mapping[str, Any] | None = None) -> DataConfig:
    """How to read other data of the same kind: nothing is held out or drawn there. The same data for None.

    Args:
        layout: settings of `data` that are otherwise there: names of columns, folders of images.

    Raises:
        ConfigError: one of `layout` is none.
    """
    if path is None:
        return config
    own = {"labels": None, "val_fraction": None, "test_fraction": None, "shots": None, "fraction": None}
    if not names_splits(path, config):
        own["split_col"] = None
    return changed_data(config.model_copy(update=own), {**(layout or {}), "path": str(path)})


class Loaded(NamedTuple):
    """A trained model and what it was trained with."""

    model: Fusion
    config: RunConfig
    manifest: dict[str, Any]
    thresholds: metrics.Thresholds


def load_model(
    folder: RunFolder, checkpoint: str, device: torch.device, *, main: str | None = None, comp: Comp = None
) -> Loaded:
    """The model of a run or adapter with the weights of one of its checkpoints, its configuration and its manifest.

    Args:
        main, comp: specs, where the same weights go by another name here; see `mopefuse.config.sides.addressed`.

    Raises:
        CheckpointError: the encoders' weights are not those that the run was trained with, or its files disagree.
    """
    config, manifest = folder.config(), folder.manifest()
    modality_of = {side: str(facts.get("modality", "")) for side, facts in manifest["encoders"].items()}
    config = _elsewhere_named(config, addressed(main, comp, modality_of), str(folder.path))
    model = build_model(config, len(manifest["labels"]))
    check_encoders(model, manifest, where=str(folder.path))
    path, published = folder.checkpoint(checkpoint)
    model.load_own_state(read_tensors(path / "weights.safetensors"), where=str(path))
    devices.place(model, device)
    return Loaded(model.eval(), config, manifest, thresholds_of(published, config))


def _elsewhere_named(config: RunConfig, encoders: Mapping[str, str], where: str) -> RunConfig:
    """A configuration with the same encoders by other names.

    Raises:
        CheckpointError: an option differs that changes what an encoder says, such as ``pool``.
    """
    named = {side: str(full_spec(spec)) for side, spec in encoders.items()}
    before = specs(config)
    for side, spec in named.items():
        mine, theirs = (
            {key: value for key, value in full_spec(text).options.items() if key not in SOURCES}
            for text in (spec, before[side])
        )
        if mine != theirs:
            what = f"{spec} has other options than {before[side]}, which the run was trained with"
            raise CheckpointError(8, what, where=where, fix="write the same options, or use mopefuse swap-encoder")
    return with_specs(config, named)


def thresholds_of(checkpoint: Mapping[str, Any], config: RunConfig) -> metrics.Thresholds:
    """The thresholds that go with a checkpoint: those tuned when it was validated, or the one that is set."""
    if config.train.threshold == "tuned":
        tuned: list[float] | None = checkpoint["progress"].get("thresholds")
        return metrics.THRESHOLD if tuned is None else tuned
    return config.train.threshold


def check_encoders(model: Fusion, manifest: dict[str, Any], *, where: str) -> None:
    """Compare the encoders with those that a run was trained with; another version of a library only gives a notice.

    Raises:
        CheckpointError: other weights, or another configuration, pooling, preprocessing or tokenizer; it names what differs.
    """
    fingerprints = fresh_encoders(model)
    for side in model.uses:
        encoder, recorded = model.encoder(side), manifest["encoders"].get(side, {})
        now, before = encoder.describe(), recorded.get("description")
        changed = [] if before is None else differences(before, now)
        expected = recorded.get("fingerprint")
        if side in fingerprints and fingerprints[side] != expected:
            changed.insert(0, f"fingerprint {fingerprints[side]}, expected {expected}")
            raise CheckpointError(
                8,
                f"the weights of {encoder.spec} are not those that the run was trained with ({_some(changed)})",
                where=where,
                fix=_SAME_ENCODER,
            )
        if changed:
            raise CheckpointError(
                220,
                f"{encoder.spec} is not the encoder that the run was trained with: {_some(changed)}",
                where=where,
                fix=_SAME_ENCODER,
            )
        if before is not None and (versions := other_versions(before, now)):
            text = f"{encoder.spec} was trained with other versions of libraries ({', '.join(versions)})"
            warnings.warn(f"{text}; answers may differ slightly", Notice, stacklevel=2)


_SAME_ENCODER = "restore those files or options, load the same revision, or change the encoder with mopefuse swap-encoder"


def _some(changed: Sequence[str], most: int = 6) -> str:
    more = f"; and {len(changed) - most} more" if len(changed) > most else ""
    return "; ".join(changed[:most]) + more


def with_labels(data: DataSet, manifest: dict[str, Any], split: str) -> DataSet:
    """`data` with the labels that a model was trained for.

    Raises:
        DataError: a label that it does not know, or a single label where it gives several.
    """
    labels = tuple(manifest["labels"])
    unknown = sorted(data.splits[split].labels.counts().keys() - set(labels))
    if unknown:
        raise DataError(
            6, f"labels that the model does not know: {', '.join(unknown[:20])}", where=split, fix="evaluate on data it knows"
        )
    if data.multi_label != manifest["multi_label"]:
        raise DataError(5, "single labels and lists of labels do not fit", where=split, fix="write labels as in training")
    return replace(data, labels=labels)


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
