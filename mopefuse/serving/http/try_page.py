"""``GET /``: a page to try the models in a browser. It is one file, loads only answers of its own server, and names no model.

The models are read by the page from ``/models``, so it can be sent to clients without a key, and is the same for all.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path

from starlette.responses import HTMLResponse

from mopefuse import __version__
from mopefuse.errors import MopefuseError
from mopefuse.modalities import base as modality

_FOLDER = Path(__file__).parent / "templates"
_HEADERS = {"Cache-Control": "no-cache", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}


def try_page() -> HTMLResponse:
    """The page, with a policy by which a browser runs only its own scripts and sends requests only to its own server."""
    text, policy = _page()
    return HTMLResponse(text, headers={**_HEADERS, "Content-Security-Policy": policy})


@cache
def _page() -> tuple[str, str]:
    """The page, and its Content-Security-Policy."""
    style, results, form = map(_read, ("try.css", "try_results.js", "try.js"))
    text = _read("try.html").replace("<!-- version -->", __version__)
    parts = {"style": style, "modalities": _modalities(), "results": results, "form": form}
    for name, content in parts.items():
        text = text.replace(f"/* {name} */", content)
    policy = {
        "default-src": "'none'",
        "style-src": _digest(style),
        "script-src": f"{_digest(results)} {_digest(form)}",
        "img-src": "blob: data:",
        "connect-src": "'self'",
        **dict.fromkeys(("base-uri", "form-action", "frame-ancestors"), "'none'"),
    }
    return text, "; ".join(f"{name} {value}" for name, value in policy.items())


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    """How a policy names a script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'"


def _modalities() -> str:
    """How the page asks for values of each installed modality, as JSON that cannot end its element."""
    found = {}
    for name in modality.modality_names():
        try:
            kind = modality.get_modality(name)
        except MopefuseError:  # a broken plugin, whose models cannot be served either
            continue
        found[name] = {"file": kind.is_file, "picture": kind.is_picture}
    return json.dumps(found).replace("<", "\\u003c")
