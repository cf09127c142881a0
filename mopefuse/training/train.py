"""Train a fusion of frozen encoders into a run folder: the best checkpoint on validation is tested, once."""

from __future__ import annotations

import platform
import signal
from collections import Counter
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from mopefuse import __version__
from mopefuse.config.schema import Data as DataConfig
from mopefuse.config.schema import RunConfig
from mopefuse.config.sides import is_comp
from mopefuse.core import device as devices
from mopefuse.core import distributed, registry
from mopefuse.core.artifact import FREE_SPACE, dump_json, read_tensors, write_atomically, write_tensors
from mopefuse.data.base import SPLITS, DataSet
from mopefuse.data.collate import Samples
from mopefuse.data.load import load_data
from mopefuse.errors import DataError, Interrupted, ResourceError
from mopefuse.fusion.base import Fusion, fresh_encoders
from mopefuse.fusion.build import build_model, check_names, full_specs, require_rows
from mopefuse.metrics import classification as metrics
from mopefuse.modalities.base import of
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.load import check_encoders
from mopefuse.training import regression_start as closed_form
from mopefuse.training.doubts import notice_doubts
from mopefuse.training.losses import classification_loss
from mopefuse.training.optim import with_learning_rates
from mopefuse.training.resume import resumed
from mopefuse.training.stop_request import StopRequest
from mopefuse.training.trainer import Listener, Start, Trainer

_WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Plan:
    """What a run would be: nothing is trained or written."""

    config: RunConfig
    rows: dict[str, int]
    labels: tuple[str, ...]
    multi_label: bool
    encoders: dict[str, str]
    preprocess: dict[str, dict[str, Any]]  # by side: image size, most tokens of a text
    trainable: dict[str, int]  # by part
    total: int
    memory: int  # bytes, estimated for one training step

    @property
    def share(self) -> float:
        """Trainable parameters over all parameters."""
        return sum(self.trainable.values()) / self.total


def plan(config: RunConfig, listener: Listener | None = None) -> Plan:
    """Resolve everything that training would, and count.

    Raises:
        MopefuseError: whatever training would refuse before its first step.
    """
    check_names(config)
    data = _load(config, listener or Listener())
    config = _with_modalities(config, data)
    model = build_model(config, len(data.labels))
    _require_rows(model, data)
    notice_doubts(config, data, model, listener or Listener())
    config = resolved(config, model)
    return Plan(
        config,
        {name: len(split.rows) for name, split in data.splits.items()},
        data.labels,
        data.multi_label,
        {side: str(model.encoder(side).spec) for side in model.uses},
        {side: model.encoder(side).preprocess.describe() for side in model.uses},
        model.breakdown(),
        sum(parameter.numel() for parameter in model.parameters()),
        estimate_memory(model, data, config),
    )


