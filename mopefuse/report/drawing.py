"""Drawings of a few kinds of shapes: as SVG in a page, whose style gives the colours, and as SVG and PNG files of their own.

Places are in units of the drawing, from its upper left corner.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markupsafe import Markup
from PIL import Image, ImageColor, ImageDraw

from mopefuse.core.artifact import replacing, write_atomically
from mopefuse.report import fonts
from mopefuse.report.pages import readable

_COLOURS = {  # of files; a page has its own, in templates/base.html
    "axis": "#d5dae2",
    "text": "#5c6675",
    "strong": "#1b2230",
    "a": "#3566d6",
    "b": "#1f9d8a",
    "c": "#c77d1a",
    "d": "#8b4fd0",
    "e": "#c43d86",
    "f": "#6f7a2a",
    "bad": "#c5322a",
    "paper": "#ffffff",
}
_FONT = 11.0
_SCALE = 3  # pixels of a PNG for a unit
_SMOOTH = 2  # times that it is drawn larger, before it is made smaller


@dataclass(frozen=True)
class Rect:
    """A filled rectangle."""

    x: float
    y: float
    width: float
    height: float
    colour: str = "a"
    opacity: float = 1.0
    title: str = ""


@dataclass(frozen=True)
class Line:
    """A line through points."""

    points: tuple[tuple[float, float], ...]
    colour: str = "a"
    thick: float = 1.5
    dashed: bool = False
    title: str = ""


@dataclass(frozen=True)
class Area:
    """A filled polygon."""

    points: tuple[tuple[float, float], ...]
    colour: str = "a"
    opacity: float = 1.0
    title: str = ""


@dataclass(frozen=True)
class Dot:
    """A filled circle."""

    x: float
    y: float
    radius: float
    colour: str = "a"
    title: str = ""


@dataclass(frozen=True)
class Text:
    """A word or number; `y` is where its line stands. `upright` ones are read from below, and begin at (x, y)."""

    x: float
    y: float
    text: str
    anchor: str = "start"  # middle, end
    colour: str = "text"
    upright: bool = False
    title: str = ""


Shape = Rect | Line | Area | Dot | Text


@dataclass(frozen=True)
class Drawing:
    """Shapes on a plane. `label` says in words what they show."""

    name: str
    label: str
    width: float
    height: float
    shapes: tuple[Shape, ...]

    def svg(self) -> Markup:
        """To be put into a page, with classes for colours and a title where a pointer rests."""
        inside = Markup("").join(_element(shape) for shape in self.shapes)
        box = '<svg class="drawing" viewBox="0 0 {:g} {:g}" style="max-width: {:g}px" role="img" aria-label="{}">{}</svg>'
        return Markup(box).format(self.width, self.height, self.width * 1.25, readable(self.label), inside)

    def svg_file(self) -> str:
        """A document of its own, on white, with its colours in it."""
        style = "".join(
            f".f-{name}{{fill:{colour}}}.s-{name}{{stroke:{colour};fill:none}}" for name, colour in _COLOURS.items()
        )
        inside = Markup("").join(_element(shape) for shape in self.shapes)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}" '
            f'height="{self.height:g}" font-family="sans-serif" font-size="{_FONT:g}">'
            f'<title>{html.escape(readable(self.label))}</title><style>{style}</style>'
            f'<rect width="100%" height="100%" fill="#fff"/>{inside}</svg>\n'
        )

    def png(self) -> Image.Image:
        """As pixels, on white."""
        factor = _SCALE * _SMOOTH
        image = Image.new("RGB", (round(self.width * factor), round(self.height * factor)), "white")
        for shape in self.shapes:
            _paint(image, shape, factor)
        return image.resize((round(self.width * _SCALE), round(self.height * _SCALE)), Image.Resampling.BOX)

    @property
    def unwritable(self) -> str:
        """Characters in it that no font here has: a PNG of it has question marks instead."""
        lost = "".join(fonts.lost(readable(shape.text)) for shape in self.shapes if isinstance(shape, Text))
        return "".join(dict.fromkeys(lost))

    def save(self, folder: Path) -> list[Path]:
        """Write NAME.svg and NAME.png into a folder, each whole or not at all."""
        paths = [folder / f"{self.name}.svg", folder / f"{self.name}.png"]
        write_atomically(paths[0], self.svg_file())
        with replacing(paths[1]) as temporary:
            self.png().save(temporary, "PNG")
        return paths


# -- SVG


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _element(shape: Shape) -> Markup:
    title = Markup("<title>{}</title>").format(readable(shape.title)) if shape.title else Markup("")
    if isinstance(shape, Rect):
        place = tuple(map(_number, (shape.x, shape.y, shape.width, shape.height)))
        faint = "" if shape.opacity == 1 else Markup(' fill-opacity="{}"').format(_number(shape.opacity))
        return Markup('<rect class="f-{}" x="{}" y="{}" width="{}" height="{}"{}>{}</rect>').format(
            shape.colour, *place, faint, title
        )
    if isinstance(shape, Line | Area):
        points = " ".join(f"{_number(x)},{_number(y)}" for x, y in shape.points)
    if isinstance(shape, Area):
        return Markup('<polygon class="f-{}" points="{}" fill-opacity="{}">{}</polygon>').format(
            shape.colour, points, _number(shape.opacity), title
        )
    if isinstance(shape, Line):
        dashes = Markup(' stroke-dasharray="4 3"') if shape.dashed else ""
        return Markup('<polyline class="s-{}" points="{}" stroke-width="{:g}"{}>{}</polyline>').format(
            shape.colour, points, shape.thick, dashes, title
        )
    if isinstance(shape, Dot):
        return Markup('<circle class="f-{}" cx="{}" cy="{}" r="{}">{}</circle>').format(
            shape.colour, _number(shape.x), _number(shape.y), _number(shape.radius), title
        )
    x, y = _number(shape.x), _number(shape.y)
    turned = Markup(' transform="rotate(-90 {} {})"').format(x, y) if shape.upright else ""
    anchor = "" if shape.anchor == "start" else Markup(' text-anchor="{}"').format(shape.anchor)
    body = readable(shape.text)
    return Markup('<text class="f-{}" x="{}" y="{}"{}{}>{}{}</text>').format(shape.colour, x, y, anchor, turned, title, body)


# -- pixels


def _paint(image: Image.Image, shape: Shape, factor: int) -> None:
    draw, colour = ImageDraw.Draw(image, "RGBA"), _COLOURS[shape.colour]
    if isinstance(shape, Rect):
        corners = [value * factor for value in (shape.x, shape.y, shape.x + shape.width, shape.y + shape.height)]
        if corners[2] - corners[0] >= 1 and corners[3] - corners[1] >= 1:
            draw.rectangle([corners[0], corners[1], corners[2] - 1, corners[3] - 1], fill=_shade(colour, shape.opacity))
    elif isinstance(shape, Area):
        draw.polygon([(x * factor, y * factor) for x, y in shape.points], fill=_shade(colour, shape.opacity))
    elif isinstance(shape, Line):
        points = [(x * factor, y * factor) for x, y in shape.points]
        for part in _dashes(points, factor) if shape.dashed else [points]:
            draw.line(part, fill=colour, width=max(1, round(shape.thick * factor)), joint="curve")
    elif isinstance(shape, Dot):
        x, y, radius = shape.x * factor, shape.y * factor, shape.radius * factor
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
    else:
        _write(image, shape, colour, factor)


def _shade(colour: str, opacity: float) -> tuple[int, ...]:
    return (*ImageColor.getrgb(colour)[:3], round(255 * opacity))


def _write(image: Image.Image, shape: Text, colour: str, factor: int) -> None:
    font, text = fonts.able(readable(shape.text).replace("\n", " "), _FONT * factor)
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[shape.anchor]
    if not shape.upright:
        ImageDraw.Draw(image).text((shape.x * factor, shape.y * factor), text, fill=colour, font=font, anchor=anchor)
        return
    left, top, right, bottom = (round(side) for side in font.getbbox(text, anchor="ls"))
    turned = Image.new("L", (max(1, right - min(0, left)), max(1, bottom - top)))
    ImageDraw.Draw(turned).text((-min(0, left), -top), text, fill=255, font=font, anchor="ls")
    turned = turned.rotate(90, expand=True)
    shift = {"start": 1.0, "middle": 0.5, "end": 0.0}[shape.anchor]
    at = (round(shape.x * factor) + top, round(shape.y * factor - shift * turned.height))
    image.paste(Image.new("RGB", turned.size, colour), at, turned)


def _dashes(points: list[tuple[float, float]], factor: int) -> list[list[tuple[float, float]]]:
    """A line as pieces of 4 units with 3 between."""
    pieces = []
    for (x, y), (to_x, to_y) in pairwise(points):
        length = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5
        step = 7 * factor
        for number in range(int(length // step) + 1):
            first, last = number * step / max(length, 1e-9), min(1.0, (number * step + 4 * factor) / max(length, 1e-9))
            pieces.append([(x + (to_x - x) * at, y + (to_y - y) * at) for at in (first, last)])
    return pieces
