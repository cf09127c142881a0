"""Progress and result of training: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from mopefuse.cli._render import count, duration, err, out, print_json, table
from mopefuse.core import distributed
from mopefuse.core.error_codes import ConfigCode
from mopefuse.core.formatting import several, visible
from mopefuse.errors import ConfigError
from mopefuse.metrics.names import write_metric
from mopefuse.training.listener import Listener, Progress

_LINE_EVERY = 10.0  # seconds between plain lines
_IN_LINE = 3  # metrics in the line of a validation
_WIDEST = 8  # metrics in a row of the final table


class Display(Listener):
    """A listener that shows progress on stderr; `result` prints the final table, or one JSON object."""

    def __init__(self, folder: Path, *, json: bool, tensorboard: bool = False) -> None:
        self.folder, self.json = folder, json
        self.notices: list[str] = []
        self.console = err()
        self.live = self.console.is_terminal and not json and os.environ.get("RANK", "0") == "0"
        self._bar: Any = None
        self._task: Any = None
        self._printed_at = time.monotonic()
        self._began: tuple[int, float] | None = None
        self._reading = _Pace()
        self._writer_type = _tensorboard() if tensorboard else None
        self._writer: Any = None

    def __enter__(self) -> Display:
        if self.live:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("preparing", total=None, text="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    def on_notice(self, text: str) -> None:
        """Print a notice on stderr, or keep it for ``notices`` of the JSON object."""
        self.notices.append(text)
        if not self.json and distributed.is_main():
            self.console.print(text, style="yellow", markup=False)

    def on_task(self, text: str) -> None:
        """Print the task."""
        if not self.json and distributed.is_main():
            self.console.print(f"task: {text}", markup=False)

    def on_rows(self, counts: dict[str, int]) -> None:
        """Print the number of rows of each split."""
        if not self.json and distributed.is_main():
            text = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            self.console.print(f"rows: {text}", markup=False)

    def on_data_progress(self, what: str, done: int, total: int) -> None:
        """Update the bar, or print a line from time to time, while something is computed for the cache."""
        if not distributed.is_main() or self.json:
            return
        now = time.monotonic()
        self._reading.update(done, total, now)
        if self._bar is not None:
            self._bar.update(self._task, description=visible(what), completed=done, total=total)
        elif now - self._printed_at >= _LINE_EVERY:
            self._printed_at, eta = now, self._reading.eta(now)
            self.console.print(f"{what}  {done}/{total}{f'  eta {duration(eta)}' if eta is not None else ''}", markup=False)

    def on_step(self, progress: Progress, total: int, loss: float, lr: float) -> None:
        """Update the bar, or print a line from time to time."""
        if self._writer_type is not None and self._writer is None and distributed.is_main():
            self._writer = self._writer_type(str(self.folder / "tensorboard"))
        if self._writer is not None:
            self._writer.add_scalar("train/loss", loss, progress.step)
            self._writer.add_scalar("train/lr", lr, progress.step)
        if not distributed.is_main() or self.json:
            return
        if self._bar is not None:
            self._bar.update(self._task, description="training", completed=progress.step, total=total, text=f"loss {loss:.3f}")
            return
        now = time.monotonic()
        if self._began is None:
            self._began = (progress.step, now)
        if now - self._printed_at >= _LINE_EVERY:
            self._printed_at = now
            per_step = (now - self._began[1]) / max(1, progress.step - self._began[0])
            eta = duration(per_step * (total - progress.step))
            self.console.print(f"step {progress.step}/{total}  loss {loss:.3f}  lr {lr:.2g}  eta {eta}", markup=False)

    def on_validation(self, progress: Progress, found: dict[str, float], *, best: bool) -> None:
        """Print a line for an evaluation on validation."""
        if self._writer is not None:
            for name, value in found.items():
                self._writer.add_scalar(f"val/{name}", value, progress.step)
        if not distributed.is_main() or self.json:
            return
        from mopefuse.tasks.base import all_metrics

        names = [name for name in found if name in {next(iter(found)), *all_metrics()} - {"loss"}]
        shown = "  ".join(f"{name} {write_metric(name, found[name])}" for name in names[:_IN_LINE])
        star = "  best" if best else ""
        line = f"step {progress.step}  validation  {shown}  loss {found['loss']:.3f}  {duration(progress.seconds)}{star}"
        self.console.print(line, markup=False)

    def result(self, result: dict[str, Any]) -> None:
        """Print the final metrics."""
        if not distributed.is_main():
            return
        if self.json:
            found = {**result, "metrics": _tested(result), "splits": result["metrics"], "notices": self.notices}
            print_json({"ok": True, "run": str(self.folder), **found})
            return
        splits = {name: found for name, found in result["metrics"].items() if found}
        names = [name for name in next(iter(splits.values()), {}) if name not in ("loss", "absent_labels")]
        rows = [[split, *(write_metric(name, found[name]) for name in names)] for split, found in splits.items()]
        columns = ["split", *names]
        if len(names) > _WIDEST:
            columns, *rows = map(list, zip(columns, *rows, strict=True))
        table(f"{self.folder}, step {result['selected_step']}", columns, rows)
        for split, found in splits.items():
            if found.get("absent_labels"):
                of_masks = "miou" in found
                nouns = ("class has", "classes have") if of_masks else ("label has", "labels have")
                unit, metric = ("pixel", "mean IoU") if of_masks else ("sample", "macro-F1")
                which = several(found["absent_labels"], *nouns)
                self.on_notice(f"{split}: {which} no {unit}; {metric} is averaged over the others")
        parameters = result["parameters"]
        share = 100 * parameters["trainable"] / parameters["total"]
        trained = f"{count(parameters['trainable'])} of {count(parameters['total'])} parameters trained ({share:.2f} %)"
        steps = "1 step" if result["steps"] == 1 else f"{result['steps']} steps"
        out().print(f"{trained}, {steps} in {duration(result['seconds'])}", markup=False)
        out().print(f"run folder: {self.folder}", markup=False)


class _Pace:
    """Estimates the time left of a computation from its pace so far."""

    def __init__(self) -> None:
        self.total = self.first = self.done = 0
        self.began = 0.0

    def update(self, done: int, total: int, now: float) -> None:
        """Record progress at a time in seconds; another total, or less done than before, starts another computation."""
        if total != self.total or done < self.done:
            self.total, self.first, self.began = total, done, now
        self.done = done

    def eta(self, now: float) -> float | None:
        """Seconds left; None if nothing was done since the computation began."""
        if self.done <= self.first:
            return None
        return (now - self.began) / (self.done - self.first) * (self.total - self.done)


def _tested(result: dict[str, Any]) -> dict[str, Any]:
    return result["metrics"]["test"] or result["metrics"]["val"] or {}


def _tensorboard() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        fix = 'pip install "mopefuse[track]"'
        raise ConfigError(
            ConfigCode.TENSORBOARD_MISSING, "tensorboard is not installed", where="--tensorboard", fix=fix
        ) from None
    return SummaryWriter
