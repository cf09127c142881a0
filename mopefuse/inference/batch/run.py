"""Predict many tables: plan, predict what is missing, and say when everything is complete."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mopefuse import __version__
from mopefuse.core import cache
from mopefuse.core.dependencies import require
from mopefuse.core.error_codes import ConfigCode, DataCode, ResourceCode
from mopefuse.core.formatting import several
from mopefuse.core.stop_request import StopRequest
from mopefuse.errors import ConfigError, DataError, Interrupted, MopefuseError, ResourceError, error_from_dict
from mopefuse.inference.batch import local
from mopefuse.inference.batch.inputs import InputFile
from mopefuse.inference.batch.job import Computer, Job, ModelSource, Reader
from mopefuse.inference.batch.output import Output, Record
from mopefuse.inference.batch.parquet_file import schema_of
from mopefuse.inference.batch.plan import Plan, check_same, make_plan

ENGINES = ("local", "ray")
ROWS = 10_240  # of a partition; a multiple of the default batch, so that batches are those of a whole table


@dataclass(frozen=True)
class BatchSettings:
    """How to predict many tables.

    Args:
        files: the tables, see `mopefuse.inference.batch.inputs.list_files`. out: folder or URL.
        engine: one of `ENGINES`. workers: processes with the model; None for one per GPU, or one on the CPU.
        format: one of `mopefuse.inference.batch.output.FORMATS`; None for Parquet if all inputs are Parquet, else JSON lines.
        rows: of a partition, at most; a multiple of the batch gives the batches of a whole table.
        overwrite: remove what an earlier prediction with other settings wrote.
        ray_address: of a Ray cluster; None for one on this machine.
    """

    files: Sequence[InputFile]
    out: str
    engine: str = "local"
    workers: int | None = None
    format: str | None = None
    rows: int = ROWS
    overwrite: bool = False
    ray_address: str | None = None
    device: str = "auto"


@dataclass
class Progress:
    """How far a prediction is.

    Attributes:
        rows: of all partitions. done: of complete ones, `before` of them complete at the start. errors: rows with an error.
        current: rows of partitions that are not complete yet, as far as known. partitions: how many, `complete` of them.
        first_error: that of the first row with one. failures: why partitions and tables failed.
    """

    rows: int = 0
    before: int = 0
    done: int = 0
    current: int = 0
    partitions: int = 0
    complete: int = 0
    errors: int = 0
    first_error: Mapping[str, Any] | None = None
    failures: list[MopefuseError] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def add(self, record: Record) -> None:
        """Count a complete partition."""
        self.done, self.complete, self.errors = self.done + record.rows, self.complete + 1, self.errors + record.errors
        self.current = max(0, self.current - record.rows)
        self.first_error = self.first_error or record.first_error

    @property
    def rate(self) -> float:
        """Rows per second since the start."""
        seen = min(self.rows - self.before, self.done - self.before + self.current)
        return seen / max(time.monotonic() - self.began, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """How long the rest will take at this rate; None if that is not known."""
        left = self.rows - self.done - self.current
        return max(left, 0) / self.rate if self.rate > 0 else None

    def summary(self) -> dict[str, Any]:
        """The numbers, for machines."""
        rate = (self.done - self.before) / max(time.monotonic() - self.began, 1e-9)
        return {
            "rows": self.done,
            "rows_with_error": self.errors,
            "rows_before": self.before,
            "partitions": self.complete,
            "seconds": round(time.monotonic() - self.began, 3),
            "rows_per_second": round(rate, 2),
        }


def start(
    source: ModelSource, computer: Computer, settings: BatchSettings, on_progress: Callable[[Progress], None]
) -> dict[str, Any]:
    """Predict what is not complete in the output folder yet, and return a summary.

    Args:
        source, computer: the model, and the same loaded on the CPU, for what is known of it.
        on_progress: called often.

    Raises:
        ConfigError: the output folder has something else, or predictions with other settings.
        DataError: a table or a partition cannot be read (the others are complete then), or no row can.
        ResourceError: a partition killed its workers, or the output cannot be written. Interrupted: by a signal.
    """
    files = settings.files
    form = settings.format or ("parquet" if all(file.suffix == ".parquet" for file in files) else "jsonl")
    if form == "parquet" or any(file.suffix == ".parquet" for file in files):
        require("pyarrow", extra="parquet", what="Parquet")
    model = computer.predictor.model
    if form == "parquet":
        schema_of(model.task, model.labels)
    output = Output(settings.out, form, model.task, model.labels)
    job = _job(source, computer, output, settings)
    facts = _facts(source, computer, settings, form)
    old = output.read_plan()
    if old is not None and settings.overwrite and _differs(old, files, facts, settings.out):
        output.clear(old)
        old = None
    if old is not None:
        check_same(old, files, facts, settings.out)
    plan = make_plan(files, facts, settings.rows, job.reader.columns(), job.reader.config, old)
    if old is None or old.as_json() != plan.as_json():
        output.write_plan(plan)
    if old is not None:
        output.remove({partition.name for partition in old.partitions} - {partition.name for partition in plan.partitions})
    progress = Progress(plan.rows, partitions=len(plan.partitions), failures=[*plan.problems.values()])
    for record in (complete := output.complete(plan)):
        progress.add(record)
    progress.before, progress.began = progress.done, time.monotonic()
    _predict(job, computer, plan, {record.name for record in complete}, settings, progress, on_progress)
    return _finish(output, plan, settings, progress)


def _differs(old: Plan, files: Sequence[InputFile], facts: Mapping[str, Any], where: str) -> bool:
    try:
        check_same(old, files, facts, where)
    except ConfigError:
        return True
    return False


def _job(source: ModelSource, computer: Computer, output: Output, settings: BatchSettings) -> Job:
    """What workers need.

    Raises:
        ConfigError: masks cannot be written there.
    """
    model, gallery = computer.predictor.model, source.gallery
    has_masks = model.task.label_kind == "mask"
    if has_masks and (settings.engine != "local" or not output.is_local):
        what = "masks are files, which only --engine local writes, to a local folder"
        raise ConfigError(ConfigCode.BATCH_OPTION, what, where="predict", fix="use --engine local and a local --out")
    if gallery is not None:  # the values of queries only
        reader = Reader(source.config, (gallery[2],), (), False, source.batch)
    else:
        reader = Reader(source.config, model.modalities, model.optional_modalities, model.empty_is_missing, source.batch)
    return Job(reader, source, output, prepares=not has_masks and gallery is None, writes_masks=has_masks)


def _facts(source: ModelSource, computer: Computer, settings: BatchSettings, form: str) -> dict[str, Any]:
    """The settings of the plan: what predictions depend on, besides the inputs."""
    model = computer.predictor.model
    columns = source.config.model_dump(
        mode="json", include={"text_col", "img_col", "id_col", "columns", "allow_missing_text", "max_pixels", "image_roots"}
    )
    facts = {
        "model": cache.make_key(model.digest, model.labels, list(model.thresholds), json.dumps(model.task.facts())),
        "gallery": None if source.gallery is None else [*source.gallery, computer.gallery_digest],
        "columns": columns,
        "batch": source.batch,
        "top": source.top,
        "routing": source.routing,
        "format": form,
        "partition_rows": settings.rows,
        "version": __version__,
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def _predict(
    job: Job,
    computer: Computer,
    plan: Plan,
    complete: set[str],
    settings: BatchSettings,
    progress: Progress,
    report: Callable[[Progress], None],
) -> None:
    """Predict the partitions that are not complete.

    Raises:
        Interrupted: by a signal. MopefuseError: the model cannot be loaded.
    """
    missing = [partition for partition in plan.partitions if partition.name not in complete]
    report(progress)
    if not missing:
        return
    job.output.remove_success()

    def on_rows(count: int) -> None:
        progress.current += count
        report(progress)

    with StopRequest() as stop:
        if settings.engine == "ray":
            from mopefuse.inference.batch import ray_data

            outcomes = ray_data.run(
                job, computer, missing, settings.workers, settings.device, settings.ray_address, stop
            )
        else:
            devices = local.devices_for(settings.device, settings.workers)
            outcomes = local.run(job, missing, devices, stop, on_rows)
        for outcome in outcomes:
            if isinstance(outcome, Record):
                progress.add(outcome)
            else:
                progress.failures.append(outcome[1])
                plan.note_problem(*outcome)
            report(progress)
        if stop.signal_number:
            name = "Ctrl-C" if stop.signal_number == 2 else "SIGTERM"
            what = f"by {name} with {progress.complete:,} of {several(progress.partitions, 'partition')} complete"
            raise Interrupted(stop.signal_number, what, fix="run the same command again to continue")


def _finish(output: Output, plan: Plan, settings: BatchSettings, progress: Progress) -> dict[str, Any]:
    """Write the file that says that everything is complete, unless something failed.

    Raises:
        MopefuseError: see `start`.
    """
    summary = {**progress.summary(), "inputs": len(plan.files), "format": output.format, "out": settings.out}
    if progress.failures:
        output.write_plan(plan)  # with the problems: these tables may be replaced
        first = progress.failures[0]
        count = several(len(progress.failures), "table or partition", "tables or partitions")
        what = f"{count} could not be predicted, and {several(progress.complete, 'partition')} could; the first: {first.what}"
        error = error_from_dict({**first.as_dict(), "message": what})
        error.fix = f"{first.fix}; complete partitions are kept"
        raise error
    if progress.first_error is not None and progress.errors == plan.rows:
        what = f"could not read any of {several(plan.rows, 'row')}; first error: {progress.first_error['message']}"
        fix = str(progress.first_error.get("hint") or "pass tables of rows")
        raise DataError(DataCode.NO_ROW_READABLE, what, where=settings.out, fix=fix)
    if missing := output.missing(plan):
        what = f"{several(len(missing), 'partition')} missing from the output, such as {missing[0]}"
        raise ResourceError(ResourceCode.OTHER_PROCESS_FAILED, what, where=settings.out, fix="run the same command again")
    output.write_success(summary)
    return {**summary, "first_error": progress.first_error}
