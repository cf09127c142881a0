"""Charts in a page: the scripts that draw them, which are embedded, and the content security policy that allows no others.

Vega runs without ``eval``: its formulas are interpreted (the option ``ast`` of vega-embed), so that the policy can forbid it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

from mopefuse.core import cache as kept
from mopefuse.report.chart import Chart
from mopefuse.report.themes import THEMES

_KIND, _FILE = "charts", "vega.js"
_EXPORTS = "window.vegaEmbed = vegaEmbed;"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Embedded:
    """What a page with scripts needs.

    Args:
        policy: its Content-Security-Policy. scripts: elements for the end of its body.
    """

    policy: str
    scripts: Markup


def embed(charts: Sequence[Chart], *, scripted: bool) -> Embedded:
    """The scripts of a page.

    Args:
        scripted: whether the page has anything that one of our scripts sorts or filters.
    """
    if not charts and not scripted:
        return Embedded(_POLICY, Markup(""))
    data = {"charts": {chart.name: chart.spec for chart in charts}, "themes": THEMES}
    sources = [*([_library()] if charts else []), _own_script()]
    block = Markup('<script type="application/json" id="charts">{}</script>').format(Markup(inert_json(data)))
    scripts = Markup("\n").join([block, *(Markup(f"<script>{source}</script>") for source in sources)])
    allowed = " ".join(f"'{_digest(source)}'" for source in sources)
    return Embedded(f"{_POLICY}; script-src {allowed}", scripts)


def inert_json(value: Any) -> str:
    """JSON that cannot end a script element or begin a comment or element, regardless of its texts."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _digest(source: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


@cache
def _own_script() -> str:
    return (Path(__file__).parent / "templates" / "page.js").read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Vega, Vega-Lite and vega-embed as one script. To bundle them takes seconds, so the result is cached."""
    import vl_convert

    key = kept.make_key("vega", version("vl-convert-python"), vl_convert.get_vega_version(), _EXPORTS)
    found = kept.find(_KIND, key)
    if found is not None:
        return (found[0] / _FILE).read_text(encoding="utf-8")
    source = vl_convert.javascript_bundle(_EXPORTS).replace("</script", "<\\/script").replace("<!--", "<\\!--")

    def write(folder: Path) -> None:
        (folder / _FILE).write_text(source, encoding="utf-8", newline="\n")

    kept.store(_KIND, key, write, {"charts": 1})
    return source
