"""Compare runs: one row for all seeds of the same settings, every number from the files of the runs."""

from __future__ import annotations

import io
import json
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_array

from mopefuse.core.artifact import read_json
from mopefuse.core.regular_files import open_regular
from mopefuse.errors import CheckpointError, ConfigError, did_you_mean
from mopefuse.metrics.bootstrap import Difference, Outcome, difference
from mopefuse.metrics.gates import METRICS, selected_metric
from mopefuse.runs.folder import RunFolder
from mopefuse.studies.study_file import KIND, STUDY_FILE, identity, unknown_label

_AGAIN = "write it again with mopefuse eval"


@dataclass(frozen=True)
class Spread:
    """A number of several runs."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return sum(self.values) / len(self.values)

    @property
    def std(self) -> float | None:
        """Their sample standard deviation (n - 1); None of a single one."""
        if len(set(self.values)) == 1 < len(self.values):
            return 0.0  # exactly, whatever the mean was rounded to
        squares = sum((value - self.mean) ** 2 for value in self.values)
        return math.sqrt(squares / (len(self.values) - 1)) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only.

    metrics: split to metric to its values. versus: on the test split, of the metric that is compared; None in the row that
    others are compared with. settings: by path, where rows differ.
    """

    label: str
    runs: tuple[Path, ...]
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    metrics: dict[str, dict[str, Spread]]
    trainable: int
    total: int
    seconds: Spread
    peak_memory: int  # bytes, the most of any run
    versus: Difference | None = None


@dataclass(frozen=True)
class Comparison:
    """A table of rows in their order."""

    rows: tuple[Row, ...]
    metric: str
    against: str | None
    samples: int  # of the test split
    notices: tuple[str, ...] = ()
    chosen: str | None = None  # of a search: the row that validation chose, which alone may stand out

    @property
    def metrics(self) -> list[str]:
        """Those that the runs have, in their order."""
        return [name for name in METRICS if name in self.rows[0].metrics["test"]]

    def best(self, split: str, metric: str) -> set[str]:
        """Labels of the rows with the highest mean; of a search, of the one that validation chose."""
        if self.chosen is not None:
            return {self.chosen}
        means = {row.label: row.metrics[split][metric].mean for row in self.rows}
        highest = max((mean for mean in means.values() if not math.isnan(mean)), default=math.nan)
        return {label for label, mean in means.items() if mean == highest}


@dataclass(frozen=True)
class _Run:
    """A finished run as its files say it is."""

    path: Path
    seed: int
    identity: dict[str, Any]
    data: dict[str, Any]  # hash of each split
    multi_label: bool
    labels: tuple[str, ...]
    result: dict[str, Any]


