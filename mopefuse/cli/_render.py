"""How the command line speaks: results on stdout, everything else on stderr, one JSON object with ``--json``."""

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
    """Results: tables in colour on a terminal, plain when piped."""
    return _console(stderr=False)


def err() -> Console:
    """Progress, notices and errors."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    """A console that prints each text as one line: nothing in it is markup, control characters in it are spelt out."""
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
    """A text that a console prints as the several lines that it is."""
    from rich.text import Text

    return Text(visible(text, lines=True))


def print_json(value: dict[str, Any]) -> None:
    """One object on stdout and nothing else there; what is not a number is null."""
    from mopefuse.core.artifact import finite

    print(json_text(finite(value), ensure_ascii=not speaks_unicode(sys.stdout)))


def speaks_unicode(stream: Any) -> bool:
    """Whether every character can be written to a stream as it is."""
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    bold: int | None = None,
    left: Collection[int] = (0,),
) -> None:
    """A table on stdout: columns of the numbers `left` begin at the left, others end at the right; row `bold` stands out."""
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
    """The same without colour or lines, as it is piped."""
    written = [[visible(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in written) for i in range(len(columns))]
    lines = []
    for row in written:
        cells = [cell.ljust(widths[i]) if i in left else cell.rjust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
