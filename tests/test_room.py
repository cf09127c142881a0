"""Memory determines how many processes run at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_study import write_study

from mopefuse.core import device as devices
from mopefuse.studies.memory_budget import MemoryBudget, MemoryReport
from mopefuse.studies.study import FINISHED, StudyListener, run_study
from mopefuse.studies.study_file import read_study

GB = 10**9


def test_the_first_process_always_fits_and_the_second_waits_for_its_report() -> None:
    budget = MemoryBudget()
    assert (budget.fits(0), budget.fits(1)) == (True, False)
    budget.update("a", MemoryReport(0.1, 2 * GB, 5 * GB))
    assert budget.fits(1)


def test_memory_is_reserved_for_a_process_that_has_not_grown_yet() -> None:
    budget = MemoryBudget()
    budget.update("a", MemoryReport(0.5, 3 * GB, 5 * GB))
    assert budget.fits(1), "3 of 5 free"
    assert not budget.fits(2), "the second, without a report yet, may take 3 of the 5, and 2 is less than 3"
    budget.update("b", MemoryReport(0.1, 3 * GB, 2 * GB))
    assert not budget.fits(2)
    budget.release("b")
    assert budget.fits(1), "2 free, and the 3 that it had"


def test_if_free_memory_is_unknown_every_process_fits() -> None:
    budget = MemoryBudget()
    budget.update("a", MemoryReport(0.5, 3 * GB, None))
    assert budget.fits(7)


def test_free_memory_is_less_than_total_memory() -> None:
    free = devices.free_memory(torch.device("cpu"))
    assert free is None or 0 < free < 2**50


@pytest.mark.soak
@pytest.mark.parametrize("roomy", [True, False])
def test_a_study_runs_one_cell_at_a_time_if_memory_is_short(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roomy: bool
) -> None:
    """Cells run in other processes, so their reports are changed when they are received."""
    update = MemoryBudget.update
    free = 10**15 if roomy else 1
    monkeypatch.setattr(MemoryBudget, "update", lambda self, process, report: update(self, process, report._replace(free=free)))
    monkeypatch.setattr(MemoryBudget, "release", lambda self, process: self.peaks.pop(process, None))
    most, notices = [0], []

    class Watch(StudyListener):
        def on_progress(self, statuses, eta):
            most[0] = max(most[0], sum(status.state == "running" for status in statuses))

        def on_notice(self, text):
            notices.append(text)

    study = read_study(str(write_study(tmp_path, pairs)), ["train.epochs=15"])
    statuses = run_study(study, tmp_path / "out", jobs=2, listener=Watch())
    assert {status.state for status in statuses} == {FINISHED}
    assert most == [2 if roomy else 1]
    assert sum("not enough memory for one more" in text for text in notices) == (not roomy)