def compare(
    paths: Sequence[Path], *, against: str | None = None, metric: str | None = None, partly: bool = False
) -> Comparison:
    """A table of runs, or of the finished cells of one study.

    Rows of a study are its labels; rows of runs are named by their folders, without what numbers the seeds.

    Args:
        against: label of the row (or path of a run in it) that significance is computed against, see
            `mopefuse.metrics.bootstrap.difference`; default the study's baseline.
        metric: that is compared; default the study's, else accuracy, or macro-F1 of multi-label data.
        partly: whether cells that are not finished are left out of a study, in silence, as those that failed.

    Of several folders, those that are no run, not finished, or that repeat another one are left out, with a notice.

    Raises:
        CheckpointError: no such run or study, or damaged files.
        ConfigError: no run is finished, or they were tested on different data, an unknown label or metric.
    """
    folders = [Path(path) for path in paths]
    studies = [folder for folder in folders if (folder / STUDY_FILE).is_file()]
    if studies and len(folders) > 1:
        raise ConfigError(87, "a study is compared alone", where=str(studies[0]), fix="name one study, or runs")
    notices: list[str] = []
    search: dict[str, Any] | None = None
    if studies:
        facts = study_facts(studies[0])
        groups, failed = _cells(studies[0], facts, partly=partly)
        notices += failed
        search = facts.get("search")
        if search:
            notices.append(_not_to_choose_by(search))
        metric = metric or facts.get("metric")
        baseline = facts.get("baseline")
        if against is None and baseline is not None:
            there = baseline in dict(groups)
            against = baseline if there else None
            notices += [] if there else [f"nothing is compared with {baseline}: no run of it is finished"]
    else:
        named, notices = _with_result(dict.fromkeys(folders))
        groups, twins = _by_settings(_finished(named))
        notices += twins
    runs = [run for _, group in groups for run in group]
    if not runs:
        raise ConfigError(87, "no run is finished", where=", ".join(map(str, folders)), fix="name finished runs")
    _same_test(runs)
    if metric is None:
        metric = selected_metric(multi_label=runs[0].multi_label)
    known = [name for name in METRICS if name in runs[0].result["metrics"]["test"]]
    if metric not in known:
        raise ConfigError(86, f"these runs have no metric {metric!r}", where="--metric", fix=did_you_mean(metric, known))
    rows = tuple(_row(label, group, runs) for label, group in groups)
    samples = int(runs[0].result["rows"]["test"])
    chosen = (search.get("best") or "") if search else None
    comparison = Comparison(rows, metric, None, samples, tuple(notices), chosen)
    return _against(comparison, dict(groups), against, metric) if against is not None else comparison


def _against(comparison: Comparison, groups: dict[str, list[_Run]], against: str, metric: str) -> Comparison:
    labels = [row.label for row in comparison.rows]
    named = next((row.label for row in comparison.rows if Path(against) in row.runs), against)
    if named not in labels:
        raise unknown_label(against, labels, "--against")
    ids = _ids(groups[named][0])
    outcomes = {label: [_outcome(run, ids) for run in group] for label, group in groups.items()}
    rows = [
        row if row.label == named else replace(row, versus=difference(outcomes[row.label], outcomes[named], metric))
        for row in comparison.rows
    ]
    return replace(comparison, rows=tuple(rows), against=named)


# -- reading


def study_facts(folder: Path) -> dict[str, Any]:
    """What study.json says of a study and its cells.

    Raises:
        CheckpointError: it is damaged.
    """
    facts = read_json(folder / STUDY_FILE)
    cells = facts.get("cells")
    if facts.get("kind") != KIND or not isinstance(cells, list) or not cells or not all(map(_is_cell, cells)):
        raise CheckpointError(3, f"{STUDY_FILE} is damaged", where=str(folder), fix="run mopefuse study again with this --out")
    return facts


def _is_cell(cell: Any) -> bool:
    if not isinstance(cell, dict) or not all(isinstance(cell.get(key), str) for key in ("label", "run", "state")):
        return False
    return all(isinstance(cell.get(key) or {}, dict) for key in ("settings", "error"))


def has_result(folder: Path, cell: dict[str, Any]) -> bool:
    """Whether a cell of a study was run to its end."""
    return cell["state"] != "failed" and RunFolder(folder / cell["run"]).metrics_file.is_file()


def _not_to_choose_by(search: dict[str, Any]) -> str:
    """What the rows of a search are not for."""
    best = search.get("best")
    chosen = f"its choice, on validation, is {best}" if best else "none is chosen yet"
    return f"rows are trials of a search: {chosen}; to choose by the test split would spoil the test"


def _cells(folder: Path, facts: dict[str, Any], *, partly: bool) -> tuple[list[tuple[str, list[_Run]]], list[str]]:
    """Label and finished runs of each row, and a notice for each cell that failed; none with `partly`."""
    failed = [cell for cell in facts["cells"] if cell["state"] == "failed"]
    notices = [
        f"left out: {cell['label']}, seed {cell.get('seed')}: {(cell.get('error') or {}).get('message', 'failed')}"
        for cell in failed
    ]
    whole = [cell for cell in facts["cells"] if (has_result(folder, cell) if partly else cell not in failed)]
    named = [(f"{cell['label']}, seed {cell.get('seed')}", folder / cell["run"]) for cell in whole]
    runs = {run.path: run for run in _finished(named)}
    groups: dict[str, list[_Run]] = {}
    for cell in whole:
        groups.setdefault(cell["label"], []).append(runs[folder / cell["run"]])
    return list(groups.items()), [] if partly else notices


