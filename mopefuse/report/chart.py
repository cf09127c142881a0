"""A chart: its Vega-Lite specification, what it shows in words, and its numbers; as part of a page and as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopefuse.core.atomic_files import replace_atomically, write_atomically
from mopefuse.core.dependencies import require
from mopefuse.core.formatting import visible
from mopefuse.report.themes import FILE_THEME

FILE_WIDTH = 560  # pixels of a file; on a page a chart takes the available width
_SCALE = 3  # pixels of a PNG for each of an SVG

Spec = Mapping[str, Any]


def require_charts(what: str) -> None:
    """Check that the packages that draw charts are installed.

    Raises:
        PackageError: one of them is missing.
    """
    require("altair", "vl_convert", extra="report", what=what)


@dataclass(frozen=True)
class Chart:
    """A chart of a page.

    Args:
        name: unique on the page; also the name of its files. label: what it shows.
        spec: Vega-Lite, with its data, without colours. columns, rows: its numbers, as text.
    """

    name: str
    label: str
    spec: Spec
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def save(self, folder: Path) -> list[Path]:
        """Write NAME.svg and NAME.png into a folder, each whole or not at all."""
        import vl_convert

        spec = {**self.spec, "width": FILE_WIDTH}
        options: dict[str, Any] = {"config": FILE_THEME, "allowed_base_urls": []}
        paths = [folder / f"{self.name}.svg", folder / f"{self.name}.png"]
        write_atomically(paths[0], vl_convert.vegalite_to_svg(spec, **options))
        with replace_atomically(paths[1]) as temporary:
            temporary.write_bytes(vl_convert.vegalite_to_png(spec, scale=_SCALE, **options))
        return paths


def zoom() -> Any:
    """Zoom with the wheel while Ctrl is held, so that a page still scrolls; drag to move, double-click to go back."""
    import altair

    return altair.selection_interval(name="zoom", bind="scales", zoom="wheel![event.ctrlKey || event.metaKey]")


def make_chart(
    name: str, label: str, layers: Sequence[Any], columns: Sequence[str], rows: Sequence[Sequence[str]], *, height: int
) -> Chart:
    """A chart of Altair layers that takes the available width.

    Args:
        columns, rows: see `Chart`. height: height of the plotting area, in pixels.
    """
    import altair

    fit = altair.AutoSizeParams(type="fit-x", contains="padding")
    spec = altair.layer(*layers).properties(width="container", height=height, autosize=fit).to_dict()
    spec.pop("$schema", None)  # a URL; our pages contain none
    spec.pop("config", None)  # pages and files have their own themes
    return Chart(name, label, spec, columns, rows)


def data_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Rows as the data of an Altair chart; unprintable characters in its texts are escaped.

    Texts that come from data or settings belong here, or into titles of axes: Vega treats them as plain text. Names of
    fields, and formulas, are only those written in this package.
    """
    import altair

    shown = [{key: readable(value) if isinstance(value, str) else value for key, value in row.items()} for row in rows]
    return altair.Data(values=shown)


def shorten(text: str, most: int) -> str:
    """A text, cut at its end if it is longer than `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def shorten_middle(text: str, most: int) -> str:
    """A text, cut in its middle if it is longer, because names of rows often differ at their ends."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[-(most // 2) :]}"


def short_names(names: Sequence[str], most: int) -> list[str]:
    """Names shortened in their middle, numbered if that would make two of them equal."""
    found: list[str] = []
    for name in names:
        short, number = shorten_middle(name, most), 1
        while short in found:
            number += 1
            short = f"{shorten_middle(name, most)} ({number})"
        found.append(short)
    return found


def readable(text: str) -> str:
    """A text with unprintable characters escaped."""
    return visible(text, lines=True)


def plain(value: float) -> str:
    """A number with four significant digits, without an exponent if that is readable."""
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
