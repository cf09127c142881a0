"""What every trained run supports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import call

from mopefuse.runs.folder import RunFolder


def check_eval_and_report(run: Path) -> None:
    """Evaluate a run with the metrics of training, and report on it with an audit."""
    expected = RunFolder(run).result()["metrics"]["test"]
    assert json.loads(call("eval", run, "--json").stdout)["metrics"] == pytest.approx(expected)
    done = call("report", run)
    assert done.returncode == 0, done.stderr


def check_eval_report_and_export(run: Path, folder: Path) -> None:
    """Do `check_eval_and_report`, and export the run as pt2 into `folder`."""
    check_eval_and_report(run)
    done = call("export", run, "--format", "pt2", "-o", folder / "pt2")
    assert done.returncode == 0, done.stderr
