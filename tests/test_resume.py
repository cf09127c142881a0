"""Resuming in special cases: a step that was not validated, a result of earlier settings, a removed folder."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from test_train import StopAt, assert_same_run, config, data, log

from mopefuse.errors import Interrupted, ResourceError
from mopefuse.runs.folder import RunFolder
from mopefuse.training.listener import Listener, Progress
from mopefuse.training.train import train

__all__ = ["data"]  # the fixture

UNVALIDATED: dict[str, dict[str, Any]] = {
    "before any validation": {"train__evals_per_epoch": 1},
    "after one": {"train__evals_per_epoch": 2},
    "with the last selected": {"train__evals_per_epoch": 2, "train__select": "last"},
}


@pytest.mark.parametrize("how", UNVALIDATED)
def test_a_run_that_ends_at_the_step_where_it_was_stopped_is_validated_there(data: Path, tmp_path: Path, how: str) -> None:
    """Step 3 is published because training was stopped; it is validated only because it becomes the last step."""
    settings = config(data, **UNVALIDATED[how], train__schedule="constant")
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "parts", listener=StopAt(3, signal.SIGTERM))
    assert "val" not in log(tmp_path / "parts")[-1]
    shorter = config(data, **UNVALIDATED[how], train__schedule="constant", train__max_steps=3)
    result = train(shorter, tmp_path / "parts", resume=True)
    whole = train(shorter, tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert (result["steps"], result["metrics"], result["selected_step"]) == (3, whole["metrics"], whole["selected_step"])
    assert result["metrics"]["val"] is not None


def test_a_validation_that_was_logged_but_not_published_is_repeated(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Interrupted):
        train(config(data), tmp_path / "run", listener=StopAt(3, signal.SIGTERM))
    with monkeypatch.context() as now:
        now.setattr(RunFolder, "save", lambda *_: (_ for _ in ()).throw(RuntimeError("no power")))
        with pytest.raises(RuntimeError, match="no power"):
            train(config(data, train__max_steps=3), tmp_path / "run", resume=True)
    assert "val" in log(tmp_path / "run")[-1]
    train(config(data), tmp_path / "run", resume=True)
    assert [line["step"] for line in log(tmp_path / "run") if "val" in line] == [3]


def test_a_finished_run_that_is_extended_is_unfinished_until_it_ends(data: Path, tmp_path: Path) -> None:
    """Its earlier result does not belong to the new settings."""
    constant = {"train__schedule": "constant"}
    train(config(data, **constant), tmp_path / "run")
    longer = config(data, **constant, train__epochs=5)
    with pytest.raises(Interrupted):
        train(longer, tmp_path / "run", resume=True, listener=StopAt(14, signal.SIGTERM))
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert train(longer, tmp_path / "run", resume=True)["steps"] == 20


def test_a_run_folder_removed_during_training_is_a_one_line_error(data: Path, tmp_path: Path) -> None:
    class Vanish(Listener):
        def on_step(self, progress: Progress, total: int, loss: float, lr: float) -> None:
            shutil.rmtree(tmp_path / "run")

    with pytest.raises(ResourceError, match="the run folder is gone") as lost:
        train(config(data), tmp_path / "run", listener=Vanish())
    assert lost.value.exit_code == 7
    assert not (tmp_path / "run").exists()
