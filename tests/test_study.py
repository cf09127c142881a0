"""A study runs every cell once, whatever kills it, and ends with the same table as without interruptions."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PLAIN_SETTINGS, call

from mopefuse.core.atomic_files import is_alive
from mopefuse.errors import ConfigError
from mopefuse.runs.folder import RunFolder
from mopefuse.studies.study import FAILED, FINISHED, StudyListener, is_finished, run_study
from mopefuse.studies.study_file import read_study

STEPS = {"epochs": 4, "batch_size": 4, "lr": 1e-2, "log_every": 1, "checkpoint_every": 5}  # a run has 12 steps


def write_study(folder: Path, pairs: Path, **values: Any) -> Path:
    settings = {"main": "tiny:vision", "comp": "tiny:text", "device": "cpu", "data.path": str(pairs), "train": STEPS}
    settings |= {"prompts.static": 2, "prompts.dynamic": 2, **PLAIN_SETTINGS}
    study = {"settings": settings, "seeds": [0, 1], "grid": {"prompts.experts": [1, 3]}, "baseline": "experts=1"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(study | values, sort_keys=False))
    return folder / "study.yaml"


def start(file: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    """Start a study in separate processes."""
    command = [sys.executable, "-m", "mopefuse", "study", str(file), "--out", str(out), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def cells(out: Path) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads((out / "study.json").read_text())["cells"]
    return listed


def steps(out: Path) -> int:
    """The number of lines that all runs of a study have logged."""
    return sum(len(file.read_bytes().splitlines()) for file in out.glob("cells/*/*/metrics.jsonl"))


def wait_for(reached: Any, process: subprocess.Popen[str], seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while not reached() and process.poll() is None:
        assert time.monotonic() < until, "the study takes too long"
        time.sleep(0.02)


def table(out: Path) -> list[Any]:
    """The table without measured times and memory."""
    rows = json.loads(call("compare", out, "--json").stdout)["rows"]
    return [{key: row[key] for key in ("label", "seeds", "metrics", "parameters", "versus", "best")} for row in rows]


def predictions(out: Path) -> dict[str, str]:
    return {cell["run"]: (out / cell["run"] / "predictions.jsonl").read_text() for cell in cells(out)}


@pytest.fixture(scope="module")
def file(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(tmp_path_factory.mktemp("study"), pairs)


@pytest.fixture(scope="module")
def undisturbed(file: Path) -> Path:
    """The study run in this process, one cell at a time; tests must not change it."""
    out = file.parent / "undisturbed"
    statuses = run_study(read_study(str(file)), out)
    assert {status.state for status in statuses} == {FINISHED}
    return out


def test_every_cell_is_an_ordinary_run_with_its_settings(undisturbed: Path) -> None:
    listed = cells(undisturbed)
    assert [(cell["label"], cell["seed"]) for cell in listed] == [
        ("experts=1", 0), ("experts=1", 1), ("experts=3", 0), ("experts=3", 1),
    ]  # fmt: skip
    for cell in listed:
        config = RunFolder(undisturbed / cell["run"]).config()
        assert (config.prompts.experts, config.seed) == (cell["settings"]["prompts.experts"], cell["seed"])
        assert cell["state"] == "finished"
    assert len(set(predictions(undisturbed).values())) >= 3, "otherwise the test could not show a difference"


@pytest.mark.soak
def test_a_study_killed_at_random_and_restarted_gives_the_same_table(undisturbed: Path, file: Path, tmp_path: Path) -> None:
    """SIGKILL of the main process while two cells run: its cells end with it, and the next call continues."""
    moments, out, kills, done = random.Random(1), tmp_path / "killed", 0, 0
    for _ in range(20):
        process = start(file, out, "--jobs", "2")
        until = steps(out) + moments.randint(0, 11) if kills < 2 else 10**9
        wait_for(lambda until=until: steps(out) > until, process)
        process.kill()
        _, stderr = process.communicate(timeout=60)
        if process.returncode == 0:
            done += 1
            break
        assert process.returncode == -signal.SIGKILL, stderr
        kills += 1
    assert (kills >= 2, done) == (True, 1), "it finished before it could be killed often enough"
    assert table(out) == table(undisturbed)
    assert predictions(out) == predictions(undisturbed)


@pytest.mark.process
def test_notices_of_cells_are_shown_once(pairs: Path, tmp_path: Path) -> None:
    cells = {"a": {"method": "linear"}, "b": {"method": "linear", "linear.features": "average"}}
    file = write_study(tmp_path, pairs, cells=cells, grid={}, seeds=[0], baseline="a")
    lines = call("study", file, "--out", tmp_path / "out").stderr.splitlines()
    notices = [line.partition(": ")[2] for line in lines if line.startswith(("a, seed 0: ", "b, seed 0: "))]
    assert any(text.startswith("logistic regression, chosen on validation") for text in notices)
    assert len(set(notices)) == len(notices)
    assert sum("does not use the settings of prompts" in text for text in notices) == 1, "both cells give this notice"


def test_finished_cells_are_not_repeated_and_added_ones_are_run(undisturbed: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / cells(out)[3]["run"])
    before = {cell["run"]: (out / cell["run"] / "metrics.json").stat().st_mtime_ns for cell in cells(out)[:3]}
    more = write_study(tmp_path, pairs, grid={"prompts.experts": [3, 2, 1]}, seeds=[0, 1])
    statuses = run_study(read_study(str(more)), out, jobs=2)
    assert [status.state for status in statuses] == [FINISHED] * 6
    assert {run: (out / run / "metrics.json").stat().st_mtime_ns for run in before} == before
    assert [row["label"] for row in table(out)] == ["experts=3", "experts=2", "experts=1"]
    again = {row["label"]: row["metrics"] for row in table(out)}
    assert all(again[row["label"]] == row["metrics"] for row in table(undisturbed))


@pytest.mark.matrix
def test_a_finished_cell_of_every_kind_of_method_counts_as_finished(pairs: Path, tmp_path: Path) -> None:
    kinds = ("conditional", "linear", "mlp", "comp-only", "pmf", "mmbt", "flamingo", "map")  # of each kind of method one
    labels = {name: {"method": name} for name in kinds}
    file = write_study(tmp_path, pairs, baseline=None, grid={}, seeds=[0], cells={**labels, "warm": {"warm_start": "linear"}})
    study = read_study(str(file), ["train.max_steps=1"])
    assert {status.state for status in run_study(study, tmp_path / "out")} == {FINISHED}
    assert [cell.label for cell in study.cells if not is_finished(cell, tmp_path / "out")] == []


def test_a_run_with_other_settings_in_place_of_a_cell_is_refused(undisturbed: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    first, third = cells(out)[0]["run"], cells(out)[2]["run"]
    shutil.rmtree(out / first)
    shutil.copytree(out / third, out / first)
    statuses = run_study(read_study(str(file)), out)
    assert [status.state for status in statuses] == [FAILED, FINISHED, FINISHED, FINISHED]
    assert statuses[0].error is not None
    assert statuses[0].error["code"] == "MF-CFG-32"


@pytest.mark.process
def test_a_failed_cell_is_recorded_and_the_others_continue(pairs: Path, tmp_path: Path) -> None:
    bad = {"fine": {}, "diverges": {"train.lr": 1e30}, "no such method": {"method": "nothing"}}
    file = write_study(tmp_path, pairs, cells=bad, grid={}, seeds=[0], baseline="no such method")
    done = call("study", file, "--out", tmp_path / "out", "--json", "--set", "train.epochs=1")
    result = json.loads(done.stdout)
    assert done.returncode == 8
    assert (result["ok"], result["error"]["code"][:6]) == (False, "MF-NUM")
    assert [cell["state"] for cell in result["cells"]] == ["finished", "failed", "failed"]
    assert [row["label"] for row in result["comparison"]["rows"]] == ["fine"]
    *left_out, uncompared = result["comparison"]["notices"]
    assert [text.partition(":")[0] for text in left_out] == ["left out"] * 2
    assert uncompared == "no row is compared with no such method: none of its runs is finished"
    assert [cell["error"] and cell["error"]["exit"] for cell in cells(tmp_path / "out")] == [None, 8, 3]
    good = {"fine": {}, "diverges": {"train.lr": 0.1}}
    mended = write_study(tmp_path, pairs, cells=good, grid={}, seeds=[0], baseline="fine")
    done = call("study", mended, "--out", tmp_path / "out", "--set", "train.epochs=1")
    assert (done.returncode, "diverges" in done.stdout) == (0, True)


@pytest.mark.process
def test_a_cell_whose_process_is_killed_is_recorded_and_the_others_continue(file: Path, tmp_path: Path) -> None:
    process = start(file, tmp_path / "out", "--set", "train.epochs=10")
    wait_for(lambda: steps(tmp_path / "out") >= 3, process)
    lock = next((tmp_path / "out").glob("cells/*/seed-0/.lock"))
    os.kill(json.loads(lock.read_text())["pid"], signal.SIGKILL)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 7, stderr
    assert [cell["state"] for cell in cells(tmp_path / "out")] == ["failed", "finished", "finished", "finished"]
    assert cells(tmp_path / "out")[0]["error"]["code"] == "MF-RES-11"


@pytest.mark.process
def test_a_stop_signal_saves_running_cells_and_leaves_no_process(file: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(file, out, "--jobs", "2", "--set", "train.epochs=2000")
    wait_for(lambda: steps(out) >= 20 and len([*out.glob("cells/*/*/metrics.jsonl")]) == 2, process)
    pids = [json.loads(lock.read_text())["pid"] for lock in out.glob("cells/*/*/.lock")]
    with pytest.raises(ConfigError) as refused:
        run_study(read_study(str(file)), out)
    assert refused.value.code == "MF-CFG-24"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    assert "0 of 4 cells finished" in stderr
    assert len(pids) == 2
    assert not any(is_alive(pid) for pid in pids)
    states = [cell["state"] for cell in cells(out)]
    assert sorted(states) == ["stopped", "stopped", "waiting", "waiting"]
    for cell in cells(out):
        if cell["state"] == "stopped":
            run = RunFolder(out / cell["run"])
            assert run.steps()[-1] == run.read_log()[-1]["step"]
    done = call("compare", out)
    assert (done.returncode, "not finished: experts=1, seed 0" in done.stderr) == (3, True)


@pytest.mark.parametrize("content", [None, "{}", '{"kind": "run"}'])
def test_a_folder_that_is_not_a_study_is_not_changed(file: Path, tmp_path: Path, content: str | None) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    if content is not None:
        (tmp_path / "study.json").write_text(content)
    with pytest.raises(ConfigError) as refused:
        run_study(read_study(str(file)), tmp_path)
    assert refused.value.code == "MF-CFG-82"
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert not (tmp_path / "cells").exists()


def test_unreadable_data_end_the_study_before_its_first_cell(file: Path, tmp_path: Path) -> None:
    done = call("study", file, "--out", tmp_path / "out", "--set", f"data.path={tmp_path / 'nowhere'}")
    assert done.returncode == 4
    assert not (tmp_path / "out" / "cells").exists()


def test_a_dry_run_lists_the_cells_and_writes_nothing(file: Path, tmp_path: Path) -> None:
    done = call("study", file, "--out", tmp_path / "out", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "4 runs: 2 cells, seeds 0, 1" in done.stdout
    assert not (tmp_path / "out").exists()
    listed = json.loads(call("study", file, "--out", tmp_path / "out", "--dry-run", "--json").stdout)["cells"]
    one, _, three, _ = (cell["trainable"] for cell in listed)
    width, layers, tokens = 96, 4, 2
    assert three - one == layers * (2 * tokens * width + 3 * (width + 1)), "two more experts, and a router of three"


def test_a_dry_run_lists_the_cells_that_will_fail(pairs: Path, tmp_path: Path) -> None:
    settings = {"main": "tiny:vision", "comp": "tiny:text", "data.path": str(pairs), "train": {"modality_dropout": 0.2}}
    cells: dict[str, Any] = {"a": {}, "linear": {"method": "linear"}, "b": {"method": "mmbt"}}
    study = {"settings": settings, "seeds": [0], "cells": cells}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    done = call("study", tmp_path / "study.yaml", "--dry-run")
    assert done.returncode == 0 and "b will fail: " in done.stderr and "mmbt needs every modality" in done.stderr
    listed = json.loads(call("study", tmp_path / "study.yaml", "--dry-run", "--json").stdout)["cells"]
    assert [bool(cell["refused"]) for cell in listed] == [False, False, True]


def test_a_dry_run_shows_finished_cells(undisturbed: Path, file: Path) -> None:
    listed = json.loads(call("study", file, "--out", undisturbed, "--dry-run", "--json").stdout)["cells"]
    assert all(cell["finished"] for cell in listed)


def test_a_metric_that_the_data_do_not_have_is_refused_before_the_first_run(multi_pairs: Path, tmp_path: Path) -> None:
    study = read_study(str(write_study(tmp_path, multi_pairs, metric="accuracy")))
    with pytest.raises(ConfigError, match="metric 'accuracy' is not defined for multi-label data"):
        run_study(study, tmp_path / "out")
    assert not list((tmp_path / "out").glob("cells/*"))


def test_an_error_in_the_study_process_leaves_no_cell_running(file: Path, tmp_path: Path) -> None:
    class Closed(StudyListener):
        def on_progress(self, statuses: Any, eta: Any) -> None:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run_study(read_study(str(file), ["train.epochs=2000"]), tmp_path / "out", jobs=2, listener=Closed())
    assert multiprocessing.active_children() == []


@pytest.mark.process
def test_a_cell_terminated_from_outside_is_recorded_as_failed(file: Path, tmp_path: Path) -> None:
    ended = []

    class Kill(StudyListener):
        def on_progress(self, statuses: Any, eta: Any) -> None:
            if not ended:
                ended.append(1)
                multiprocessing.active_children()[0].terminate()

    statuses = run_study(read_study(str(file), ["train.epochs=10"]), tmp_path / "out", listener=Kill())
    assert [status.state for status in statuses] == [FAILED, FINISHED, FINISHED, FINISHED]
    assert statuses[0].error is not None
    assert statuses[0].error["code"] == "MF-RES-11"
