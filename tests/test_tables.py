"""Tables of any format: JSON lines, CSV, TSV, Parquet and image folders give the same data set."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, call, code_of, make_pairs, write_rows
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tasks_of import MULTI

from mopefuse.config.schema import Data
from mopefuse.data.base import DataSet
from mopefuse.data.csv_records import delimiter_of
from mopefuse.data.load import load_data
from mopefuse.errors import MopefuseError, Notice

SPLITS = ("train", "val", "test")


def load(path: Path, require: tuple[str, ...] = ("train", "val"), **options: Any) -> DataSet:
    return load_data(Data(path=str(path), **options), require=require)


def refused(path: Path, **options: Any) -> MopefuseError:
    with pytest.raises(MopefuseError) as caught:
        load(path, **options)
    return caught.value


def rows_of(root: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]


def content_of(data: DataSet) -> dict[str, list[tuple[str, str, str, tuple[str, ...]]]]:
    each = {name: [(row.id, row.values, row.labels) for row in split.rows] for name, split in data.splits.items()}
    return {name: [(i, v["text"], v["image"], labels) for i, v, labels in rows] for name, rows in each.items()}


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def copy(pairs: Path, tmp_path: Path) -> Path:
    """A data set whose tables a test may replace."""
    return shutil.copytree(pairs, tmp_path / "copy")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_every_format_gives_the_same_rows(pairs: Path, copy: Path, suffix: str) -> None:
    for split in SPLITS:
        rows = rows_of(copy, split)
        rows[0]["text"] = 'a "quoted", text\nof two lines; with a tab\t'
        write_rows(copy / f"{split}.jsonl", rows)
    expected = content_of(load(copy))
    for split in SPLITS:
        rows = rows_of(copy, split)
        (copy / f"{split}.jsonl").unlink()
        if suffix == "parquet":
            arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
            parquet.write_table(arrow.Table.from_pylist(rows), copy / f"{split}.parquet")
        else:
            write_csv(copy / f"{split}.{suffix}", rows, "\t" if suffix == "tsv" else ",")
    assert content_of(load(copy)) == expected
    assert content_of(load(copy)) == expected, "and the same from the cache"


@pytest.mark.parametrize(("delimiter", "name"), [(";", "semicolon"), ("\t", "tab"), ("|", "vertical-bar")])
def test_the_delimiter_of_a_csv_file_is_detected(copy: Path, delimiter: str, name: str) -> None:
    expected = content_of(load(copy))
    for split in SPLITS:
        rows = rows_of(copy, split)
        (copy / f"{split}.jsonl").unlink()
        write_csv(copy / f"{split}.csv", rows, delimiter)
    with pytest.warns(Notice, match=f"train.csv is parsed as {name}-separated, not comma-separated"):
        assert content_of(load(copy)) == expected
    done = call("data", "check", copy)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("header", "default", "wanted", "delimiter"),
    [
        ("id,text,img,label", ",", {"text", "img", "label"}, ","),
        ("nr;titel;bild;art", ",", {"text", "img", "label"}, ";"),
        ("id;text, long;img, small, square;label", ",", {"img", "label"}, ";"),
        ("id,text;long,img,label", ",", {"img", "label"}, ","),
        ("id,text,img,label", "\t", {"text", "img", "label"}, ","),
        ("text", ",", {"text"}, ","),
        ("\ufeff\n\nid;label", ",", {"label"}, ";"),
        ("", ",", set(), ","),
    ],
)
def test_the_delimiter_is_detected_from_the_header(header: str, default: str, wanted: set[str], delimiter: str) -> None:
    assert delimiter_of(f"{header}\na,b;c\n".encode(), default, wanted) == delimiter


def test_columns_may_have_other_names(copy: Path) -> None:
    expected = content_of(load(copy))
    for split in SPLITS:
        rows = [{"n": r["id"], "caption": r["text"], "file": r["img"], "kind": r["label"]} for r in rows_of(copy, split)]
        write_rows(copy / f"{split}.jsonl", rows)
    error = refused(copy)
    assert "has no text or img or label; found caption, file, kind, n" in error.what
    assert "did you mean --text-col caption --image-col file?" in error.what
    columns = {"id_col": "n", "text_col": "caption", "img_col": "file", "label_col": "kind"}
    assert content_of(load(copy, **columns)) == expected


def test_a_single_table_may_name_splits_in_a_column(copy: Path) -> None:
    expected = content_of(load(copy))
    names = {"train": "train", "val": "Validation", "test": "test"}
    write_csv(copy / "all.csv", [row | {"part": names[split]} for split in SPLITS for row in rows_of(copy, split)])
    assert content_of(load(copy / "all.csv", split_col="part")) == expected
    write_csv(copy / "all.csv", [row | {"part": "sometimes"} for row in rows_of(copy, "train")])
    assert "part is none of train, val, test" in refused(copy / "all.csv", split_col="part").what
    write_rows(copy / "all.jsonl", rows_of(copy, "train"))
    assert "all.jsonl:1 has no part; found id, img, label, text" in refused(copy / "all.jsonl", split_col="part").what
    assert content_of(load(copy, split_col="part")) == expected, "a folder defines splits by its files"


def test_missing_splits_are_held_out_only_on_request(copy: Path) -> None:
    rows = rows_of(copy, "train")
    write_csv(copy / "one.csv", rows)
    error = refused(copy / "one.csv")
    assert "the val split is missing" in error.what
    assert "--val-fraction 0.1" in error.fix
    data = load(copy / "one.csv", val_fraction=0.25, test_fraction=0.25)
    assert {name: len(split.rows) for name, split in data.splits.items()} == {"train": 6, "val": 3, "test": 3}
    ids = [row.id for split in data.splits.values() for row in split.rows]
    assert sorted(ids) == sorted(row["id"] for row in rows)
    assert refused(copy, val_fraction=0.5).code == "MF-CFG-43", "the folder has a val split"


def test_several_labels_in_one_cell_are_split(copy: Path) -> None:
    rows = [row | {"label": "a|b" if number % 2 else " c "} for number, row in enumerate(rows_of(copy, "train"))]
    write_csv(copy / "one.csv", [*rows[:-1], rows[-1] | {"label": ""}])
    data = load(copy / "one.csv", label_sep="|", val_fraction=0.2)
    assert (data.task == MULTI)
    assert data.labels == ("a", "b", "c")
    assert {labels for split in data.splits.values() for labels in split.labels} == {("a", "b"), ("c",), ()}
    assert "label is empty" in refused(copy / "one.csv", val_fraction=0.2).what


def test_images_may_be_in_other_named_folders(copy: Path, tmp_path: Path) -> None:
    expected = content_of(load(copy))
    shutil.move(copy / "images", tmp_path / "photos" / "images")
    assert refused(copy).code == "MF-DATA-11"
    assert content_of(load(copy, image_roots=(str(tmp_path / "photos"),))) == expected
    for split in SPLITS:
        rows = [row | {"img": str(tmp_path / "photos" / row["img"])} for row in rows_of(copy, split)]
        write_rows(copy / f"{split}.jsonl", rows)
    assert refused(copy).code == "MF-SEC-01"
    assert len(load(copy, image_roots=(str(tmp_path / "photos"),)).splits["train"].rows) == 12
    assert refused(copy, image_roots=(str(tmp_path / "photos" / "images" / "none"),)).code == "MF-SEC-01"


def test_image_folders_have_labels_by_folder_and_captions_in_files(tmp_path: Path) -> None:
    root = tmp_path / "folders"
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            for number in range(2):
                path = root / split / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (number, len(label), len(split))).save(path)
                path.with_suffix(".txt").write_text(f"{label} {number}\n")
    beside = content_of(load(root))
    assert beside["val"][3] == ("dog/1.png", "dog 1", "val/dog/1.png", ("dog",))
    for split in ("train", "val"):
        names = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(2)]
        write_rows(root / split / "metadata.jsonl", [{"file_name": n, "text": n[:5].replace("/", " ")} for n in names])
        for path in root.rglob("*.txt"):
            path.unlink(missing_ok=True)
    assert content_of(load(root)) == beside
    write_csv(root / "val" / "metadata.csv", [{"file_name": "cat/0.png", "caption": "x"}])
    (root / "val" / "metadata.jsonl").unlink()
    assert "has no text" in refused(root).what
    (root / "val" / "metadata.csv").unlink()
    assert "val/:1 (cat/0.png) has no text: add 0.txt beside it" in refused(root).what
    assert load(root, allow_missing_text=True).splits["val"].rows[0].values["text"] == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'id,text,img,label\n1,"never closed,a.png,a\n2,t,a.png,b\n', "table.csv:2 has an unclosed quote"),
        (b'id,text,img,label\n1,"a"b,a.png,a\n2,t,a.png,b\n', "table.csv:2 is not CSV"),
        (b'id,"text,img,label\n1,t,a.png,a\n', "the header has an unclosed quote"),
        (b"id,text,img,label\n1,t,a.png\n", "table.csv:2 has 3 fields, the header has 4"),
        (b"id,text,img,label\n1,t,a.png,a,b\n", "table.csv:2 has 5 fields"),
        (b"id,text,text,label\n", "the column 'text' occurs twice"),
        (b"caption,img,label\nt,a.png,a\n", "did you mean --text-col caption?"),
        (b"id,text,img,label\n\n1,caf\xe9,a.png,a\n", "table.csv:3 is not UTF-8 (byte 0xe9)"),
        ("id,text\n".encode("utf-16"), "this is UTF-16"),
        (b"", "no rows"),
        (b"id,text,img,label\n", "no rows"),
    ],
)
def test_an_invalid_csv_is_an_error_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "table.csv").write_bytes(content)
    error = refused(tmp_path / "table.csv", val_fraction=0.5)
    assert message in error.what
    assert error.exit_code == 4


def test_a_damaged_parquet_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing more PAR1")
    assert refused(tmp_path / "t.parquet", val_fraction=0.5).code == "MF-DATA-24"


def test_a_split_in_two_formats_and_a_file_that_is_not_a_table_are_refused(copy: Path) -> None:
    write_csv(copy / "val.csv", rows_of(copy, "val"))
    assert "the val split has two tables: val.jsonl and val.csv" in refused(copy).what
    (copy / "notes.txt").write_text("a")
    assert refused(copy / "notes.txt").code == "MF-DATA-20"


@given(content=st.binary(max_size=200) | st.lists(st.sampled_from(['"', ",", "\n", "a", "text,img,label\n"])).map("".join))
def test_any_bytes_give_a_table_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, content: bytes | str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert code_of(lambda: load(path, val_fraction=0.5)).startswith(("MF-DATA", "MF-SEC"))


def test_a_single_table_can_be_trained_on_from_the_command_line(pairs: Path, tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data", counts={"train": 20})
    rows = [{"no": r["id"], "title": r["text"], "photo": r["img"][7:], "kind": r["label"]} for r in rows_of(root, "train")]
    write_csv(tmp_path / "products.csv", rows)
    columns = "--id-col no --text-col title --image-col photo --label-col kind --val-fraction 0.2 --test-fraction 0.2".split()
    where = ("--data", tmp_path / "products.csv", "--image-root", root / "images", "--out", tmp_path / "run")
    done = call("train", *TINY, *columns, *where, "--steps", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == {"train": 12, "val": 4, "test": 4}
    drawn = json.loads((tmp_path / "run" / "splits.json").read_text())
    assert {name: len(ids) for name, ids in drawn.items()} == {"train": 12, "val": 4, "test": 4}
    again = call("eval", tmp_path / "run", "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["metrics"]["accuracy"] == json.loads(done.stdout)["metrics"]["accuracy"]
