"""UPMC Food-101: its titles files, parsed line by line, its pages, and the optional cleaning of both."""

from __future__ import annotations

import csv
import html
import io
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prepare_cases import TEST_ROWS, TRAIN_ROWS, TRAIN_SKIPPED, food101, rows_of, skipped_in

from mopefuse.data._source_files import SourceFolder
from mopefuse.data.prepare import Sample, Skip, prepare
from mopefuse.data.sets._food101_text import OddRow, TitleRow, clean, plain_title, read_title
from mopefuse.data.sets.food101 import Food101
from mopefuse.errors import DataError


def by_id(folder: Path, *splits: str) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for split in splits for row in rows_of(folder, split)}


def expected(split: str, titles: dict[str, tuple[str, str]], *, cleaned: bool = False) -> dict[str, dict[str, str]]:
    return {
        name: {
            "id": name,
            "text": title[cleaned],
            "img": f"images/{split}/{name.rpartition('_')[0]}/{name}.jpg",
            "label": name.rpartition("_")[0],
        }
        for name, title in titles.items()
    }


# -- the whole data set


@pytest.mark.parametrize("cleaned", [False, True])
def test_rows_are_images_with_their_titles(cleaned: bool, tmp_path: Path) -> None:
    about = prepare(Food101, food101(tmp_path / "source"), tmp_path / "made", {"val": 4, "clean": cleaned})
    assert by_id(tmp_path / "made", "train", "val") == expected("train", TRAIN_ROWS, cleaned=cleaned)
    assert by_id(tmp_path / "made", "test") == expected("test", TEST_ROWS, cleaned=cleaned)
    assert skipped_in(tmp_path / "made") == TRAIN_SKIPPED
    assert about["rows"] == {"train": 12, "val": 4, "test": 3}
    assert about["difference"] == {"train+val": 16 - 67972, "test": 3 - 22716, "train+val+test": 19 - 90840}
    assert (about["options"]["text"], about["text"]) == ("title", "title of the page (the only text available)")
    assert (about["labels"], about["seed"]) == (3, 0)


def test_titles_may_be_directly_in_the_source_folder(tmp_path: Path) -> None:
    source = food101(tmp_path / "source")
    for split in ("train", "test"):
        (source / f"texts/{split}_titles.csv").rename(source / f"{split}_titles.csv")
    prepare(Food101, source, tmp_path / "made", {"val": 4, "text": "title"})
    assert by_id(tmp_path / "made", "train", "val") == expected("train", TRAIN_ROWS)


@pytest.mark.parametrize("by_split", [False, True], ids=["texts_txt/<label>", "texts_txt/<split>/<label>"])
def test_rows_are_images_with_their_pages(by_split: bool, tmp_path: Path) -> None:
    source = food101(tmp_path / "source", titles=False, pages=True)
    pages = source / "texts_txt"
    if by_split:
        for split, names in (("train", [*TRAIN_ROWS, "apple_pie_8", "apple_pie_98"]), ("test", TEST_ROWS)):
            for name in names:
                (pages / split / name.rpartition("_")[0]).mkdir(parents=True, exist_ok=True)
                (pages / name.rpartition("_")[0] / f"{name}.txt").rename(
                    pages / split / name.rpartition("_")[0] / f"{name}.txt"
                )
    about = prepare(Food101, source, tmp_path / "made", {"val": 4})
    texts = {name: (f"<b>{name}</b>\nbake &amp; eat", "") for name in TRAIN_ROWS | TEST_ROWS}
    assert by_id(tmp_path / "made", "train", "val") == expected("train", {name: texts[name] for name in TRAIN_ROWS})
    assert by_id(tmp_path / "made", "test") == expected("test", {name: texts[name] for name in TEST_ROWS})
    below = "texts_txt/train" if by_split else "texts_txt"
    assert skipped_in(tmp_path / "made") == [
        ("images/train/apple_pie/apple_pie_11.jpg", None, "image has no text"),
        (f"{below}/apple_pie/apple_pie_8.txt", None, "not UTF-8"),
        ("images/train/apple_pie/notes.html", None, "not a .jpg file"),
        ("images/train/beignets/beignets_2.jpg", None, "image has no text"),
        ("images/train/beignets/beignets_4.jpg", None, "image has no text"),
        ("images/train/beignets/beignets_50.jpg", None, "duplicate image"),
        ("images/train/beignets/waffles_1.jpg", None, "image name does not start with its class"),
        ("images/train/miso_soup/miso_soup_77.jpg", None, "image has no text"),
        ("images/train/stray.jpg", None, "not in the folder of a class"),
        (f"{below}/apple_pie/apple_pie_98.txt", None, "text has no image"),
    ]
    assert (about["options"]["text"], about["text"]) == ("page", "text of the page (the only text available)")
    sums = (tmp_path / "made" / "SHA256SUMS").read_text()
    assert all(f"{name}.txt" in sums for name in texts)


