"""The page of a study: its numbers match the runs, missing runs are listed, and a browser renders all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chart_cases import encodings, tips
from chart_cases import rows_of as data_of
from check_cases import HOSTILE
from chromium import Chromium
from conftest import call, code_of, matrix
from report_cases import UNDRAWN, settle
from study_cases import Made, change, make_study
from test_data_pages import Page

from mopefuse.config.schema import RunConfig
from mopefuse.report import study_charts
from mopefuse.report.study_data import StudyFacts
from mopefuse.report.study_report import report_study
from mopefuse.report.sweeps import sweeps
from mopefuse.studies.compare import compare

FRACTIONS = (0.01, 0.1, 1.0)
HOSTILE_ROW = f"plain {HOSTILE}"


def rows_of(seeds: int = 3) -> list[Made]:
    """Two methods at three fractions, and a row that belongs to neither line."""
    rows = []
    for method, name, base in (("late-concat", "late", 0.3), ("comp-only", HOSTILE_ROW, 0.1)):
        for number, fraction in enumerate(FRACTIONS):
            scores = [base + 0.2 * number + 0.02 * seed for seed in range(seeds)]
            settings = {"method": method, "data.fraction": fraction}
            curve = {10: base, 20: base + 0.1, 30: base + 0.2 * number}
            rows.append(Made(f"{name}, fraction={fraction}", settings, scores, curve, 10 ** (3 + number)))
    return [*rows, Made("linear", {"method": "linear"}, [0.4] * seeds, {0: 0.4}, 500)]


@pytest.fixture(scope="module")
def study(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study with its page; tests must not change it."""
    out = make_study(trained, tmp_path_factory.mktemp("page") / "made", rows_of(), baseline="linear")
    report_study(out, figures=out / "figures")
    return out


def page_of(study: Path) -> Page:
    return Page((study / "report.html").read_text(encoding="utf-8"))


def facts_of(study: Path) -> StudyFacts:
    return StudyFacts(study, json.loads((study / "study.json").read_text()), compare([study], allow_unfinished=True))


def sections(study: Path) -> dict[str, Any]:
    facts = facts_of(study)
    assert facts.comparison is not None
    return {section.key: section for section in study_charts.sections(facts, facts.comparison)}


def keys(page: Page) -> list[str]:
    return [attributes["id"] for attributes in page.all("section") if "id" in attributes]


# -- content


def test_the_page_has_the_table_of_the_comparison_and_every_figure(study: Path) -> None:
    page = page_of(study)
    assert keys(page) == ["comparison", "against-data-fraction", "rows", "parameters", "learning", "missing", "settings"]
    printed = call("compare", study, "--format", "csv").stdout.splitlines()
    numbers = (1 + 3) + (1 + 7) + (1 + 7) + (1 + 3)
    assert len(page.all("tr")) == len(printed) + 1 + 7 + numbers, "comparison, settings of each row, numbers of charts"
    shown = call("compare", study, "--format", "table")
    assert shown.returncode == 0
    cells = set(re.findall(r"\d+\.\d ± \d\.\d", shown.stdout))
    assert {"72.0 ± 2.0", "12.0 ± 2.0", "40.0 ± 0.0"} < cells
    assert all(cell in page.text for cell in cells)
    assert "paired bootstrap over the 7 test samples" in page.text
    html = (study / "report.html").read_text(encoding="utf-8")
    assert "<b>72.0 ± 2.0</b>" in html, "the best is bold: 70, 72 and 74"
    assert "<b>52.0 ± 2.0</b>" not in html


def test_the_page_is_harmless_and_small(study: Path) -> None:
    page, html = page_of(study), (study / "report.html").read_text(encoding="utf-8")
    assert HOSTILE in page.text, "hostile text is shown as text"
    page.check_harmless()
    assert not {"link", "iframe", "object", "a", "form", "img"} & {tag for tag, _ in page.elements}
    assert page.charts() == {"against-data-fraction", "rows", "parameters", "validation"}
    without = re.sub("<script.*?</script>", "", html, flags=re.DOTALL)
    assert "http" not in without.replace("http-equiv", "")
    assert len(html) < 1_300_000 and len(without) < 100_000
    for path in (study / "figures").glob("*.svg"):
        assert not re.search("<(script|img)[ >]", path.read_text(encoding="utf-8"))


def test_figures_are_also_written_as_files(study: Path) -> None:
    names = {path.name for path in (study / "figures").iterdir()}
    stems = ("against-data-fraction", "rows", "parameters", "validation")
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")}


# -- numbers


def test_points_are_means_and_error_bars_are_sample_deviations(study: Path) -> None:
    found = sections(study)
    against = tips(found["against-data-fraction"].charts[0])
    assert "late, data.fraction 0.01: 32 % ± 2 %" in against
    assert f"{HOSTILE_ROW}, data.fraction 1: 52 % ± 2 %" in against
    assert len(against) == 6
    assert "linear: 40 %" in tips(found["rows"].charts[0]), "three equal runs have no spread"
    assert "late, fraction=0.1: 52 % ± 2 %, trainable parameters 10,000" in tips(found["parameters"].charts[0])
    assert "late, fraction=1.0, step 30: 80 % ± 10 %" in tips(found["learning"].charts[0])
    assert "No curve for rows that were validated only once, or never at the same steps: linear." in found["learning"].body


