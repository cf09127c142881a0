"""Labels that are probably a mistake are found, with the flag that helps; labels that may be intended are accepted."""

from __future__ import annotations

import csv
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, call, make_pairs, write_rows
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mopefuse.config.schema import Data
from mopefuse.data.label_cells import is_blank, normalise, parse_list, split_cell
from mopefuse.data.label_check import SuspiciousLabels, find_suspicious_labels
from mopefuse.data.load import load_data

GENRES = ("Drama", "Comedy", "Horror", "War", "Music", "Crime")


def found(labels: list[str]) -> dict[str, SuspiciousLabels]:
    return {issue.kind: issue for issue in find_suspicious_labels(Counter(labels), len(labels))}


def combinations(form: str, rows: int = 300) -> list[str]:
    """Labels of a multi-label data set, each row's in one cell."""
    drawn = random.Random(0)
    each = [drawn.sample(GENRES, drawn.randint(1, 4)) for _ in range(rows)]
    forms = {"json": json.dumps, "python": repr, "numpy": lambda row: "[" + " ".join(map(repr, row)) + "]"}
    return [forms[form](row) if form in forms else form.join(row) for row in each]


def prices(rows: int = 300) -> list[str]:
    drawn = random.Random(1)
    return [f"{drawn.uniform(1, 999):.2f}" for _ in range(rows)]


# -- each kind of issue


@pytest.mark.parametrize("form", ["json", "python", "numpy"])
def test_a_list_in_a_cell_is_an_error_with_the_flag_that_reads_it(form: str) -> None:
    issue = found(combinations(form))["list-label"]
    assert "--label-sep list" in issue.fix and "--allow-odd-labels" in issue.fix
    assert issue.rows == 300
    assert "many-labels" not in found(combinations(form)), "one cause is reported once"


@pytest.mark.parametrize("separator", ["|", ";", ", ", "/", ","])
def test_a_separator_whose_parts_recur_is_reported(separator: str) -> None:
    all_of_it = found(combinations(separator))
    flag = f'--label-sep "{separator.strip()}"'
    assert flag in all_of_it["joined-labels"].fix
    assert flag in all_of_it["many-labels"].fix, "the error of too many labels names the cause"
    assert "many-labels" not in found(combinations(separator, 3) * 100)


@pytest.mark.parametrize(
    "labels",
    [
        ["Clothing, Shoes & Jewelry", "Toys, Games", "Books"],
        ["Action/Adventure", "Comedy", "Sci-Fi/Fantasy"],
        ["Home/Kitchen", "Home/Garden", "Electronics/Phones", "Electronics/Audio"],  # paths of a tree
        ["a; b c", "d", "e", "f"],
    ],
)
def test_a_class_name_with_a_comma_or_slash_is_accepted(labels: list[str]) -> None:
    assert found(labels * 20) == {}


def test_unique_prices_are_an_error_and_recurring_ones_a_warning() -> None:
    many = found(prices())
    assert "--label-col" in many["numeric-labels"].fix
    assert "--label-col" in many["many-labels"].fix
    assert set(found([f"${price}" for price in prices(40)] * 10)) == {"numeric-labels"}
    assert set(found([str(number * 7) for number in range(60)] * 10)) == {"numeric-labels"}


@pytest.mark.parametrize(
    "labels",
    [
        [str(number) for number in range(100)],
        [f"{number:03}" for number in range(30)],
        ["0.5", "1.0", "1.5", "2.0", "2.5"],
        [f"{number}.0" for number in range(40)],
        [f"n{1440764 + 391 * number:08}" for number in range(50)],
        ["3", "17", "404"],
        [str(1899 + 5 * number) for number in range(25)],  # years
        [f"{number / 2}" for number in range(21)],  # ratings
        [f"{701 * number:05}" for number in range(60)],  # postcodes
    ],
)
def test_numeric_class_codes_are_accepted(labels: list[str]) -> None:
    assert found(labels * 20) == {}


def test_spellings_of_one_label_are_reported_together() -> None:
    labels = ["Watches"] * 20 + ["watches"] * 3 + ["Watches "] * 2 + ["Caf\u00e9"] * 5 + ["Cafe\u0301"] * 4 + ["Bags"] * 9
    each = [issue for issue in find_suspicious_labels(Counter(labels), len(labels)) if issue.kind == "label-variants"]
    assert len(each) == 2
    assert each[0].message.startswith("'Watches' (20), 'watches' (3), 'Watches ' (2) differ only in case, spaces or Unicode")
    assert each[0].rows == 5
    assert "--fold-labels" in each[0].fix