def _with_result(folders: Iterable[Path]) -> tuple[list[tuple[str, Path]], list[str]]:
    """Name and folder of the runs that are finished, all of them where none is; and a notice for each other folder."""
    runs, notices = [], []
    for path in folders:
        if RunFolder(path).exists():
            runs.append((str(path), path))
        elif path.exists():
            notices.append(f"left out: {path} is no run")
        else:
            raise CheckpointError(4, f"{path} is no run and no study", where=str(path), fix="name folders of finished runs")
    if not runs:
        raise CheckpointError(4, f"{path} is no run and no study", where=str(path), fix="name folders of finished runs")
    finished = [(name, path) for name, path in runs if RunFolder(path).metrics_file.is_file()]
    if not finished:
        return runs, notices
    notices += [f"left out: {name} is not finished" for name, path in runs if (name, path) not in finished]
    return finished, notices


def _finished(named: Sequence[tuple[str, Path]]) -> list[_Run]:
    """The runs, all of them finished."""
    unfinished = [name for name, path in named if not RunFolder(path).metrics_file.is_file()]
    if unfinished:
        shown = "; ".join(unfinished[:8]) + (f"; and {len(unfinished) - 8} more" if len(unfinished) > 8 else "")
        raise ConfigError(83, f"not finished: {shown}", where="compare", fix="run them to the end, or leave them out")
    return [_read(path) for _, path in named]


def _read(path: Path) -> _Run:
    run = RunFolder(path)
    config, manifest, result = run.config(), run.manifest(), run.result()
    missing = [key for key in ("metrics", "parameters", "seconds", "peak_memory_bytes", "rows") if key not in result]
    if missing:
        what = f"metrics.json is damaged: {missing[0]} is missing"
        raise CheckpointError(3, what, where=str(path), fix="run mopefuse train with --resume")
    if not (result["metrics"] or {}).get("test"):
        raise ConfigError(87, f"{path} was not tested", where=str(path), fix="compare runs on data with a test split")
    start = "a trained model" if manifest.get("start") else "scratch"
    settings = {**identity(config), "start": start}
    return _Run(path, config.seed, settings, manifest["data"], manifest["multi_label"], tuple(manifest["labels"]), result)


def _same_test(runs: Sequence[_Run]) -> None:
    for run in runs[1:]:
        for what in ("labels", "samples"):  # in this order: samples differ if their labels do
            mine, first = (r.labels if what == "labels" else r.data.get("test") for r in (run, runs[0]))
            if mine != first:
                both = f"{runs[0].path} and {run.path} were tested on different {what}"
                raise ConfigError(84, both, where="compare", fix="compare runs on the same data")


def _by_settings(runs: Sequence[_Run]) -> tuple[list[tuple[str, list[_Run]]], list[str]]:
    """Runs of the same settings together, each group with a name that no other has; and a notice for each repetition.

    A run with the settings and the seed of an earlier one says nothing new, and would count twice.
    """
    groups: dict[str, list[_Run]] = {}
    notices = []
    for run in runs:
        group = groups.setdefault(json.dumps(run.identity, sort_keys=True), [])
        twin = next((other for other in group if other.seed == run.seed), None)
        if twin is not None:
            notices.append(f"left out: {run.path} has the settings and the seed of {twin.path}")
        else:
            group.append(run)
    named = [(_common_name([run.path for run in group]), group) for group in groups.values()]
    names = [name for name, _ in named]
    return [(name if names.count(name) == 1 else str(group[0].path), group) for name, group in named], notices


