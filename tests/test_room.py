"""Memory decides how many processes run beside one another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_study import write_study

from mopefuse.core import device as devices
from mopefuse.studies.memory_budget import Room, Told
from mopefuse.studies.study import FINISHED, StudyListener, run_study
from mopefuse.studies.study_file import read_study

GB = 10**9


def test_the_first_process_always_fits_and_the_second_waits_for_what_it_tells() -> None:
    room = Room()
    assert (room.fits(0), room.fits(1)) == (True, False)
    room.hear("a", Told(0.1, 2 * GB, 5 * GB))
    assert room.fits(1)


def test_one_that_has_not_grown_yet_keeps_its_room() -> None:
    room = Room()
    room.hear("a", Told(0.5, 3 * GB, 5 * GB))
    assert room.fits(1), "3 of 5 free"
    assert not room.fits(2), "the second, silent yet, will take 3 of the 5, and 2 is less than 3"
    room.hear("b", Told(0.1, 3 * GB, 2 * GB))
    assert not room.fits(2)
    room.leave("b")
    assert room.fits(1), "2 free, and the 3 that it had"


def test_where_the_system_does_not_say_what_is_free_all_fit() -> None:
    room = Room()
    room.hear("a", Told(0.5, 3 * GB, None))
    assert room.fits(7)


def test_free_memory_is_below_what_the_machine_has() -> None:
    free = devices.free_memory(torch.device("cpu"))
    assert free is None or 0 < free < 2**50


@pytest.mark.parametrize("roomy", [True, False])
def test_a_study_runs_one_at_a_time_where_memory_has_no_room(
    pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, roomy: bool
) -> None:
    """Its cells are other processes, so what they tell is changed as it is heard."""
    hear = Room.hear
    free = 10**15 if roomy else 1
    monkeypatch.setattr(Room, "hear", lambda self, who, told: hear(self, who, told._replace(free=free)))
    monkeypatch.setattr(Room, "leave", lambda self, who: self.peaks.pop(who, None))
    most, notices = [0], []

    class Watch(StudyListener):
        def moved(self, statuses, eta):
            most[0] = max(most[0], sum(status.state == "running" for status in statuses))

        def notice(self, text):
            notices.append(text)

    study = read_study(str(write_study(tmp_path, pairs)), ["train.epochs=40"])
    statuses = run_study(study, tmp_path / "out", jobs=2, listener=Watch())
    assert {status.state for status in statuses} == {FINISHED}
    assert most == [2 if roomy else 1]
    assert sum("no room for one more" in text for text in notices) == (not roomy)
