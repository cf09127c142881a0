"""The pages of `data check` and `data preview`: complete, harmless, without network access, and never written over other
data."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from chart_cases import rows_of, tips
from check_cases import ATTRIBUTE, HOSTILE, MAX_PIXELS, line, make_broken, save
from conftest import call
from PIL import Image

from mopefuse.config.schema import Data
from mopefuse.data.check import check
from mopefuse.report import data_check
from mopefuse.report.bars import histogram, sizes
from mopefuse.report.data_preview import draw
from mopefuse.report.pages import dump, thumbnail

SERVED = "http://127.0.0.1:8000/?model="  # the page of a server for the model, the only link
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails if elements are not nested correctly."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def check_harmless(self) -> None:
        """Check that a page loads nothing and runs only the scripts that its policy lists by digest."""
        for tag, attributes in self.elements:
            links = [key for key in attributes if key.startswith("on") or key in ("href", "srcset", "action", "xlink:href")]
            if tag == "a" and attributes["href"].startswith(SERVED):
                links.remove("href")  # followed by a click only
            assert not links, tag
            assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
        policy = next(meta["content"] for meta in self.all("meta") if "http-equiv" in meta)
        parts = dict(part.strip().partition(" ")[::2] for part in policy.split(";"))
        data, *sources = self.scripts or [""]
        assert parts.pop("script-src", "").split() == [
            f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" for source in sources
        ]
        assert parts == {"default-src": "'none'", "style-src": "'unsafe-inline'", "img-src": "data:"}
        if sources:
            assert [script.get("type") for script in self.all("script")] == ["application/json", *[None] * len(sources)]
            assert json.loads(data).keys() == {"charts", "themes"} and "<" not in data

    def charts(self) -> set[str]:
        """Return the names of the page's charts, each with its specification."""
        names = [attributes["data-chart"] for attributes in self.all("div") if "data-chart" in attributes]
        assert len(set(names)) == len(names)
        assert set(names) == (json.loads(self.scripts[0])["charts"].keys() if self.scripts else set())
        return set(names)

    def pictures(self) -> list[Image.Image]:
        kinds = [attributes["src"].partition(",") for attributes in self.all("img")]
        assert {kind for kind, _, _ in kinds} <= {"data:image/jpeg;base64"}
        return [Image.open(io.BytesIO(base64.b64decode(content))) for _, _, content in kinds]


def state(root: Path) -> list[tuple[str, int, str]]:
    """Return names, times and contents of everything below a folder."""
    files = sorted(path for path in root.rglob("*"))
    return [
        (str(path), path.lstat().st_mtime_ns, hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest())
        for path in [root, *files]
    ]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_broken(tmp_path_factory.mktemp("broken"))


@pytest.fixture(scope="module")
def pages(broken: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """The page of a check and the preview of the same data; also checks that the data did not change."""
    folder, before = tmp_path_factory.mktemp("pages"), state(broken)
    done = call("data", "check", broken, "--max-pixels", MAX_PIXELS, "--html", folder / "check.html", "--json")
    assert (done.returncode, json.loads(done.stdout)["html"]) == (4, str(folder / "check.html"))
    done = call("data", "preview", broken, "--max-pixels", MAX_PIXELS, "-o", folder / "sheet.html", "--json")
    assert json.loads(done.stdout) == {"ok": True, "path": str(folder / "sheet.html"), "rows": 19}
    assert state(broken) == before
    assert sorted(path.name for path in folder.iterdir()) == ["check.html", "sheet.html"]
    return {path.stem: Page(path.read_text(encoding="utf-8")) for path in folder.iterdir()}


@pytest.mark.parametrize("name", ["check", "sheet"])
def test_a_page_loads_nothing_and_runs_only_its_own_scripts(pages: dict[str, Page], name: str) -> None:
    page = pages[name]
    allowed = "html head meta title style body main header footer section article h1 h2 p div span i b br img table tr th td"
    allowed += " code pre details summary ul li"
    if name == "check":
        allowed += " script noscript figure figcaption thead tbody"
    assert {tag for tag, _ in page.elements} <= set(allowed.split())
    page.check_harmless()
    assert len(page.scripts) == (3 if name == "check" else 0)


@pytest.mark.parametrize("name", ["check", "sheet"])
def test_hostile_labels_ids_and_texts_are_shown_as_text(pages: dict[str, Page], name: str) -> None:
    assert HOSTILE in pages[name].text
    assert f"t26{ATTRIBUTE}" in pages[name].text
    assert not re.search("[\x00-\x08\x0b-\x1f\ud800-\udfff]", pages[name].text)


def test_attributes_are_escaped(tmp_path: Path) -> None:
    odd = f"{ATTRIBUTE}'><img src=x>"
    save(tmp_path / f"{odd}.png")
    rows = [line("=1+1", f"{odd}.png", odd, odd), line("2", f"{odd}.png", "b")]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "val.jsonl").write_text("\n".join(rows))
    beside = tmp_path.with_name(f"{tmp_path.name}-page.html")
    call("data", "check", tmp_path, "--html", beside)
    page = Page(beside.read_text(encoding="utf-8"))
    titles = {attributes["title"] for _, attributes in page.elements if "title" in attributes}
    assert {odd, f"{odd}.png, 24 x 24 pixels"} <= titles
    assert {attributes["alt"] for attributes in page.all("img")} == {f"{odd}.png"}
    assert "=1+1" in page.text


