"""Search for settings: trials that Optuna proposes, each an ordinary run, compared on the validation split alone.

There is no state beside the runs and study.json. A seeded sampler proposes the same settings for the same history, so a search
that was killed asks again from its first trial and finds the runs that are finished where their settings say they are.
A trial that failed, but for lack of memory, stays failed as long as its folder is there. Trials do not depend on `jobs`,
only on `Search.at_once`.

Tree-structured Parzen estimator: Bergstra et al., Algorithms for hyper-parameter optimization, NeurIPS 2011, as in Optuna
(https://arxiv.org/abs/1907.10902). Every run tests its best checkpoint, as any run does; nothing here reads that.
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
from mopefuse.data.load import load_data
from mopefuse.errors import CheckpointError, ConfigError, Interrupted, ResourceError, did_you_mean
from mopefuse.metrics.gates import selected_metric
from mopefuse.runs.folder import RunFolder
from mopefuse.studies.search_space import Axis, Search
from mopefuse.studies.study import FAILED, FINISHED, WAITING, Schedule, Status, StudyListener, claimed, is_finished, write
from mopefuse.studies.study_file import STUDY_FILE, Cell, Settings, Study
from mopefuse.training.stop_request import StopRequest


@dataclass(frozen=True)
class Trial:
    """Settings that were tried, and how good they are: the mean over seeds; None if a run of it failed."""

    number: int
    settings: Settings
    statuses: tuple[Status, ...]
    value: float | None

    @property
    def label(self) -> str:
        """Its row in a comparison."""
        return self.statuses[0].cell.label


@dataclass(frozen=True)
class Searched:
    """All trials in their order, and the metric of the validation split that they are compared by."""

    trials: tuple[Trial, ...]
    metric: str

    @property
    def best(self) -> Trial | None:
        """The first of those with the highest value; None if all failed."""
        worth = [trial for trial in self.trials if trial.value is not None]
        return max(worth, key=lambda trial: (trial.value, -trial.number), default=None)

    @property
    def statuses(self) -> list[Status]:
        """Of all runs, each once: settings can come again."""
        return list({status.cell.folder: status for trial in self.trials for status in trial.statuses}.values())


def run_search(study: Study, out: Path, *, jobs: int = 1, listener: StudyListener | None = None) -> Searched:
    """Run the trials that are not finished, in order.

    Raises:
        Interrupted: Ctrl-C or SIGTERM, after the runs under way published a checkpoint.
        ConfigError: `out` is something else, another process searches there, or the data have no such metric.
        MopefuseError: the data cannot be used. PackageError: Optuna is not installed.
    """
    search = study.file.search
    assert search is not None
    require("optuna", extra="search", what="a search")
    listener = listener or StudyListener()
    most = search.at_once * len(study.file.seeds)
    if jobs > most:
        listener.notice(f"{most} at a time, not {jobs}: raise search.at_once to propose more trials together")
    with claimed(out, listener):
        multi_label = load_data(study.trial(0, search.first())[0].config.data).multi_label
        metric = study.file.metric or selected_metric(multi_label=multi_label)
        searching = _Searching(study, search, out, metric, jobs, listener)
        with StopRequest() as stop:
            while len(searching.trials) < search.trials and searching.next_ones(stop):
                pass
        if len(searching.trials) == search.trials:
            searching.publish()
    searched = Searched(tuple(searching.trials), metric)
    if len(searched.trials) < search.trials:
        raise Interrupted(
            stop.signal_number,
            f"with {len(searched.trials)} of {search.trials} trials finished",
            fix="run the same command again to go on",
        )
    return searched


class _Searching:
    """The sampler, the trials so far, and the runs that they share."""

    def __init__(
        self, study: Study, search: Search, out: Path, metric: str, jobs: int, listener: StudyListener
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
        self.known: dict[str, Status] = {}
        self.errors = _errors(out)
        self.schedule = Schedule(study, out, [], jobs, listener)
        self.publish(only_new=True)

    def next_ones(self, stop: StopRequest) -> bool:
        """Propose the next trials, run what is not finished of them, and tell the sampler; False if it was stopped."""
        count = min(self.search.at_once, self.search.trials - len(self.trials))
        asked = [self.sampler.ask(self.space) for _ in range(count)]
        proposed = []
        for trial in asked:
            axes = self.search.space
            chosen = {path: _chosen(axes[path], value) for path, value in trial.params.items()}
            proposed.append((chosen, tuple(self._status(cell) for cell in self.study.trial(trial.number, chosen))))
        self.schedule.to_come = (self.search.trials - len(self.trials) - count) * len(self.study.file.seeds)
        waited = any(status.state == WAITING for status in self.schedule.statuses)
        self.schedule.run(stop)
        if any(status.state not in (FINISHED, FAILED) for _, statuses in proposed for status in statuses):
            return False
        for trial, (chosen, statuses) in zip(asked, proposed, strict=True):
            value = self._value(statuses)
            self.sampler.tell(trial, value, state=self.failed_state if value is None else None)
            self.trials.append(Trial(trial.number, chosen, statuses, value))
        self.publish(only_new=not waited)
        return True

    def _status(self, cell: Cell) -> Status:
        """Of the run of these settings, which an earlier trial may have proposed, too."""
        if cell.folder not in self.known:
            status = Status(cell, FINISHED if is_finished(cell, self.out) else WAITING)
            error = self.errors.get(cell.folder)
            if status.state == WAITING and error and (self.out / cell.folder).is_dir():
                status.state, status.error = FAILED, error
            self.known[cell.folder] = status
            self.schedule.statuses.append(status)
        return self.known[cell.folder]

    def _value(self, statuses: Sequence[Status]) -> float | None:
        """The mean metric of validation over the runs; None if one failed or has no number there."""
        values: list[float] = []
        for status in statuses:
            if status.state == FAILED:
                return None
            found = RunFolder(self.out / status.cell.folder).result()["metrics"]["val"] or {}
            if found and self.metric not in found:
                what = f"these runs have no metric {self.metric!r}"
                raise ConfigError(113, what, where="metric", fix=did_you_mean(self.metric, found))
            value = found.get(self.metric)
            if value is None or not math.isfinite(value):
                return None
            values.append(value)
        return sum(values) / len(values)

    def publish(self, *, only_new: bool = False) -> None:
        """Write study.json; with `only_new` where there is none: one from before knows of more trials."""
        best = Searched(tuple(self.trials), self.metric).best
        trials = [
            {"trial": trial.number, "settings": trial.settings, "value": trial.value, "label": trial.label}
            for trial in self.trials
        ]
        self.schedule.facts["search"] = {"metric": self.metric, "best": best and best.label, "trials": trials}
        if not (only_new and (self.out / STUDY_FILE).is_file()):
            write(self.study, self.out, self.schedule.statuses, self.schedule.facts)


def _errors(out: Path) -> dict[str, Any]:
    """Run folder to error, of the runs that study.json says have failed; not those that lacked memory, to be tried again."""
    try:
        cells = read_json(out / STUDY_FILE)["cells"] if (out / STUDY_FILE).is_file() else []
        failed = {cell["run"]: cell["error"] for cell in cells if cell["state"] == FAILED}
        return {run: error for run, error in failed.items() if error["exit"] != ResourceError.exit_code}
    except (KeyError, TypeError):
        raise CheckpointError(3, f"{STUDY_FILE} is damaged", where=str(out), fix="name another --out") from None


def _distribution(axis: Axis) -> Any:
    """An axis as Optuna has it: values of a list by their JSON, so that any can be one."""
    from optuna import distributions

    if isinstance(axis, list):
        return distributions.CategoricalDistribution([json.dumps(value) for value in axis])
    if axis.whole:
        return distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log)
    return distributions.FloatDistribution(float(axis.low), float(axis.high), log=axis.log)


def _chosen(axis: Axis, value: Any) -> Any:
    return json.loads(value) if isinstance(axis, list) else value


def command(trial: Trial, out: Path) -> str:
    """How to train with the settings of a trial, elsewhere."""
    return f"mopefuse train --recipe {out / trial.statuses[0].cell.folder / 'config.yaml'} --out runs/best"


def on_test(trial: Trial, out: Path) -> Mapping[str, float]:
    """What the runs of one trial, once it is chosen, have on the test split: means over seeds; empty without one."""
    found = [RunFolder(out / status.cell.folder).result()["metrics"]["test"] or {} for status in trial.statuses]
    return {name: sum(each[name] for each in found) / len(found) for name in found[0]}
