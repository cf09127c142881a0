"""Load a trained model from a run or an adapter, and the data that it is evaluated on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mopefuse.config.recipe import changed_data
from mopefuse.config.schema import Data as DataConfig
from mopefuse.config.schema import RunConfig
from mopefuse.config.sides import Comp, addressed, specs, with_specs
from mopefuse.core import device as devices
from mopefuse.core.artifact import read_tensors
from mopefuse.data.base import DataSet
from mopefuse.data.load import names_splits
from mopefuse.encoders.base import full_spec
from mopefuse.encoders.description import SOURCES, differences, other_versions
from mopefuse.errors import CheckpointError, DataError, Notice
from mopefuse.fusion.base import Fusion, fresh_encoders
from mopefuse.fusion.build import build_model
from mopefuse.metrics import classification as metrics
from mopefuse.runs.folder import RunFolder


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
