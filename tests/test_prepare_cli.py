"""``mopefuse data prepare``: its output and errors, that its results can be used for training, and that it handles any
bytes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, call, code_of
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prepare_cases import SNLI_VE_SKIPPED, food101, mm_imdb, pair, snli_ve

from mopefuse.data.prepare import Option, prepare
from mopefuse.data.sets.snli_ve import LABELS, SNLIVE, Pair, read_pair


def stdout_json(done: subprocess.CompletedProcess[str]) -> Any:
    """Parse stdout as a single JSON value."""
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "tree", "flags", "labels"),
    [("food101", food101, ("--val", "4"), 3), ("mm-imdb", mm_imdb, (), 23), ("snli-ve", snli_ve, ("--premise",), 3)],
    ids=["food101", "mm-imdb", "snli-ve"],
)
def test_a_prepared_data_set_can_be_used_for_training(
    name: str, tree: Any, flags: tuple[str, ...], labels: int, tmp_path: Path
) -> None:
    done = call("data", "prepare", name, tree(tmp_path / "source"), tmp_path / "made", *flags, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    about = stdout_json(done)
    assert about["ok"] and about["written"] and about["labels"] == labels
    assert {key: about[key] for key in about if key not in ("ok", "written", "folder")} == json.loads(
        (tmp_path / "made" / "dataset.json").read_text()
    )
    trained = call("train", *TINY, "--data", tmp_path / "made", "--out", tmp_path / "run", "--steps", "2", "--json")
    assert trained.returncode == 0, trained.stderr
    assert stdout_json(trained)["steps"] == 2


def test_the_printed_tables_compare_rows_with_published_numbers(tmp_path: Path) -> None:
    done = call("data", "prepare", "snli-ve", snli_ve(tmp_path / "source"), tmp_path / "made")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"""{tmp_path / "made"}:
split  rows  published  difference
train     6    529,527    -529,521
val       3     17,858     -17,855
test      3     17,901     -17,898

skipped, by reason:
reason              number
no gold label            3
no Flickr30K_ID          1
no hypothesis            1
no image                 1
not JSON                 1
not UTF-8                1
not a JSON object        1
unknown gold label       1

