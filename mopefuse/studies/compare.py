"""Compare runs: one row for all seeds of the same settings, every number read from the files of the runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mopefuse.core.artifact import read_json
from mopefuse.core.error_codes import CheckpointCode, ConfigCode
from mopefuse.errors import CheckpointError, ConfigError, did_you_mean
from mopefuse.metrics.bootstrap import Difference, difference
from mopefuse.metrics.names import LOWER_IS_BETTER
from mopefuse.runs.folder import RunFolder
from mopefuse.studies.finished_runs import (
    FinishedRun,
    group_by_settings,
    read_finished,
    read_outcome,
    require_same_test,
    sample_ids,
    select_finished,
    select_same_data,
)
from mopefuse.studies.study_file import KIND, STUDY_FILE, unknown_label
from mopefuse.tasks.base import all_metrics


@dataclass(frozen=True)
class Spread:
    """The values of one number in several runs."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return sum(self.values) / len(self.values)

    @property
    def std(self) -> float | None:
        """The sample standard deviation (n - 1); None for a single value."""
        if len(set(self.values)) == 1 < len(self.values):
            return 0.0  # exactly 0, even if the mean was rounded
        squares = sum((value - self.mean) ** 2 for value in self.values)
        return math.sqrt(squares / (len(self.values) - 1)) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only.

    Args:
        settings: settings that are not the same in all rows, by path.
        metrics: values by split and metric.
        trainable, total: numbers of parameters.
        seconds: training time. peak_memory: in bytes, the largest of the runs.
        versus: difference of the compared metric on the test split; None in the row that others are compared with.
    """

    label: str
    runs: tuple[Path, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    metrics: dict[str, dict[str, Spread]]
    trainable: int
    total: int
    seconds: Spread
    peak_memory: int
    versus: Difference | None = None


@dataclass(frozen=True)
class Comparison:
    """Rows in their order.

    Args:
        metric: the metric by which rows are compared. against: label of the row that others are compared with.
        samples: samples of the test split.
        chosen: for a search, the label of the row with the best validation metric, "" if there is none; None for other studies.
    """

    rows: tuple[Row, ...]
    metric: str
    against: str | None
    samples: int
    notices: tuple[str, ...] = ()
    chosen: str | None = None

    @property
    def metrics(self) -> list[str]:
        """The metrics that the runs have, in their order."""
        return [name for name in all_metrics() if name in self.rows[0].metrics["test"]]

    def best(self, split: str, metric: str) -> set[str]:
        """Labels of the rows with the best mean; of a search, of the row that validation chose."""
        if self.chosen is not None:
            return {self.chosen}
        means = {row.label: row.metrics[split][metric].mean for row in self.rows}
        choose: Any = min if metric in LOWER_IS_BETTER else max
        best = choose((mean for mean in means.values() if not math.isnan(mean)), default=math.nan)
        return {label for label, mean in means.items() if mean == best}


class _Groups(NamedTuple):
    """Label and runs of each row to compare, and of a study, the entries of study.json."""

    rows: list[tuple[str, list[FinishedRun]]]
    notices: list[str]
    metric: str | None = None
    baseline: str | None = None
    search: dict[str, Any] | None = None


def compare(
    paths: Sequence[Path], *, against: str | None = None, metric: str | None = None, allow_unfinished: bool = False
) -> Comparison:
    """Compare runs, or the finished cells of one study.

    Rows of a study have the labels of its cells; rows of other runs are named by their folders, without the seed.

    Args:
        against: label of the row (or path of a run in it) that significance is computed against, see
            `mopefuse.metrics.bootstrap.difference`; default the study's baseline.
        metric: the metric to compare by; default the study's, else accuracy, or macro-F1 of multi-label data.
        allow_unfinished: leave out unfinished and failed cells of a study without an error or a notice.

    Of several folders, those that are not a finished run, or that repeat another one, are left out, with a notice. So are
    runs that were tested on other data than most, or than the run `against`.

    Raises:
        CheckpointError: no such run or study, or damaged files.
        ConfigError: no run is finished, runs were tested on different data, or an unknown label or metric.
    """
    folders = [Path(path) for path in paths]
    groups = _read_groups(folders, against, allow_unfinished=allow_unfinished)
    notices = list(groups.notices)
    if against is None and groups.baseline is not None:
        if groups.baseline in dict(groups.rows):
            against = groups.baseline
        else:
            notices.append(f"no row is compared with {groups.baseline}: none of its runs is finished")
    runs = [run for _, group in groups.rows for run in group]
    if not runs:
        raise ConfigError(
            ConfigCode.NOTHING_TO_COMPARE,
            "no run is finished",
            where=", ".join(map(str, folders)),
            fix="pass folders of finished runs",
        )
    require_same_test(runs)
    if metric is None:
        metric = groups.metric or runs[0].task.metric
    known = [name for name in all_metrics() if name in runs[0].result["metrics"]["test"]]
    if metric not in known:
        raise ConfigError(
            ConfigCode.UNKNOWN_COMPARISON_METRIC,
            f"these runs have no metric {metric!r}",
            where="--metric",
            fix=did_you_mean(metric, known),
        )
    comparison = Comparison(
        rows=tuple(_row(label, group, runs) for label, group in groups.rows),
        metric=metric,
        against=None,
        samples=int(runs[0].result["rows"]["test"]),
        notices=tuple(notices),
        chosen=(groups.search.get("best") or "") if groups.search else None,
    )
    return _compare_with(comparison, dict(groups.rows), against, metric) if against is not None else comparison


def _read_groups(folders: Sequence[Path], against: str | None, *, allow_unfinished: bool) -> _Groups:
    studies = [folder for folder in folders if (folder / STUDY_FILE).is_file()]
    if studies and len(folders) > 1:
        what = "a study cannot be compared with other runs or studies"
        raise ConfigError(ConfigCode.NOTHING_TO_COMPARE, what, where=str(studies[0]), fix="pass one study, or runs")
    if not studies:
        named, notices = select_finished(dict.fromkeys(folders))
        named, elsewhere = select_same_data(named, against)
        rows, repeated = group_by_settings(read_finished(named))
        return _Groups(rows, notices + elsewhere + repeated)
    facts = study_facts(studies[0])
    rows, notices = _study_rows(studies[0], facts, allow_unfinished=allow_unfinished)
    search = facts.get("search")
    if search:
        notices.append(_search_notice(search))
    return _Groups(
        rows=rows, notices=notices, metric=facts.get("metric"), baseline=facts.get("baseline"), search=search
    )


def _compare_with(
    comparison: Comparison, groups: dict[str, list[FinishedRun]], against: str, metric: str
) -> Comparison:
    """Add the differences of all rows from the row `against`, a label or the path of one of its runs."""
    labels = [row.label for row in comparison.rows]
    baseline = next((row.label for row in comparison.rows if Path(against) in row.runs), against)
    if baseline not in labels:
        raise unknown_label(against, labels, "--against")
    ids = sample_ids(groups[baseline][0])
    outcomes = {label: [read_outcome(run, ids) for run in group] for label, group in groups.items()}
    rows = [
        row if row.label == baseline else replace(row, versus=difference(outcomes[row.label], outcomes[baseline], metric))
        for row in comparison.rows
    ]
    return replace(comparison, rows=tuple(rows), against=baseline)


def _row(label: str, group: Sequence[FinishedRun], all_runs: Sequence[FinishedRun]) -> Row:
    first = group[0]
    differing = [key for key, value in first.identity.items() if any(run.identity.get(key) != value for run in all_runs)]
    return Row(
        label=label,
        runs=tuple(run.path for run in group),
        seeds=tuple(run.seed for run in group),
        settings={key: first.identity[key] for key in differing},
        metrics={split: _spreads(group, split) for split in ("val", "test")},
        trainable=first.result["parameters"]["trainable"],
        total=first.result["parameters"]["total"],
        seconds=Spread(tuple(run.result["seconds"] for run in group)),
        peak_memory=max(run.result["peak_memory_bytes"] for run in group),
    )


def _spreads(group: Sequence[FinishedRun], split: str) -> dict[str, Spread]:
    found = [run.result["metrics"][split] or {} for run in group]
    names = [name for name in all_metrics() if all(name in metrics for metrics in found)]
    return {
        name: Spread(tuple(math.nan if metrics[name] is None else metrics[name] for metrics in found)) for name in names
    }


# -- study.json


def study_facts(folder: Path) -> dict[str, Any]:
    """Read study.json and check its cells.

    Raises:
        CheckpointError: it is damaged.
    """
    facts = read_json(folder / STUDY_FILE)
    cells = facts.get("cells")
    if facts.get("kind") != KIND or not isinstance(cells, list) or not cells or not all(map(_is_cell, cells)):
        raise CheckpointError(
            CheckpointCode.CONTENT_DAMAGED,
            f"{STUDY_FILE} is damaged",
            where=str(folder),
            fix="run mopefuse study again with this --out",
        )
    return facts


def _is_cell(cell: Any) -> bool:
    if not isinstance(cell, dict) or not all(isinstance(cell.get(key), str) for key in ("label", "run", "state")):
        return False
    return all(isinstance(cell.get(key) or {}, dict) for key in ("settings", "error"))


def has_result(folder: Path, cell: dict[str, Any]) -> bool:
    """Whether a cell of a study is finished.

    Args:
        folder: folder of the study. cell: its entry in study.json.
    """
    return cell["state"] != "failed" and RunFolder(folder / cell["run"]).metrics_file.is_file()


def _search_notice(search: dict[str, Any]) -> str:
    best = search.get("best")
    chosen = f"validation chose {best}" if best else "none is chosen yet"
    return f"rows are trials of a search: {chosen}; choosing on the test split would make the test metrics too optimistic"


def _study_rows(
    folder: Path, facts: dict[str, Any], *, allow_unfinished: bool
) -> tuple[list[tuple[str, list[FinishedRun]]], list[str]]:
    """Label and finished runs of each row, and a notice for each cell that failed; no notices with `allow_unfinished`."""
    failed = [cell for cell in facts["cells"] if cell["state"] == "failed"]
    notices = [
        f"left out: {cell['label']}, seed {cell.get('seed')}: {(cell.get('error') or {}).get('message', 'failed')}"
        for cell in failed
    ]
    used = [cell for cell in facts["cells"] if (has_result(folder, cell) if allow_unfinished else cell not in failed)]
    named = [(f"{cell['label']}, seed {cell.get('seed')}", folder / cell["run"]) for cell in used]
    runs = {run.path: run for run in read_finished(named)}
    rows: dict[str, list[FinishedRun]] = {}
    for cell in used:
        rows.setdefault(cell["label"], []).append(runs[folder / cell["run"]])
    return list(rows.items()), [] if allow_unfinished else notices