def test_curves_cover_the_steps_that_all_seeds_have(trained: Path, tmp_path: Path) -> None:
    study = make_study(trained, tmp_path / "made", [Made("a", {}, [0.5, 0.5], {10: 0.2, 20: 0.4})])
    log = study / "cells/row-0/seed-1/metrics.jsonl"
    log.write_text('{"step": 10, "val": {"accuracy": 0.4}}\n{"step": 30, "val": {"accuracy": 0.9}}\n')
    facts = facts_of(study)
    assert facts.comparison is not None
    assert [(step, spread.values) for step, spread in facts.learning(facts.comparison.rows[0])] == [(10, (0.2, 0.4))]


def test_a_sweep_varies_exactly_one_number(trained: Path, tmp_path: Path) -> None:
    rows = [Made(f"experts={n}", {"prompts.experts": n}, [0.5], {}) for n in (16, 1, 4)]
    rows += [Made(f"{n} tokens", {"prompts.static": n, "prompts.dynamic": 0}, [0.5], {}) for n in (5, 20, 80)]
    rows += [Made("both", {"prompts.static": 7, "prompts.experts": 9}, [0.5], {})]
    found = sweeps(compare([make_study(trained, tmp_path / "made", rows)]).rows)
    assert [(sweep.path, [[value for value, _ in series.rows] for series in sweep.series]) for sweep in found] == [
        ("prompts.static", [[5, 20, 80]]), ("prompts.experts", [[1, 4, 16]]),
    ]  # fmt: skip
    assert [series.name for sweep in found for series in sweep.series] == ["5 tokens to 80 tokens", "prompts.experts"]
    rates = [Made(f"lr={n}", {"train.lr": n, "train.lr_comp": n, "train.lr_head": n / 50}, [0.5], {}) for n in (0.1, 0.2, 0.3)]
    assert [sweep.path for sweep in sweeps(compare([make_study(trained, tmp_path / "rates", rates)]).rows)] == ["train.lr"]
    two = [Made(f"experts={n}", {"prompts.experts": n}, [0.5], {}) for n in (1, 4)]
    assert sweeps(compare([make_study(trained, tmp_path / "two", two)]).rows) == [], "two values do not make a line"


def test_in_a_search_the_choice_by_validation_is_highlighted_not_the_best_on_test(trained: Path, tmp_path: Path) -> None:
    rows = [Made("trial 0", {"train.lr": 0.1}, [0.9], {}), Made("trial 1", {"train.lr": 0.2}, [0.7], {})]
    study = make_study(trained, tmp_path / "made", rows, search={"metric": "accuracy", "best": "trial 1", "trials": []})
    assert compare([study]).best("test", "accuracy") == {"trial 1"}
    page = report_study(study).page.read_text()
    assert "test accuracy, of trial 1, selected on validation" in page
    assert "<b>70.0</b>" in page
    assert "<b>90.0</b>" not in page


def test_many_rows_are_split_into_several_figures_with_the_same_axes(trained: Path, tmp_path: Path) -> None:
    methods = [Made(f"row {n}", {"train.lr": 0.1 + n, "head_hidden": n + 1}, [n / 20], {1: 0.0, 9: n / 20}) for n in range(14)]
    charts = sections(make_study(trained, tmp_path / "made", methods))["learning"].charts
    assert [chart.name for chart in charts] == ["validation", "validation-2", "validation-3"]
    assert sum(len(tips(chart)) for chart in charts) == 2 * 14
    for chart in charts:
        for y in encodings(chart, "y"):
            assert (y["scale"]["domainMin"], y["scale"]["domainMax"]) == (0.0, pytest.approx(13 / 20))


# -- missing runs


def test_runs_without_a_result_are_listed_with_the_reason(trained: Path, tmp_path: Path) -> None:
    study = make_study(trained, tmp_path / "made", rows_of(2), baseline="linear")
    error = {"code": "MF-NUM-01", "exit": 8, "message": f"loss is NaN {HOSTILE}", "where": "x", "hint": "lower train.lr"}
    change(study, 0, state="failed", error=error)
    change(study, 1, state="failed", error=error)
    change(study, 2, state="stopped")
    for number in (12, 13):
        change(study, number, state="waiting")
    done = report_study(study)
    page = page_of(study)
    assert (done.runs, done.missing) == (14, 5)
    assert "5 of 14 runs have no result, of which 2 failed" in page.text
    assert f"MF-NUM-01 loss is NaN {HOSTILE}" in page.text and "lower train.lr" in page.text
    assert "interrupted, at step 30" in page.text
    assert "no row is compared with linear: none of its runs is finished" in page.text
    assert "Rows have different numbers of seeds" in page.text
    groups = {(group.label, group.state): group.seeds for group in facts_of(study).missing}
    assert groups == {
        ("late, fraction=0.01", "failed"): (0, 1), ("late, fraction=0.1", "stopped"): (0,), ("linear", "waiting"): (0, 1),
    }  # fmt: skip
    refused = call("compare", study)
    assert (refused.returncode, "not finished" in refused.stderr) == (3, True), "comparison tables still need a finished study"