def test_a_rare_label_similar_to_a_frequent_one_is_reported() -> None:
    for wrong in ("Wacthes", "Watche", "Watchess", "Wotches", " watchs"):
        issue = found(["Watches"] * 30 + ["Handbags"] * 30 + [wrong])["misspelt-label"]
        assert (issue.label, issue.rows) == (wrong, 1)
        assert "'Watches' (30 rows)" in issue.message


@pytest.mark.parametrize(
    "labels",
    [
        ["Watches"] * 30 + ["Witches"] * 12,  # both are frequent
        ["class1"] * 30 + ["class2"],  # digits distinguish classes
        ["cat"] * 30 + ["car"],  # short words are similar by chance
        ["Watches"] * 30 + ["Handbag"],
        ["Watches"] * 4 + ["Wotches"],
    ],
)
def test_labels_that_are_similar_by_chance_are_accepted(labels: list[str]) -> None:
    assert found(labels) == {}


def test_classes_with_a_single_row_are_reported() -> None:
    labels = [f"thing {chr(97 + i)}{chr(97 + j)}" for i in range(5) for j in range(4)] + ["often"] * 100
    assert found(labels)["rare-labels"].rows == 20


@pytest.mark.parametrize("placeholder", ["NaN", "n/a", " NULL", "-"])
def test_a_label_that_stands_for_a_missing_value_is_reported(placeholder: str) -> None:
    issue = found(["cat"] * 30 + ["dog"] * 30 + [placeholder] * 12)["placeholder-label"]
    assert (issue.label, issue.rows) == (placeholder, 12) and "--on-bad skip" in issue.fix
    assert found(["cat"] * 30 + ["dog"] * 30 + ["none"] * 12) == {}, "which may be a class"


@pytest.mark.parametrize("labels", [["a", "b"], ["a", "b", "c"] * 4, [*"abcdefghij"], [], [f"w{i}x" for i in range(10)] * 2])
def test_small_data_sets_may_have_few_rows_of_each_class(labels: list[str]) -> None:
    assert found(labels) == {}


@given(st.lists(st.text(st.sampled_from("0123456789.,eE+-$€% '\"[]|;/\u0661\u00b2"), min_size=1), max_size=20))
def test_any_labels_can_be_checked(labels: list[str]) -> None:
    found(labels)


def test_tags_that_are_unique_to_almost_every_row_are_refused() -> None:
    counts = Counter(f"tag {number}" for number in range(100)) | Counter({"often": 60})
    (many,) = (issue for issue in find_suspicious_labels(counts, 60) if issue.kind == "many-labels")
    assert many.message.startswith("101 distinct labels in 60 training rows, used 160 times in all")


# -- cells


@pytest.mark.parametrize(
    ("cell", "items"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a', \"it's\"]", ["a", "it's"]),
        ("['a' 'b'\n 'c']", ["a", "b", "c"]),
        ("('a',)", ["a"]),
        ("{'a', 'b'}", ["a", "b"]),
        ("[a, b c]", ["a", "b c"]),
        ("[1, 2]", ["1", "2"]),
        ("[]", []),
        ('["caf\\u00e9"]', ["caf\u00e9"]),
        (' ["a"] ', ["a"]),
        *((text, None) for text in ("a", "[other]", "(1)", "{}", "a, b", "[a", "[[1, 2]]", "(a, b)", "", "['a' + 'b']")),
    ],
)
def test_cells_are_recognised_as_lists(cell: str, items: list[str] | None) -> None:
    assert parse_list(cell) == items


@given(st.lists(st.text(max_size=5), min_size=1, max_size=4))
def test_lists_written_by_json_and_python_are_parsed(items: list[str]) -> None:
    kept = [item.encode("utf-8", "replace").decode() for item in items]
    assert parse_list(json.dumps(kept)) == kept
    assert parse_list(repr(kept)) == kept


@given(st.text(st.sampled_from("[](){}'\"\\, a1"), max_size=40))
def test_any_cell_can_be_parsed(cell: str) -> None:
    assert parse_list(cell) is None or all(isinstance(item, str) for item in parse_list(cell) or [])


def test_a_long_cell_is_parsed_quickly() -> None:
    began = time.process_time()
    for cell in ("[" + "'a' " * 24_000 + "]", "[" + '"' * 90_000 + "]", "[" * 90_000 + "]", "['" + "\\" * 90_000 + "]"):
        parse_list(cell)
    assert time.process_time() - began < 5


def test_labels_are_split_from_a_cell() -> None:
    assert split_cell("['a', ' b ', 'a', ' ']", "list") == ("a", "b")
    assert split_cell(" plain ", "list") == ("plain",)
    assert split_cell("  ", "list") == split_cell(" | ", "|") == ()
    assert split_cell("a| b|a", "|") == ("a", "b")


