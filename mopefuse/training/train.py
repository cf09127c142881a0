"""Train a fusion of frozen encoders and write a run folder; the best checkpoint on validation is tested once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from mopefuse.config.schema import RunConfig
from mopefuse.core import device as devices
from mopefuse.core import distributed
from mopefuse.core.artifact import dump_json
from mopefuse.core.atomic_files import FREE_SPACE, write_atomically
from mopefuse.core.error_codes import DataCode
from mopefuse.core.parameters import count_parameters
from mopefuse.core.stop_request import StopRequest
from mopefuse.core.tensor_files import read_tensors, write_tensors
from mopefuse.data.base import SPLITS, DataSet
from mopefuse.errors import DataError, Interrupted, ResourceError
from mopefuse.evaluation.scoring import Evaluation
from mopefuse.metrics.thresholds import Thresholds
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.load import check_encoders
from mopefuse.training.listener import Listener
from mopefuse.training.plan import Prepared, prepare
from mopefuse.training.resume import merge_resumed
from mopefuse.training.run_facts import get_versions, sampled_ids
from mopefuse.training.start_layer import PrefixTables, prepare_prefixes
from mopefuse.training.trainer import Start, Trainer
from mopefuse.training.warm_start import baselines_at_start, initial_state

_WEIGHTS = "weights.safetensors"


def train(
    config: RunConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    start: Start | None = None,
    listener: Listener | None = None,
    test: bool = True,
) -> dict[str, Any]:
    """Train, select a checkpoint on validation, test it once; returns the contents of ``metrics.json``.

    Args:
        config: for a resumed run, the saved configuration with changes (see `mopefuse.training.resume.MAY_CHANGE`).
        start: initial weights, if not from scratch; published as step 0.
        test: whether to test the selected checkpoint; False for one of several candidates of which only the best is tested.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after a checkpoint was published.
        MopefuseError: see docs/errors.md; published checkpoints are kept.
    """
    listener = listener or Listener()
    with distributed.process_group():
        # the main process has seen the folder, which other machines may see late or not at all
        config, out = distributed.broadcast_from_main((config, out))
        folder = RunFolder(out)
        with _claimed(folder, listener, resume=resume, overwrite=overwrite):
            return _train(config, folder, listener, resume=resume, start=start, test=test)


@contextmanager
def _claimed(folder: RunFolder, listener: Listener, *, resume: bool, overwrite: bool) -> Iterator[None]:
    """The folder, prepared and locked while the context lasts."""
    notice = distributed.run_on_main(lambda: folder.claim(resume=resume, overwrite=overwrite))
    if notice:
        listener.on_notice(notice)
    try:
        yield
    except ResourceError as error:
        if error.fix == FREE_SPACE:
            error.fix = "free space and continue with --resume"
        raise
    finally:
        if distributed.is_main():
            folder.abandon()
            folder.unlock()


@dataclass(frozen=True)
class _Origin:
    """What a run continues from.

    Args:
        config: merged with that of a resumed run.
        facts: the manifest of a resumed run; None for a new run.
        start: initial weights; None for scratch.
    """

    config: RunConfig
    facts: dict[str, Any] | None
    start: Start | None


def _train(
    config: RunConfig, folder: RunFolder, listener: Listener, *, resume: bool, start: Start | None, test: bool
) -> dict[str, Any]:
    device = devices.resolve(config.device)
    # 1. A new run, or the one in the folder with the settings that may change.
    origin = _resume(folder, config, listener) if resume else None
    origin = origin or _Origin(config, None, start)
    # 2. Data, resolved configuration and model, as `plan` prepares them.
    prepared = prepare(origin.config, listener, device)
    listener.on_rows({name: len(prepared.data.splits[name].rows) for name in SPLITS if name in prepared.data.splits})
    # 3. Check that the folder's run has the same data and encoders, or make the folder a run.
    facts = None if origin.facts is None else _same_run(folder, prepared, origin.facts)
    prepared, prefixes = _with_prefixes(prepared, device, listener)
    facts = facts or _begin(folder, prepared, origin, listener)
    # 4. The trainer, at the step to continue from.
    trainer = Trainer(prepared.config, prepared.data, prepared.model, folder, device, listener, prefixes)
    if facts["warm_up"]:
        trainer.warm_up(**facts["warm_up"])
    if (result := _restore_or_initialize(trainer, folder, prepared, origin, facts)) is not None:
        return result
    # 5. Steps and validations.
    with StopRequest() as stop:
        trainer.fit(stop)
    # 6. One test of the selected checkpoint.
    try:
        return _finish(trainer, prepared, folder, device, trainer.test() if test else None)
    except KeyboardInterrupt:
        what = f"after the last step, {trainer.progress.step}, before the test; its checkpoint has been saved"
        raise Interrupted(signal.SIGINT, what, fix="continue with --resume") from None


def _with_prefixes(prepared: Prepared, device: torch.device, listener: Listener) -> tuple[Prepared, PrefixTables]:
    """The outputs of early layers from which training starts; the configuration records whether it does."""
    model = prepared.model
    model.config, tables = prepare_prefixes(model, prepared.data, prepared.config, device, listener)
    return replace(prepared, config=model.config), tables


def _resume(folder: RunFolder, config: RunConfig, listener: Listener) -> _Origin | None:
    """The run in the folder with the changes in `config`; None if it has not published anything yet."""
    facts = distributed.run_on_main(lambda: folder.manifest() if folder.can_resume() else None)
    if facts is None:
        return None
    config, changes = distributed.run_on_main(lambda: merge_resumed(folder.config(), config))
    for change in changes:
        listener.on_notice(f"changed: {change}")
    return _Origin(config, facts, distributed.run_on_main(lambda: _initial_weights(folder)))


def _initial_weights(folder: RunFolder) -> Start | None:
    """The initial weights of a run that has no checkpoint yet; None if it starts from scratch."""
    saved = folder.initial_weights()
    if saved is None:
        return None
    path, facts = saved
    return Start(read_tensors(path / _WEIGHTS), tuple(facts["fresh"]), facts["warm_up"])


def _begin(folder: RunFolder, prepared: Prepared, origin: _Origin, listener: Listener) -> dict[str, Any]:
    """Make the folder a run, with its initial weights in place first; returns the facts of its manifest."""
    prepared.warn(listener)
    start, facts = origin.start, prepared.facts()
    facts["start"] = uuid4().hex if start else None  # tells several attempts in the same folder apart
    facts["warm_up"] = {"names": list(start.fresh), "epochs": start.warm_up} if start and start.warm_up else None

    def write() -> None:
        if start is None:
            folder.drop_initial_weights()
        else:
            start_facts = {"start": facts["start"], "fresh": list(start.fresh), "warm_up": start.warm_up}
            folder.save_initial_weights(lambda to: write_tensors(to / _WEIGHTS, start.state), start_facts)
        _write_settings(folder, prepared, facts)

    distributed.run_on_main(write)
    return facts


def _same_run(folder: RunFolder, prepared: Prepared, facts: dict[str, Any]) -> dict[str, Any]:
    """Refuse to resume with other data or encoders than the run began with; returns its facts."""
    data = prepared.data
    found = {"data": data.fingerprint(), "labels": list(data.labels), "task": data.task.facts()}
    if any(facts[key] != value for key, value in found.items()):
        what = "the data have changed since the run began"
        fix = "restore the data, or start a new run with a different --out"
        raise DataError(DataCode.DATA_CHANGED, what, where=str(prepared.config.data.path), fix=fix)
    check_encoders(prepared.model, facts, where=str(folder.path))
    return facts


def _restore_or_initialize(
    trainer: Trainer, folder: RunFolder, prepared: Prepared, origin: _Origin, facts: dict[str, Any]
) -> dict[str, Any] | None:
    """Bring the trainer to the step to continue from: a checkpoint, given or fitted weights, or scratch.

    Returns:
        The result of a run that is finished already; None if there are steps to make.
    """
    listener = trainer.listener
    if trainer.total and trainer.duration.notice:
        listener.on_notice(trainer.duration.notice)
    if origin.facts is not None and trainer.restore():
        step = trainer.progress.step
        result: dict[str, Any] | None = distributed.run_on_main(lambda: _continue(folder, prepared, facts, trainer))
        if result is None:
            listener.on_notice(f"resuming at step {step} of {trainer.total}")
        else:
            more = "" if prepared.model.closed_form else f"; raise {' and '.join(trainer.duration.limits)} to continue"
            listener.on_notice(f"already finished at step {step}{more}")
        return result
    distributed.run_on_main(lambda: folder.rewind_log(-1))  # lines of an attempt that ended before its first checkpoint
    if origin.facts is not None:
        distributed.run_on_main(lambda: _write_settings(folder, prepared, facts))
    if (start := initial_state(trainer, origin.start)) is not None:
        trainer.begin(start)
    return None


def _continue(folder: RunFolder, prepared: Prepared, facts: dict[str, Any], trainer: Trainer) -> dict[str, Any] | None:
    """The result of a finished run; of an unfinished one, an earlier result is removed first."""
    result, step = folder.result(), trainer.progress.step
    finished = step >= trainer.total and result.get("steps") == step
    if not finished:
        folder.metrics_file.unlink(missing_ok=True)
    _write_settings(folder, prepared, facts)
    return result if finished else None


def _write_settings(folder: RunFolder, prepared: Prepared, facts: dict[str, Any]) -> None:
    folder.start(prepared.config, facts)
    if sampled := sampled_ids(prepared.config.data, prepared.data):
        write_atomically(folder.path / "splits.json", dump_json(sampled))


def _finish(
    trainer: Trainer, prepared: Prepared, folder: RunFolder, device: torch.device, test: Evaluation | None
) -> dict[str, Any]:
    """Write ``metrics.json``, with the test of the selected checkpoint if there was one."""
    data, progress, breakdown = prepared.data, trainer.progress, prepared.model.breakdown()
    selected = progress.best_step if trainer.config.train.select == "best" else progress.step
    result = {
        "metrics": {"val": _validation_at(selected, folder), "test": test.metrics if test else None},
        "per_label": test.per_label if test else None,
        "thresholds": _by_label(trainer.thresholds(), data) if data.task.uses_thresholds else None,
        "start": baselines_at_start(folder.path),
        "selected_step": selected,
        "steps": progress.step,
        "seconds": round(progress.seconds, 2),
        "peak_memory_bytes": devices.peak_memory(device),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "parameters": {
            "trainable": sum(breakdown.values()),
            "total": count_parameters(prepared.model),
            "by_part": breakdown,
        },
        "rows": {name: len(split.rows) for name, split in data.splits.items()},
        "seed": trainer.config.seed,
        "versions": get_versions(),
    }
    distributed.run_on_main(lambda: write_atomically(folder.metrics_file, dump_json(result)))
    return result


def _validation_at(step: int, folder: RunFolder) -> dict[str, float] | None:
    """The last logged validation metrics of a step; None if there are none, and on other processes than the main one."""
    lines = folder.read_log() if distributed.is_main() else []
    return next((line["val"] for line in reversed(lines) if "val" in line and line["step"] == step), None)


def _by_label(thresholds: Thresholds, data: DataSet) -> dict[str, float]:
    each = [thresholds] * len(data.labels) if isinstance(thresholds, float) else thresholds
    return dict(zip(data.labels, each, strict=True))
