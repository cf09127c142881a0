"""The page of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mopefuse.report import (
    run_baselines,
    run_errors,
    run_masks,
    run_missing,
    run_overview,
    run_ranks,
    run_routing,
    run_training,
    run_values,
)
from mopefuse.report.pages import Section, sections_page
from mopefuse.report.run_data import RunFacts

_PREDICTIONS: dict[str, Callable[[RunFacts], Sequence[Section | None]]] = {
    "class": run_errors.sections,
    "number": run_values.sections,
    "mask": run_masks.sections,
    "pair": run_ranks.sections,
}
"""The sections on the predictions, by `Task.label_kind`."""


def sections(facts: RunFacts) -> list[Section]:
    """Everything on a run, in the order of the page."""
    found: Sequence[Section | None] = (
        run_baselines.baselines(facts),
        run_overview.audit(facts),
        run_missing.missing(facts),
        run_overview.task(facts),
        run_training.resources(facts),
        *_PREDICTIONS[facts.task.label_kind](facts),
        run_training.training(facts),
        *run_routing.sections(facts),
    )
    return [section for section in found if section is not None]


def run_page(facts: RunFacts, parts: Sequence[Section]) -> str:
    """The page, as HTML.

    Args:
        parts: from `sections`.
    """
    encoders = " and ".join(str(encoder.get("spec", "")) for encoder in facts.manifest["encoders"].values())
    summary = f"{facts.config.method} with {encoders}; predictions of step {facts.step:,} on {facts.split}"
    pill = facts.config.method
    return sections_page(facts.name, summary, run_overview.tiles(facts), parts, pill=pill, notes=facts.notes)
