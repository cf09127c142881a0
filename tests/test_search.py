"""A search proposes what Optuna itself proposes, never uses the test split, and gives the same result after a kill."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from conftest import PLAIN_SETTINGS, call
from test_study import start, steps, wait_for

from mopefuse.errors import ConfigError, PackageError
from mopefuse.runs.folder import RunFolder
from mopefuse.studies.search import SearchResult, run_search
from mopefuse.studies.study_file import read_study

SPACE: dict[str, Any] = {
    "train.lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "prompts.experts": [1, 3],
    "prompts.dynamic": {"low": 1, "high": 3},
}
STEPS = {"epochs": 2, "batch_size": 6, "log_every": 1, "checkpoint_every": 1}


def write_search(folder: Path, pairs: Path, name: str = "search", **values: Any) -> Path:
    settings = {"main": "tiny:vision", "comp": "tiny:text", "device": "cpu", "data.path": str(pairs), "train": STEPS}
    settings |= PLAIN_SETTINGS
    study: dict[str, Any] = {"settings": settings, "search": {"trials": 5, "space": SPACE, "seed": 3}}
    study["search"] |= values.pop("search", {})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(study | values, sort_keys=False))
    return folder / f"{name}.yaml"


def facts(searched: SearchResult) -> list[Any]:
    return [(t.number, t.settings, t.value, [s.cell.folder for s in t.statuses]) for t in searched.trials]


@pytest.fixture(scope="module")
def file(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_search(tmp_path_factory.mktemp("search"), pairs)


@pytest.fixture(scope="module")
def undisturbed(file: Path) -> tuple[Path, SearchResult]:
    """(folder, result); tests must not change it."""
    out = file.parent / "undisturbed"
    return out, run_search(read_study(str(file)), out)


@pytest.mark.process
def test_trials_are_those_that_optuna_proposes_for_these_values(undisturbed: tuple[Path, SearchResult]) -> None:
    out, searched = undisturbed
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=3))
    for trial in searched.trials:
        proposed = study.ask()
        dynamic = proposed.suggest_int("prompts.dynamic", 1, 3)
        experts = proposed.suggest_categorical("prompts.experts", ["1", "3"])
        lr = proposed.suggest_float("train.lr", 1e-4, 1e-1, log=True)
        assert trial.settings == {"train.lr": lr, "prompts.experts": int(experts), "prompts.dynamic": dynamic}
        value = RunFolder(out / trial.statuses[0].cell.folder).result()["metrics"]["val"]["accuracy"]
        assert trial.value == value
        study.tell(proposed, value)
    assert searched.best is not None
    assert searched.best.value == study.best_value == max(trial.value or 0 for trial in searched.trials)


@pytest.mark.process
def test_every_trial_is_an_ordinary_run_with_its_settings(undisturbed: tuple[Path, SearchResult]) -> None:
    out, searched = undisturbed
    for trial in searched.trials:
        config = RunFolder(out / trial.statuses[0].cell.folder).config()
        found = {"prompts.experts": config.prompts.experts, "prompts.dynamic": config.prompts.dynamic}
        assert {**found, "train.lr": config.train.lr} == trial.settings
    assert not [path for path in out.rglob("*") if path.suffix in (".pkl", ".pickle", ".db", ".pt")]


@pytest.mark.process
def test_the_test_split_does_not_affect_the_search(undisturbed: tuple[Path, SearchResult], file: Path, tmp_path: Path) -> None:
    """With the test metrics of all runs inverted, the trials and the best one are the same."""
    before, searched = undisturbed
    out = tmp_path / "out"
    shutil.copytree(before, out)
    for metrics in out.glob("cells/*/*/metrics.json"):
        values = json.loads(metrics.read_text())
        values["metrics"]["test"] = {name: 1 - value for name, value in values["metrics"]["test"].items()}
        metrics.write_text(json.dumps(values))
    again = run_search(read_study(str(file)), out)
    assert facts(again) == facts(searched) and again.best is not None and searched.best is not None
    assert again.best.number == searched.best.number


@pytest.mark.matrix
def test_the_validation_split_affects_the_search(
    undisturbed: tuple[Path, SearchResult], tmp_path: Path, pairs: Path
) -> None:
    """The control for the test above: with other values, the sampler proposes other trials after the random ones."""
    _, searched = undisturbed
    more = write_search(tmp_path, pairs, search={"trials": 11})
    first = run_search(read_study(str(more)), tmp_path / "first", jobs=1)
    assert facts(first)[:5] == facts(searched)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    for number, trial in enumerate(first.trials[:10]):
        metrics = tmp_path / "second" / trial.statuses[0].cell.folder / "metrics.json"
        values = json.loads(metrics.read_text())
        values["metrics"]["val"]["accuracy"] = 1 / (2 + number)
        metrics.write_text(json.dumps(values))
    second = run_search(read_study(str(more)), tmp_path / "second")
    assert [t.settings for t in second.trials][:10] == [t.settings for t in first.trials][:10]
    assert [t.settings for t in second.trials][10:] != [t.settings for t in first.trials][10:]


@pytest.mark.process
def test_finished_trials_are_not_repeated_and_more_trials_continue_the_search(
    undisturbed: tuple[Path, SearchResult], pairs: Path, tmp_path: Path
) -> None:
    before, searched = undisturbed
    out = tmp_path / "out"
    shutil.copytree(before, out)
    times = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/metrics.json")}
    more = run_search(read_study(str(write_search(tmp_path, pairs, search={"trials": 6}))), out)
    assert facts(more)[:5] == facts(searched)
    assert len(more.trials) == 6
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.soak
def test_a_killed_and_restarted_search_gives_the_same_result(
    undisturbed: tuple[Path, SearchResult], file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    kills = 0
    for moment in (3, 9, 10**9):
        process = start(file, out)
        wait_for(lambda moment=moment: steps(out) > moment, process)
        process.kill()
        process.communicate(timeout=60)
        kills += process.returncode == -signal.SIGKILL
    assert kills == 2, "it finished before it could be killed"
    assert facts(run_search(read_study(str(file)), out)) == facts(undisturbed[1])


@pytest.mark.soak
def test_trials_of_one_batch_are_the_same_for_any_number_of_jobs(pairs: Path, tmp_path: Path) -> None:
    file = write_search(tmp_path, pairs, search={"trials": 4, "at_once": 2}, seeds=[0, 1])
    one, two = (run_search(read_study(str(file)), tmp_path / str(jobs), jobs=jobs) for jobs in (1, 2))
    assert [t.settings for t in one.trials] == [t.settings for t in two.trials]
    for trial in one.trials:
        results = [RunFolder(tmp_path / "1" / s.cell.folder).result()["metrics"]["val"]["accuracy"] for s in trial.statuses]
        assert (len(results), trial.value) == (2, sum(results) / 2)


def test_repeated_settings_are_one_run_and_a_failed_one_stays_failed(pairs: Path, tmp_path: Path) -> None:
    space = {"train.lr": [1e30, 1e-3]}
    file = write_search(tmp_path, pairs, search={"trials": 8, "space": space, "seed": 0})
    done = call("study", file, "--out", tmp_path / "out", "--json")
    result = json.loads(done.stdout)
    assert (done.returncode, result["ok"], result["best"]["settings"]) == (0, True, {"train.lr": 1e-3})
    assert {t["settings"]["train.lr"]: t["value"] is None for t in result["trials"]} == {1e30: True, 1e-3: False}
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2 + len(list((tmp_path / "out").glob("cells/*crash.log")))
    logs = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("cells/*/*/metrics.jsonl")}
    assert json.loads(call("study", file, "--out", tmp_path / "out", "--json").stdout) == result
    assert {path: path.stat().st_mtime_ns for path in logs} == logs


@pytest.mark.process
def test_the_table_marks_the_best_trial_and_prints_a_working_command(
    undisturbed: tuple[Path, SearchResult], file: Path, tmp_path: Path
) -> None:
    out, searched = undisturbed
    done = call("study", file, "--out", out)
    assert done.returncode == 0, done.stderr
    best = searched.best
    assert best is not None
    table, command = done.stdout.rstrip().rpartition("\n")[::2]
    first = table.splitlines()[2].split()
    assert first[:2] == [str(best.number), "*"] and first[-1] == f"{100 * (best.value or 0):.1f}"
    assert len(table.splitlines()) == 2 + len(searched.trials)
    again = call(*command.split()[1:-1], tmp_path / "best")
    assert again.returncode == 0, again.stderr
    mine, theirs = (RunFolder(path).result()["metrics"] for path in (tmp_path / "best", out / best.statuses[0].cell.folder))
    assert mine == theirs


@pytest.mark.process
def test_compare_shows_the_trials_and_warns_against_selecting_by_test_results(
    undisturbed: tuple[Path, SearchResult],
) -> None:
    out, searched = undisturbed
    done = call("compare", out, "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert {row["label"] for row in result["rows"]} <= {trial.label for trial in searched.trials}
    assert searched.best is not None
    assert [searched.best.label in notice for notice in result["notices"]] == [True]


# -- errors before the first trial


@pytest.mark.parametrize(
    ("values", "sets", "code", "message"),
    [
        ({"search": {"space": {"train.lr": {"low": -1.0, "high": 1e-2}}}}, (), "MF-CFG-01", "train.lr=-1"),
        ({"search": {"space": {"prompts.experts": [4, 0]}}}, (), "MF-CFG-01", "prompts.experts=0"),
        ({"search": {"space": {"prompts.dropout": {"low": 0.0, "high": 1.0}}}}, (), "MF-CFG-01", "prompts.dropout=1"),
        ({"search": {"space": {"prompts.expert": [4]}}}, (), "MF-CFG-01", "did you mean prompts.experts"),
        (
            {"search": {"space": {"prompts.experts": [2, 8], "router.top_m": [1, 4]}}},
            (), "MF-CFG-01", "prompts.experts=2, router.top_m=4",
        ),
        ({"search": {"space": {"train.lr": {"low": 1e-2, "high": 1e-4}}}}, (), "MF-CFG-80", "must be below high"),
        ({"search": {"space": {"train.lr": {"low": 0.0, "high": 1e-4, "log": True}}}}, (), "MF-CFG-80", "must be above 0"),
        ({"search": {"space": {"prompts.experts": [4, 4]}}}, (), "MF-CFG-80", "twice"),
        ({"search": {"trials": 0}}, (), "MF-CFG-80", "study: search.trials: got 0; needs at least 1 ·"),
        ({"search": {"space": {"train.lr": {"low": 2, "high": 1}}}}, (), "MF-CFG-80", "study: search.space.train.lr: low (2) "),
        ({"search": {"space": {"train.lr": {"low": "a", "high": 1}}}}, (), "MF-CFG-80",
         "study: search.space.train.lr.low: got 'a'; needs a whole number or a number ·"),
        ({"search": {"space": {"train.lr": {"low": 1}}}}, (), "MF-CFG-80", "study: search.space.train.lr.high is missing ·"),
        ({"search": {"space": {"train.lr": {"low": 1, "high": 2, "lgo": True}}}}, (), "MF-CFG-80",
         "study: unknown key search.space.train.lr.lgo (did you mean low, log?)"),
        ({"search": {"space": {"train.lr": []}}}, (), "MF-CFG-80",
         "study: search.space.train.lr: got []; needs at least 1 value ·"),
        ({"search": {"space": {"train.lr": 3}}}, (), "MF-CFG-80",
         "study: search.space.train.lr: got 3; needs a list of values, or a range (low, high, log) ·"),
        ({"search": {"space": {"seed": [1, 2]}}}, (), "MF-CFG-80", "a list of seeds"),
        ({"grid": {"prompts.experts": [1, 2]}}, (), "MF-CFG-110", "cannot have grid"),
        ({"cells": {"a": {}}}, (), "MF-CFG-110", "cannot have cells"),
        ({}, ("train.lr=1e-3",), "MF-CFG-111", "train.lr"),
        ({"search": {"space": {"data.workers": [0, 1]}}}, (), "MF-CFG-112", "data.workers"),
    ],
)  # fmt: skip
def test_an_invalid_search_space_is_refused_before_the_first_trial(
    values: dict[str, Any], sets: tuple[str, ...], code: str, message: str, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_study(str(write_search(tmp_path, pairs, **values)), sets)
    assert (caught.value.code, bool(caught.value.fix)) == (code, True)
    assert message in str(caught.value)


def test_encoders_can_be_part_of_the_search_space(pairs: Path, tmp_path: Path) -> None:
    settings = {"comp": "tiny:text", "device": "cpu", "data.path": str(pairs), "train": {"max_steps": 1}, **PLAIN_SETTINGS}
    space = {"main": ["tiny:vision", "tiny:vision-b"]}
    file = write_search(tmp_path, pairs, settings=settings, search={"trials": 1, "space": space})
    (trial,) = run_search(read_study(str(file)), tmp_path / "out").trials
    assert RunFolder(tmp_path / "out" / trial.statuses[0].cell.folder).config().main == trial.settings["main"]


@pytest.mark.process
def test_a_metric_that_the_data_do_not_have_is_refused(
    undisturbed: tuple[Path, SearchResult], pairs: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed[0], tmp_path / "out")
    with pytest.raises(ConfigError, match="f1_samples") as caught:
        run_search(read_study(str(write_search(tmp_path, pairs, metric="f1_samples"))), tmp_path / "out")
    assert caught.value.code == "MF-CFG-113"


def test_without_optuna_the_error_has_the_install_command(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "optuna" else object())
    with pytest.raises(PackageError, match="needs optuna") as caught:
        run_search(read_study(str(file)), tmp_path / "out")
    assert caught.value.fix == 'pip install "mopefuse[search]"'
    assert not (tmp_path / "out").exists()


def test_a_search_plan_shows_the_space_and_runs_nothing(file: Path, tmp_path: Path) -> None:
    done = call("study", file, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "0.0001 to 0.1, logarithmic" in done.stdout and "5 runs: 5 trials, seeds 0" in done.stdout
    assert json.loads(call("study", file, "--dry-run", "--json").stdout)["runs"] == 5
    assert not (tmp_path / "out").exists()
