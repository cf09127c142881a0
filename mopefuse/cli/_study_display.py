"""Progress of a study: a live bar on a terminal, one line per run elsewhere, with the time left."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

from mopefuse.cli._render import duration, err
from mopefuse.core.formatting import visible
from mopefuse.studies.study import FAILED, FINISHED, RUNNING, Status, StudyListener
from mopefuse.studies.study_file import Study


class StudyDisplay(StudyListener):
    """A listener that shows progress on stderr."""

    def __init__(self, study: Study, *, json: bool) -> None:
        self.study, self.json = study, json
        self.console = err()
        self.total = study.runs
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> StudyDisplay:
        search = self.study.file.search
        rows = f"{len(self.study.labels)} cells" if search is None else f"{search.trials} trials"
        self.on_notice(f"{self.total} runs: {rows}, {len(self.study.file.seeds)} seeds")
        if self.console.is_terminal and not self.json:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("[bold]{task.fields[done]} of {task.fields[cells]} runs"),
                BarColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total, done=0, cells=self.total, text="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def on_notice(self, text: str) -> None:
        """Print a line on stderr."""
        if not self.json:
            self.console.print(text, markup=False)

    def on_progress(self, statuses: Sequence[Status], eta: float | None) -> None:
        """Update the bar."""
        if self._bar is not None:
            running = [status for status in statuses if status.state == RUNNING]
            finished = sum(status.state == FINISHED for status in statuses)
            names = ", ".join(f"{status.cell.label}, seed {status.cell.seed}" for status in running)
            text = f"eta {duration(eta)}  {names}" if eta is not None else names
            share = finished + sum(status.share for status in running)
            self._bar.update(self._task, completed=share, done=finished, text=visible(text))

    def on_cell_end(self, status: Status, statuses: Sequence[Status], eta: float | None) -> None:
        """Print a line for a run that ended."""
        if self.json:
            return
        done = sum(other.state in (FINISHED, FAILED) for other in statuses)
        line = f"{done}/{self.total}  {status.cell.label}, seed {status.cell.seed}  {status.state}"
        if status.error:
            line += f": {status.error['code']} {status.error['message']}"
        if eta is not None and done < self.total:
            line += f"  eta {duration(eta)}"
        self.console.print(line, markup=False, style="red" if status.error else None)
        self.on_progress(statuses, eta)