def test_pages_can_be_cleaned(tmp_path: Path) -> None:
    source = food101(tmp_path / "source", titles=False, pages=True)
    prepare(Food101, source, tmp_path / "made", {"val": 4, "clean": True})
    assert by_id(tmp_path / "made", "test")["beignets_50"]["text"] == "beignets 50 bake eat"


def test_with_two_texts_a_choice_is_required(tmp_path: Path) -> None:
    source = food101(tmp_path / "source", pages=True)
    with pytest.raises(DataError, match="each image has two texts") as caught:
        prepare(Food101, source, tmp_path / "made", {"val": 4})
    assert (caught.value.code, caught.value.fix) == ("MF-DATA-64", "choose one: --text page or --text title")
    about = prepare(Food101, source, tmp_path / "made", {"val": 4, "text": "title"})
    assert about["text"] == "title of the page (requested)"
    assert by_id(tmp_path / "made", "test") == expected("test", TEST_ROWS)


@pytest.mark.parametrize(
    ("titles", "pages", "requested", "missing"),
    [
        (True, False, "page", "texts_txt"),
        (False, True, "title", "train_titles.csv and test_titles.csv"),
        (False, False, None, "texts_txt and no train_titles.csv and test_titles.csv"),
    ],
)
def test_a_missing_text_is_an_error_that_names_it(
    titles: bool, pages: bool, requested: str | None, missing: str, tmp_path: Path
) -> None:
    source = food101(tmp_path / "source", titles=titles, pages=pages)
    with pytest.raises(DataError) as caught:
        prepare(Food101, source, tmp_path / "made", {"val": 4} | ({"text": requested} if requested else {}))
    there = ", ".join(sorted(path.name for path in source.iterdir()))
    assert (caught.value.code, caught.value.what) == ("MF-DATA-63", f"{missing} not found; the folder contains {there}")


# -- one line of a titles file


@pytest.mark.parametrize(
    ("line", "title"),
    [
        ("a_1.jpg,Pie,a", "Pie"),
        ("a_1.jpg,Pie, and more, of it,a", "Pie, and more, of it"),
        ('a_1.jpg,"Pie, and more",a', "Pie, and more"),
        ('a_1.jpg,"""Pie"" it is",a', '"Pie" it is'),
        ('a_1.jpg,A "pie",a', 'A "pie"'),
        ('a_1.jpg,"[[""Dad\'s pie""]]",a', "Dad's pie"),
        ('a_1.jpg,"[[""Dad\'s pie",a', "Dad's pie"),
        ("a_1.jpg,[['Pie']],a", "Pie"),
        ("a_1.jpg,[Pie],a", "[Pie]"),
        (r"a_1.jpg,Pie \xe2\x84\xa2,a", "Pie ™"),
        (r"a_1.jpg,Caf\xe9 \x93Pie\x94,a", "Café “Pie”"),
        (r"a_1.jpg,Let\'s \"bake\",a", 'Let\'s "bake"'),
        (r"a_1.jpg,One \\xe9 and C:\pies,a", r"One \xe9 and C:\pies"),
        (r"a_1.jpg,\t\tPie\r\n  |  \xc2\x96 blog ,a", "Pie | blog"),
        ("a_1.jpg,Salt &amp; sugar&nbsp;&#8211;&#x27;pie&#39;,a", "Salt & sugar –'pie'"),
        ("a_1.jpg,,a", ""),
        ('a_1.jpg,"",a', ""),
        ("a_1.jpg,Tarte aux pommes à la crème,a", "Tarte aux pommes à la crème"),
    ],
)
def test_a_title_is_restored_as_on_its_page(line: str, title: str) -> None:
    assert read_title(line.encode()) == TitleRow("a_1.jpg", title, "a")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'a_1.jpg,"Pie,a', "quote not closed"),
        (b'a_1.jpg,",a', "quote not closed"),
        (b'a_1.jpg,"Pie" and more,a', "quote not closed"),
        (b'a_1.jpg,"Pie "of" mine",a', "quote not closed"),
        (b"a_1.jpg", "fewer than three fields"),
        (b"a_1.jpg,Pie", "fewer than three fields"),
        (b"a_1.jpg,Pie,", "fewer than three fields"),
        (b"a_1.jpg,Pie,b", "image name does not start with its class"),
        (b"a_1.jpg,Pi\xe9,a", "not UTF-8"),
    ],
)
def test_a_line_that_is_not_a_row_gives_a_reason_and_its_image(line: bytes, reason: str) -> None:
    assert read_title(line) == OddRow(reason, "a_1.jpg")


