"""Charts show what they are given, in distinguishable colours, as text and as files."""

from __future__ import annotations

import builtins
import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chart_cases import encodings, layers_of, rows_of, tips
from check_cases import HOSTILE
from conftest import call, code_of
from PIL import Image, ImageColor

from mopefuse.core import cache as kept
from mopefuse.core import dependencies
from mopefuse.report import embedding
from mopefuse.report.bars import bars, heat_map, reliability
from mopefuse.report.chart import Chart, plain, require_charts, short_names, shorten, shorten_middle
from mopefuse.report.curves import Curve, curves, dots, scatter, spans_decades
from mopefuse.report.themes import SERIES, THEMES

# -- what is drawn


def test_axes_of_bars_and_losses_start_at_zero_and_those_of_scores_at_the_data() -> None:
    chart = bars("x", "x", [("a", 0.5), ("b", 0.25)], across="accuracy", against=0.5)
    assert encodings(chart, "x")[0]["scale"]["domain"][0] == 0
    assert [row["value"] for row in rows_of(chart, "value")] == [0.5, 0.25, 0.5], "two bars, and the line to compare with"
    loss = curves("x", "x", [Curve("loss", [(1, 2.0), (2, 1.5)])], across="step", up="loss", low=0.0)
    scales = [y["scale"] for y in encodings(loss, "y") if "scale" in y]
    assert scales and all(scale["domainMin"] == 0 and scale["domainMax"] > 2.0 for scale in scales)
    score = curves("x", "x", [Curve("accuracy", [(1, 0.5), (2, 0.6)])], across="step", up="accuracy", percent=True)
    assert all(y["scale"]["zero"] is False for y in encodings(score, "y"))


def test_one_curve_has_no_legend_and_several_have_one_colour_each() -> None:
    def lines(count: int) -> list[Curve]:
        return [Curve(f"row {n}", [(1, 0.1), (2, 0.1 * n)]) for n in range(count)]

    assert encodings(curves("x", "x", lines(1), across="step", up="y"), "color") == []
    several = encodings(curves("x", "x", lines(3), across="step", up="y"), "color")
    assert several and all(colour["scale"]["domain"] == ["row 0", "row 1", "row 2"] for colour in several)
    assert {colour["legend"]["orient"] for colour in several} == {"bottom"}, "not next to a curve, which it could cover"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_are_distinguishable_and_text_is_legible(theme: str) -> None:
    found = THEMES[theme]["range"]["category"]
    assert len(found) == SERIES == 6
    for one, other in combinations([*found, THEMES[theme]["style"]["over"]["color"]], 2):
        distance = np.linalg.norm(np.subtract(ImageColor.getrgb(one), ImageColor.getrgb(other)))
        assert distance > 45, (one, other)
    paper = {"light": "#ffffff", "dark": "#1b2029"}[theme]
    for colour in (THEMES[theme]["axis"]["labelColor"], THEMES[theme]["style"]["strong"]["color"]):
        assert _contrast(colour, paper) > 4.5, "WCAG 2.1, level AA"
    assert _contrast(THEMES[theme]["style"]["on-colour"]["color"], found[0]) > 4.5


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = np.array(ImageColor.getrgb(colour)) / 255
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_spread_is_drawn_as_bars_or_a_band_with_the_given_ends() -> None:
    line = Curve("a", [(1.0, 0.5), (100.0, 0.5)], [0.1, 0.2])
    for bands, mark in ((False, "rule"), (True, "area")):
        chart = curves("x", "x", [line], across="x", up="y", log=True, bands=bands)
        assert [(row["low"], row["high"]) for row in rows_of(chart, "low")] == [(0.4, 0.6), (0.3, 0.7)]
        drawn = [layer["mark"]["type"] for layer in layers_of(chart) if "y2" in layer["encoding"]]
        assert drawn == [mark]
    assert tips(chart) == ["a, x 1: 0.5 ± 0.1", "a, x 100: 0.5 ± 0.2"]
    assert not [layer for layer in layers_of(curves("x", "x", [Curve("a", line.points)], across="x", up="y")) if "y2" in layer]


def test_settings_that_span_decades_have_a_logarithmic_axis() -> None:
    points = [Curve("a", [(10, 0.5)]), Curve("b", [(1000, 0.6)])]
    assert {x["scale"].get("type") for x in encodings(scatter("x", "x", points, across="n", up="y"), "x")} == {"log"}
    assert spans_decades([1, 16]) and not spans_decades([1, 9]) and not spans_decades([0, 100])


def test_the_table_of_numbers_has_every_point() -> None:
    lines = [Curve("a", [(1, 0.5), (2, 0.6)]), Curve("b", [(2, 0.25)], [0.05])]
    chart = curves("x", "x", lines, across="step", up="accuracy", percent=True)
    assert chart.columns == ["step", "a", "b"]
    assert chart.rows == [["1", "50 %", ""], ["2", "60 %", "25 % ± 5 %"]]
    of_dots = dots("x", "x", [Curve("a", [(0, 0.5)], [0.1])], across="accuracy", percent=True)
    assert of_dots.rows == [["a", "50 % ± 10 %"]]
    of_bins = reliability("x", "x", [(0.0, 0.0, 0), (0.25, 0.5, 4)])
    assert of_bins.rows == [["25.0 %", "50.0 %", "4"]], "an empty bin has no text"


