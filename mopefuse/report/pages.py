"""Self-contained HTML pages: one file with its style and pictures in it, which never asks a network for anything.

Everything that comes from data is escaped, in attributes too, and what cannot be shown is spelt out.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from markupsafe import Markup
from PIL import Image

from mopefuse import __version__
from mopefuse.core.artifact import check_file, write_atomically
from mopefuse.core.formatting import visible
from mopefuse.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mopefuse.report.drawing import Drawing

SIDE = 200  # pixels; the longer side of a thumbnail
_MARK = '<meta name="generator" content="mopefuse">'


def readable(text: str) -> str:
    """A text in which what cannot be shown is spelt out."""
    return visible(text, lines=True)


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


def render(template: str, **facts: Any) -> str:
    """A page of `templates`, filled in."""
    return _ENVIRONMENT.get_template(template).render(mark=Markup(_MARK), version=__version__, **facts)


@dataclass(frozen=True)
class Section:
    """A part of a page, under a title.

    Args:
        key: its address on the page, unique there. body: escaped HTML, from `fragment`.
        figures: drawings in it, which can be written as files, too.
        half: it may stand beside another half, where there is room.
    """

    key: str
    title: str
    body: Markup
    figures: tuple[Drawing, ...] = ()
    half: bool = False


def fragment(name: str, *values: Any, **facts: Any) -> Markup:
    """A piece of a page: a macro of `templates/parts.html`, called; everything that is no `Markup` is escaped."""
    piece: Markup = getattr(_ENVIRONMENT.get_template("parts.html").module, name)(*values, **facts)
    return piece


def sections_page(
    title: str,
    told: str,
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    *,
    pill: str = "",
    notes: Sequence[str] = (),
) -> str:
    """A page of sections.

    Args:
        told: what it is about. tiles: (name, value) of the numbers on top.
        pill: a word beside the title. notes: what a reader must know first.
    """
    groups: list[list[Section]] = []
    for section in sections:
        if section.half and groups and groups[-1][0].half and len(groups[-1]) == 1:
            groups[-1].append(section)
        else:
            groups.append([section])
    return render("sections.html", title=title, told=told, tiles=tiles, groups=groups, pill=pill, notes=notes)


def check_place(page: Path, data: Path | None) -> None:
    """Refuse to write a page into a data folder, or over anything that is no page of ours.

    Raises:
        DataError: such a place. ConfigError: see `check_file`.
    """
    check_file(page, where="--html or --out")
    if data is not None and data.is_dir() and page.resolve().is_relative_to(data.resolve()):
        raise DataError(84, "the page would lie in the data folder", where=str(page), fix="name a file beside it")
    if page.exists() and not _is_ours(page):
        raise DataError(86, f"{page.name} is there and is no page of mopefuse", where=str(page), fix="name another file")


def check_places(page: Path, data: Path | None, figures: Path | None) -> None:
    """As `check_place`, and that figures can be written.

    Raises:
        DataError: see there. ConfigError: `figures` is no folder.
    """
    check_place(page, data)
    if figures is not None and figures.exists() and not figures.is_dir():
        raise ConfigError(90, f"{figures} is no folder", where="--figures", fix="name a folder for the figures")


def save_figures(parts: Sequence[Section], figures: Path | None) -> tuple[tuple[Path, ...], list[str]]:
    """The files of the figures, and what is wrong with them."""
    if figures is None:
        return (), []
    figures.mkdir(parents=True, exist_ok=True)
    drawings = [drawing for part in parts for drawing in part.figures]
    lost = "".join(dict.fromkeys("".join(drawing.unwritable for drawing in drawings)))
    files = tuple(path for drawing in drawings for path in drawing.save(figures))
    what = f"no font here has {lost[:20]}: PNG figures have question marks instead, the SVG ones and the page are whole"
    return files, [what] if lost else []


def _is_ours(page: Path) -> bool:
    if not page.is_file():
        return False
    with page.open("rb") as file:
        return _MARK.encode() in file.read(1000)


def write(page: Path, html: str) -> None:
    """The page, whole or not at all.

    Raises:
        ResourceError: the disk is full or cannot be written.
    """
    write_atomically(page, html)


def thumbnail(image: Image.Image) -> str:
    """An RGB image as a JPEG of at most 200 pixels a side, in a ``data:`` address."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82, subsampling=0 if min(small.size) < 64 else -1)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def dump(content: bytes) -> list[tuple[str, str]]:
    """Bytes as lines of eight: in hex, and as text with a dot for what cannot be shown."""
    lines = [content[start : start + 8] for start in range(0, len(content), 8)]
    return [(line.hex(" ", -2).ljust(19), "".join(chr(byte) if 32 <= byte < 127 else "." for byte in line)) for line in lines]
