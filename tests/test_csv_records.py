"""An unclosed quote invalidates only its own row, and cells may still have several lines."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path

import pytest
from conftest import TINY, call
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mopefuse.config.schema import Data
from mopefuse.data.csv_records import Records
from mopefuse.data.index_build import read_rows
from mopefuse.data.tables import find_tables

HEADER = "id,text,img,label"


def rows(count: int) -> list[str]:
    return [f"{number},text {number},a.png,{'ab'[number % 2]}" for number in range(1, count + 1)]


def read(lines: list[str], tmp_path: Path) -> tuple[list[str], dict[int, str]]:
    """Read a table; return the ids, and the problems by line."""
    (tmp_path / "t.csv").write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    config = Data()
    index = read_rows(find_tables(tmp_path / "t.csv", config)[""], "train", ("text", "image"), config)
    return index.ids, {int(p.where.partition(":")[2]): p.what for p in index.row_problems}


def without(ids: list[str], *gone: int) -> list[str]:
    return [each for each in ids if int(each) not in gone]


ALL = [str(number) for number in range(1, 501)]


def test_an_unclosed_quote_invalidates_one_row_of_500(tmp_path: Path) -> None:
    lines = rows(500)
    lines[299] = '300,"text 300,a.png,a'
    ids, problems = read(lines, tmp_path)
    assert ids == without(ALL, 300)
    assert problems == {301: "has an unclosed quote, which would swallow the 200 lines after it, up to line 501"}


def test_an_unclosed_quote_before_a_quoted_cell_invalidates_one_row(tmp_path: Path) -> None:
    lines = rows(500)
    lines[299] = '300,"text 300,a.png,a'
    lines[309] = '310,"text, 310",a.png,a'
    ids, problems = read(lines, tmp_path)
    assert ids == without(ALL, 300)
    assert problems == {301: "has an unclosed quote, which would swallow the 10 lines after it, up to line 311"}


@pytest.mark.parametrize("closing", ['310,text 310",a.png,a', '310,text 310",a.png'], ids=["fields fit", "fields do not"])
def test_a_stray_quote_further_down_does_not_invalidate_the_rows_between(tmp_path: Path, closing: str) -> None:
    lines = rows(500)
    lines[299], lines[309] = '300,"text 300,a.png,a', closing
    ids, problems = read(lines, tmp_path)
    assert set(without(ALL, 300, 310)) <= set(ids)
    assert 301 in problems


def test_several_unclosed_quotes_invalidate_one_row_each(tmp_path: Path) -> None:
    lines = rows(500)
    for number in (10, 11, 200, 500):
        lines[number - 1] = f'{number},"text,a.png,a'
    ids, problems = read(lines, tmp_path)
    assert ids == without(ALL, 10, 11, 200, 500)
    assert sorted(problems) == [11, 12, 201, 501]


def test_of_scraped_titles_only_the_truncated_one_is_invalid() -> None:
    titles = ['a.jpg,Plain title,pie', 'b.jpg,"[[""Somebody\'s pie""]]",pie', 'c.jpg,"Pan of 8"" and more, by hand",pie']
    lines = ["img,text,label", *titles * 5, 'cut.jpg,"[[""A burrito that,burrito', *titles * 5]
    records = Records("\r\n".join(lines), ",")
    good, bad = [], []
    for record in records:
        (bad if record.problem else good).append(record)
        records.width = 3
    assert (len(good), [record.line for record in bad]) == (31, [17])


def test_cells_with_line_breaks_are_read(tmp_path: Path) -> None:
    poem = 'roses are red,\nviolets, "blue", and so on\n\n1,2\n'
    text = io.StringIO()
    csv.writer(text).writerows([["1", poem, "a.png", "a"], ["2", "t", "a.png", "b"]])
    ids, problems = read(text.getvalue().splitlines(), tmp_path)
    assert (ids, problems) == (["1", "2"], {})


def test_sentences_with_as_many_commas_as_a_row_are_not_rows() -> None:
    review = "Nice, all in all.\nWarm, quiet, and near the beach\nThe food, though, was cold\nso, next time"
    text = io.StringIO()
    csv.writer(text).writerows([["img", "text", "label"], ["a.jpg", review, "good"], ["b.jpg", "Fine", "good"]])
    records = Records(text.getvalue(), ",")
    found = []
    for record in records:
        records.width = 3
        found.append(record)
    assert [record.problem for record in found] == [""] * 3
    assert found[1].cells == ["a.jpg", review, "good"]


def test_a_bad_row_of_several_lines_counts_once(tmp_path: Path) -> None:
    ids, problems = read(['1,"two\nlines",a.png', *rows(3)[1:]], tmp_path)
    assert ids == ["2", "3"]
    assert problems == {2: "has 3 fields, the header has 4"}


def test_skipped_rows_are_counted_correctly(tmp_path: Path) -> None:
    for number in range(10):
        Image.new("RGB", (16, 16), (number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = [row.replace("a.png", f"{number % 10}.png") for number, row in enumerate(rows(500))]
    lines[299] = '300,"text 300,a.png,a'
    (tmp_path / "t.csv").write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
    options = ("--data", tmp_path / "t.csv", "--val-fraction", "0.2", "--steps", "1")
    refused = call("train", *TINY, *options, "--out", tmp_path / "no")
    assert refused.returncode == 4
    assert "1 bad row: t.csv:301 has an unclosed quote, which would swallow the 200 lines after it" in refused.stderr
    assert "fix: close all quotes" in refused.stderr
    done = call("train", *TINY, *options, "--out", tmp_path / "run", "--on-bad", "skip", "--json")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)["rows"]
    assert counts["train"] + counts["val"] == 499
    check = json.loads(call("data", "check", tmp_path / "t.csv", "--val-fraction", "0.2", "--json").stdout)
    assert (check["splits"]["train"]["rows"], check["splits"]["train"]["bad_rows"]) == (500, 1)
    assert [(each["kind"], each["where"]) for each in check["problems"] if each["severity"] == "error"] == [
        ("bad-csv", "t.csv:301")
    ]


CELL = st.text(st.sampled_from('ab,"\n\r ;'), max_size=6)


@given(st.lists(st.tuples(st.text("ab", min_size=1, max_size=3), CELL), max_size=8))
def test_two_columns_written_by_a_csv_writer_are_read_back(table: list[tuple[str, str]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([("x", "y"), *table])
    records = Records(text.getvalue(), ",")
    found = []
    for record in records:
        assert not record.problem
        records.width = 2
        found.append(tuple(record.cells))
    assert found == [("x", "y"), *table]


@pytest.mark.parametrize("line", ['ab","d', 'x,"', '"', 'a,"b""'])
def test_many_stray_quotes_do_not_take_quadratic_time(line: str) -> None:
    text = "x,y\n" + f"{line}\n" * 30_000 + "a,b\n"
    began = time.process_time()
    records = Records(text, ",")
    lines = set()
    for record in records:
        records.width = 2
        lines.add(record.line)
    assert time.process_time() - began < 20
    assert max(lines) > 29_000
