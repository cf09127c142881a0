"""Self-contained HTML pages: one file with its style, scripts and pictures in it, which never loads anything.

Everything that comes from data is escaped, in attributes and scripts too, and unprintable characters are escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from mopefuse import __version__
from mopefuse.core.atomic_files import check_file, write_atomically
from mopefuse.core.error_codes import ConfigCode, DataCode
from mopefuse.data.storage.paths import is_remote
from mopefuse.errors import ConfigError, DataError
from mopefuse.report.chart import Chart, readable
from mopefuse.report.embedding import embed

SIDE = 200  # pixels; the longer side of a thumbnail
_MARK = '<meta name="generator" content="mopefuse">'


def _readable(value: Any) -> Any:
    return readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_readable,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters["thousands"] = lambda number: f"{number:,}"
_ENVIRONMENT.filters["percent"] = lambda share: f"{100 * share:.1f} %"


def render(template: str, charts: Sequence[Chart] = (), *, scripted: bool = False, **facts: Any) -> str:
    """A page of `templates`, filled in.

    Args:
        charts: all charts on the page. scripted: whether it has a table to sort or filter.
    """
    embedded = embed(charts, scripted=scripted)
    return _ENVIRONMENT.get_template(template).render(mark=Markup(_MARK), version=__version__, embedded=embedded, **facts)


@dataclass(frozen=True)
class Section:
    """A part of a page, under a title.

    Args:
        key: its address on the page, unique there. body: escaped HTML, from `fragment`.
        charts: its charts, which can also be written as files.
        half: whether another half may be placed next to it, if there is space.
        folded: why it is collapsed at first, in a sentence; neighbours with the same reason are collapsed together.
        scripted: it has a table to sort or filter.
    """

    key: str
    title: str
    body: Markup
    charts: tuple[Chart, ...] = ()
    half: bool = False
    folded: str = ""
    scripted: bool = False


def fragment(name: str, *values: Any, **facts: Any) -> Markup:
    """A piece of a page: a macro of `templates/parts.html`, called; everything that is not `Markup` is escaped."""
    piece: Markup = getattr(_ENVIRONMENT.get_template("parts.html").module, name)(*values, **facts)
    return piece


def sections_page(
    title: str,
    summary: str,
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    *,
    pill: str = "",
    notes: Sequence[str] = (),
) -> str:
    """A page of sections.

    Args:
        summary: description of the content. tiles: (name, value) of the numbers on top.
        pill: a word next to the title. notes: what a reader must know first.
    """
    groups: list[list[Section]] = []
    for section in sections:
        last = groups[-1] if groups else []
        beside = section.half and len(last) == 1 and last[0].half and not last[0].folded
        if last and ((beside and not section.folded) or (section.folded and section.folded == last[0].folded)):
            last.append(section)
        else:
            groups.append([section])
    charts = [chart for section in sections for chart in section.charts]
    scripted = any(section.scripted for section in sections)
    page = {"title": title, "summary": summary, "tiles": tiles, "groups": groups, "pill": pill, "notes": notes}
    return render("sections.html", charts, scripted=scripted, **page)


def check_place(page: Path, data: Path | None) -> None:
    """Refuse to write a page into a data folder, or over a file that is not a mopefuse page.

    Raises:
        DataError: such a place. ConfigError: see `check_file`.
    """
    check_file(page, where="--html or --out")
    if data is not None and not is_remote(data) and data.is_dir() and page.resolve().is_relative_to(data.resolve()):
        raise DataError(
            DataCode.PAGE_INSIDE_DATA,
            "the page would be inside the data folder",
            where=str(page),
            fix="choose a file outside the data folder",
        )
    if page.exists() and not _is_ours(page):
        raise DataError(
            DataCode.PAGE_NOT_OURS,
            f"{page.name} exists and is not a mopefuse page",
            where=str(page),
            fix="choose a different file",
        )


def check_places(page: Path, data: Path | None, figures: Path | None) -> None:
    """Like `check_place`; also check that figures can be written.

    Raises:
        DataError: see `check_place`. ConfigError: `figures` is not a folder.
    """
    check_place(page, data)
    if figures is not None and figures.exists() and not figures.is_dir():
        raise ConfigError(
            ConfigCode.FIGURES_NOT_A_FOLDER,
            f"{figures} is not a folder",
            where="--figures",
            fix="choose a folder for the figures",
        )


def save_charts(parts: Sequence[Section], folder: Path | None) -> tuple[Path, ...]:
    """Write the charts of sections as SVG and PNG; returns their files, none if no folder is given."""
    if folder is None:
        return ()
    folder.mkdir(parents=True, exist_ok=True)
    return tuple(path for part in parts for chart in part.charts for path in chart.save(folder))


def _is_ours(page: Path) -> bool:
    if not page.is_file():
        return False
    with page.open("rb") as file:
        return _MARK.encode() in file.read(1000)


def write(page: Path, html: str) -> None:
    """Write the page, whole or not at all.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    write_atomically(page, html)


def thumbnail(image: Image.Image) -> str:
    """An RGB image as a JPEG of at most 200 pixels a side, as a ``data:`` address."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82, subsampling=0 if min(small.size) < 64 else -1)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def dump(content: bytes) -> list[tuple[str, str]]:
    """Bytes as lines of eight: in hex, and as text with a dot for each unprintable byte."""
    lines = [content[start : start + 8] for start in range(0, len(content), 8)]
    return [(line.hex(" ", -2).ljust(19), "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)) for line in lines]
