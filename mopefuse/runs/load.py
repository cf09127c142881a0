"""Load a trained model from a run or an adapter, and the data set to evaluate it on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mopefuse.config.encoder_sides import Comp, specs, specs_by_side, with_specs
from mopefuse.config.recipe import changed_data
from mopefuse.config.schema import Data as DataConfig
from mopefuse.config.schema import RunConfig
from mopefuse.core import device as devices
from mopefuse.core.error_codes import CheckpointCode, DataCode
from mopefuse.core.formatting import several
from mopefuse.core.tensor_files import read_tensors
from mopefuse.data.base import DataSet
from mopefuse.data.load import has_split_column, load_data
from mopefuse.data.storage.paths import data_path
from mopefuse.encoders.base import Encoder, full_spec
from mopefuse.encoders.description import SOURCES, differences, other_versions
from mopefuse.errors import CheckpointError, DataError, Notice
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.build import build_model
from mopefuse.fusion.model_facts import unsaved_fingerprints
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.locate import find_run
from mopefuse.tasks.base import task_from_facts
from mopefuse.tasks.segmentation import Segmentation

Advance = Callable[[int, int], None]  # (files checked, files in all)


@dataclass(frozen=True)
class Loaded:
    """A trained model in evaluation mode, and what it was trained with.

    Args:
        step: training step of the loaded checkpoint; None for an adapter, which does not record it.
    """

    model: Fusion
    config: RunConfig
    manifest: dict[str, Any]
    thresholds: Thresholds
    step: int | None


@dataclass(frozen=True)
class OpenRun(Loaded):
    """A trained model on `device`, with the data set and the split to evaluate it on."""

    folder: RunFolder
    data: DataSet
    split: str
    device: torch.device

    def changed_splits(self, *splits: str) -> list[str]:
        """Those of some splits that are not the ones that the run was trained with."""
        found = self.data.fingerprint()
        return [split for split in dict.fromkeys(splits) if self.manifest["data"].get(split) != found.get(split)]

    def notice_changes(self, *splits: str) -> bool:
        """Give a notice if some splits of the run's own data have changed, see `changed_splits`; returns whether they have."""
        if changed := self.changed_splits(*splits):
            what = f"the {' and '.join(changed)} data have changed since the run was trained"
            warnings.warn(f"{what}, so these are not the results of the run", Notice, stacklevel=2)
        return bool(changed)


def open_run(
    path: str | Path,
    split: str | None = "test",
    data: Path | None = None,
    *,
    layout: Mapping[str, Any] | None = None,
    checkpoint: str = "best",
    device: str = "auto",
    main: str | None = None,
    comp: Comp = None,
    advance: Advance = lambda done, total: None,
) -> OpenRun:
    """Load the model of a run or an adapter, and the data set that it is evaluated on.

    Args:
        path: folder of a run or an adapter, or an adapter on the hub.
        split: None for the test split, or the validation split if there is no test split.
        data: another data set with the same labels; None for the run's own.
        layout: settings of the section `data` that differ for these data, see `with_data_path`.
        main, comp: other specs of the same encoders, see `mopefuse.config.encoder_sides.specs_by_side`.
        advance: progress of checking the files of a data set that was not checked before.

    Raises:
        CheckpointError: no such run, or its encoders differ from those it was trained with.
        DataError: no such split, bad rows, or labels that the model was not trained for.
    """
    target, folder = devices.resolve(device), find_run(path)
    loaded = load_model(folder, checkpoint, target, main=main, comp=comp)
    where = with_data_path(loaded.config.data, data, layout)
    dataset, split = load_split(where, split, loaded.manifest, advance=advance)
    return OpenRun(**vars(loaded), folder=folder, data=dataset, split=split, device=target)


def load_split(
    config: DataConfig,
    split: str | None,
    manifest: Mapping[str, Any],
    *,
    advance: Advance = lambda done, total: None,
) -> tuple[DataSet, str]:
    """The data set that `config` describes, with the labels of a trained model, and the name of the split.

    Args:
        split: must exist; None selects test, or validation if there is no test split.
        manifest: with ``labels`` and ``task`` of the model.

    Raises:
        DataError: no such split, bad rows, or labels that the model was not trained for.
    """
    data = load_data(config, require=(split,) if split else (), may_skip=False, advance=advance)
    if split is None:
        split = next((name for name in ("test", "val") if name in data.splits), None)
    if split is None:  # one table without splits counts as test; otherwise the error names what is missing
        data, split = load_data(config, require=("test",), advance=advance), "test"
    return with_labels(data, manifest, split), split


