"""``GET /docs``: Swagger UI, from files of an installed package, so that it works without the internet."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import Response

_PACKAGE = "fastapi_offline"
FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
"""What the page loads, with the type of each."""

_POLICY = "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:"


def docs_page() -> Response:
    """The page."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="mopefuse",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"tryItOutEnabled": True, "validatorUrl": None, "defaultModelsExpandDepth": 0},
    )
    page.headers["Content-Security-Policy"] = _POLICY
    return page


def docs_file(name: str) -> Response:
    """One of `FILES`."""
    return Response(_content(name), media_type=FILES[name], headers={"Cache-Control": "max-age=86400"})


@cache
def _content(name: str) -> bytes:
    spec = find_spec(_PACKAGE)  # not imported: only its files are needed
    assert spec is not None and spec.origin is not None, "mopefuse serve checks that it is installed"
    return (Path(spec.origin).parent / "static" / name).read_bytes()