@given(st.binary(max_size=60) | st.text(alphabet='a_1.jpg,"[]\\xe&;# \'', max_size=40).map(str.encode))
@example(b'a_,"[["",a')
@example(rb"a_,\xff\xfe\xed\xa0\x80&#xD800;&#0;&#99999999999;,a")
def test_any_bytes_give_a_title_row_or_an_odd_row(line: bytes) -> None:
    row = read_title(line)
    assert isinstance(row, TitleRow | OddRow)
    if isinstance(row, TitleRow):
        assert row.image.startswith(f"{row.label}_")
        assert row.title == " ".join(row.title.split())
        row.title.encode()


PLAIN = st.characters(codec="utf-8", exclude_categories=["Cc", "Zs", "Zl", "Zp"], exclude_characters="\\&")
TITLE = st.text(PLAIN, max_size=20)


@given(TITLE)
def test_a_title_written_by_a_csv_writer_is_read_back(title: str) -> None:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(["a_1.jpg", title, "a"])
    assert read_title(line.getvalue().encode()) == TitleRow("a_1.jpg", plain_title(title), "a")
    if not title.startswith("[["):
        assert plain_title(title) == title


def test_an_unclosed_quote_does_not_affect_other_rows(tmp_path: Path) -> None:
    """Python's csv module would read the rest of the file as one title."""
    lines = ["a_1.jpg,One,a", 'a_2.jpg,"Two,a', *(f"a_{i}.jpg,More,a" for i in range(3, 100))]
    assert len(list(csv.reader(lines))) == 2
    (tmp_path / "titles.csv").write_text("\n".join(lines))
    found = [read_title(line) for _, line in SourceFolder(tmp_path).lines("titles.csv")]
    assert [type(row) for row in found] == [TitleRow, OddRow, *[TitleRow] * 97]


LINES = ("b_1.jpg,One,b", "b_1.jpg,Two,b", 'b_2.jpg,"x,b', "b_3.jpg,Three,b", "c_1", "", "a_1.jpg,x,b")


@settings(deadline=None)
@given(st.lists(st.sampled_from(LINES)))
def test_every_line_and_image_becomes_a_row_or_is_listed(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    root = tmp_path_factory.mktemp("lines")
    for split in ("train", "test"):
        (root / "images" / split / "b").mkdir(parents=True)
        (root / f"{split}_titles.csv").write_text("\n".join(lines))
    for number in (1, 2):
        (root / f"images/train/b/b_{number}.jpg").write_bytes(b"")
    (root / "images/test/b/b_9.jpg").write_bytes(b"")
    found = list(Food101(SourceFolder(root), {}).rows("train"))
    samples, skips = [row for row in found if isinstance(row, Sample)], [row for row in found if isinstance(row, Skip)]
    assert len(samples) + sum(skip.line is not None for skip in skips) == sum(bool(line) for line in lines)
    named = {row.file for row in found} | {f"images/train/b/{line.partition(',')[0]}" for line in lines if '"' in line}
    assert {"images/train/b/b_1.jpg", "images/train/b/b_2.jpg"} <= named


REAL = os.environ.get("MOPEFUSE_FOOD101_TITLES", "")


@pytest.mark.skipif(not REAL, reason="MOPEFUSE_FOOD101_TITLES names no titles file")
def test_a_real_titles_file_agrees_with_the_csv_module() -> None:
    with open(REAL, newline="", encoding="utf-8") as lines:
        by_csv = [row for row in csv.reader(lines) if row]
    ours = [read_title(line.rstrip(b"\r\n")) for line in Path(REAL).read_bytes().split(b"\n") if line.strip()]
    assert [type(row) for row in ours] == [TitleRow] * len(by_csv)
    assert [(row.image, row.title, row.label) for row in ours if isinstance(row, TitleRow)] == [
        (image, plain_title(title), label) for image, title, label in by_csv
    ]
    assert not any("\\x" in row.title or "[[" in row.title or html.unescape(row.title) != row.title for row in ours)


# -- cleaning


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("My Apple-Pie, again!", "my apple pie again"),
        ("<p class='x'>Bake</p><br/>it<!-- now -->", "bake it"),
        ("&lt;b&gt;Bake&lt;/b&gt; &amp;amp; eat", "bake eat"),
        ("see https://example.org/a?b=c#d, www.example.org and HTTP://X.", "see and"),
        ("1 < 2 and 3 > 2", "1 2 and 3 2"),
        ("snake_case  \t\n  ÉTÉ 日本 №5", "snake case été 日本 5"),
        ("…", ""),
    ],
)
def test_cleaning_leaves_lower_case_words(text: str, words: str) -> None:
    assert clean(text) == words


@given(st.text())
def test_cleaning_is_idempotent(text: str) -> None:
    words = clean(text)
    assert words == " ".join(words.split())
    assert not set(words) & set("<>&;/\\'\"_-.,:!?()[]{}#$%^*+=@~`|")