def test_the_page_of_a_check_has_its_counts_kinds_and_labels(pages: dict[str, Page]) -> None:
    page = pages["check"]
    for text in ("21 errors", "10 warnings", "truncated-image", "train.jsonl:15, id t15", "zebra", "8 x 30 to 20 x 300"):
        assert text in page.text
    assert page.charts() == {"lengths", "sizes"}
    assert "24 x 24" in page.text and "20 x 300" in page.text, "sizes of images that could be decoded, in a table"
    bars = [attributes["title"] for attributes in page.all("span") if attributes.get("class") == "name"]
    assert bars == ["a", "b", HOSTILE, "zebra"]


def test_the_worst_problems_have_pictures_or_say_why_not(pages: dict[str, Page], broken: Path) -> None:
    page = pages["check"]
    names = [attributes["alt"] for attributes in page.all("img")]
    assert names == ["copy-of-1.png", "1.png", "5.png", "2.png", "tiny.png", "strip.png", "moving.gif"]
    assert [picture.size for picture in page.pictures()] == [(24, 24)] * 4 + [(8, 30), (13, 200), (24, 24)]
    assert page.text.count("text of t2") == 2, "both texts of a pair"
    assert "8950 4e47 0d0a 1a0a .PNG...." in page.text
    assert "3c21 646f 6374 7970 &lt;!doctyp".replace("&lt;", "<") in page.text
    assert "huge.png has 200 x 100 pixels, more than 12,000" in page.text
    assert len(page.all("pre")) == 4  # cut, page, scan and words; nothing.jpg does not exist


def test_with_many_problems_sixty_are_shown_and_every_kind_is_represented(tmp_path: Path) -> None:
    rows = []
    for number in range(90):
        save(tmp_path / f"{number}.png", (8, 8), seed=number)
        rows.append(line(f"t{number}", f"{number}.png", "ab"[number % 2]))
    save(tmp_path / "cut.png", seed=99)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    (tmp_path / "train.jsonl").write_text("\n".join([*rows, line("t90", "cut.png")]))
    report = check(Data(path=str(tmp_path)))
    assert len(report.by_kind()["tiny-image"]) == 90
    page = Page(data_check.check_page(report, name="x", summary="", columns=(), splits=()))
    assert (len(page.all("img")), len(page.all("pre"))) == (59, 1)


