r"""How the texts of UPMC Food-101 are read: rows of its titles files, and a cleaning that they and its pages can have.

A titles file has lines ``<image name>,<title>,<class>`` without a header, made by a CSV writer from the printed form of
lists of byte strings. So titles may hold commas, quotes and wrappers (``"[[""Dad's pie""]]"``; where a title had a comma
the owners cut it there, and the wrapper's end with it), bytes written out (``\xe2\x84\xa2``), and entities (``&amp;``).
"""

from __future__ import annotations

import html
import re
from typing import NamedTuple


class TitleRow(NamedTuple):
    """One line of a titles file, understood."""

    image: str
    title: str
    label: str


class OddRow(NamedTuple):
    """One line of a titles file that is no row: why, and the image that it names as far as it can be told."""

    reason: str
    image: str


_ESCAPE = re.compile(r"((?:\\x[0-9a-fA-F]{2})+)|\\([tnr\\'\"])")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
_TAG = re.compile(r"</?[A-Za-z!][^<>]*>")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+", re.IGNORECASE)
_NEITHER_LETTER_NOR_DIGIT = re.compile(r"[\W_]+")


def read_title(line: bytes) -> TitleRow | OddRow:
    """One physical line, whatever the lines around it hold: a quote that is never closed harms no other row.

    The image name goes up to the first comma, the class follows the last one, the title is between them: in double quotes
    by the CSV rule (a quote inside is doubled), or as it stands.
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
        return OddRow("image name not of the class", image)
    return TitleRow(image, spelt_out(title), label)


def spelt_out(title: str) -> str:
    r"""A title as its page had it: without ``[["`` ``"]]``, bytes and entities as characters, one space between words.

    Bytes that are no UTF-8 are read as Windows-1252. Entities are resolved twice, for pages that wrote ``&amp;rsquo;``.
    Control characters count as spaces.
    """
    if title.startswith(('[["', "[['")):
        quote = title[2]
        title = title[3:].removesuffix(f"{quote}]]")
    title = html.unescape(html.unescape(_ESCAPE.sub(_escaped, title)))
    return " ".join(_CONTROL.sub(" ", title).split())


def _escaped(match: re.Match[str]) -> str:
    if match[2]:
        return {"t": " ", "n": " ", "r": " "}.get(match[2], match[2])
    written = bytes.fromhex(match[1].replace("\\x", ""))
    try:
        return written.decode("utf-8")
    except UnicodeDecodeError:
        return written.decode("cp1252", "replace")


def clean(text: str) -> str:
    """A text as lower-case words: the option ``clean``.

    In this order: entities become characters (twice over), tags ``<...>`` and addresses (``http://``, ``https://``,
    ``www.``, up to the next space) become spaces, every run of characters that are neither letters nor digits (of any
    script) becomes one space, letters become lower case, spaces at both ends go. MMBT's preparation of Food-101 likewise
    keeps lower-case words without punctuation; this is a cleaning of the same kind, not the same bytes.
    """
    text = html.unescape(html.unescape(text))
    text = _ADDRESS.sub(" ", _TAG.sub(" ", text))
    return _NEITHER_LETTER_NOR_DIGIT.sub(" ", text).lower().strip()
