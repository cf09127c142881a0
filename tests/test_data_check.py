"""`data check` finds all problems at once, by kind, line and id; it hides nothing and changes nothing."""

from __future__ import annotations

import gzip
import json
import os
import re
import tempfile
from pathlib import Path

import pytest
from check_cases import BROKEN, ESCAPE, HOSTILE, MAX_PIXELS, folder, kinds, line, make_broken, report, save, stdout_json, write
from conftest import TINY, call, make_pairs, run_cli
from hypothesis import given
from hypothesis import strategies as st

from mopefuse.config.schema import Data
from mopefuse.data.findings import KINDS, row_findings
from mopefuse.data.index import Index
from mopefuse.data.load import load_data
from mopefuse.data.sets.digit_questions import make
from mopefuse.report.data_check import check_page


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_broken(tmp_path_factory.mktemp("broken"))


# -- everything at once


def test_a_clean_data_set_has_no_findings(pairs: Path, multi_pairs: Path) -> None:
    for data, multi in ((pairs, False), (multi_pairs, True)):
        done = call("data", "check", data, "--json", "--strict")
        found = stdout_json(done)
        assert (done.returncode, found["ok"], found["errors"], found["warnings"], found["problems"]) == (0, True, 0, 0, [])
        assert {name: facts["rows"] for name, facts in found["splits"].items()} == {"train": 12, "val": 6, "test": 7}
        assert found["splits"]["val"]["pixels"] == {"smallest": [16, 16], "largest": [16, 16]}
        assert found["labels"]["task"] == ("multi-label" if multi else "single-label")
        assert "error" not in found


def test_all_problems_are_found_in_one_pass_with_line_and_id(broken: Path) -> None:
    done = call("data", "check", broken, "--max-pixels", MAX_PIXELS, "--json")
    fields = ("kind", "severity", "code", "split", "where", "id", "rows")
    found = [tuple(problem[field] for field in fields) for problem in stdout_json(done)["problems"]]
    assert found == [tuple(str(broken) if value == "{data}" else value for value in row) for row in BROKEN]
    assert done.returncode == 4


def test_every_kind_of_finding_has_a_test_case(broken: Path) -> None:
    elsewhere = {"missing-split", "unreadable-table", "empty-split", "bad-labels-file", "one-class"}
    elsewhere |= {"contradicting-labels", "repeated-row"}
    elsewhere |= {"bad-csv", "bad-split-name", "slow-image", "bad-row", "label-not-a-number"}
    elsewhere |= {"missing-file", "unreadable-file", "leaked-file", "leaked-value", "missing-value", "nothing"}
    elsewhere |= {"list-label", "many-labels", "joined-labels", "label-variants", "misspelt-label"}  # test_label_check.py
    elsewhere |= {"mixed-currencies"}  # test_values_data.py
    elsewhere |= {"numeric-labels", "rare-labels", "placeholder-label"}
    elsewhere |= {"missing-mask", "unreadable-mask", "unlisted-class", "mask-of-other-shape"}  # test_segmentation.py
    elsewhere |= {"unintended-ids", "unused-class-ids"}  # test_mask_data.py
    assert {row[0] for row in BROKEN} | elsewhere == KINDS.keys()