text: hypothesis; 3 labels
skipped rows are listed in {tmp_path / "made" / "skipped.jsonl"}
"""
    assert len(SNLI_VE_SKIPPED) == 10
    again = call("data", "prepare", "snli-ve", tmp_path / "source", tmp_path / "made")
    assert again.stdout == done.stdout + "The folder already has this prepared data set; nothing was written.\n"


def test_splits_published_together_have_their_own_row(tmp_path: Path) -> None:
    done = call("data", "prepare", "food101", food101(tmp_path / "source"), tmp_path / "made", "--val", "4")
    assert [line.split() for line in done.stdout.splitlines()[1:7]] == [
        ["split", "rows", "published", "difference"],
        ["train", "12", "-", "-"],
        ["val", "4", "-", "-"],
        ["test", "3", "22,716", "-22,713"],
        ["train+val", "16", "67,972", "-67,956"],
        ["train+val+test", "19", "90,840", "-90,821"],
    ]


@pytest.mark.parametrize(
    ("args", "code", "said_"),
    [
        (("make", "food101", "DEST"), 4, "fix: mopefuse data prepare food101 SOURCE DEST"),
        (("prepare", "digit-questions", "SOURCE", "DEST"), 4, "fix: mopefuse data make digit-questions DEST"),
        (("prepare", "snli", "SOURCE", "DEST"), 3, "did you mean snli-ve"),
        (("prepare", "snli", "SOURCE", "DEST", "--premise"), 3, "did you mean snli-ve"),
        (("prepare", "snli-ve", "SOURCE", "DEST", "--premises"), 4, "fix: did you mean --premise?"),
        (("prepare", "snli-ve", "SOURCE", "DEST", "--image", "copy"), 4, "fix: did you mean --images?"),
        (("prepare", "food101", "SOURCE", "DEST", "--text", "pages"), 4, "fix: use page or title"),
        (("make", "digit-questions", "DEST", "--train", "0"), 2, "--train"),
        (("prepare", "snli-ve", "SOURCE", "DEST", "--clean"), 4, "fix: remove --clean; snli-ve has the options --premise"),
        (("prepare", "food101", "SOURCE", "DEST", "--premise"), 4, "food101 has no option --premise"),
        (("prepare", "mm-imdb", "SOURCE", "DEST", "--seed", "0"), 4, "mm-imdb has no options"),
        (("prepare", "mm-imdb", "SOURCE", "DEST"), 4, "split.json not found; the folder contains flickr30k_images"),
        (("prepare", "snli-ve", "SOURCE", "DEST", "--images", "move"), 4, "fix: use link or copy"),
        (("prepare", "snli-ve", "nowhere", "DEST"), 4, "source folder not found: nowhere"),
        (("prepare", "food101", "SOURCE", "DEST", "--val", "0"), 2, "--val"),
        (("prepare", "food101", "SOURCE"), 2, "Missing argument 'DEST'"),
    ],
)
def test_invalid_arguments_are_one_line_that_names_the_valid_ones(
    args: tuple[str, ...], code: int, said_: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    snli_ve(tmp_path / "SOURCE")
    done = call("data", *args)
    assert (done.returncode, done.stdout) == (code, "")
    assert said_ in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["SOURCE"]


def test_the_options_depend_on_the_data_set(tmp_path: Path) -> None:
    listed = {name: call("data", "prepare", name, "--help").stdout for name in ("food101", "snli-ve", "mm-imdb")}
    flags = ("--text", "--clean", "--val", "--seed", "--premise")
    found = {name: [flag for flag in flags if flag in text] for name, text in listed.items()}
    assert found == {"food101": ["--text", "--clean", "--val", "--seed"], "snli-ve": ["--premise"], "mm-imdb": []}
    done = call("data", "make", "digit-questions", tmp_path / "made", "--train", 3, "--val", 2, "--test", 1, "--json")
    assert stdout_json(done)["rows"] == {"train": 3, "val": 2, "test": 1}
    before_the_name = call("data", "prepare", "--premise", "snli-ve", snli_ve(tmp_path / "source"), tmp_path / "dest", "--json")
    assert stdout_json(before_the_name)["options"] == {"premise": True}


def test_an_option_that_clashes_with_the_command_is_a_plugin_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SNLIVE, "declared_options", (Option("images", 1, "Something else."),))
    done = call("data", "prepare", "snli-ve", "SOURCE", "DEST")
    assert done.returncode == 9
    assert "the data set 'snli-ve' declares the option --images, which the command already has" in done.stderr


def test_preparing_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys; from mopefuse.cli.app import main\ntry: main()\nfinally: print({'torch', 'numpy'} & set(sys.modules))"
    for args in (("--help",), ("snli-ve", snli_ve(tmp_path / "source"), tmp_path / "made")):
        command = [sys.executable, "-c", code, "data", "prepare", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "set()")


def test_progress_is_shown_live_only_on_a_terminal(tmp_path: Path) -> None:
    here, there = pty.openpty()
    args = ("data", "prepare", "snli-ve", str(snli_ve(tmp_path / "source")), str(tmp_path / "made"))
    done = subprocess.run(
        [sys.executable, "-m", "mopefuse", *args],
        stdout=subprocess.PIPE,
        stderr=there,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
        check=True,
    )
    os.close(there)
    shown = b""
    with suppress(OSError):  # the other end is closed: all is read
        while more := os.read(here, 65536):
            shown += more
    os.close(here)
    assert all(word in shown for word in (b"train", b"val", b"test", b"images", b"eta", b"16/16", b"3/3"))
    assert b"eta" not in done.stdout and b"\x1b" not in done.stdout


# -- any bytes in a file of SNLI-VE

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = ("gold_label", "sentence1", "sentence2", "Flickr30K_ID", "pairID")
ROWS = st.fixed_dictionaries({key: JSON | st.sampled_from(["neutral", "100", "a b"]) for key in KEYS})


@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()), st.booleans())
@example(b"[" * 100_000, False)
@example(b"1" * 10_000, False)
def test_any_bytes_give_a_pair_or_a_reason(line: bytes, premise: bool) -> None:
    assert isinstance(read_pair(line, premise=premise), str)


@given(ROWS, st.booleans())
@example(pair("1", "\ud800", "neutral", "\ud800"), True)
def test_any_values_give_a_pair_or_a_reason(row: dict[str, Any], premise: bool) -> None:
    found = read_pair(json.dumps(row).encode(), premise=premise)
    if isinstance(found, Pair):
        assert found.label == row["gold_label"] in LABELS
        assert found.text == (f"{row['sentence1']} {row['sentence2']}" if premise else row["sentence2"])
        assert found.image == f"{str(row['Flickr30K_ID']).removesuffix('.jpg')}.jpg" and "/" not in found.image
        (found.id + found.image).encode()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(max_size=30) | ROWS.map(lambda row: json.dumps(row).encode()), max_size=5))
def test_every_line_of_any_file_becomes_a_row_or_is_listed(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    root = tmp_path_factory.mktemp("any")
    content = b"\n".join(lines)
    (snli_ve(root / "source") / "snli_ve_dev.jsonl").write_bytes(content)
    if code_of(lambda: prepare(SNLIVE, root / "source", root / "made")) == "MF-DATA-66":
        return  # not a single row
    about = json.loads((root / "made/dataset.json").read_text())
    of_dev = [line for line in (root / "made/skipped.jsonl").read_text().splitlines() if "snli_ve_dev" in line]
    assert about["rows"]["val"] + len(of_dev) == sum(bool(line.strip()) for line in content.split(b"\n"))