@pytest.mark.parametrize("label", [" ", "\t\n", "\u200b", "\u00a0\u2003", "\ufeff"])
def test_a_label_of_invisible_characters_is_blank(label: str) -> None:
    assert is_blank(label)
    assert not any(map(is_blank, ["a", " a ", "\u200ba", "\u3042", "\ud800", "\ue000", "-"]))
    assert normalise(f"{label}A{label}") == "a"


# -- on the command line


def table(root: Path, labels: list[str], *, delimiter: str = ",") -> Path:
    """Write a CSV of images, texts and labels, each row with its own image."""
    root.mkdir(exist_ok=True)
    with (root / "items.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "text", "img", "label"])
        for number, label in enumerate(labels):
            Image.new("RGB", (16, 16), (number % 256, number // 256, 0)).save(root / f"{number}.png")
            writer.writerow([f"r{number}", f"text {number}", f"{number}.png", label])
    return root / "items.csv"


def check(path: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    done = call("data", "check", path, "--val-fraction", "0.2", *flags, "--json")
    return done.returncode, json.loads(done.stdout)


def train(path: Path, out: Path, *flags: str) -> Any:
    return call("train", *TINY, "--data", path, "--val-fraction", "0.2", "--steps", "1", "--out", out, *flags)


def test_a_column_of_lists_is_refused_without_its_flag_and_read_with_it(tmp_path: Path) -> None:
    path = table(tmp_path / "data", combinations("python", 60))
    code, report = check(path)
    assert code == 4
    (problem,) = (each for each in report["problems"] if each["kind"] == "list-label")
    assert (problem["code"], problem["where"], problem["rows"]) == ("MF-DATA-231", "items.csv:7", 60)
    assert "--label-sep list" in problem["hint"]
    refused = train(path, tmp_path / "no")
    assert refused.returncode == 4
    assert "error[MF-DATA-231]" in refused.stderr and "--label-sep list" in refused.stderr
    code, report = check(path, "--label-sep", "list")
    assert (code, report["labels"]["task"], set(report["labels"]["balance"])) == (0, "multi-label", set(GENRES))
    done = train(path, tmp_path / "run", "--label-sep", "list", "--json")
    assert done.returncode == 0, done.stderr
    assert check(path, "--allow-odd-labels")[0] == 0


def test_cells_with_a_separator_are_refused_by_train_with_the_flag(tmp_path: Path) -> None:
    path = table(tmp_path / "data", combinations("|", 60))
    refused = train(path, tmp_path / "no")
    assert (refused.returncode, "error[MF-DATA-232]" in refused.stderr) == (4, True)
    assert '--label-sep "|"' in refused.stderr and "--allow-odd-labels" in refused.stderr
    code, report = check(path)
    assert code == 4
    assert {"many-labels", "joined-labels"} <= report["kinds"].keys()
    html = tmp_path / "page.html"
    call("data", "check", path, "--val-fraction", "0.2", "--html", html)
    assert "are joined with" in html.read_text() and "--label-sep" in html.read_text()


def test_a_column_of_prices_is_refused_as_classes_unless_it_is_allowed(tmp_path: Path) -> None:
    path = table(tmp_path / "data", prices(40))
    refused = train(path, tmp_path / "no", "--task", "single-label")
    assert (refused.returncode, "--task regression" in refused.stderr) == (4, True)
    alone = train(path, tmp_path / "no", "--task", "single-label", "--allow-odd-labels")
    assert "no row of train can be held out for val" in alone.stderr
    table(path.parent, prices(40) * 2)
    assert train(path, tmp_path / "no", "--task", "single-label").returncode == 4
    done = train(path, tmp_path / "run", "--task", "single-label", "--allow-odd-labels")
    assert done.returncode == 0, done.stderr
    assert "labels: labels are numbers" in done.stderr
    assert "allow_odd_labels: true" in (tmp_path / "run" / "config.yaml").read_text()
    (path.parent / "labels.txt").write_text("".join(f"{price}\n" for price in dict.fromkeys(prices(40))))
    done = train(path, tmp_path / "listed")
    assert (done.returncode, "labels:" in done.stderr) == (0, False), "a labels file states which labels are intended"
    assert "task: single-label, one of 40 labels" in done.stderr


def test_a_labels_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = train(table(tmp_path / "data", ["a", "b"] * 20), tmp_path / "run", "--labels", tmp_path / "none.txt")
    assert done.returncode == 4, done.stderr
    assert f"file not found: {tmp_path / 'none.txt'} · --labels · fix: pass the path of a file" in done.stderr


def test_check_and_train_warn_about_spellings_and_misspellings(tmp_path: Path) -> None:
    labels = ["Watches"] * 12 + ["watches", "Watches ", "Wacthes"] + ["Bags"] * 5
    path = table(tmp_path / "data", labels)
    code, report = check(path)
    assert code == 0
    wheres = {each["kind"]: each["where"] for each in report["problems"]}
    assert wheres["label-variants"] == "items.csv:14"
    assert wheres["misspelt-label"] == "items.csv:16"
    assert check(path, "--strict")[0] == 4
    done = train(path, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "labels: 'Watches' (12), 'Watches ' (1), 'watches' (1) differ only in case" in done.stderr
    assert "labels: 'Wacthes' (1 row) is similar to 'Watches' (14 rows), first in items.csv:16" in done.stderr


def test_with_the_flag_spellings_are_one_label_also_in_evaluation(tmp_path: Path) -> None:
    path = table(tmp_path / "data", ["Watches", "watches", "Watches ", "Bags", "BAGS", "bags"] * 4)
    code, report = check(path, "--fold-labels", "--strict", "--test-fraction", "0.2")
    assert (code, report["labels"]["balance"]) == (0, {"bags": {"train": 12}, "watches": {"train": 12}})
    done = train(path, tmp_path / "run", "--fold-labels", "--test-fraction", "0.2", "--json")
    assert done.returncode == 0, done.stderr
    assert [each["label"] for each in json.loads(done.stdout)["per_label"]] == ["bags", "watches"]
    done = call("eval", tmp_path / "run", "--data", path, "--json")
    assert done.returncode == 0, done.stderr
    (path.parent / "labels.txt").write_text("Watches\nBags\nbags\n")
    assert load_data(Data(path=str(path), fold_labels=True), require=("train",)).labels == ("watches", "bags")


def test_a_blank_label_is_an_error_with_its_row(tmp_path: Path) -> None:
    path = table(tmp_path / "data", ["a", "b", "   ", "a", "b", "a"])
    refused = train(path, tmp_path / "no")
    assert (refused.returncode, "items.csv:4 label is empty" in refused.stderr) == (4, True)
    code, report = check(path)
    assert (code, report["kinds"]["empty-label"]) == (4, 1)


def test_shots_of_many_classes_still_train(tmp_path: Path) -> None:
    path = table(tmp_path / "data", [f"w{number:02}x" for number in range(12)] * 6)
    done = train(path, tmp_path / "run", "--shots", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"]["train"] == 12


def test_unknown_labels_that_join_others_are_an_error_with_the_flag(tmp_path: Path) -> None:
    root = make_pairs(tmp_path / "data", counts={"train": 30, "val": 6})
    for split in ("train", "val"):
        rows = [json.loads(line) for line in (root / f"{split}.jsonl").read_text().splitlines()]
        labels = ["a|b", "a|c", "a"] if split == "train" else ["a|b", "b|c"]
        write_rows(root / f"{split}.jsonl", [row | {"label": labels[i % len(labels)]} for i, row in enumerate(rows)])
    done = call("train", *TINY, "--data", root, "--out", tmp_path / "run", "--steps", "1")
    assert "error[MF-DATA-06]" in done.stderr and '--label-sep "|"' in done.stderr


def test_evaluation_on_other_data_does_not_check_labels(tmp_path: Path) -> None:
    path = table(tmp_path / "data", prices(30))
    assert load_data(Data(path=str(path)), require=()).labels


# -- many labels


def test_ten_thousand_labels_take_seconds() -> None:
    drawn = random.Random(0)
    names = ["".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=12)) for _ in range(10_000)]
    counts = {name: drawn.randint(20, 200) for name in names} | {f"{names[0][:5]}!{names[0][6:]}": 1}
    began = time.process_time()
    assert [issue.kind for issue in find_suspicious_labels(counts, sum(counts.values()))] == ["misspelt-label"]
    assert time.process_time() - began < 10


def test_warnings_about_labels_have_their_own_heading(tmp_path: Path) -> None:
    path = table(tmp_path / "data", ["Watches"] * 12 + ["Watches ", "Wacthes"] + ["Bags"] * 5)
    done = call("data", "check", path, "--val-fraction", "0.2", "--test-fraction", "0.2")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    heading = lines.index("suspicious labels:")
    assert [text.startswith("warning: items.csv:") for text in lines[heading + 1 : heading + 3]] == [True, True]
    assert not [text for text in lines[:heading] if text.startswith("warning: ") and "Watches" in text]
    assert heading > next(number for number, text in enumerate(lines) if text.endswith(" labels:"))