def test_curves_of_one_point_or_of_one_value_can_be_drawn(tmp_path: Path) -> None:
    for number, points in enumerate(([(1.0, 0.5)], [(1.0, 0.5), (2.0, 0.5)])):
        chart = curves(f"x{number}", "x", [Curve("y", points, [0.1] * len(points))], across="step", up="y", mark=1)
        assert all(path.stat().st_size > 500 for path in chart.save(tmp_path))
        assert "NaN" not in (tmp_path / f"x{number}.svg").read_text()


def test_the_selected_step_is_marked_if_it_is_within_the_axis() -> None:
    for mark, seen in ((2.0, [2.0]), (9.0, [])):
        chart = curves("x", "x", [Curve("y", [(1, 1), (3, 2)])], across="step", up="y", mark=mark)
        assert [row["x"] for row in rows_of(chart, "shown")] == seen


def test_shortened_names_keep_their_ends_and_stay_distinct() -> None:
    assert shorten_middle("a long name, fraction=0.1", 13) == "a long…on=0.1"
    assert len(shorten_middle("x" * 99, 13)) == len(shorten_middle("x" * 99, 12)) + 1 == 13
    assert shorten_middle("short", 5) == shorten("short", 5) == "short" and shorten("longer", 5) == "long…"
    assert short_names(["a" * 9 + "1" + "b" * 9, "a" * 9 + "2" + "b" * 9], 9) == ["aaaa…bbbb", "aaaa…bbbb (2)"]
    assert plain(12345.6) == "12,346" and plain(0.00012345) == "0.0001234"


# -- files


def test_a_png_has_the_colours_of_its_heat_map(tmp_path: Path) -> None:
    values = [[0.0, 1.0], [0.5, float("nan")]]
    chart = heat_map("x", "x", values, ["a", "b"], ["1", "2"], across="n", down="m", tips=lambda i, j: f"{i} {j}")
    image = Image.open(chart.save(tmp_path)[1]).convert("RGB")
    counts = {colour: count for count, colour in image.getcolors(1 << 24) or []}
    dark, light = (ImageColor.getrgb(THEMES["light"]["range"]["ramp"][end]) for end in (1, 0))
    cell = counts[dark]
    assert cell > 10_000 and 1.9 < counts[light] / cell < 2.1, "one full cell and two empty ones"
    assert chart.rows == [["a", "0.0 %", "100.0 %"], ["b", "50.0 %", "-"]]


def test_hostile_names_are_plain_text_in_files(tmp_path: Path) -> None:
    lines = [Curve(f"{HOSTILE} {n}", [(1, 0.5), (2, n)]) for n in range(2)]
    svg = curves("x", "x", lines, across=HOSTILE, up='"]+alert(1)+["').save(tmp_path)[0].read_text(encoding="utf-8")
    assert "<script" not in svg and "&lt;script&gt;" in svg and "]+alert(1)+[" in svg


# -- the page


def test_embedded_json_cannot_end_a_script_and_is_unchanged() -> None:
    value = {"</script><!--": ["<script>", "\u2028&\u2029", "\U0001f600"]}
    text = embedding.inert_json(value)
    assert not set("<>&\u2028\u2029") & set(text) and text.isascii()
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="JSON compliant"):
        embedding.inert_json(float("nan"))


def test_the_library_is_bundled_once_and_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vl_convert

    bundled = []
    bundle = lambda snippet: bundled.append(snippet) or "let x = '</script><!--'"  # noqa: E731
    monkeypatch.setattr(vl_convert, "javascript_bundle", bundle)
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path))
    found = []
    for _ in range(2):
        embedding._library.cache_clear()
        found.append(embedding._library())
    assert len(bundled) == 1 and found[0] == found[1] and "</script" not in found[0] and "<!--" not in found[0]
    assert [kind for kind, *_ in kept.entries()] == ["charts"]
    (file,) = tmp_path.glob("charts/*/vega.js")
    file.write_text("hacked()")
    embedding._library.cache_clear()
    assert embedding._library() == found[0], "a changed script is not used"
    embedding._library.cache_clear()


def test_without_the_extra_the_error_names_it(
    trained: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dependencies.require

    def require(*packages: str, **options: Any) -> None:
        found(*(f"no_{name}" if name == "altair" else name for name in packages), **options)

    monkeypatch.setattr("mopefuse.report.chart.require", require)
    assert code_of(lambda: require_charts("x")) == "MF-ENV-01"
    for command in (("report", trained, "--out", tmp_path / "x.html"), ("data", "check", pairs, "--html", tmp_path / "x.html")):
        done = call(*command)
        assert (done.returncode, 'pip install "mopefuse[report]"' in done.stderr) == (5, True), done.stderr
    assert not (tmp_path / "x.html").exists()
    assert call("data", "check", pairs).returncode == 0, "a check without a page needs no charts"


def test_a_check_without_a_page_imports_no_charts(pairs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        assert name.partition(".")[0] not in ("altair", "vl_convert"), name
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert call("data", "check", pairs).returncode == 0


def test_charts_are_reproducible() -> None:
    def made() -> Chart:
        return curves("x", "x", [Curve("y", [(n, n) for n in range(9)])], across="step", up="y")

    assert made().spec == made().spec, "pages of the same run are the same"
