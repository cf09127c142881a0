"""The page of a run in a browser: rendered, without errors, light and dark, sortable, readable without scripts, harmless."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from check_cases import ATTRIBUTE, HOSTILE
from chromium import Chromium
from conftest import matrix
from report_cases import UNDRAWN, facts_of, settle
from test_data_pages import Page

from mopefuse.report import run_errors, run_routing
from mopefuse.report.bars import bars, heat_map
from mopefuse.report.curves import Curve, curves, dots, scatter
from mopefuse.report.pages import Section, fragment, sections_page
from mopefuse.report.themes import THEMES

CHOOSE = """{{ const one = document.querySelector('{}'); one.value = '{}';
    one.dispatchEvent(new Event('input', {{bubbles: true}})); }}"""


@pytest.fixture
def run(reported: Path) -> Path:
    """A run of two steps with its page; tests must not change it."""
    return reported


@pytest.mark.parametrize("dark", matrix([False, True], [False]))
@pytest.mark.parametrize("width", matrix([360, 1200], [360]))
def test_a_browser_shows_the_page_without_requests_or_errors(run: Path, browser: Chromium, width: int, dark: bool) -> None:
    browser.show(run / "report.html", width=width, dark=dark)
    assert [url for url in browser.requests if not url.startswith("data:image/jpeg")] == [(run / "report.html").as_uri()]
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width, "nothing scrolls sideways"
    unseen = "[...document.images].filter(image => !image.complete || !image.naturalWidth || !image.clientWidth).length"
    assert browser.evaluate(unseen) == 0
    settle(browser)
    assert browser.evaluate(UNDRAWN) == []
    browser.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
    settle(browser, closed=False)
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width, "nothing scrolls sideways"
    paper = np.asarray(browser.picture()).reshape(-1, 3)
    light = float((paper.mean(axis=1) > 128).mean())
    assert light < 0.3 if dark else light > 0.7


def test_a_layer_can_be_chosen_without_a_script(run: Path, browser: Chromium, tmp_path: Path) -> None:
    routing_SLK = torch.full((7, 6, 2), 0.5)
    routing_SLK[:, 4, 0] = 0.0
    routing_SLK[::2, 4] = torch.tensor([1.0, 0.0])
    parts = run_routing.sections(facts_of(run, routing_SLK=routing_SLK))
    (tmp_path / "page.html").write_text(sections_page("x", "x", [], parts), encoding="utf-8")
    browser.show(tmp_path / "page.html")
    seen = "[...document.querySelectorAll('.panels > div')].map(panel => getComputedStyle(panel).visibility == 'visible')"
    for number in (1, 2, 3, 4):
        browser.evaluate(f"document.querySelector('label[for=layer-{number}]').click()")
        assert browser.evaluate(seen) == [number == other for other in (1, 2, 3, 4)]


def test_charts_follow_changes_of_light_and_dark_mode(run: Path, browser: Chromium) -> None:
    browser.show(run / "report.html")
    settle(browser)
    colour = "document.querySelector('[data-chart=audit] .mark-rect path').getAttribute('fill')"
    found = []
    for scheme in ("light", "dark", "light"):
        browser.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        expected = THEMES[scheme]["mark"]["color"]
        for _ in range(100):
            found.append(browser.evaluate(colour))
            if found[-1] == expected:
                break
            time.sleep(0.1)
        assert found[-1] == expected


def test_mistakes_can_be_sorted_and_filtered_with_the_keyboard(run: Path, browser: Chromium, tmp_path: Path) -> None:
    logits_SN = torch.zeros(7, 3)
    logits_SN[torch.arange(7), torch.tensor([1, 2, 0, 1, 0, 0, 2])] = torch.arange(1.0, 8.0)
    section = run_errors.mistakes(facts_of(run, logits_SN=logits_SN))
    assert section is not None
    (tmp_path / "page.html").write_text(sections_page("x", "x", [], [section]), encoding="utf-8")
    browser.show(tmp_path / "page.html")
    ids = "[...document.querySelectorAll('.sortable tbody tr')].filter(row => !row.hidden).map(row => row.cells[0].innerText)"
    by_loss = browser.evaluate(ids)
    assert sorted(by_loss) == [f"test-{n}" for n in range(7)] and by_loss[0] == "test-6"
    button = "document.querySelectorAll('table.sortable th button')[0]"
    browser.evaluate(f"{button}.focus()")
    assert browser.evaluate(f"document.activeElement === {button}")
    browser.evaluate(f"{button}.click()")
    assert browser.evaluate(ids) == [f"test-{n}" for n in range(7)]
    assert browser.evaluate(f"{button}.parentElement.getAttribute('aria-sort')") == "ascending"
    browser.evaluate(f"{button}.click()")
    assert browser.evaluate(ids) == [f"test-{n}" for n in reversed(range(7))]
    browser.evaluate(CHOOSE.format("[name=predicted]", "a"))
    assert browser.evaluate(ids) == ["test-5", "test-4", "test-2"], "predicted as a: 2, 4 and 5"
    assert browser.evaluate("document.querySelector('[role=status]').innerText") == "3 of 7 shown"
    browser.evaluate(CHOOSE.format("[name=actual]", "c"))
    assert browser.evaluate(ids) == ["test-5", "test-2"]
    for name in ("actual", "predicted"):
        browser.evaluate(CHOOSE.format(f"[name={name}]", ""))
    browser.evaluate(CHOOSE.format("[type=search]", "TEST-3"))
    assert browser.evaluate(ids) == ["test-3"]
    assert browser.complaints == []


def test_without_scripts_everything_is_readable(run: Path, browser: Chromium) -> None:
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.show(run / "report.html")
        text = browser.evaluate("document.body.innerText")
        assert "JavaScript is off, so charts are not drawn" in text
        assert "Data of this chart" in text and "predicted" in text
        assert browser.evaluate("getComputedStyle(document.querySelector('.controls')).display") == "none"
    finally:
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)


def test_tooltips_show_hostile_names_as_text(browser: Chromium, tmp_path: Path) -> None:
    """Names of series and settings stay text in legends, axes and tooltips; Vega does not interpret them as formulas or
    URLs."""
    odd = ["x\"]+hacked()+[\"", "\\", "datum.tip", "a.b[0]['c']", HOSTILE, f"{ATTRIBUTE}'><img src=x onerror=hacked()>"]
    odd += ["{{hacked()}}", "${hacked()}", "http://localhost/x", "</script><script>hacked()</script>", "line\u2028break"]
    lines = [Curve(name, [(1.0, 0.5 + n / 50), (2.0, 0.7)]) for n, name in enumerate(odd)]
    charts = (
        curves("a", odd[4], lines, across=odd[0], up=odd[1]),
        heat_map("b", "x", [[0.5] * len(odd)], [odd[0]], odd, across=odd[9], down=odd[5], tips=lambda i, j: odd[j]),
        dots("c", "x", [Curve(name, [(0, 0.5)]) for name in odd], across=odd[6]),
        scatter("d", "x", lines, across=odd[7], up=odd[3]),
        bars("e", "x", [(name, 0.5) for name in odd], across="x"),
    )
    parts = [Section(f"s{n}", "x", fragment("figure", chart, ""), (chart,)) for n, chart in enumerate(charts)]
    html = sections_page("x", "x", [], parts)
    Page(html).check_harmless()
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    browser.show(tmp_path / "page.html")
    settle(browser)
    assert browser.complaints == [] and browser.requests == [(tmp_path / "page.html").as_uri()]
    assert browser.evaluate(UNDRAWN) == []
    assert browser.evaluate("typeof window.hacked") == "undefined"
    assert browser.evaluate("document.querySelectorAll('img, svg script, svg image, svg a').length") == 0
    drawn = browser.evaluate("[...document.querySelectorAll('svg text')].map(text => text.textContent).join('\\n')")
    for name in (odd[0], odd[1], odd[2], odd[3], HOSTILE, odd[6]):
        assert name in drawn
    point = """(() => {
        const marks = [...document.querySelectorAll('[data-chart=a] .mark-symbol path')];
        const seen = [];
        for (const mark of marks) {
            const box = mark.getBoundingClientRect(), at = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
            mark.dispatchEvent(new PointerEvent('pointerover', {bubbles: true, ...at}));
            mark.dispatchEvent(new PointerEvent('pointermove', {bubbles: true, ...at}));
            const tip = document.querySelector('#vg-tooltip-element');
            seen.push([tip?.innerText ?? '', tip?.querySelectorAll('script, img, b').length ?? 0]);
        }
        return seen;
    })()"""
    seen = browser.evaluate(point)
    assert any(HOSTILE in text for text, _ in seen) and any(odd[5] in text for text, _ in seen)
    assert {count for _, count in seen} == {0}
    assert browser.complaints == []


def test_the_test_browser_records_requests_and_errors(tmp_path: Path, browser: Chromium) -> None:
    """Otherwise the test above could not fail."""
    page = tmp_path / "bad.html"
    page.write_text("<p style='width: 3000px'>x<img src='missing.png'><script>console.log('x'); nothing()</script>")
    browser.show(page, width=360)
    assert any(url.endswith("missing.png") for url in browser.requests)
    assert len(browser.complaints) >= 2
    assert browser.evaluate("document.documentElement.scrollWidth") > 360