def test_a_split_whose_rows_are_all_bad_is_not_called_empty(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("title,photo,label\n" + "a shoe,a.png,shoe\n" * 20)
    done = call("data", "check", tmp_path / "items.csv", "--val-fraction", "0.2", "--json")
    assert stdout_json(done)["kinds"] == {"missing-column": 20, "missing-test": 1}


def test_the_error_is_one_line_on_stderr_after_the_report(broken: Path) -> None:
    done = call("data", "check", broken, "--max-pixels", MAX_PIXELS)
    assert done.returncode == 4
    assert done.stderr.splitlines()[-1] == f"error[MF-DATA-80]: 21 errors in {broken} · fix: correct the problems listed"
    lines = done.stdout.splitlines()
    assert "error: train.jsonl:13, id t13: image not found: gone.png; used by 2 rows" in lines
    assert "error: train.jsonl:15, id t15: cut.png is not a readable image (image file is truncated)" in lines
    assert "21 errors, 10 warnings" in lines
    summary = [text.split()[:4] for text in lines]
    assert ["wrong-format-image", "error", "2", "train.jsonl:17,"] in summary
    assert ["tiny-image", "warning", "1", "train.jsonl:22,"] in summary


def test_json_has_the_error_in_its_usual_form_next_to_the_report(broken: Path) -> None:
    found = stdout_json(call("data", "check", broken, "--max-pixels", MAX_PIXELS, "--json", "--most", "3"))
    assert found["ok"] is False
    assert found["error"] == {
        "code": "MF-DATA-80",
        "exit": 4,
        "message": f"21 errors in {broken}",
        "where": "",
        "hint": "correct the problems listed",
    }
    assert len(found["problems"]) == 3
    assert (found["errors"], found["warnings"], sum(found["kinds"].values())) == (21, 10, 31)
    assert found["splits"]["train"]["bad_rows"] == 20
    assert found["leaks"] == {"val": {"images": 1, "texts": 1}}


def test_control_characters_are_escaped(tmp_path: Path) -> None:
    root = folder(tmp_path, val=(line(f"x{ESCAPE}", "3.png", f"two\nlines{ESCAPE}"),))
    done = call("data", "check", root)
    assert "\x1b" not in done.stdout + done.stderr
    assert "two\\x0alines\\x1b[31m" in done.stdout


def test_the_program_ends_with_the_exit_code_and_names_the_problem(tmp_path: Path) -> None:
    root = tmp_path / "questions"
    make(root, train=40, val=8, test=8)
    assert run_cli("data", "check", root).returncode == 0
    (root / "images/train/000002.png").unlink()
    image = root / "images/val/000001.png"
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    lines = (root / "test.jsonl").read_text().splitlines()
    (root / "test.jsonl").write_text("\n".join([*lines[:4], lines[4][:-1], *lines[5:]]) + "\n")
    done = run_cli("data", "check", root)
    assert done.returncode == 4
    assert f"error[MF-DATA-80]: 3 errors in {root} · " in done.stderr
    for named in (
        "train.jsonl:9, id train-000008: image not found: images/train/000002.png; used by 4 rows",
        "val.jsonl:5, id val-000004: images/val/000001.png is not a readable image (image file is truncated); used by 4 rows",
        "test.jsonl:5: is not JSON ",
    ):
        assert f"error: {named}" in done.stdout


# -- severity


def test_warnings_become_errors_only_with_strict(tmp_path: Path) -> None:
    root = folder(tmp_path, val=(line("v3", "3.png", "a", " "),))
    assert kinds(root) == {"empty-text": 1}
    assert call("data", "check", root).returncode == 0
    done = call("data", "check", root, "--strict")
    assert (done.returncode, done.stderr.split(":")[0]) == (4, "error[MF-DATA-81]")
    found = stdout_json(call("data", "check", root, "--strict", "--json"))
    assert (found["ok"], found["errors"], found["warnings"], found["error"]["code"]) == (False, 0, 1, "MF-DATA-81")


def test_a_held_out_split_needs_no_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", line("t1"), line("t2", "2.png", "b"))
    (tmp_path / "dev.jsonl").touch()
    assert kinds(tmp_path) == {"missing-split": 1, "missing-test": 1}
    assert "dev.jsonl" in report(tmp_path).findings[0].hint
    assert kinds(tmp_path, val_fraction=0.5) == {"missing-test": 1, "empty-split": 1}, "one row of each label stays in train"
    rows = [line(f"r{number}", f"{number}.png", "ab"[number % 2]) for number in range(10, 20)]
    write(tmp_path / "train.jsonl", line("t1"), line("t2", "2.png", "b"), *rows)
    for number in range(10, 20):
        save(tmp_path / f"{number}.png", seed=number)
    assert kinds(tmp_path, val_fraction=0.5) == {"missing-test": 1}
    assert call("data", "check", tmp_path, "--val-fraction", "0.3", "--test-fraction", "0.3", "--strict").returncode == 0


def test_held_out_rows_are_counted_as_in_training(tmp_path: Path) -> None:
    data = make_pairs(tmp_path / "data", counts={"train": 20})
    options = (data, "--val-fraction", "0.2", "--test-fraction", "0.1")
    rows = {"train": {"rows": 14, "labels": 3}, "val": {"rows": 4, "labels": 3}, "test": {"rows": 2, "labels": 2}}
    found = stdout_json(call("data", "check", *options, "--json"))
    assert (found["splits_in_training"], found["splits"]["train"]["rows"]) == (rows, 20)
    assert re.search(r"^test +2 +2$", call("data", "check", *options).stdout, re.MULTILINE)
    done = call("train", *TINY, "--data", *options, "--steps", "1", "--out", tmp_path / "run")
    assert "rows: train 14, val 4, test 2\n" in done.stderr
    write(data / "val.jsonl", line("v1"))
    assert call("data", "check", *options).returncode == 3, "there is only one, so it cannot be held out"


# -- problems do not hide each other


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("train.jsonl", gzip.compress(b"{}"), "MF-DATA-08"),
        ("train.csv", b"id,text,img,label\nt1,caf\xe9,1.png,a\n", "MF-DATA-21"),
        ("train.csv", b"id,text,text,img,label\n", "MF-DATA-22"),
        ("train.parquet", b"PAR1 no", "MF-DATA-24"),
    ],
    ids=["gzip", "bytes", "columns", "parquet"],
)
def test_an_unreadable_table_does_not_hide_problems_of_the_others(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    write(tmp_path / name, content)
    write(tmp_path / "val.jsonl", line("v1", "gone.png"), "{")
    found = report(tmp_path)
    assert {kind: len(each) for kind, each in found.by_kind().items()} == {
        "unreadable-table": 1,
        "bad-json": 1,
        "missing-image": 1,
        "missing-test": 1,
    }
    assert (found.findings[0].code, found.findings[0].split) == (code, "train")
    assert call("data", "check", tmp_path).returncode == 4


@pytest.mark.parametrize("kind", ["pipe", "folder", "two"])
def test_a_split_that_is_not_a_file_does_not_hide_problems_of_the_others(tmp_path: Path, kind: str) -> None:
    root = folder(tmp_path, val=("{",))
    if kind == "two":
        (root / "train.csv").touch()
    else:
        (root / "train.jsonl").unlink()
        os.mkfifo(root / "train.jsonl") if kind == "pipe" else (root / "train.jsonl").mkdir()
    assert kinds(root) == {"unreadable-table": 1, "bad-json": 1}


def test_a_missing_data_set_is_the_usual_error(tmp_path: Path) -> None:
    done = call("data", "check", tmp_path / "nowhere")
    assert (done.returncode, done.stderr.split(":")[0]) == (4, "error[MF-DATA-01]")
    assert kinds(tmp_path) == {"missing-split": 2, "missing-test": 1}


@pytest.mark.parametrize(
    ("bad", "kind"),
    [
        ("{,}", "bad-json"),
        ("[" * 100_000, "bad-json"),
        ('{"id": ' + "9" * 5000 + "}", "bad-json"),
        ('{"a": 1, "a": 2}', "bad-json"),
        (line("x", extra=-float("inf")), "bad-json"),
        (b"\xff", "bad-encoding"),
        ("null", "not-an-object"),
        ("{}", "missing-column"),
        (line("x", text=[]), "wrong-type"),
        (line("x", img=3), "wrong-type"),
        (line("x", label={}), "wrong-type"),
        (line("x", label=["a", 1]), "wrong-type"),
        (line("x", label=True), "wrong-type"),
        (line("x").replace('"x"', "1.5"), "wrong-type"),
        (line("x", label=""), "empty-label"),
        (line("x", label=[""]), "empty-label"),
        (line("x", label=None), "empty-label"),
        (line("\ud800"), "half-character"),
        (line("t1"), "duplicate-id"),
        (line('it\'s \\ "odd"') + "\n" + line('it\'s \\ "odd"'), "duplicate-id"),
    ],
)
def test_a_bad_row_is_classified_by_kind(tmp_path: Path, bad: str | bytes, kind: str) -> None:
    root = folder(tmp_path)
    write(root / "train.jsonl", line("t1"), line("t2", "2.png", "b"), bad)
    (found,) = (finding for finding in report(root).findings if finding.kind != "leaked-image")
    assert (found.kind, found.where.split(":")[0], found.code) == (kind, "train.jsonl", "MF-DATA-03")


def test_a_repeated_id_is_reported_verbatim(tmp_path: Path) -> None:
    odd = 'it\'s \\ "odd"'
    write(tmp_path / "train.jsonl", line(odd), line(odd))
    assert [finding.id for finding in report(tmp_path).findings if finding.kind == "duplicate-id"] == [odd]


# -- repeated rows


def test_rows_with_the_inputs_of_another_row_are_found(tmp_path: Path) -> None:
    root = folder(tmp_path)
    save(root / "copy.png", seed=1)
    rows = [
        line("t1", text="a shoe"),
        line("t2", "2.png", "b", text="a shoe"),  # another image
        line("t3", "copy.png", text="A  shoe"),
        line("t4", "2.png", "a", text="a shoe"),
        line("t5", "2.png", "b", text="a shoe"),
    ]
    write(root / "train.jsonl", *rows)
    found = [(each.kind, each.place, each.message) for each in report(root).findings if each.split == "train"]
    assert found == [
        (
            "contradicting-labels",
            "train.jsonl:4, id t4",
            "its label is 'a', but that of train.jsonl:2, id t2, with the same inputs, is 'b'",
        ),
        ("repeated-row", "train.jsonl:3, id t3", "it has the same inputs and label as train.jsonl:1, id t1"),
        ("repeated-row", "train.jsonl:5, id t5", "it has the same inputs and label as train.jsonl:2, id t2"),
    ]
    expected = "labels: 1 row has the same inputs as an earlier row, but a different label, first in train.jsonl:4"
    assert any(notice.startswith(expected) for notice in load_data(Data(path=str(root))).notices)


# -- leaks


def test_leaks_are_counted_and_name_both_rows(tmp_path: Path) -> None:
    root = folder(tmp_path)
    write(
        root / "train.jsonl",
        line("t1", text="a phrase"),
        line("t2", text="a phrase"),
        line("t3", "2.png", "b", text="said once"),
    )
    write(root / "val.jsonl", line("v1", "3.png", text="a phrase"), line("v2", "3.png", "b", text=" Said  ONCE"))
    write(root / "test.jsonl", line("e1", "2.png"), line("e2", "1.png", "b"), line("e3", "1.png", "b"))
    found = report(root)
    assert found.leaks == {"val": {"images": 0, "texts": 2}, "test": {"images": 3, "texts": 0}}
    leaks = [each for each in found.findings if each.kind.startswith("leaked")]
    assert [(each.kind, each.place, each.message) for each in leaks] == [
        ("leaked-image", "test.jsonl:1, id e1", "its image is also in train.jsonl:3, id t3"),
        ("leaked-image", "test.jsonl:2, id e2", "its image is also in train.jsonl:1, id t1"),
        ("leaked-image", "test.jsonl:3, id e3", "its image is also in train.jsonl:1, id t1"),
        ("leaked-text", "val.jsonl:1, id v1", "its text is also in train.jsonl:1, id t1"),
        ("leaked-text", "val.jsonl:2, id v2", "its text is also in train.jsonl:3, id t3"),
    ]


def test_leaks_into_held_out_rows_are_those_that_training_reports(tmp_path: Path) -> None:
    for number in range(1, 31):
        save(tmp_path / f"{number}.png", seed=number % 15)  # each image twice, under two names
    write(tmp_path / "train.jsonl", *(line(f"r{number}", f"{number}.png", "ab"[number % 2]) for number in range(1, 31)))
    fractions = {"val_fraction": 0.2, "test_fraction": 0.2}
    found = report(tmp_path, **fractions)
    assert min(found.leaks[name]["images"] for name in ("val", "test")) > 0
    first = found.findings[0]
    assert re.fullmatch(r"held out for (val|test), but its image is also in train.jsonl:\d+, id r\d+", first.message)
    notices = "; ".join(load_data(Data(path=str(tmp_path), **fractions)).notices)
    for name, counts in found.leaks.items():
        assert re.search(rf"\b{counts['images']} images? of {name} (is|are) also in train", notices)


# -- other formats


def test_a_table_with_a_split_column_is_checked_once(tmp_path: Path) -> None:
    for number in range(1, 5):
        save(tmp_path / f"{number}.png", seed=number)
    rows = ["split,name,photo,caption,tags"]
    rows += ["train,r1,1.png,one,a|b", "val,r2,2.png,two,a|b", "test,r3,3.png,three,a", "later,r4,4.png,four,a", "train,r5"]
    rows += ["train,r6,gone.png,six,b", 'test,r7,4.png,"seven, and so on",b']
    (tmp_path / "all.csv").write_text("\n".join(rows) + "\n")
    flags = ("--split-col", "split", "--id-col", "name", "--image-col", "photo", "--text-col", "caption", "--label-col", "tags")
    found = stdout_json(call("data", "check", tmp_path / "all.csv", *flags, "--label-sep", "|", "--json"))
    assert [(each["kind"], each["split"], each["where"], each["id"]) for each in found["problems"]] == [
        ("bad-csv", "train", "all.csv:6", ""),
        ("bad-split-name", "train", "all.csv:5", ""),
        ("missing-image", "train", "all.csv:7", "r6"),
    ]
    assert {name: facts["images"] for name, facts in found["splits"].items()} == {"train": 2, "val": 1, "test": 2}
    assert found["labels"]["balance"] == {"a": {"train": 1, "val": 1, "test": 1}, "b": {"train": 2, "val": 1, "test": 1}}


def test_a_folder_of_images_is_checked_by_the_names_of_its_files(tmp_path: Path) -> None:
    for seed, name in enumerate(("train/a/1", "train/b/1", "val/a/1", "val/b/1", "val/b/2", "test/a/1", "test/b/1")):
        save(tmp_path / f"{name}.png", seed=seed)
        (tmp_path / f"{name}.txt").write_text(f"seen at {name}")
    assert kinds(tmp_path) == {}
    (tmp_path / "val/b/2.png").write_bytes(b"")
    (tmp_path / "val/b/1.txt").unlink()
    found = report(tmp_path).findings
    assert [(each.kind, each.where, each.id) for each in found] == [
        ("missing-text", "val/:2", "b/1.png"),
        ("empty-image", "val/:3", "b/2.png"),
    ]
    assert call("data", "check", tmp_path, "--set", "data.allow_missing_text=true", "--json").stdout.count('"empty-text"') == 2


# -- options


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (("--max-pixels", "0"), "MF-CFG-01"),
        (("--encoder", "tiny:vision"), "MF-DATA-85"),
        (("--encoder", "tiny:nothing"), "MF-ENC-51"),
        (("--set", "data.nothing=1"), "MF-CFG-06"),
    ],
)
def test_impossible_options_are_refused(pairs: Path, flags: tuple[str, ...], code: str) -> None:
    assert stdout_json(call("data", "check", pairs, *flags, "--json"))["error"]["code"] == code