def load_model(
    folder: RunFolder,
    checkpoint: str,
    device: torch.device,
    *,
    main: str | None = None,
    comp: Comp = None,
    encoders: Mapping[str, Encoder] | None = None,
) -> Loaded:
    """The model of a run or an adapter with the weights of one of its checkpoints, on `device`.

    Args:
        main, comp: other specs of the same encoders, see `mopefuse.config.encoder_sides.specs_by_side`.
        encoders: the same encoders by side, taken from a model that was loaded before, in place of loading them again.

    Raises:
        CheckpointError: the encoders differ from those that the run was trained with, or its files do not match each other.
    """
    config, manifest = folder.config(), folder.manifest()
    modality_of = {side: str(facts["modality"]) for side, facts in manifest["encoders"].items()}
    config = _with_other_specs(config, specs_by_side(main, comp, modality_of), where=str(folder.path))
    task = task_from_facts(manifest["task"])
    model = build_model(config, task.outputs(manifest["labels"]), task, encoders=encoders)
    if encoders is None:
        check_encoders(model, manifest, where=str(folder.path))
    path, facts = folder.checkpoint(checkpoint)
    model.load_trainable_state_dict(read_tensors(path / "weights.safetensors"), where=str(path))
    devices.move_to_device(model, device)
    return Loaded(
        model=model.eval(),
        config=config,
        manifest=manifest,
        thresholds=get_thresholds(facts, config),
        step=facts.get("step"),
    )


def _with_other_specs(config: RunConfig, encoders: Mapping[str, str], *, where: str) -> RunConfig:
    """`config` with other specs of the same encoders, such as a local folder in place of a name on the hub.

    Raises:
        CheckpointError: the new spec changes an option that affects the encoder's features, such as ``pool``.
    """
    new_specs = {side: str(full_spec(spec)) for side, spec in encoders.items()}
    old_specs = specs(config)
    for side, spec in new_specs.items():
        if _feature_options(spec) != _feature_options(old_specs[side]):
            what = f"{spec} has different options from {old_specs[side]}, which the run was trained with"
            raise CheckpointError(
                CheckpointCode.ENCODER_CHANGED, what, where=where, fix="write the same options, or use mopefuse swap-encoder"
            )
    return with_specs(config, new_specs)


def _feature_options(spec: str) -> dict[str, str]:
    """The options of a spec that affect features, not where weights come from."""
    return {key: value for key, value in full_spec(spec).options.items() if key not in SOURCES}


def get_thresholds(checkpoint: Mapping[str, Any], config: RunConfig) -> Thresholds:
    """Decision thresholds of a checkpoint: those tuned at its validation, or the one in the configuration.

    Args:
        checkpoint: its manifest.
    """
    if config.train.threshold != "tuned":
        return config.train.threshold
    tuned: list[float] | None = checkpoint["progress"]["thresholds"]
    return THRESHOLD if tuned is None else tuned


def check_encoders(model: Fusion, manifest: Mapping[str, Any], *, where: str) -> None:
    """Compare the encoders of a model with those recorded in a manifest; a different library version only gives a notice.

    Raises:
        CheckpointError: different weights, configuration, pooling, preprocessing or tokenizer; the message names what differs.
    """
    fingerprints = unsaved_fingerprints(model)
    for side in model.uses:
        encoder, recorded = model.encoder(side), manifest["encoders"][side]
        current = encoder.describe()
        changed = differences(recorded["description"], current)
        expected = recorded["fingerprint"]
        if side in fingerprints and fingerprints[side] != expected:
            changed.insert(0, f"fingerprint {fingerprints[side]}, expected {expected}")
            what = f"the weights of {encoder.spec} are not those that the run was trained with ({_abridged(changed)})"
            raise CheckpointError(CheckpointCode.ENCODER_CHANGED, what, where=where, fix=_SAME_ENCODER)
        if changed:
            what = f"{encoder.spec} is not the encoder that the run was trained with: {_abridged(changed)}"
            raise CheckpointError(CheckpointCode.OTHER_ENCODER, what, where=where, fix=_SAME_ENCODER)
        if versions := other_versions(recorded["description"], current):
            text = f"{encoder.spec} was trained with other library versions ({', '.join(versions)})"
            warnings.warn(f"{text}; predictions may differ slightly", Notice, stacklevel=2)