def _common_name(paths: Sequence[Path]) -> str:
    """``text`` for runs/text-0 and runs/text-1, or for runs/text/seed-0."""
    places = [path.absolute() for path in paths]
    names = [place.parent.name if re.fullmatch(r"seed-\d+", place.name) else place.name for place in places]
    without = {re.sub(r"[-_.]?(seed|s)?[-_.]?\d+$", "", name) for name in names}
    return without.pop() or names[0] if len(set(names)) > 1 and len(without) == 1 else names[0]


def _row(label: str, group: Sequence[_Run], everyone: Sequence[_Run]) -> Row:
    first = group[0]
    differ = [key for key, value in first.identity.items() if any(run.identity.get(key) != value for run in everyone)]
    return Row(
        label,
        tuple(run.path for run in group),
        tuple(run.seed for run in group),
        {key: first.identity[key] for key in differ},
        {split: _spreads(group, split) for split in ("val", "test")},
        first.result["parameters"]["trainable"],
        first.result["parameters"]["total"],
        Spread(tuple(run.result["seconds"] for run in group)),
        max(run.result["peak_memory_bytes"] for run in group),
    )


def _spreads(group: Sequence[_Run], split: str) -> dict[str, Spread]:
    found = [run.result["metrics"][split] or {} for run in group]
    names = [name for name in METRICS if all(name in each for each in found)]
    return {name: Spread(tuple(math.nan if each[name] is None else each[name] for each in found)) for name in names}


# -- predictions


class _Line(NamedTuple):
    """What is read of a line of predictions: labels that were predicted and that are true."""

    id: str
    chosen: Sequence[str]
    actual: Sequence[str]


def _predictions(run: _Run) -> Iterator[_Line]:
    file = RunFolder(run.path).predictions_file
    try:
        with io.TextIOWrapper(open_regular(file), encoding="utf-8", newline="\n") as lines:
            for line in filter(str.strip, lines):
                row = json.loads(line)
                chosen, actual = (row["labels"], row["true"]) if run.multi_label else ([row["label"]], [row["true"]])
                yield _Line(row["id"], chosen, actual)
    except FileNotFoundError:
        raise CheckpointError(4, f"there is no {file.name}", where=str(run.path), fix=_AGAIN) from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(3, f"{file.name} is damaged: {error}", where=str(run.path), fix=_AGAIN) from None


def _ids(run: _Run) -> list[str]:
    return [line.id for line in _predictions(run)]


def _outcome(run: _Run, ids: Sequence[str]) -> Outcome:
    """What a run says of the samples `ids`, in their order."""
    place = {identity: sample for sample, identity in enumerate(ids)}
    number = {label: column for column, label in enumerate(run.labels)}
    seen = np.zeros(len(ids), dtype=np.bool_)
    pairs = [array("q") for _ in range(4)]  # rows and columns of what is predicted, and of what is true
    try:
        for line in _predictions(run):
            sample = place.get(line.id, -1)
            if sample < 0 or seen[sample]:
                raise _other_samples(run)
            seen[sample] = True
            for (rows, columns), labels in zip((pairs[:2], pairs[2:]), (line.chosen, line.actual), strict=True):
                columns.extend([number[label] for label in dict.fromkeys(labels)])
                rows.extend([sample] * (len(columns) - len(rows)))
    except (KeyError, TypeError) as error:
        what = f"predictions.jsonl is damaged: {error}"
        raise CheckpointError(3, what, where=str(run.path), fix=_AGAIN) from None
    if not seen.all():
        raise _other_samples(run)
    tables = [
        csr_array((np.ones(len(rows)), (np.array(rows), np.array(columns))), shape=(len(ids), len(number)))
        for rows, columns in (pairs[:2], pairs[2:])
    ]
    return Outcome(*tables)


def _other_samples(run: _Run) -> ConfigError:
    return ConfigError(84, f"{run.path} has predictions of other samples", where=str(run.path), fix=_AGAIN)
