"""The contents of the page of a study: study.json, the logs of its runs, and their comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mopefuse.config.schema import RunConfig
from mopefuse.runs.folder import RunFolder
from mopefuse.studies.compare import Comparison, Row, Spread, has_result

_NOT_YET = {
    "waiting": "not begun",
    "running": "running when study.json was last written, or killed since",
    "stopped": "interrupted",
    "finished": "finished, but its folder has been deleted",
}
_AGAIN = "run mopefuse study again"


@dataclass(frozen=True)
class Missing:
    """Runs of a row that have no result, all for one reason."""

    label: str
    seeds: tuple[Any, ...]
    state: str
    why: str
    fix: str


@dataclass(frozen=True)
class StudyFacts:
    """A study.

    Args:
        study: content of study.json. comparison: comparison of the finished runs; None if no run is finished.
    """

    folder: Path
    study: Mapping[str, Any]
    comparison: Comparison | None

    @property
    def name(self) -> str:
        """Name of the study."""
        return str(self.study.get("name") or self.folder.resolve().name)

    @property
    def cells(self) -> Sequence[dict[str, Any]]:
        """Runs of the study, finished or not."""
        found: Sequence[dict[str, Any]] = self.study["cells"]
        return found

    @cached_property
    def missing(self) -> tuple[Missing, ...]:
        """Runs without a result; those of one row with the same state and reason are grouped."""
        groups: dict[tuple[str, str, str, str], list[Any]] = {}
        for cell in self.cells:
            if not has_result(self.folder, cell):
                groups.setdefault((cell["label"], cell["state"], *self._reason(cell)), []).append(cell.get("seed"))
        return tuple(Missing(label, tuple(seeds), state, why, fix) for (label, state, why, fix), seeds in groups.items())

    @property
    def unfinished(self) -> int:
        """How many runs have no result."""
        return sum(len(group.seeds) for group in self.missing)

    def _reason(self, cell: dict[str, Any]) -> tuple[str, str]:
        error = cell.get("error") or {}
        if cell["state"] == "failed":
            what = " ".join(str(error[key]) for key in ("code", "message") if error.get(key)) or "it failed"
            return what, str(error.get("hint") or _AGAIN)
        log = RunFolder(self.folder / cell["run"]).read_log()
        reached = f", at step {log[-1]['step']:,}" if log else ""
        return _NOT_YET.get(cell["state"], cell["state"]) + reached, _AGAIN

    def score(self, row: Row) -> Spread:
        """The metric that is compared, on the test split."""
        assert self.comparison is not None
        return row.metrics["test"][self.comparison.metric]

    def learning(self, row: Row) -> list[tuple[int, Spread]]:
        """The metric on validation at each step at which all runs of a row were validated."""
        assert self.comparison is not None
        found: dict[int, list[float]] = {}
        for path in row.runs:
            of_run = {line["step"]: (line.get("val") or {}).get(self.comparison.metric) for line in RunFolder(path).read_log()}
            for step, value in of_run.items():
                if isinstance(value, int | float):
                    found.setdefault(step, []).append(float(value))
        whole = {step: values for step, values in found.items() if len(values) == len(row.runs)}
        return [(step, Spread(tuple(values))) for step, values in sorted(whole.items())]

    @cached_property
    def started_rows(self) -> list[tuple[RunConfig, dict[str, str]]]:
        """The configuration, and the modality of each encoder, of the first run that was started of each row."""
        first: dict[str, tuple[RunConfig, dict[str, str]]] = {}
        for cell in self.cells:
            run = RunFolder(self.folder / cell["run"])
            if cell["label"] not in first and run.exists():
                encoders = run.manifest()["encoders"]
                modality_of = {side: encoder["modality"] for side, encoder in encoders.items() if encoder.get("modality")}
                first[cell["label"]] = run.config(), modality_of
        return list(first.values())
