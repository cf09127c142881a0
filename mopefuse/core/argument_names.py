"""In errors of the Python interface, replace command-line flags with the names of arguments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mopefuse.errors import MopefuseError

_COMMAND_OR_FLAG = re.compile(r"((?:mopefuse|pip) [^;,·]*)|--([a-z]+(?:-[a-z]+)*)")

_OTHERWISE = {"image-col": "img_col", "image-root": "image_roots"}  # names that do not follow from the flag


@contextmanager
def python_names() -> Iterator[None]:
    """A context whose errors name arguments (``on_missing``) in place of flags (``--on-missing``), except in commands."""
    try:
        yield
    except MopefuseError as error:
        error.what, error.where, error.fix = map(as_argument, (error.what, error.where, error.fix))
        raise


def as_argument(text: str) -> str:
    """`text` with the names of arguments in place of flags."""
    return _COMMAND_OR_FLAG.sub(lambda match: match[1] or _OTHERWISE.get(match[2]) or match[2].replace("-", "_"), text)
