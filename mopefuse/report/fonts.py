"""The font of a picture's text: Pillow's own, which has little beyond ASCII, or one of this machine that has more.

A font draws one and the same box for whatever it lacks; here that becomes a question mark, and can be asked for.
"""

from __future__ import annotations

import unicodedata
from functools import cache

from PIL import ImageFont, features

_OTHERS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial Unicode.ttf", "Arial.ttf", "arial.ttf",
    "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf",
)  # fmt: skip
_MISSING = "\U0010ffff"  # no font has it
_LEFTWARD = ("R", "AL")

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def able(text: str, size: float) -> tuple[Font, str]:
    """The first font that has all of a text, else the one that lacks least; and the text as that can draw it."""
    text = unicodedata.normalize("NFC", text)
    name = min(_names(), key=lambda name: len(_lost(name, text)))  # the first of several
    lost = set(_lost(name, text))
    return _font(name, size), "".join("?" if character in lost else character for character in text)


def lost(text: str) -> str:
    """What of a text no single font here can draw."""
    text = unicodedata.normalize("NFC", text)
    return min((_lost(name, text) for name in _names()), key=len)


def _lost(name: str, text: str) -> str:
    return "".join(character for character in text if not _has(name, character))


@cache
def _names() -> tuple[str, ...]:
    """Pillow's own as the empty name, and those that are installed."""
    return "", *(name for name in _OTHERS if _installed(name))


def _installed(name: str) -> bool:
    try:
        _font(name, 12)
    except OSError:
        return False
    return True


@cache
def _font(name: str, size: float) -> Font:
    return ImageFont.truetype(name, size) if name else ImageFont.load_default(size)


@cache
def _has(name: str, character: str) -> bool:
    if unicodedata.bidirectional(character) in _LEFTWARD and not features.check("raqm"):
        return False  # it would be drawn in the wrong order
    if character.isspace() or unicodedata.category(character) == "Cf":
        return True
    font = _font(name, 24)
    return bytes(font.getmask(character)) != bytes(font.getmask(_MISSING))
