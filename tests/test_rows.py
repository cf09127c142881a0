"""The native row format: every problem is found before training, with its line, and messages do not repeat a row's content."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import LABELS, code_of, make_pairs, write_rows
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from tasks_of import MULTI

from mopefuse.config.schema import Data
from mopefuse.data.base import DataSet, Split
from mopefuse.data.load import load_data
from mopefuse.encoders.preprocess import TextPreprocess
from mopefuse.errors import DataError

GOOD = {"id": "1", "text": "t", "img": "a.png", "label": "a"}


def load(root: Path, **options: Any) -> DataSet:
    """Load the data set of a folder, which has the image that `GOOD` names."""
    if root.is_dir() and not (root / "a.png").exists():
        Image.new("RGB", (4, 4)).save(root / "a.png")
    return load_data(Data(path=str(root), **options))


def read_split(path: Path, **options: Any) -> Split:
    """Read a training split alone; ``b`` is a second label, so that there is something to learn."""
    (path.parent / "labels.txt").write_text("a\nb\nx\n")
    if not (path.parent / "a.png").exists():
        Image.new("RGB", (4, 4)).save(path.parent / "a.png")
    return load_data(Data(path=str(path.parent), **options), require=("train",)).splits["train"]


def split(folder: Path, content: bytes | str) -> Path:
    path = folder / "train.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read_split(path)
    assert caught.value.where.startswith(str(path))
    return caught.value


def line(**changed: Any) -> str:
    return json.dumps(GOOD | changed)


def folder_with(root: Path, train: list[Any], val: list[Any] | None = None) -> Path:
    """Write a data folder whose rows have these labels."""
    for name, labels in (("train", train), ("val", train if val is None else val)):
        write_rows(root / f"{name}.jsonl", [GOOD | {"id": i, "label": label} for i, label in enumerate(labels)])
    return root


# -- a folder


def test_a_folder_is_read(pairs: Path, multi_pairs: Path) -> None:
    single, multi = load(pairs), load(multi_pairs)
    assert {name: len(part.rows) for name, part in single.splits.items()} == {"train": 12, "val": 6, "test": 7}
    assert (single.labels, (single.task == MULTI), multi.labels, (multi.task == MULTI)) == (LABELS, False, LABELS, True)
    row = single.splits["val"].rows[4]
    assert (row.id, row.values["image"], row.labels, row.line) == ("val-4", "images/val-4.png", ("b",), 5)
    assert single.targets("val")[4].item() == 1
    assert multi.targets("train")[4].tolist() == [1.0, 0.0, 1.0]


def test_a_row_without_labels_is_a_target_of_zeros(tmp_path: Path) -> None:
    data = load(folder_with(tmp_path, [["a"], [], ["b", "b"]]))
    assert data.targets("train").tolist() == [[1, 0], [0, 0], [0, 1]]


def test_a_missing_folder_or_split_is_an_error_that_names_existing_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data folder not found"):
        load(tmp_path / "no" / "where")
    for name in ("products.csv", "snd.csv"):
        (tmp_path / name).touch()
    with pytest.raises(
        DataError, match=r"data folder not found: .* fix: did you mean [^,]*/products.csv\? Otherwise pass a folder"
    ):
        load(tmp_path / "product.csv")
    write_rows(tmp_path / "train.jsonl", [GOOD])
    write_rows(tmp_path / "dev.jsonl", [GOOD])
    with pytest.raises(DataError, match="val split is missing") as caught:
        load(tmp_path)
    assert "dev.jsonl" in caught.value.fix


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_an_empty_split_is_an_error_that_names_it(tmp_path: Path, content: str) -> None:
    assert "the train split has no rows" in refused(split(tmp_path, content)).what


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_a_split_that_is_not_a_regular_file_is_refused_without_reading_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "train.jsonl"
    path.mkdir() if kind == "folder" else os.mkfifo(path)
    assert "not a regular file" in refused(path).what


# -- a row


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"id": 1,,}', "column 10"),
        ('{"id": 1', "is not JSON"),
        ("[1, 2]", "is a list, expected an object"),
        ('"x"', "is a str, expected an object"),
        ("null", "expected an object"),
        (line(extra=float("nan")), "NaN"),
        (line(extra=-float("inf")), "-Infinity"),
        ('{"text": "a", "text": "b", "img": "c", "label": "d"}', "has a key twice"),
        (line(text=None), "text is null"),
        (line(text=3), "text is a number"),
        (line(text=["t"]), "text is a list"),
        (line(img=None), "img is null"),
        (line(label=None), "label is null: the row has no label"),
        (line(label=3), "label is a number"),
        (line(label=False), "label is a boolean"),
        (line(label=["a", 1]), "label is a list, expected a string or a list of strings"),
        (line(id=1.5), "id is a number"),
        (line(id=True), "id is a boolean"),
        (line(id=None), "id is null"),
        ('{"caption": "t", "image": "i", "label": "x"}', "has no text or img; found caption, image, label"),
        ("{}", "has no text or img or label; found nothing"),
        (line(label="\ud800"), "label contains a lone surrogate"),
        (line(img="\udfff.png"), "img contains a lone surrogate"),
        (line(id="\ud800"), "id contains a lone surrogate"),
        ("[" * 100_000, "nested too deeply"),
        ('{"id": ' + "9" * 5000 + "}", "too many digits"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path: Path, bad: str, message: str) -> None:
    error = refused(split(tmp_path, f"{line(id=1)}\n\n{bad}\n{line(id=2)}\n"))
    assert message in error.what
    assert "1 bad row: train.jsonl:3 " in error.what


def test_bytes_that_are_not_utf8_are_an_error_with_their_position(tmp_path: Path) -> None:
    error = refused(split(tmp_path, line().encode() + b'\n{"text": "caf\xe9"}\n'))
    assert "train.jsonl:2 is not UTF-8 (byte 0xe9 at 14)" in error.what
    assert "iconv" in error.what


def test_error_messages_do_not_repeat_the_content_of_rows(tmp_path: Path) -> None:
    secret = "the-patient-name"
    error = refused(split(tmp_path, f'{{"text": "{secret}", "img": 3, "label": "x"}}\n{{"text": "{secret}"\n'))
    assert secret not in str(error)


def test_twenty_problems_are_listed_and_all_are_counted(tmp_path: Path) -> None:
    rows = [line(id="good"), *(line(id=i, img=f"{i}.png") for i in range(33))]
    error = refused(split(tmp_path, "\n".join(rows)))
    assert error.what.startswith("33 bad rows: train.jsonl:2, id 0: image not found: 0.png; ")
    assert error.what.count("train.jsonl:") == 20
    assert error.what.endswith("; and 13 more")
    assert error.fix == "add the file; mopefuse data check --json lists all"


def test_rows_with_the_same_problem_are_reported_once_with_the_fix(tmp_path: Path) -> None:
    error = refused(split(tmp_path, "".join(line(id=i, img="") + "\n" for i in range(33)) + "x\n"))
    assert error.what.startswith("34 bad rows: train.jsonl:1 img is empty, expected a string (to accept such rows, add ")
    assert "(and 32 similar); train.jsonl:34 is not JSON" in error.what
    assert error.what.count("train.jsonl:") == 2 and error.fix.startswith("correct or remove them; ")
    same = refused(split(tmp_path, "x\n" * 33))
    assert same.what == "33 bad rows: train.jsonl:1 is not JSON (column 1: Expecting value) (and 32 similar)"
    assert same.fix.startswith("correct the line; ")


@pytest.mark.parametrize(("name", "hint"), [("titel", "titles"), ("body", "caption")])
def test_the_most_similar_column_is_suggested(tmp_path: Path, name: str, hint: str) -> None:
    write_rows(tmp_path / "train.jsonl", [{"caption": "t", "titles": "t", "img": "a.png", "label": "x"}])
    with pytest.raises(DataError, match=rf"has no {name}; found .*; did you mean --text-col {hint}\?"):
        load_data(Data(path=str(tmp_path), modalities=("text", "image"), text_col=name))


def test_a_repeated_id_is_an_error_with_both_lines(tmp_path: Path) -> None:
    error = refused(split(tmp_path, f"{line(id='x')}\n{line(id='y')}\n{line(id='x')}\n"))
    assert "train.jsonl:3 duplicate id 'x', first used on line 1" in error.what


def test_rows_without_ids_are_numbered_by_line(tmp_path: Path) -> None:
    row = {key: value for key, value in GOOD.items() if key != "id"}
    write_rows(tmp_path / "train.jsonl", [row, row])
    assert [row.id for row in read_split(tmp_path / "train.jsonl").rows] == ["train-1", "train-2"]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (f"{line(id=1)}\r\n{line(id=2)}\r\n", [1, 2]),
        (f"{line(id=1)}\n\n  \n{line(id=2)}", [1, 4]),
        (f"\ufeff{line(id=1)}\n{line(id=2)}\n", [1, 2]),
        (json.dumps(GOOD | {"text": "a\u2028b\x85c"}, ensure_ascii=False) + f"\n{line(id=2)}\n", [1, 2]),
    ],
    ids=["CRLF", "blank lines and no last newline", "BOM", "U+2028 in a text"],
)
def test_any_line_ending_is_accepted_and_line_numbers_are_correct(tmp_path: Path, content: str, lines: list[int]) -> None:
    assert [row.line for row in read_split(split(tmp_path, content)).rows] == lines


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (gzip.compress(line().encode()), "gzip"),
        (b"PAR1....PAR1", "Parquet"),
        (line().encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04...", "zip"),
    ],
    ids=["gzip", "Parquet", "UTF-16", "zip"],
)
def test_other_formats_with_the_suffix_jsonl_are_recognised(tmp_path: Path, content: bytes, name: str) -> None:
    assert name in refused(split(tmp_path, content)).what


# -- labels


def test_labels_unknown_to_training_are_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x \(2\), y \(1\)") as caught:
        load(folder_with(tmp_path, ["a", "b"], ["x", "a", "y", "x"]))
    assert caught.value.where == "val.jsonl:1, id 0"
    (tmp_path / "labels.txt").write_text("b\na\r\nx\ny\n")
    assert load(tmp_path).labels == ("b", "a", "x", "y")


@pytest.mark.parametrize(
    ("content", "message"), [(b"a\nb\na\n", "'a' twice"), (b"a\nb\xff\n", "not UTF-8")], ids=["twice", "bytes"]
)
def test_an_invalid_labels_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (folder_with(tmp_path, ["a", "b"]) / "labels.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def test_mixing_strings_and_lists_as_labels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="some labels are strings and some are lists") as caught:
        load(folder_with(tmp_path, ["a", "b"], ["a", ["b"]]))
    assert caught.value.where == "val.jsonl:2"


@pytest.mark.parametrize("labels", [["a", "a"], [["a"], []], [[], []]])
def test_a_single_class_is_refused(tmp_path: Path, labels: list[Any]) -> None:
    with pytest.raises(DataError, match="a classifier needs at least two"):
        load(folder_with(tmp_path, labels))


@pytest.mark.parametrize("label", ["日本", "עברית", "🙂", "<script>", "=1+1", "İ", " spaced "])
def test_labels_are_preserved_verbatim(tmp_path: Path, label: str) -> None:
    assert label in load(folder_with(tmp_path, ["a", label])).labels


# -- any bytes


_pieces = [line(), "{", "}", '"', "\ud800", "\n", "NaN", "[", "0"]


@given(st.binary(max_size=300) | st.lists(st.sampled_from(_pieces), max_size=8))
@example(b'{"text": "\\ud800", "img": "\\u0000", "label": []}')
@example(b"1e999999")
def test_any_bytes_give_rows_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, content: bytes | list[str]) -> None:
    raw = content if isinstance(content, bytes) else "".join(content).encode("utf-8", "surrogatepass")
    path = split(tmp_path_factory.getbasetemp(), raw)
    assert re.fullmatch(r"|MF-(DATA|SEC)-\d+", code_of(lambda: read_split(path).rows[0]))


@pytest.mark.parametrize("field", ["text", "img", "label", "id"])
def test_a_field_of_the_wrong_type_is_refused(tmp_path: Path, field: str) -> None:
    assert field in refused(split(tmp_path, line(**{field: {"a": 1}}))).what


# -- texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\ud800b", "a\ufffdb"),
        ("nul\x00 bell\x07 del\x7f", "nul\ufffd bell\ufffd del\ufffd"),
        ("tab\tline\nreturn\r", "tab\tline\nreturn\r"),
        ("", ""),
        ("x" * 1_000_000, "x" * 128),
        ("é🙂日本", "é🙂日本"),
    ],
    ids=["surrogate", "control", "white space", "empty", "long", "unicode"],
)
def test_a_text_is_cleaned_and_truncated_before_tokenization(text: str, expected: str) -> None:
    assert TextPreprocess(lambda texts, most: texts == ["a"] or pytest.fail("not yet"), 4).item(text) == expected


def test_data_sets_are_reproducible(tmp_path: Path) -> None:
    one, two = load(make_pairs(tmp_path / "one")), load(make_pairs(tmp_path / "two"))
    assert one.fingerprint() == two.fingerprint()
    (tmp_path / "two" / "val.jsonl").open("a").write("\n")
    assert one.fingerprint() != load(tmp_path / "two").fingerprint()
