"""Search for settings: trials that Optuna proposes, each an ordinary run, compared on the validation split alone.

The only state is the runs and study.json. A seeded sampler proposes the same settings for the same history, so a search that
was killed repeats its proposals from the first trial and finds the finished runs in the folders that their settings determine.
A failed trial stays failed as long as its folder exists, unless it ran out of memory. Trials do not depend on `jobs`, only on
`Search.at_once`.

Tree-structured Parzen estimator: Bergstra et al., Algorithms for hyper-parameter optimization, NeurIPS 2011, as in Optuna
(https://arxiv.org/abs/1907.10902). Every run evaluates its best checkpoint on the test split; the search does not read that.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopefuse.core.artifact import read_json
from mopefuse.core.dependencies import require
from mopefuse.core.error_codes import CheckpointCode, ConfigCode
from mopefuse.core.stop_request import StopRequest
from mopefuse.data.load import load_data
from mopefuse.errors import CheckpointError, ConfigError, Interrupted, ResourceError, did_you_mean
from mopefuse.runs.folder import RunFolder
from mopefuse.studies.search_space import Axis, Search
from mopefuse.studies.study import (
    FAILED,
    FINISHED,
    WAITING,
    Schedule,
    Status,
    StudyListener,
    claim_folder,
    is_finished,
    write_study,
)
from mopefuse.studies.study_file import STUDY_FILE, Cell, Settings, Study


@dataclass(frozen=True)
class Trial:
    """Settings that were tried.

    Args:
        value: mean of the validation metric over seeds; None if a run failed or its metric is not finite.
    """

    number: int
    settings: Settings
    statuses: tuple[Status, ...]
    value: float | None

    @property
    def label(self) -> str:
        """The label of its row in a comparison."""
        return self.statuses[0].cell.label


@dataclass(frozen=True)
class SearchResult:
    """The result of a search: all trials in their order, and the validation metric that they are compared by."""

    trials: tuple[Trial, ...]
    metric: str

    @property
    def best(self) -> Trial | None:
        """The first trial with the highest value; None if all failed."""
        rated = [trial for trial in self.trials if trial.value is not None]
        return max(rated, key=lambda trial: (trial.value, -trial.number), default=None)

    @property
    def statuses(self) -> list[Status]:
        """The states of all runs, each once: two trials may have the same settings."""
        return list({status.cell.folder: status for trial in self.trials for status in trial.statuses}.values())


def run_search(study: Study, out: Path, *, jobs: int = 1, listener: StudyListener | None = None) -> SearchResult:
    """Run the trials that are not finished, in order.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after the running runs saved a checkpoint.
        ConfigError: `out` is not the folder of a study, another process uses it, or the data have no such metric.
        MopefuseError: the data cannot be read. PackageError: Optuna is not installed.
    """
    search = study.file.search
    assert search is not None
    require("optuna", extra="search", what="a search")
    listener = listener or StudyListener()
    most_jobs = search.at_once * len(study.file.seeds)
    if jobs > most_jobs:
        listener.on_notice(f"running {most_jobs} at a time, not {jobs}: raise search.at_once to propose more trials at a time")
    with claim_folder(out, listener):
        metric = study.file.metric or load_data(study.trial(0, search.first())[0].config.data).task.metric
        running = _RunningSearch(study, search, out, metric=metric, jobs=jobs, listener=listener)
        with StopRequest() as stop:
            while len(running.trials) < search.trials and running.run_next(stop):
                pass
        if len(running.trials) == search.trials:
            running.publish()
    result = SearchResult(tuple(running.trials), metric)
    if len(result.trials) < search.trials:
        raise Interrupted(
            stop.signal_number,
            f"with {len(result.trials)} of {search.trials} trials finished",
            fix="run the same command again to continue",
        )
    return result


class _RunningSearch:
    """The sampler, the trials so far, and the states of their runs."""

    def __init__(
        self, study: Study, search: Search, out: Path, *, metric: str, jobs: int, listener: StudyListener
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(seed=search.seed, constant_liar=search.at_once > 1)
        self.sampler = optuna.create_study(direction="maximize", sampler=sampler)
        self.failed_state = optuna.trial.TrialState.FAIL
        self.space = {path: _distribution(axis) for path, axis in sorted(search.space.items())}
        self.study, self.search, self.out, self.metric = study, search, out, metric
        self.trials: list[Trial] = []
        self.status_of: dict[str, Status] = {}  # by run folder
        self.errors = _read_errors(out)
        self.schedule = Schedule(study=study, out=out, statuses=[], jobs=jobs, listener=listener)
        self.publish(only_new=True)

    def run_next(self, stop: StopRequest) -> bool:
        """Propose the next trials, run those that are not finished, and report to the sampler; False if stopped."""
        count = min(self.search.at_once, self.search.trials - len(self.trials))
        proposals = [self.sampler.ask(self.space) for _ in range(count)]
        proposed = []
        for trial in proposals:
            axes = self.search.space
            chosen = {path: _decode(axes[path], value) for path, value in trial.params.items()}
            proposed.append((chosen, tuple(self._status(cell) for cell in self.study.trial(trial.number, chosen))))
        self.schedule.to_come = (self.search.trials - len(self.trials) - count) * len(self.study.file.seeds)
        has_waiting = any(status.state == WAITING for status in self.schedule.statuses)
        self.schedule.run(stop)
        if any(status.state not in (FINISHED, FAILED) for _, statuses in proposed for status in statuses):
            return False
        for trial, (chosen, statuses) in zip(proposals, proposed, strict=True):
            value = self._value(statuses)
            self.sampler.tell(trial, value, state=self.failed_state if value is None else None)
            self.trials.append(Trial(trial.number, chosen, statuses, value))
        self.publish(only_new=not has_waiting)
        return True

    def _status(self, cell: Cell) -> Status:
        """The state of the run of a cell; an earlier trial may have proposed the same settings."""
        if cell.folder not in self.status_of:
            status = Status(cell, FINISHED if is_finished(cell, self.out) else WAITING)
            error = self.errors.get(cell.folder)
            if status.state == WAITING and error and (self.out / cell.folder).is_dir():
                status.state, status.error = FAILED, error
            self.status_of[cell.folder] = status
            self.schedule.statuses.append(status)
        return self.status_of[cell.folder]

    def _value(self, statuses: Sequence[Status]) -> float | None:
        """The mean validation metric over the runs; None if one failed or its metric is not finite."""
        values: list[float] = []
        for status in statuses:
            if status.state == FAILED:
                return None
            found = RunFolder(self.out / status.cell.folder).result()["metrics"]["val"] or {}
            if found and self.metric not in found:
                what = f"these runs have no metric {self.metric!r}"
                raise ConfigError(ConfigCode.UNKNOWN_SEARCH_METRIC, what, where="metric", fix=did_you_mean(self.metric, found))
            value = found.get(self.metric)
            if value is None or not math.isfinite(value):
                return None
            values.append(value)
        return sum(values) / len(values)

    def publish(self, *, only_new: bool = False) -> None:
        """Write study.json; with `only_new`, keep an existing file, which may list more trials."""
        best = SearchResult(tuple(self.trials), self.metric).best
        trials = [
            {"trial": trial.number, "settings": trial.settings, "value": trial.value, "label": trial.label}
            for trial in self.trials
        ]
        self.schedule.facts["search"] = {"metric": self.metric, "best": best and best.label, "trials": trials}
        if not (only_new and (self.out / STUDY_FILE).is_file()):
            write_study(self.study, self.out, self.schedule.statuses, self.schedule.facts)


def _read_errors(out: Path) -> dict[str, Any]:
    """Run folder to error, of the failed runs in study.json; not of those that lacked memory, which are run again."""
    try:
        cells = read_json(out / STUDY_FILE)["cells"] if (out / STUDY_FILE).is_file() else []
        failed = {cell["run"]: cell["error"] for cell in cells if cell["state"] == FAILED}
        return {run: error for run, error in failed.items() if error["exit"] != ResourceError.exit_code}
    except (KeyError, TypeError):
        raise CheckpointError(
            CheckpointCode.CONTENT_DAMAGED,
            f"{STUDY_FILE} is damaged",
            where=str(out),
            fix="choose a different folder with --out",
        ) from None


def _distribution(axis: Axis) -> Any:
    """Convert an axis for Optuna; values of a list become JSON, so that any value can be a category."""
    from optuna import distributions

    if isinstance(axis, list):
        return distributions.CategoricalDistribution([json.dumps(value) for value in axis])
    if axis.is_whole:
        return distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return distributions.FloatDistribution(float(axis.low), float(axis.high), log=axis.log)


def _decode(axis: Axis, value: Any) -> Any:
    return json.loads(value) if isinstance(axis, list) else value


def train_command(trial: Trial, out: Path) -> str:
    """The command that trains with the settings of a trial, into another folder."""
    return f"mopefuse train --recipe {out / trial.statuses[0].cell.folder / 'config.yaml'} --out runs/best"


def test_metrics(trial: Trial, out: Path) -> Mapping[str, float]:
    """Test metrics of a trial, as means over seeds; empty if the data have no test split. Only for the chosen trial."""
    found = [RunFolder(out / status.cell.folder).result()["metrics"]["test"] or {} for status in trial.statuses]
    return {name: sum(metrics[name] for metrics in found) / len(found) for name in found[0]}
