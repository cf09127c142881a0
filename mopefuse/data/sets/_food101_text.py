r"""Read the texts of UPMC Food-101: the rows of its titles files, and an optional cleaning of titles and pages.

A titles file has lines ``<image name>,<title>,<class>`` without a header, written by a CSV writer from the printed form of
lists of byte strings. So titles may contain commas, quotes and wrappers (``"[[""Dad's pie""]]"``; a title with a comma was
cut there, together with the end of the wrapper), escaped bytes (``\xe2\x84\xa2``), and entities (``&amp;``).
"""

from __future__ import annotations

import html
import re
from typing import NamedTuple


class TitleRow(NamedTuple):
    """One valid line of a titles file."""

    image: str
    title: str
    label: str


class OddRow(NamedTuple):
    """One line of a titles file that is not valid: the reason, and the image that it names, if that is known."""

    reason: str
    image: str


_ESCAPE = re.compile(r"((?:\\x[0-9a-fA-F]{2})+)|\\([tnr\\'\"])")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_TAG = re.compile(r"</?[A-Za-z!][^<>]*>")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_NEITHER_LETTER_NOR_DIGIT = re.compile(r"[\W_]+")


def read_title(line: bytes) -> TitleRow | OddRow:
    """Parse one line by itself, so that an unclosed quote does not affect other rows.

    The image name ends at the first comma, the class starts after the last one, and the title is between them: in double
    quotes by the rule of CSV (a quote inside is doubled), or without.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return OddRow("not UTF-8", line.partition(b",")[0].decode("utf-8", "replace"))
    image, _, rest = text.partition(",")
    title, comma, label = rest.rpartition(",")
    image, label = image.strip(), label.strip()
    if not comma or not image or not label:
        return OddRow("fewer than three fields", image)
    if title.startswith('"'):
        inner = title[1:-1]
        if len(title) < 2 or not title.endswith('"') or '"' in inner.replace('""', ""):
            return OddRow("quote not closed", image)
        title = inner.replace('""', '"')
    if not image.startswith(f"{label}_"):
        return OddRow("image name does not start with its class", image)
    return TitleRow(image, plain_title(title), label)


def plain_title(title: str) -> str:
    r"""Restore a title: remove ``[["`` ``"]]``, decode bytes and entities, and put one space between words.

    Bytes that are not UTF-8 are decoded as Windows-1252. Entities are resolved twice, for pages with ``&amp;rsquo;``.
    Control characters count as spaces.
    """
    if title.startswith(('[["', "[['")):
        quote = title[2]
        title = title[3:].removesuffix(f"{quote}]]")
    title = html.unescape(html.unescape(_ESCAPE.sub(_unescape, title)))
    return " ".join(_CONTROL.sub(" ", title).split())


def _unescape(match: re.Match[str]) -> str:
    if match[2]:
        return {"t": " ", "n": " ", "r": " "}.get(match[2], match[2])
    raw = bytes.fromhex(match[1].replace("\\x", ""))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252", "replace")


def clean(text: str) -> str:
    """Reduce a text to lower-case words: the option ``clean``.

    In this order: entities are resolved twice, tags ``<...>`` and addresses (``http://``, ``https://``, ``www.``, up to the
    next space) become spaces, every run of characters that are neither letters nor digits (of any script) becomes one space,
    letters become lower case, and spaces at both ends are removed. MMBT's preparation of Food-101 also keeps lower-case words
    without punctuation; the result is similar, not identical.
    """
    text = html.unescape(html.unescape(text))
    text = _ADDRESS.sub(" ", _TAG.sub(" ", text))
    return _NEITHER_LETTER_NOR_DIGIT.sub(" ", text).lower().strip()