def test_long_lists_are_truncated_and_counted(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{\n" * 300)
    page = Page(data_check.check_page(check(Data(path=str(tmp_path))), name="x", summary="", columns=(), splits=()))
    assert page.text.count("train.jsonl:") == 200 + 1
    assert "and 100 more" in page.text


# -- the preview


def test_the_sheet_shows_each_row_and_what_is_wrong_with_its_image(pages: dict[str, Page]) -> None:
    page = pages["sheet"]
    assert len(page.all("article")) == 19
    for text in ("image not found: gone.png", "(image file is truncated)", "outside the data folder", "more than 12,000"):
        assert text in page.text
    assert page.text.count("no picture") == 10
    assert "19 of 19 rows, taken from each class in turn, seed 0; 10 more cannot be read" in page.text
    assert "empty text" in page.text


def test_a_long_text_is_truncated_and_can_be_expanded(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    text = "".join(f"{number:05d} " for number in range(5000))
    rows = [line("1", text=text), line("2", label="b", text=text[:300]), line("3", text=text[:301])]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    sheet = tmp_path.with_name(f"{tmp_path.name}-sheet.html")
    assert call("data", "preview", tmp_path, "-o", sheet).returncode == 0
    page = Page(sheet.read_text(encoding="utf-8"))
    assert len(page.all("details")) == 2
    assert page.text.count(text[:300] + "…") == 2
    assert text[:20_000] + "… and 10,000 characters more" in page.text


def test_rows_are_drawn_from_every_class_in_turn_by_the_seed_alone() -> None:
    labels = [("a",)] * 90 + [("b",)] * 7 + [("c",)] * 3 + [("a", "d")]
    ids = [f"r{number}" for number in range(len(labels))]
    drawn = draw(ids, labels, 12, 0)
    counts = {name: sum(labels[row] == name for row in drawn) for name in set(labels)}
    assert counts == {("a",): 4, ("b",): 4, ("c",): 3, ("a", "d"): 1}
    assert draw(ids, labels, 12, 0) == drawn != draw(ids, labels, 12, 1)
    turned = draw(ids[::-1], labels[::-1], 12, 0)
    assert {ids[::-1][row] for row in turned} == {ids[row] for row in drawn}
    assert sorted(draw(ids, labels, 1000, 0)) == list(range(len(ids)))
    assert draw(["x"], [()], 5, 0) == [0]


@pytest.mark.parametrize("split", ["test", "nothing"])
def test_a_missing_split_has_no_preview(tmp_path: Path, split: str) -> None:
    root = tmp_path / "data"
    save(root / "1.png")
    (root / "train.jsonl").write_text(line("1"))
    done = call("data", "preview", root, "--split", split, "-o", tmp_path / "sheet.html")
    assert (done.returncode, done.stderr.split(":")[0]) == (4, "error[MF-DATA-82]")
    assert "the data have train" in done.stderr
    assert not (tmp_path / "sheet.html").exists()


def test_a_split_of_a_single_table_has_a_preview(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    (tmp_path / "all.csv").write_text("id,text,img,label,part\n1,one,1.png,a,train\n2,two,1.png,b,dev\n")
    flags = ("--split-col", "part", "--split", "val", "-o", tmp_path / "sheet.html", "--json")
    assert json.loads(call("data", "preview", tmp_path / "all.csv", *flags).stdout)["rows"] == 1
    assert "two" in Page((tmp_path / "sheet.html").read_text(encoding="utf-8")).text


# -- where pages are written


@pytest.mark.parametrize("command", [("check", "--html"), ("preview", "-o")])
def test_a_page_is_never_written_into_data_or_over_other_files(pairs: Path, tmp_path: Path, command: tuple[str, str]) -> None:
    verb, flag = command
    (tmp_path / "notes.html").write_text("mine")
    before = state(pairs)
    for page, code in (
        (pairs / "page.html", "MF-DATA-84"),
        (pairs / "train.jsonl", "MF-DATA-84"),
        (tmp_path / "notes.html", "MF-DATA-86"),
        (tmp_path, "MF-CFG-303"),
    ):
        done = call("data", verb, pairs, flag, page, "--json")
        assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (4 if "DATA" in code else 3, code)
    assert (state(pairs), (tmp_path / "notes.html").read_text()) == (before, "mine")
    for _ in range(2):  # a mopefuse page may be replaced
        assert call("data", verb, pairs, flag, tmp_path / "page.html").returncode == 0


# -- parts


def test_a_thumbnail_is_a_small_jpeg() -> None:
    for size, expected in (((1000, 500), (200, 100)), ((1, 5000), (1, 200)), ((3, 2), (3, 2))):
        content = base64.b64decode(thumbnail(Image.new("RGB", size)).partition(",")[2])
        picture = Image.open(io.BytesIO(content))
        assert (picture.format, picture.size) == ("JPEG", expected)


def test_bytes_are_shown_in_hex_and_as_text() -> None:
    assert dump(b"\x89PNG\r\n\x1a\n<b>") == [("8950 4e47 0d0a 1a0a", ".PNG...."), ("3c62 3e            ", "<b>")]


def test_a_histogram_has_every_value_and_marks_the_limit() -> None:
    def drawn(values: list[int], limit: int = 0) -> Any:
        return histogram("x", "x", values, unit="words", what="text", limit=limit)

    found = drawn([1, 1, 2, 5], limit=4)
    assert [(row["count"], row["tip"]) for row in rows_of(found, "count")] == [
        (0, "0 words: 0 texts"),
        (2, "1 words: 2 texts"),
        (1, "2 words: 1 text"),
        (0, "3 words: 0 texts"),
        (0, "4 words: 0 texts"),
        (1, "5 words: 1 text"),
    ]
    assert [row["first"] for row in rows_of(found, "shown")] == [4]
    assert rows_of(drawn([3], limit=512), "shown") == [], "a limit beyond the axis"
    many = drawn([*range(1000), 10**6])
    assert (len(tips(many)), tips(many)[-1]) == (32, "961 or more words: 40 texts")
    assert many.rows[-1] == ["961 or more", "40"]
    assert drawn([]) is None


def test_sizes_of_images_are_counted_and_many_are_grouped() -> None:
    found = sizes("x", "x", [(100, 10)] * 3 + [(10, 100)])
    assert found is not None
    assert tips(found) == ["100 x 10 pixels: 3 images", "10 x 100 pixels: 1 image"]
    assert sizes("x", "x", []) is None
    many = sizes("x", "x", ((width, height) for width in range(1, 100) for height in range(1, 100)))
    assert many is not None
    rows = rows_of(many, "count")
    assert len(rows) <= 41 * 41 and sum(row["count"] for row in rows) == 99 * 99
    assert all(row["tip"].startswith("about ") and 0.9 < row["width"] < 110 for row in rows)
