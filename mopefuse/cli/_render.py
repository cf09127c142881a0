"""Output of the command line: results on stdout, everything else on stderr; with ``--json`` one object on stdout."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from mopefuse.core.formatting import count as count
from mopefuse.core.formatting import duration as duration
from mopefuse.core.formatting import json_text, visible
from mopefuse.core.formatting import percent as percent
from mopefuse.core.formatting import size as size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def out() -> Console:
    """The console for results: stdout, in colour on a terminal, plain in a pipe."""
    return _console(stderr=False)


def err() -> Console:
    """The console for progress, notices and errors: stderr."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    """A console that prints each text as one line, without markup and with control characters escaped."""
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text

    class PlainStatus(Status):
        def update(self, status: Any = None, **how: Any) -> None:
            super().update(Text(visible(status)) if isinstance(status, str) else status, **how)

    class PlainConsole(Console):
        def print(self, *parts: Any, **how: Any) -> None:
            super().print(*(visible(part) if isinstance(part, str) else part for part in parts), **how)

        def status(self, status: Any, **how: Any) -> Status:
            return PlainStatus(Text(visible(status)), console=self, **how)

    stream = sys.stderr if stderr else sys.stdout
    return PlainConsole(stderr=stderr, soft_wrap=not stream.isatty(), highlight=False, markup=False)


def lines(text: str) -> Text:
    """A text that a console prints with its line breaks."""
    from rich.text import Text

    return Text(visible(text, lines=True))


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON object on stdout; NaN and infinity become null."""
    from mopefuse.core.artifact import finite

    print(json_text(finite(value), ensure_ascii=not can_encode_unicode(sys.stdout)))


def can_encode_unicode(stream: Any) -> bool:
    """Whether a stream can encode every character."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    bold: int | None = None,
    left: Collection[int] = (0,),
) -> None:
    """Print a table on stdout.

    Args:
        bold: number of the row to highlight. left: numbers of the left-aligned columns; others are right-aligned.
    """
    console = out()
    if not console.is_terminal:
        print(f"{visible(title)}:")
        print(plain_table(columns, rows, left=left))
        return
    from rich.table import Table

    grid = Table(title=visible(title), title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        grid.add_column(visible(column), justify="left" if number in left else "right", overflow="fold")
    for number, row in enumerate(rows):
        grid.add_row(*map(visible, row), style="bold green" if number == bold else None)
    console.print(grid)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Collection[int] = (0,)) -> str:
    """The table as text, without colour or lines."""
    written = [[visible(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in written) for i in range(len(columns))]
    lines = []
    for row in written:
        cells = [cell.ljust(widths[i]) if i in left else cell.rjust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
