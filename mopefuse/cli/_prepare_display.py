"""Progress and result of preparing a data set: a live bar on a terminal, plain lines elsewhere; then two tables."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from mopefuse.cli._render import duration, err, out, table
from mopefuse.core.formatting import visible

_LINE_EVERY = 10.0  # seconds between plain lines


class PrepareDisplay:
    """A context whose `advance` shows progress on stderr; `silent` shows nothing."""

    def __init__(self, *, silent: bool) -> None:
        self.console, self.silent = err(), silent
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}
        self._began: dict[str, float] = {}
        self._printed_at = time.monotonic()

    def __enter__(self) -> PrepareDisplay:
        if self.console.is_terminal and not self.silent:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )

            self._bar = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, stage: str, done: int, total: int) -> None:
        """Update the bar of a stage (a split, or "images"), or print a line from time to time."""
        if self.silent:
            return
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(visible(stage))
            self._bar.update(self._tasks[stage], completed=done, total=total)
            return
        now = time.monotonic()
        began = self._began.setdefault(stage, now)
        if now - self._printed_at >= _LINE_EVERY:
            self._printed_at = now
            eta = duration((now - began) / done * (total - done))
            self.console.print(f"{stage}  {done:,}/{total:,}  eta {eta}", markup=False)


def show(about: Mapping[str, Any], dest: Path) -> None:
    """Print the tables of a prepared data set: its rows next to the published numbers, and why rows were skipped."""
    rows, published, difference = about["rows"], about["published"], about["difference"]
    cells = []
    for group in [*rows, *(group for group in published if group not in rows)]:
        number = sum(rows[split] for split in group.split("+"))
        known = group in published
        cells.append(
            [
                group,
                f"{number:,}",
                f"{published[group]['rows']:,}" if known else "-",
                f"{difference[group]:+,}" if known else "-",
            ]
        )
    table(str(dest), ["split", "rows", "published", "difference"], cells)
    console = out()
    if about["skipped"]:
        console.print()
        table("skipped, by reason", ["reason", "number"], [[why, f"{number:,}"] for why, number in about["skipped"].items()])
    console.print()
    console.print(f"text: {about['text']}; {about['labels']} labels", markup=False)
    if about["skipped"]:
        console.print(f"skipped rows are listed in {dest / 'skipped.jsonl'}", markup=False)
    if not about["written"]:
        console.print("The folder already has this prepared data set; nothing was written.", markup=False)
