"""``mopefuse predict --engine``: many tables into a folder of files."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from mopefuse.cli.settings import Settings, data_section
from mopefuse.core.error_codes import ConfigCode

if TYPE_CHECKING:
    from mopefuse.inference.batch.run import Progress

_PANEL = "Many tables"
_EVERY = 30.0  # seconds between lines of progress that are not on a terminal

Inputs = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="INPUT",
        help="Table of new rows (.jsonl, .csv, ...), or - for stdin. With --engine, tables, folders, patterns or URLs.",
    ),
]
Out = Annotated[
    str | None,
    typer.Option(
        "--out", "-o", metavar="FILE", help="File to write, .jsonl or .csv. Default: stdout. With --engine, a folder or URL."
    ),
]
Engine = Annotated[
    str | None,
    typer.Option(
        metavar="local|ray", help="Predict many tables into a folder; the same command continues.", rich_help_panel=_PANEL
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(min=1, max=100_000, help="Processes with the model. Default: one per GPU, or one.", rich_help_panel=_PANEL),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="jsonl|parquet", help="Of the files. Default: Parquet if all inputs are.", rich_help_panel=_PANEL
    ),
]
PartitionRows = Annotated[
    int | None,
    typer.Option(min=1, max=10**9, help="Rows of an output file, at most. Default: 10240.", rich_help_panel=_PANEL),
]
RayAddress = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Ray cluster. Default: one on this machine.", rich_help_panel=_PANEL)
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace predictions of another model, settings or inputs.", rich_help_panel=_PANEL),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the summary as one JSON object on stdout.", rich_help_panel=_PANEL)
]


class ModelOptions(NamedTuple):
    """Which model to use, and how; see the flags of the same names."""

    run: str
    checkpoint: str
    device: str
    main: str | None
    comp: list[str] | None
    top: int | None
    routing: bool
    batch: int
    gallery: Path | None
    gallery_of: str | None
    rerank: Path | None


class BatchOptions(NamedTuple):
    """What to predict, and where; see the flags of the same names."""

    engine: str | None
    inputs: list[str]
    out: str | None
    workers: int | None
    form: str | None
    partition_rows: int | None
    ray_address: str | None
    overwrite: bool
    as_json: bool

    def are_given(self) -> bool:
        """Whether many tables are to be predicted.

        Raises:
            ConfigError: something needs ``--engine``, and it is not given.
        """
        if self.engine is not None:
            return True
        flags = {"--workers": self.workers, "--format": self.form, "--partition-rows": self.partition_rows}
        flags |= {"--ray-address": self.ray_address, "--overwrite": self.overwrite, "--json": self.as_json}
        given = [name for name, value in flags.items() if value]
        if given:
            raise _error(f"{given[0]} is for many tables", given[0], "add --engine local, or remove the flag")
        urls = [text for text in (*self.inputs, self.out or "") if "://" in text]
        if len(self.inputs) > 1 or urls or any(_has_pattern(text) for text in self.inputs):
            pattern = next((f"{text} is a pattern" for text in self.inputs if _has_pattern(text)), "there are several tables")
            what = f"{urls[0]} is a URL" if urls else f"{pattern}; predictions of several tables are written to a folder"
            raise _error(what, "predict", "add --engine local, and a folder as --out")
        return False

    def refuse(self, single: Mapping[str, Any]) -> None:
        """Refuse combinations that have no meaning.

        Args:
            single: flags that are for a single table or row.

        Raises:
            ConfigError: there is one.
        """
        from mopefuse.inference.batch.output import FORMATS
        from mopefuse.inference.batch.run import ENGINES

        for name, value in single.items():
            if value:
                raise _error(f"{name} cannot be combined with --engine", name, f"remove {name}, or --engine")
        for flag, value, known in (("--engine", self.engine, ENGINES), ("--format", self.form, FORMATS)):
            if value is not None and value not in known:
                raise _error(f"unknown value {value!r}", flag, f"use {' or '.join(known)}")
        if not self.inputs or "-" in self.inputs:
            raise _error("--engine needs tables", "predict", "pass tables, folders, patterns or URLs; - has no --engine")
        if self.out is None:
            raise _error("--engine writes a folder, and none was given", "--out", "add --out FOLDER")
        if Path(self.out).is_file() or self.out.endswith((".jsonl", ".csv", ".parquet")):
            raise _error(f"{self.out} is not a folder", "--out", "pass a folder, in which there will be several files")
        if self.ray_address is not None and self.engine != "ray":
            raise _error("--ray-address is for --engine ray", "--ray-address", "add --engine ray")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise _error("--engine starts its own processes", "predict", "start it without torchrun, with --workers")


def _has_pattern(text: str) -> bool:
    return any(character in text for character in "*?[{") and not Path(text).exists()


def _error(what: str, where: str, fix: str) -> Exception:
    from mopefuse.errors import ConfigError

    return ConfigError(ConfigCode.BATCH_OPTION, what, where=where, fix=fix)


def predict_tables(options: BatchOptions, how: ModelOptions, settings: Settings) -> None:
    """Predict many tables; prints progress and a summary.

    Raises:
        MopefuseError: see `mopefuse.inference.batch.run.start`.
    """
    from mopefuse.cli._gallery import find_gallery
    from mopefuse.cli._render import err, print_json
    from mopefuse.inference.batch.inputs import list_files
    from mopefuse.inference.batch.job import Computer, ModelSource
    from mopefuse.inference.batch.run import ROWS, BatchSettings, start
    from mopefuse.inference.predict import input_settings, load

    if options.engine == "ray":
        from mopefuse.inference.batch import ray_data

        ray_data.require_ray()
    files = list_files(options.inputs)
    predictor = load(how.run, checkpoint=how.checkpoint, device="cpu", main=how.main, comp=how.comp)
    config = input_settings(how.run, data_section(settings))
    config = config.model_copy(update={"image_roots": tuple(str(Path(root).absolute()) for root in config.image_roots)})
    found, query = find_gallery(predictor, how.gallery, how.gallery_of, [], config, how.batch)
    gallery = None if found is None or query is None else (str(Path(how.gallery or "").absolute()), found.modality, query)
    run = how.run if "://" in how.run or not Path(how.run).exists() else str(Path(how.run).absolute())
    source = ModelSource(run, how.checkpoint, how.main, how.comp, how.top, how.routing, how.batch, config, gallery)
    batch = BatchSettings(
        files,
        str(options.out),
        engine=str(options.engine),
        workers=options.workers,
        format=options.form,
        rows=options.partition_rows or ROWS,
        overwrite=options.overwrite,
        ray_address=options.ray_address,
        device=how.device,
    )
    with err().status("planning") as status:
        summary = start(source, Computer(predictor, source), batch, _Display(status))
    if options.as_json:
        print_json({"ok": True, **summary})
        return
    err().print(_summary_line(summary), markup=False)


def _summary_line(summary: Mapping[str, Any]) -> str:
    from mopefuse.core.formatting import duration, several

    text = f"{several(summary['rows'], 'row')} in {several(summary['partitions'], 'file')} of {summary['out']}"
    if summary["rows_before"]:
        text += f", {summary['rows_before']:,} of them before"
    if summary["rows"] > summary["rows_before"]:
        text += f"; {summary['rows_per_second']:,} rows per second, {duration(summary['seconds'])}"
    if summary["first_error"] is not None:
        count, first = summary["rows_with_error"], summary["first_error"]["message"]
        text += f"; {count:,} could not be read (see the field error); first error: {first}"
    return text


class _Display:
    """Shows progress: on a terminal all the time, else as a line now and then."""

    def __init__(self, status: Any) -> None:
        self._status, self._printed, self._updated = status, time.monotonic(), 0.0

    def __call__(self, progress: Progress) -> None:
        from mopefuse.core.formatting import duration

        now = time.monotonic()
        if now - self._updated < 0.2:
            return
        self._updated = now
        left = "" if progress.seconds_left is None else f", {duration(progress.seconds_left)} left"
        text = f"{progress.done + progress.current:,} of {progress.rows:,} rows, {progress.rate:,.1f} per second{left}"
        text += f", {progress.errors:,} with an error" if progress.errors else ""
        text += f", {len(progress.failures):,} tables or partitions failed" if progress.failures else ""
        self._status.update(text)
        if not sys.stderr.isatty() and now - self._printed > _EVERY:
            self._printed = now
            print(text, file=sys.stderr, flush=True)
