"""A command does its work even if nobody reads its output, and reports it if printing fails."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PLAIN_SETTINGS, TINY, matrix

CLOSED = "<&- >&- 2>&-"


def shell(*command: object, streams: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a shell, with streams redirected or closed."""
    words = shlex.join([sys.executable, "-m", "mopefuse", *map(str, command)])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["/bin/sh", "-c", f"exec {words} {streams}"],
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )


@pytest.mark.parametrize("streams", matrix([CLOSED, ">&-", "<&-", "1</dev/null"], [CLOSED]))
def test_training_finishes_with_closed_streams(pairs: Path, tmp_path: Path, streams: str) -> None:
    run, workers = tmp_path / "run", 2 if streams == CLOSED else 0
    done = shell("train", *TINY, "--data", pairs, "--out", run, "--steps", 2, "--workers", workers, streams=streams)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "metrics.json").read_text())["steps"] == 2
    for file in ("manifest.json", "metrics.json"):
        json.loads((run / file).read_text())  # no output was written into it


@pytest.mark.process
def test_a_study_finishes_with_closed_streams(pairs: Path, tmp_path: Path) -> None:
    """Its cells are separate processes, which inherit the closed streams."""
    settings = {"main": "tiny:vision", "comp": "tiny:text", "device": "cpu", "data.path": str(pairs)}
    settings |= {"train.max_steps": 1, "train.batch_size": 4, **PLAIN_SETTINGS}
    (tmp_path / "study.yaml").write_text(json.dumps({"settings": settings, "seeds": [0, 1], "grid": {"prompts.experts": [2]}}))
    done = shell("study", tmp_path / "study.yaml", "--out", tmp_path / "out", "--jobs", 2, streams=CLOSED)
    cells = json.loads((tmp_path / "out" / "study.json").read_text())["cells"]
    assert (done.returncode, [cell["state"] for cell in cells]) == (0, ["finished", "finished"]), cells


@pytest.mark.parametrize("streams", matrix(["2>&-", CLOSED], ["2>&-"]))
def test_an_error_that_cannot_be_printed_still_has_its_exit_code(tmp_path: Path, streams: str) -> None:
    done = shell("compare", tmp_path, streams=streams)
    assert (done.returncode, done.stdout) == (6, ""), "an error is not a result"


@pytest.mark.parametrize("more", matrix([(), ("--json",)], [()]), ids=str)
def test_a_result_that_cannot_be_printed_is_an_error(trained: Path, more: tuple[str, ...]) -> None:
    done = shell("compare", trained, *more, streams="> /dev/full")
    assert (done.returncode, "MF-RES-250" in done.stderr) == (7, True), done.stderr
    assert "Traceback" not in done.stderr


def test_if_a_result_cannot_be_printed_the_error_of_the_command_is_reported(tmp_path: Path) -> None:
    done = shell("compare", tmp_path, "--json", streams="> /dev/full")
    assert (done.returncode, "MF-CKPT-04" in done.stderr) == (6, True), done.stderr