def test_findings_do_not_repeat_the_content_of_rows(broken: Path) -> None:
    index: Index = report(broken, max_pixels=MAX_PIXELS).indexes["train"]
    assert not [finding for finding in row_findings(index) if HOSTILE in finding.message]


# -- any bytes

_PIECES = [line("t1"), line("t1", ["x"]), line("t2", label=["a"]), line("t3", text="\ud800"), *'{}"[\n\0', "NaN"]


@given(st.binary(max_size=300) | st.lists(st.sampled_from(_PIECES), max_size=8), st.sampled_from(["jsonl", "csv", "tsv"]))
def test_any_bytes_can_be_checked_and_have_a_page(
    tmp_path_factory: pytest.TempPathFactory, content: bytes | list[str], suffix: str
) -> None:
    root = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp()))
    save(root / "1.png")
    raw = content if isinstance(content, bytes) else "".join(content).encode("utf-8", "surrogatepass")
    (root / f"train.{suffix}").write_bytes(raw)
    found = report(root)
    assert found.errors, "val is missing"
    json.dumps(found.as_dict(1000))
    page = check_page(found, name="x", summary="", columns=(), splits=())
    assert not re.search("[\x00-\x08\ud800-\udfff]", page)
    page.encode("utf-8")


# -- rows that training skips


