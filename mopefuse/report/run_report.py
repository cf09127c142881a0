"""One page about a run: its settings, training curves and predictions, and what the predictions depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mopefuse.core.error_codes import CheckpointCode
from mopefuse.errors import CheckpointError
from mopefuse.evaluation.audit import Audit, audit_model, subsample
from mopefuse.evaluation.missing_modalities import saved_missing
from mopefuse.evaluation.split import run_split
from mopefuse.report.baselines import find_baselines
from mopefuse.report.chart import require_charts
from mopefuse.report.pages import check_places, save_charts, write
from mopefuse.report.run_data import RunFacts
from mopefuse.report.run_page import run_page, sections
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.load import OpenRun, open_run
from mopefuse.runs.locate import find_run, get_kind, locate
from mopefuse.training.plan import resolve_defaults

Advance = Callable[[str, int, int], None]  # (what, samples done, samples in all)
PAGE = "report.html"
MAX_PROBABILITIES = 25_000_000
"""Maximum number of probabilities (samples times labels) that a page covers; larger splits are subsampled."""


@dataclass(frozen=True)
class Reported:
    """The page that was written, and its main numbers."""

    page: Path
    figures: tuple[Path, ...]
    split: str
    step: int
    metrics: dict[str, float]
    calibration_error: float | None  # of a classifier
    audit: Audit | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "page": str(self.page),
            "bytes": self.page.stat().st_size,
            "figures": [str(path) for path in self.figures],
            "split": self.split,
            "step": self.step,
            "metrics": self.metrics,
            "calibration_error": self.calibration_error,
            "audit": self.audit.as_dict() if self.audit else None,
            "notes": list(self.notes),
        }


def report(
    run: Path,
    *,
    out: Path | None = None,
    figures: Path | None = None,
    device: str = "auto",
    data: Path | None = None,
    audit: bool = True,
    advance: Advance = lambda what, done, total: None,
) -> Reported:
    """Write the page of a run: of its selected checkpoint, on the test split, or on validation if there is none.

    Args:
        out: file of the page; ``report.html`` in the run. figures: a folder for the page's charts, as SVG and PNG.
        data: the current location of the run's data. audit: whether to also evaluate the model without inputs and prompts.

    Raises:
        CheckpointError: no run, an adapter or a bundle, or no checkpoint yet. DataError: the data are not there any more, or
            the page would overwrite another file. ConfigError: `figures` is not a folder. PackageError: the extra
            `report` is not installed.
    """
    require_charts("mopefuse report")
    folder, page = _run_of(run), out or run / PAGE
    check_places(page, data or Path(folder.config().data.path or ""), figures)
    opened = open_run(run, split=None, data=data, checkpoint=_checkpoint(folder), device=device)
    dataset, split, step = opened.data, opened.split, opened.step or 0
    notes = _notes(opened, audited=audit)
    most, total = max(1, MAX_PROBABILITIES // len(dataset.labels)), len(dataset.splits[split].rows)
    if total > most:
        dataset, _ = subsample(dataset, split, most, seed=0)
        part = f"This page shows {most:,} of {total:,} samples, drawn at random; mopefuse eval reports the metrics of all."
        notes = (*notes, part)
    facts, found = _facts(replace(opened, data=dataset), audit=audit, notes=notes, advance=advance)
    facts = replace(facts, path=str(run))
    parts = sections(facts)
    write(page, run_page(facts, parts))
    files = save_charts(parts, figures)
    return Reported(page, files, split, step, facts.metrics, facts.calibration_error, found, facts.notes)


def _facts(
    opened: OpenRun, *, audit: bool, notes: tuple[str, ...], advance: Advance
) -> tuple[RunFacts, Audit | None]:
    """The contents of the page: the predictions of the model, and the audit if one is requested."""
    data, split, step, folder = opened.data, opened.split, opened.step or 0, opened.folder
    predicting = lambda done, total: advance(f"predicting {split}", done, total)  # noqa: E731
    outputs = run_split(opened.model, data, split, opened.config, opened.device, with_routing=True, advance=predicting)
    found = None
    if audit:
        found = audit_model(
            opened.model,
            data,
            split,
            opened.config,
            opened.device,
            thresholds=opened.thresholds,
            as_is_SN=outputs.logits_SN,
            advance=lambda name, done, total: advance(f"audit, {name}", done, total),
        )
    facts = RunFacts(
        name=folder.path.resolve().name,
        step=step,
        config=opened.config,
        manifest=opened.manifest,
        result=folder.result(),
        log=folder.read_log(),
        data=data,
        split=split,
        logits_SN=outputs.logits_SN,
        thresholds=opened.thresholds,
        routing_SLK=outputs.routing_SLK,
        audit=found.as_dict() if found else None,
        missing=saved_missing(folder.path, split, step),
        notes=notes,
        baselines=find_baselines(folder, split, data.task.metric),
        derive=lambda config: resolve_defaults(config, opened.model),
    )
    return facts, found


def _run_of(run: Path) -> RunFolder:
    """The folder of a run with a checkpoint.

    Raises:
        CheckpointError: it is something else.
    """
    kind = get_kind(locate(run))
    if kind in ("adapter", "bundle"):
        what = f"{run} is {'an adapter' if kind == 'adapter' else 'a bundle'}, which has neither a log nor data"
        raise CheckpointError(CheckpointCode.NO_TRAINING_LOG, what, fix="pass the run that it was exported from")
    folder = find_run(run)
    folder.config()
    if not folder.steps():
        raise CheckpointError(
            CheckpointCode.NO_CHECKPOINT_YET,
            "the run has no checkpoint yet",
            where=str(run),
            fix="continue with mopefuse train --resume",
        )
    return folder


def _checkpoint(folder: RunFolder) -> str:
    """The checkpoint that makes a run's predictions: the selected one, or the last if none was validated yet."""
    return "best" if folder.best_step() is not None and folder.config().train.select == "best" else "last"


def _notes(opened: OpenRun, *, audited: bool) -> tuple[str, ...]:
    folder, split, step = opened.folder, opened.split, opened.step or 0
    found = folder.result().get("fit")  # of a run that mopefuse fit chose
    notes = [found["headline"]] if isinstance(found, dict) and isinstance(found.get("headline"), str) else []
    if not folder.result():
        notes.append(
            f"This run is not finished: the page shows step {step:,}, without time, memory and parameter counts. "
            "Continue with mopefuse train --resume."
        )
    if split != "test":
        notes.append(
            "There is no test split: all numbers are from validation, which also selected the step, so they are optimistic."
        )
    if opened.changed_splits(split):
        notes.append(f"The {split} data have changed since the run was trained.")
    if not audited:
        notes.append("The audit was skipped, so this page does not show whether the model uses the other modality.")
    return tuple(notes)
