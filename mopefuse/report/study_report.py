"""One page about a study: metrics, their uncertainty, cost, and missing runs. No model is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopefuse.report import study_page
from mopefuse.report.chart import require_charts
from mopefuse.report.pages import check_places, save_charts, write
from mopefuse.report.study_data import StudyFacts
from mopefuse.studies.compare import Comparison, compare, has_result, study_facts
from mopefuse.studies.study_file import STUDY_FILE


@dataclass(frozen=True)
class StudyReported:
    """The page that was written about a study, and its comparison."""

    page: Path
    figures: tuple[Path, ...]
    runs: int
    missing: int
    comparison: Comparison | None
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``, without the comparison."""
        facts = {"page": str(self.page), "bytes": self.page.stat().st_size, "figures": [str(path) for path in self.figures]}
        return {**facts, "runs": self.runs, "missing": self.missing, "notes": list(self.notes)}


def is_study(folder: Path) -> bool:
    """Whether a folder is that of a study."""
    return (folder / STUDY_FILE).is_file()


def report_study(
    study: Path, *, out: Path | None = None, figures: Path | None = None, against: str | None = None, metric: str | None = None
) -> StudyReported:
    """Write the page of a study, from the files of its runs alone; it lists unfinished runs.

    Args:
        out: file of the page; ``report.html`` in the study. figures: a folder for the page's figures, as SVG and PNG.
        against, metric: as in `mopefuse.studies.compare.compare`.

    Raises:
        CheckpointError: damaged files. ConfigError: runs that cannot be compared, an unknown label or metric, or `figures`
            is not a folder. DataError: the page would overwrite another file.
    """
    require_charts("mopefuse report")
    page = out or study / "report.html"
    known = study_facts(study)
    check_places(page, None, figures)
    done = any(has_result(study, cell) for cell in known["cells"])
    comparison = compare([study], against=against, metric=metric, allow_unfinished=True) if done else None
    facts = StudyFacts(study, known, comparison)
    parts = study_page.sections(facts)
    write(page, study_page.study_page(facts, parts))
    files = save_charts(parts, figures)
    return StudyReported(page, files, len(facts.cells), facts.unfinished, comparison, tuple(study_page.remarks(facts)))