_SAME_ENCODER = "restore those files or options, load the same revision, or change the encoder with mopefuse swap-encoder"


def _abridged(changed: Sequence[str], limit: int = 6) -> str:
    more = f"; and {len(changed) - limit} more" if len(changed) > limit else ""
    return "; ".join(changed[:limit]) + more


def with_data_path(config: DataConfig, path: Path | None, layout: Mapping[str, Any] | None = None) -> DataConfig:
    """`config` for another data set of the same kind, without held-out rows or subsampling; unchanged if `path` is None.

    Args:
        layout: settings of the section `data` that differ for these data: column names, image folders.

    Raises:
        ConfigError: an unknown or invalid setting in `layout`.
    """
    if path is None:
        return config
    path = data_path(path)
    own = {"labels": None, "val_fraction": None, "test_fraction": None, "shots": None, "fraction": None}
    if not has_split_column(path, config):
        own["split_col"] = None
    return changed_data(config.model_copy(update=own), {**(layout or {}), "path": str(path)})


def with_labels(data: DataSet, manifest: Mapping[str, Any], split: str) -> DataSet:
    """`data` with the labels that a model was trained for, in the model's order.

    Raises:
        DataError: the split has a label that the model was not trained for, or labels of another form: single ones where the
            model is multi-label or the reverse, another number of numbers, or masks of another kind.
    """
    labels = tuple(manifest["labels"])
    unknown = sorted(data.task.unknown_labels(data.splits[split].labels.counts(), labels))
    if unknown:
        what = f"the model was not trained for these labels: {', '.join(unknown[:20])}"
        raise DataError(
            DataCode.UNKNOWN_LABEL, what, where=split, fix="remove these rows, or train on data that has these labels"
        )
    task = task_from_facts(manifest["task"])
    if data.task.name != task.name:
        what = f"the model was trained for the task {task}, and the labels are those of {data.task}"
        raise DataError(DataCode.MIXED_LABELS, what, where=split, fix="write the labels in the same form as in training")
    if task.label_kind == "number" and len(data.labels) != len(labels):
        wanted = several(len(labels), "number")
        what = f"rows have {several(len(data.labels), 'number')}, and the model predicts {len(labels)}"
        raise DataError(DataCode.MIXED_LABELS, what, where=split, fix=f"write {wanted} per row, as in training")
    if isinstance(task, Segmentation) and isinstance(data.task, Segmentation):
        _require_same_masks(data, task, labels, split)
    return replace(data, labels=labels, task=task.adapted_to(data.task))


def _require_same_masks(data: DataSet, task: Segmentation, labels: Sequence[str], split: str) -> None:
    """Refuse masks that mark an object where the model was trained on class ids, or the reverse, or that have more classes.

    The ids 0 and 1 alone can be classes too.
    """
    assert isinstance(data.task, Segmentation)
    if not task.marks_object and data.task.foreground == 1:
        what = f"{split}: masks have the ids 0 and 1 only, which are read as the classes {' and '.join(labels[:2])}"
        warnings.warn(what, Notice, stacklevel=3)
    elif task.marks_object != data.task.marks_object:
        what = f"the model predicts {task.describe(labels)}, and the labels are {data.task.describe(data.labels)}"
        fix = "use masks with 0 and 1 (or 255)" if task.marks_object else "use masks with the class ids of the training data"
        raise DataError(DataCode.MIXED_LABELS, what, where=split, fix=fix)
    if len(data.labels) > len(labels):
        what = f"masks have the class {data.labels[len(labels)]}, and the model was trained for {len(labels)} classes"
        raise DataError(DataCode.UNKNOWN_LABEL, what, where=split, fix="use masks with the classes of the training data")