def test_a_study_without_any_result_has_a_page(trained: Path, tmp_path: Path) -> None:
    study = make_study(trained, tmp_path / "made", [Made("a", {"prompts.experts": 3}, [0.5], {})])
    change(study, 0, state="running")
    done = report_study(study)
    assert keys(page_of(study)) == ["missing", "settings"]
    assert "No run is finished" in page_of(study).text and "running when study.json" in page_of(study).text
    assert done.comparison is None


def test_one_seed_has_no_spread_and_linear_rows_have_no_curves(trained: Path, tmp_path: Path) -> None:
    of_main = {"method": "linear", "linear.features": "main"}
    rows = [Made("a", {"method": "linear"}, [0.5], {0: 0.5}), Made("b", of_main, [0.4], {})]
    study = make_study(trained, tmp_path / "made", rows)
    report_study(study)
    page, found = page_of(study), sections(study)
    assert "Each row is a single run" in page.text and "±" not in page.text
    assert "one run each, so there are no error bars" in page.text
    assert found["learning"].charts == () and "no curves" in found["learning"].body
    for key in ("rows", "parameters"):
        assert all(row["low"] == row["y"] == row["high"] for row in data_of(found[key].charts[0], "tip"))


# -- the command


def test_the_command_distinguishes_a_study_from_a_run(study: Path, trained: Path, tmp_path: Path) -> None:
    flags = ("-o", tmp_path / "page.html", "--figures", tmp_path / "figures", "--json")
    found = json.loads(call("report", study, *flags, "--against", "late, fraction=0.1", "--metric", "f1_macro").stdout)
    assert (found["ok"], found["runs"], found["missing"]) == (True, 21, 0)
    assert (found["comparison"]["against"], found["comparison"]["metric"]) == ("late, fraction=0.1", "f1_macro")
    assert len(found["figures"]) == 6, "macro-F1 was not logged, so there are no learning curves"
    assert found["bytes"] == (tmp_path / "page.html").stat().st_size
    (tmp_path / "file").write_text("")
    (tmp_path / "notes.html").write_text("mine")
    for arguments, code in (
        ((study, "--data", tmp_path), "MF-CFG-120"),
        ((study, "--no-audit"), "MF-CFG-120"),
        ((study, "--device", "auto"), "MF-CFG-120"),
        ((trained, "--against", "x"), "MF-CFG-120"),
        ((study, "--against", "nobody"), "MF-CFG-85"),
        ((study, "--metric", "beauty"), "MF-CFG-86"),
        ((study, "-o", tmp_path / "page.html", "--figures", tmp_path / "file"), "MF-CFG-90"),
        ((study, "-o", tmp_path / "notes.html"), "MF-DATA-86"),
    ):
        done = call("report", *arguments, "--json")
        assert json.loads(done.stdout)["error"]["code"] == code, arguments
    assert (tmp_path / "notes.html").read_text() == "mine"


@pytest.mark.parametrize("content", ["{}", "[]", '{"kind": "study", "cells": [{"label": 5, "run": "a", "state": "waiting"}]}'])
def test_a_damaged_study_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "study.json").write_text(content)
    assert code_of(lambda: report_study(tmp_path)) == "MF-CKPT-03"
    assert not (tmp_path / "report.html").exists()


# -- parts


def test_settings_common_to_all_rows_are_listed_once(study: Path) -> None:
    text = page_of(study).text
    assert RunConfig(main="", comp="").train.batch_size != 4
    assert text.count("train.batch_size") == 1 and text.count("data.fraction") >= 2
    assert not {"train.lr", "train.lr_comp", "prompts.static", "prompts.init", "data.modalities"} & {*text.split()}, "filled in"


# -- in a browser


@pytest.mark.parametrize("dark", matrix([False, True], [False]))
@pytest.mark.parametrize("width", matrix([375, 1200], [375]))
def test_a_browser_shows_the_page_without_requests_or_errors(study: Path, browser: Chromium, width: int, dark: bool) -> None:
    browser.show(study / "report.html", width=width, dark=dark)
    assert browser.requests == [(study / "report.html").as_uri()]
    settle(browser)
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width, "tables scroll in their boxes, not the page"
    wide = "[...document.querySelectorAll('.scroll')].some(box => box.scrollWidth > box.clientWidth)"
    assert browser.evaluate(wide) == (width < 600)
    assert browser.evaluate(UNDRAWN) == []
    light = float((np.asarray(browser.picture()).reshape(-1, 3).mean(axis=1) > 128).mean())
    assert light < 0.3 if dark else light > 0.7
