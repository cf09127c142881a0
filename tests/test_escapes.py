"""A label, name or path that contains terminal escapes is shown escaped in every output."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, call, make_pairs, write_rows
from hypothesis import given
from hypothesis import strategies as st
from study_cases import Made, make_study

from mopefuse.core import formatting as shown

EVIL = "\x1b]0;owned\x07\x1b[31mred\x9b2J\u202edlog\r\nerror[MF-X]: forged|`<img src=x>[red]x[/]\x7f"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
SPELT = r"\x1b]0;owned\x07\x1b[31mred\x9b2J\u202edlog\x0d\x0aerror[MF-X]: forged"


@pytest.fixture(scope="module")
def evil_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data whose labels and ids contain escapes."""
    root = make_pairs(tmp_path_factory.mktemp("data") / "evil")
    for file in root.glob("*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        named = [row | {"id": row["id"] + EVIL, "label": row["label"].replace("a", EVIL)} for row in rows]
        write_rows(file, named)
    return root


@pytest.fixture(scope="module")
def evil(evil_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on these data."""
    run = tmp_path_factory.mktemp("runs") / "evil"
    done = call("train", *TINY, "--data", evil_pairs, "--out", run, "--steps", "2")
    assert done.returncode == 0, done.stderr
    clean(done.stdout + done.stderr)
    return run


def clean(*texts: str) -> None:
    """Check that no text contains control characters or line breaks of its own."""
    for text in texts:
        assert not OBEYED.search(text), OBEYED.findall(text)
        assert not any(line.startswith("error[MF-X]") for line in text.splitlines())


def clean_page(page: Path) -> str:
    """Check a page; in HTML, a line break counts as a space."""
    text = page.read_text(encoding="utf-8")
    assert not OBEYED.search(text), OBEYED.findall(text)
    return text


def files(folder: Path) -> list[str]:
    """Return every text file in a folder."""
    return [path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.suffix in (".md", ".json", ".jsonl", ".csv")]


def test_eval_escapes_hostile_text(evil: Path, evil_pairs: Path, tmp_path: Path) -> None:
    done = call("eval", evil, "-o", tmp_path / "predictions.jsonl")
    clean(done.stdout, done.stderr, *files(tmp_path))
    assert SPELT in done.stdout and "[red]x[/]" in done.stdout
    assert EVIL in {json.loads(line)["label"] for line in (tmp_path / "predictions.jsonl").read_text().splitlines()}
    done = call("eval", evil, "--json")
    clean(done.stdout)
    assert EVIL in {row["label"] for row in json.loads(done.stdout)["per_label"]}
    check = call("data", "check", evil_pairs, "--html", tmp_path / "page.html")
    clean(check.stdout, check.stderr)
    clean_page(tmp_path / "page.html")
    assert SPELT in check.stdout


def test_eval_on_a_terminal_escapes_hostile_text(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "300")
    done = call("eval", evil)
    assert SPELT in done.stdout and "[red]x[/]" in done.stdout
    assert "\x1b]0;" not in done.stdout and "\x9b" not in done.stdout and "\u202e" not in done.stdout


def test_predict_escapes_hostile_text(evil: Path, evil_pairs: Path, tmp_path: Path) -> None:
    table = tmp_path / "in.jsonl"
    good = {"img": str(next(evil_pairs.glob("images/*"))), "text": EVIL, "id": EVIL}
    write_rows(table, [good, {"img": f"{EVIL}.png", "text": "a", "id": "=2"}])
    flags = ("--image-root", evil_pairs)
    done = call("predict", evil, table, *flags)
    clean(done.stdout, done.stderr)
    assert json.loads(done.stdout.splitlines()[0])["id"] == EVIL
    assert call("predict", evil, table, "-o", tmp_path / "out.csv", *flags).returncode == 0
    clean(*files(tmp_path)[1:], (tmp_path / "out.csv").read_text())
    rows = list(csv.reader(io.StringIO((tmp_path / "out.csv").read_text())))
    assert rows[0][2].startswith(f"p({SPELT}") and rows[1][0].startswith(SPELT) and rows[2][0] == "'=2"
    write_rows(table, [{"img": f"{EVIL}.png", "text": "a"}])
    for path in (table, tmp_path / f"{EVIL.replace('/', '')}.jsonl"):
        done = call("predict", evil, path, *flags)
        assert done.returncode in (3, 4) and SPELT in done.stderr
        clean(done.stdout, done.stderr)
        assert len(done.stderr.splitlines()) == 1


def test_model_cards_escape_hostile_text(evil: Path, tmp_path: Path) -> None:
    done = call("export", evil, "--format", "adapter", "-o", tmp_path / "adapter")
    clean(done.stdout, done.stderr, *files(tmp_path))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert SPELT in card and "<img" not in card.replace("\\<img", "") and "\\|\\`\\<img" in card
    assert json.loads((tmp_path / "adapter" / "model.json").read_text())["labels"][0] == EVIL


def test_reports_escape_hostile_text(evil: Path, tmp_path: Path) -> None:
    done = call("report", evil, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    clean(done.stdout, done.stderr)
    page = clean_page(tmp_path / "page.html")
    assert r"\x1b[31mred" in page and "<img src=x>" not in page


@pytest.fixture(scope="module")
def study(evil: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose cells have such names."""
    folder = tmp_path_factory.mktemp("study")
    rows = [Made(EVIL, {"prompts.experts": 2}, (0.5, 0.7), {1: 0.5}), Made(f"={EVIL}", {}, (0.6, 0.8), {1: 0.4})]
    return make_study(evil, folder, rows)


@pytest.mark.parametrize("form", ["table", "markdown", "csv", "json", "latex"])
def test_compare_escapes_hostile_text(form: str, study: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out.{form}"
    more: tuple[Any, ...] = ("--against", EVIL, "--format", form)
    for done in (call("compare", study, *more), call("compare", study, *more, "-o", out)):
        assert done.returncode == 0, done.stderr
        clean(done.stdout, done.stderr)
    text = out.read_text()
    clean(text)
    if form == "json":
        assert json.loads(text)["rows"][0]["label"] == EVIL
    elif form == "latex":
        assert r"\textbackslash{}x1b" in text
    else:
        assert SPELT.replace("|", "\\|") in text
    if form == "csv":
        assert list(csv.reader(io.StringIO(text)))[2][0].startswith("'=")


def test_the_page_of_a_study_escapes_hostile_text(study: Path, tmp_path: Path) -> None:
    done = call("report", study, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    clean(done.stdout, done.stderr)
    clean_page(tmp_path / "page.html")


def test_study_escapes_hostile_text(evil_pairs: Path, tmp_path: Path) -> None:
    settings = {"main": "tiny:vision", "comp": "tiny:text", "device": "cpu", "data.path": str(evil_pairs)}
    settings |= {"train": {"epochs": 1, "batch_size": 4}, "method": "late-concat"}
    cells = {EVIL: {}, "b": {"head_hidden": 4}}
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"settings": settings, "seeds": [0], "cells": cells}))
    done = call("study", file, "--out", tmp_path / "out", "--dry-run")
    clean(done.stdout, done.stderr)
    assert SPELT in done.stdout + done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "RUN", "--split", EVIL),
        ("train", "--main", f"tiny:{EVIL}", "--comp", "tiny:text", "--data", "PAIRS", "--out", "OUT"),
        ("train", "--recipe", EVIL),
        ("encoders", "inspect", f"timm:{EVIL}"),
        ("compare", EVIL),
        ("export", "RUN", "-o", "OUT", "--format", EVIL),
        ("train", "--main", "tiny:vision", "--comp", "tiny:text", "--data", EVIL, "--out", "OUT"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_errors_escape_hostile_text(arguments: tuple[str, ...], evil: Path, evil_pairs: Path, tmp_path: Path) -> None:
    places = {"RUN": str(evil), "PAIRS": str(evil_pairs), "OUT": str(tmp_path / "out")}
    for more in ((), ("--json",)):
        done = call(*(places.get(word, word) for word in arguments), *more)
        assert done.returncode not in (0, 1)
        clean(done.stdout, done.stderr)
        if not more:
            assert len(done.stderr.splitlines()) == 1, done.stderr


@given(st.text())
def test_any_text_is_shown_on_one_line_and_is_unchanged_in_json(text: str) -> None:
    assert not OBEYED.search(shown.visible(text)) and len(shown.visible(text).splitlines()) <= 1
    assert shown.visible(shown.visible(text)) == shown.visible(text)
    assert json.loads(shown.json_text([text, {text: 1}])) == [text, {text: 1}]
    clean(shown.json_text(text), shown.markdown(text), str(shown.spreadsheet_cell(text)))
