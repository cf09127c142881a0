"""What every trained run supports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import call

from mopefuse.runs.folder import RunFolder


def check_eval_report_and_export(run: Path, folder: Path) -> None:
    """Evaluate a run with the metrics of training, report on it with an audit, and export it as pt2 into `folder`."""
    expected = RunFolder(run).result()["metrics"]["test"]
    assert json.loads(call("eval", run, "--json").stdout)["metrics"] == pytest.approx(expected)
    for command in (("report", run), ("export", run, "--format", "pt2", "-o", folder / "pt2")):
        done = call(*command)
        assert done.returncode == 0, (command, done.stderr)