def test_rows_that_training_would_skip_are_warnings(tmp_path: Path) -> None:
    data = make_pairs(tmp_path / "data")
    (data / "images" / "train-7.png").unlink()
    assert call("data", "check", data).returncode == 4
    skip = ("--on-bad", "skip", "--set", "data.max_bad_fraction=0.1")
    done = call("data", "check", data, *skip)
    assert done.returncode == 0, done.stderr
    assert "warning: train.jsonl:8, id train-7: image not found: images/train-7.png" in done.stdout
    assert "0 errors, 1 warning" in done.stdout
    assert call("train", *TINY, "--data", data, "--out", tmp_path / "run", "--steps", "1", *skip).returncode == 0
    assert call("data", "check", data, *skip, "--strict").returncode == 4
    found = stdout_json(call("data", "check", data, *skip, "--json"))
    assert [(problem["severity"], problem["id"]) for problem in found["problems"]] == [("warning", "train-7")]


@pytest.mark.parametrize("spoil", ["too many", "unsafe"])
def test_rows_that_training_would_not_skip_stay_errors(tmp_path: Path, spoil: str) -> None:
    data = make_pairs(tmp_path / "data")
    (data / "images" / "train-7.png").unlink()
    skip = ("--on-bad", "skip", "--set", "data.max_bad_fraction=0.1")
    if spoil == "too many":
        (data / "images" / "train-8.png").unlink()
    else:
        (data / "val.jsonl").write_text((data / "val.jsonl").read_text().replace("images/val-0.png", "../val-0.png"))
    done = call("data", "check", data, *skip)
    assert done.returncode == 4 and "--on-bad skip leaves out at most data.max_bad_fraction of a split's rows" in done.stderr
    assert call("train", *TINY, "--data", data, "--out", tmp_path / "run", "--steps", "1", *skip).returncode == 4