def train(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    start: Start | None = None,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Train, select on validation, test once; returns what ``metrics.json`` holds.

    Args:
        config: for a resumed run, the saved configuration with changes on top (see `mopefuse.training.resume.MAY_CHANGE`).
        start: a model to go on from instead of from scratch; published as step 0, and kept in the folder until then.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was published.
        MopefuseError: see docs/errors.md; what was published before is kept.
    """
    listener = listener or Listener()
    with distributed.joined():
        folder = RunFolder(distributed.from_main(out))
        notice = distributed.on_main(lambda: folder.claim(resume=resume, overwrite=overwrite))
        if notice:
            listener.notice(notice)
        try:
            return _train(config, folder, listener, resume=resume, start=start)
        except ResourceError as error:
            if error.fix == FREE_SPACE:
                error.fix = "free space and go on with --resume"
            raise
        finally:
            if distributed.is_main():
                folder.abandon()
                folder.unlock()


def _train(
    config: RunConfig, folder: RunFolder, listener: Listener, *, resume: bool, start: Start | None
) -> dict[str, Any]:
    device = devices.resolve(config.device)
    begun: dict[str, Any] | None = distributed.on_main(lambda: folder.manifest() if resume and folder.begun() else None)
    if begun is not None:
        config, changed = distributed.on_main(lambda: resumed(folder.config(), config))
        for change in changed:
            listener.notice(f"changed: {change}")
        start = distributed.on_main(lambda: _kept_start(folder))
    check_names(config)
    data = _load(config, listener)
    listener.rows({name: len(data.splits[name].rows) for name in SPLITS if name in data.splits})
    config = _with_modalities(config, data)
    model = build_model(config, len(data.labels))
    _require_rows(model, data)
    devices.place(model, device)
    config = model.config = resolved(config, model)
    facts = _facts(config, data, model)
    facts["start"] = uuid4().hex if start else None  # which of several attempts in a folder it is
    facts["warm_up"] = {"names": list(start.fresh), "epochs": start.warm_up} if start and start.warm_up else None
    if begun is not None:
        if any(begun[key] != facts[key] for key in ("data", "labels", "multi_label")):
            raise DataError(9, "the data are not those that the run began with", where=str(data.root), fix="restore them")
        check_encoders(model, begun, where=str(folder.path))
        facts = begun
    else:
        notice_doubts(config, data, model, listener)
        _notify_of_settings(config, model, listener)
        distributed.on_main(lambda: _begin(folder, config, data, facts, start))
    trainer = Trainer(config, data, model, folder, device, listener)
    if facts.get("warm_up"):
        trainer.warm_up(**facts["warm_up"])
    if begun is not None and trainer.restore():
        step = trainer.progress.step
        result: dict[str, Any] | None = distributed.on_main(lambda: _go_on(folder, config, data, facts, trainer))
        if result is not None:
            limit = "--steps" if trainer.total < config.train.epochs * trainer.per_epoch else "--epochs"
            more = "" if model.closed_form else f"; raise {limit} to continue"
            listener.notice(f"already finished at step {step}{more}")
            return result
        listener.notice(f"resuming at step {step} of {trainer.total}")
    else:
        distributed.on_main(lambda: folder.rewind_log(-1))  # of an attempt that ended before its first checkpoint
        if begun is not None:
            distributed.on_main(lambda: _write_settings(folder, config, data, facts))
        if (begun_from := closed_form.start(trainer, start)) is not None:
            trainer.begin(begun_from.state)
    with StopRequest() as stop:
        trainer.fit(stop)
    try:
        return _finish(trainer, data, model, folder, device)
    except KeyboardInterrupt:
        what = f"after the last step, {trainer.progress.step}, before the test; its checkpoint is published"
        raise Interrupted(signal.SIGINT, what, fix="continue with --resume") from None


def _notify_of_settings(config: RunConfig, model: Fusion, listener: Listener) -> None:
    """Settings that have no effect, and encoders that are there twice."""
    for section in model.unused_sections():
        listener.notice(f"{config.method} does not use the settings of {section}")
    for spec, count in Counter(str(model.encoder(side).spec) for side in model.uses if is_comp(side)).items():
        if count > 1:
            listener.notice(f"{spec} is a complementary encoder {count} times: what it says is the same each time")


def _begin(folder: RunFolder, config: RunConfig, data: DataSet, facts: dict[str, Any], start: Start | None) -> None:
    """Make the folder a run; where it starts from, if not from scratch, is in it before it is one."""
    if start is None:
        folder.drop_start()
    else:
        kept = {"start": facts["start"], "fresh": list(start.fresh), "warm_up": start.warm_up}
        folder.keep_start(lambda to: write_tensors(to / _WEIGHTS, start.state), kept)
    _write_settings(folder, config, data, facts)


def _kept_start(folder: RunFolder) -> Start | None:
    """Where a run that has no checkpoint yet starts from, if not from scratch."""
    kept = folder.kept_start()
    if kept is None:
        return None
    path, facts = kept
    return Start(read_tensors(path / _WEIGHTS), tuple(facts["fresh"]), facts["warm_up"])


def _go_on(
    folder: RunFolder, config: RunConfig, data: DataSet, facts: dict[str, Any], trainer: Trainer
) -> dict[str, Any] | None:
    """The result of a run that is finished; of any other, what an earlier end left is removed before it goes on."""
    result, step = folder.result(), trainer.progress.step
    finished = step >= trainer.total and result.get("steps") == step
    if not finished:
        folder.metrics_file.unlink(missing_ok=True)
    _write_settings(folder, config, data, facts)
    return result if finished else None


def _write_settings(folder: RunFolder, config: RunConfig, data: DataSet, facts: dict[str, Any]) -> None:
    folder.start(config, facts)
    if drawn := drawn_ids(config.data, data):
        write_atomically(folder.path / "splits.json", dump_json(drawn))


def _finish(trainer: Trainer, data: DataSet, model: Fusion, folder: RunFolder, device: torch.device) -> dict[str, Any]:
    test = trainer.test()
    breakdown = model.breakdown()
    progress = trainer.progress
    validated = [line for line in folder.read_log() if "val" in line] if distributed.is_main() else []
    selected = progress.best_step if trainer.config.train.select == "best" else progress.step
    result = {
        "metrics": {
            "val": next((line["val"] for line in reversed(validated) if line["step"] == selected), None),
            "test": test.metrics if test else None,
        },
        "per_label": test.per_label if test else None,
        "thresholds": _by_label(trainer.thresholds(), data) if data.multi_label else None,
        "selected_step": selected,
        "steps": progress.step,
        "seconds": round(progress.seconds, 2),
        "peak_memory_bytes": devices.peak_memory(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "parameters": {
            "trainable": sum(breakdown.values()),
            "total": sum(parameter.numel() for parameter in model.parameters()),
            "by_part": breakdown,
        },
        "rows": {name: len(split.rows) for name, split in data.splits.items()},
        "seed": trainer.config.seed,
        "versions": versions(),
    }
    distributed.on_main(lambda: write_atomically(folder.metrics_file, dump_json(result)))
    return result


def drawn_ids(config: DataConfig, data: DataSet) -> dict[str, list[str]]:
    """The ids of the rows of each split that were drawn or held out; empty where the files say which is which."""
    drawn = {"train"} if config.shots or config.fraction or config.val_fraction or config.test_fraction else set()
    drawn |= {name for name, share in (("val", config.val_fraction), ("test", config.test_fraction)) if share}
    return {name: [row.id for row in data.splits[name].rows] for name in SPLITS if name in drawn}


def _by_label(thresholds: metrics.Thresholds, data: DataSet) -> dict[str, float]:
    each = [thresholds] * len(data.labels) if isinstance(thresholds, float) else thresholds
    return dict(zip(data.labels, each, strict=True))


def versions() -> dict[str, str]:
    """Of the software that a result depends on."""
    names = ("torch", "torchvision", "timm", "transformers", "open_clip_torch", "numpy")
    return {"mopefuse": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


def estimate_memory(model: Fusion, data: DataSet, config: RunConfig) -> int:
    """Bytes of one training step on one process: weights, gradients, AdamW's state, and activations.

    Activations are what the forward pass of the sample with the longest text keeps for backward, times the share of the
    batch.
    """
    samples = Samples(data, "train", model.readers(), config.data, seed=config.seed)
    in_rows = [name for name in data.modalities if not of(name).is_file]
    lengths = [sum(len(row.values[name] or "") for name in in_rows) for row in data.splits["train"].rows]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    batch = next(samples.batches([[(0, longest)]]))
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        classification_loss(model(batch), batch, multi_label=data.multi_label)
    per_process = config.train.batch_size / config.train.accumulate / distributed.world_size()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    learning = sum(parameter.numel() * parameter.element_size() for parameter in model.ours().values())
    return int(size + 3 * learning + sum(kept.values()) * per_process)


def _load(config: RunConfig, listener: Listener) -> DataSet:
    told = partial(listener.reading, "checking files")
    if distributed.world_size() > 1:  # one process looks at the images, the others find the index
        distributed.on_main(lambda: load_data(config.data, advance=told) and None)
    data = load_data(config.data, advance=told)
    for text in data.notices:
        listener.notice(text)
    return data


def _with_modalities(config: RunConfig, data: DataSet) -> RunConfig:
    """`config` with the modalities that rows have written out: a plugin that is installed later adds none to a run's."""
    return config.model_copy(update={"data": config.data.model_copy(update={"modalities": data.modalities})})


def _require_rows(model: Fusion, data: DataSet) -> None:
    """Refuse data that lack what the model cannot do without, before anything is computed."""
    require_rows(model, data.modalities)
    for name, split in data.splits.items():
        lacks = {side: split.lacks(modality) for side, (modality, _) in model.readers().items()}
        model.require_all_but({side: lacks_S for side, lacks_S in lacks.items() if lacks_S.any()}, where=name)


def resolved(config: RunConfig, model: Fusion) -> RunConfig:
    """Every default that depends on the encoders written out."""
    modality_of = {side: model.encoder(side).modality for side in model.uses}
    tuned = [side for side in model.uses if model.encoder(side).tuned]
    return with_learning_rates(full_specs(model.resolve(config)), modality_of, tuned, fitted=model.standard is not None)


def _facts(config: RunConfig, data: DataSet, model: Fusion) -> dict[str, Any]:
    fingerprints = fresh_encoders(model)
    return {
        "mopefuse": __version__,
        "method": config.method,
        "encoders": {
            side: {
                "spec": str(model.encoder(side).spec),
                "modality": model.encoder(side).modality,
                "feature_width": model.encoder(side).feature_width,
                "layers": len(model.encoder(side).widths),
                "revision": model.encoder(side).revision,
                "fingerprint": fingerprints.get(side),
                "digest": model.encoder(side).digest(),
                "description": model.encoder(side).describe(),
            }
            for side in model.uses
        },
        "plugins": _plugins(config, model),
        "labels": list(data.labels),
        "multi_label": data.multi_label,
        "data": data.fingerprint(),
        "skipped": {name: [f"{problem.code} {problem}" for problem in split.skipped] for name, split in data.splits.items()},
    }


def _plugins(config: RunConfig, model: Fusion) -> list[dict[str, str]]:
    """Entry points of other distributions that the run cannot be loaded without."""
    needs = {(registry.ENCODERS, model.encoder(side).spec.scheme) for side in model.uses} | {(registry.FUSION, config.method)}
    return registry.needs(needs | {(registry.MODALITIES, model.encoder(side).modality) for side in model.uses})
