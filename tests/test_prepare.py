"""What all prepared data sets have in common: complete or not at all, and nothing is lost silently."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import code_of
from prepare_cases import food101, mm_imdb, rows_of, skipped_in, snli_ve

from mopefuse.data import _source_files
from mopefuse.data.prepare import Sample, Skip, Source, prepare
from mopefuse.data.sets.food101 import Food101
from mopefuse.data.sets.mm_imdb import MMIMDb
from mopefuse.data.sets.snli_ve import SNLIVE
from mopefuse.errors import DataError

CASES: list[Any] = [
    pytest.param(Food101, food101, {"val": 4}, id="food101"),
    pytest.param(MMIMDb, mm_imdb, {}, id="mm-imdb"),
    pytest.param(SNLIVE, snli_ve, {}, id="snli-ve"),
]
Tree = Callable[[Path], Path]


def tree_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("kind", "tree", "options"), CASES)
def test_the_same_command_gives_the_same_bytes_and_does_not_change_the_source(
    kind: type[Source], tree: Tree, options: dict[str, Any], tmp_path: Path
) -> None:
    before = tree_of(tree(tmp_path / "source"))
    prepare(kind, tmp_path / "source", tmp_path / "one", options)
    prepare(kind, tmp_path / "source", tmp_path / "two", options)
    assert tree_of(tmp_path / "one") == tree_of(tmp_path / "two")
    assert tree_of(tmp_path / "source") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "source", "two"]


@pytest.mark.parametrize(("kind", "tree", "options"), CASES)
def test_every_row_has_its_image_and_every_image_has_a_row(
    kind: type[Source], tree: Tree, options: dict[str, Any], tmp_path: Path
) -> None:
    prepare(kind, tree(tmp_path / "source"), tmp_path / "made", options)
    rows = [row for split in ("train", "val", "test") for row in rows_of(tmp_path / "made", split)]
    assert all(list(row) == ["id", "text", "img", "label"] for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    images = {name for name in tree_of(tmp_path / "made") if "/" in name}
    assert images == {row["img"] for row in rows}
    for name in images:
        assert (tmp_path / "made" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


@pytest.mark.parametrize(("kind", "tree", "options"), CASES)
def test_dataset_json_records_sources_and_results(
    kind: type[Source], tree: Tree, options: dict[str, Any], tmp_path: Path
) -> None:
    result = prepare(kind, tree(tmp_path / "source"), tmp_path / "made", options)
    about = json.loads((tmp_path / "made" / "dataset.json").read_text())
    assert result == about | {"written": True}
    assert (about["dataset"], about["version"]) == (kind.name, 1)
    assert about["rows"] == {split: len(rows_of(tmp_path / "made", split)) for split in ("train", "val", "test")}
    assert about["skipped"] == Counter(reason for _, _, reason in skipped_in(tmp_path / "made"))
    assert about["sha256"] == {
        name: hashlib.sha256(content).hexdigest()
        for name, content in tree_of(tmp_path / "made").items()
        if "/" not in name and name != "dataset.json"
    }
    for group, published in about["published"].items():
        counted = sum(about["rows"][split] for split in group.split("+"))
        assert about["difference"][group] == counted - published["rows"]


@pytest.mark.parametrize(("kind", "tree", "options"), CASES)
def test_sha256sums_cover_every_file_that_was_used_and_are_correct(
    kind: type[Source], tree: Tree, options: dict[str, Any], tmp_path: Path
) -> None:
    prepare(kind, tree(tmp_path / "source"), tmp_path / "made", options)
    lines = (tmp_path / "made" / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    assert list(sums) == sorted(sums)
    source = tree_of(tmp_path / "source")
    assert all(hashlib.sha256(source[name]).hexdigest() == digest for name, digest in sums.items())
    images = {name for name in tree_of(tmp_path / "made") if "/" in name}
    read = {name for name in source if name.endswith((".csv", ".json", ".jsonl"))}
    assert set(sums) == images | read


def test_the_published_counts_match_the_papers() -> None:
    rows = {kind.name: {group: number for group, (number, _) in kind.published.items()} for kind in (Food101, MMIMDb, SNLIVE)}
    assert rows == {
        "food101": {"train+val": 67972, "test": 22716, "train+val+test": 90840},
        "mm-imdb": {"train": 15552, "val": 2608, "test": 7799},
        "snli-ve": {"train": 529527, "val": 17858, "test": 17901},
    }


# -- images


def test_images_are_hard_links_or_copies_as_requested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = mm_imdb(tmp_path / "source") / "dataset/0000001.jpeg"
    linked = prepare(MMIMDb, tmp_path / "source", tmp_path / "linked")
    assert (tmp_path / "linked/dataset/0000001.jpeg").samefile(image)
    copied = prepare(MMIMDb, tmp_path / "source", tmp_path / "copied", images="copy")
    assert not (tmp_path / "copied/dataset/0000001.jpeg").samefile(image)

    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(_source_files.os, "link", no_links)
    fallen_back = prepare(MMIMDb, tmp_path / "source", tmp_path / "fallen-back")
    assert not (tmp_path / "fallen-back/dataset/0000001.jpeg").samefile(image)
    size = sum(path.stat().st_size for path in (tmp_path / "linked/dataset").iterdir())
    assert linked["image_files"] == {"linked": 9, "copied": 0, "bytes": size}
    assert copied["image_files"] == fallen_back["image_files"] == {"linked": 0, "copied": 9, "bytes": size}
    for other in ("copied", "fallen-back"):
        assert tree_of(tmp_path / other / "dataset") == tree_of(tmp_path / "linked" / "dataset")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_link_out_of_the_source_is_refused(what: str, tmp_path: Path) -> None:
    source = mm_imdb(tmp_path / "source")
    place = source / ("dataset/0000001.jpeg" if what == "file" else "dataset")
    place.rename(tmp_path / "outside")
    place.symlink_to(tmp_path / "outside")
    assert code_of(lambda: prepare(MMIMDb, source, tmp_path / "made")) == "MF-SEC-60"
    assert not (tmp_path / "made").exists()


def test_links_within_and_to_the_source_are_followed(tmp_path: Path) -> None:
    source = mm_imdb(tmp_path / "real")
    (source / "dataset/0000001.jpeg").rename(source / "elsewhere")
    (source / "dataset/0000001.jpeg").symlink_to("../elsewhere")
    (tmp_path / "source").symlink_to(source)
    prepare(MMIMDb, tmp_path / "source", tmp_path / "made")
    assert (tmp_path / "made/dataset/0000001.jpeg").samefile(source / "elsewhere")
    assert not (tmp_path / "made/dataset/0000001.jpeg").is_symlink()


def test_an_irregular_file_is_not_an_image(tmp_path: Path) -> None:
    source = mm_imdb(tmp_path / "source")
    (source / "dataset/0000001.jpeg").unlink()
    os.mkfifo(source / "dataset/0000001.jpeg")
    prepare(MMIMDb, source, tmp_path / "made")
    assert ("dataset/0000001.json", None, "no image") in skipped_in(tmp_path / "made")


# -- where it is written


def test_preparing_again_in_place_changes_nothing(tmp_path: Path) -> None:
    first = prepare(SNLIVE, snli_ve(tmp_path / "source"), tmp_path / "made")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "made").rglob("*")}
    calls: list[str] = []
    again = prepare(SNLIVE, tmp_path / "source", tmp_path / "made", advance=lambda stage, done, total: calls.append(stage))
    assert again == first | {"written": False}
    assert calls == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "made").rglob("*")} == before


def damage(made: Path, source: Path, how: str) -> None:
    if how == "a row changed":
        rows = (made / "train.jsonl").read_bytes()
        (made / "train.jsonl").write_bytes(rows.replace(b"He", b"We"))
    elif how == "an image gone":
        (made / "flickr30k_images/100.jpg").unlink()
    elif how == "a file more":
        (made / "thesis.txt").write_text("years of work")
    elif how == "the source grew":
        with (source / "snli_ve_dev.jsonl").open("a") as file:
            file.write("{}\n")
    elif how == "no dataset.json":
        (made / "dataset.json").unlink()
    elif how == "a dataset.json of somebody else":
        (made / "dataset.json").write_text('{"dataset": "snli-ve", "version": 1, "sha256": 3}')


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("a row changed", "MF-DATA-70"),
        ("an image gone", "MF-DATA-70"),
        ("a file more", "MF-DATA-70"),
        ("the source grew", "MF-DATA-69"),
        ("no dataset.json", "MF-DATA-68"),
        ("a dataset.json of somebody else", "MF-DATA-68"),
    ],
)
def test_a_folder_with_other_content_is_refused_and_not_changed(how: str, code: str, tmp_path: Path) -> None:
    prepare(SNLIVE, snli_ve(tmp_path / "source"), tmp_path / "made", images="copy")
    damage(tmp_path / "made", tmp_path / "source", how)
    before = tree_of(tmp_path / "made")
    assert code_of(lambda: prepare(SNLIVE, tmp_path / "source", tmp_path / "made", images="copy")) == code
    assert tree_of(tmp_path / "made") == before


def test_a_listing_detects_files_that_changed_places(tmp_path: Path) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one / one).mkdir(parents=True)
        (tmp_path / one / "x").write_bytes(b"1")
        (tmp_path / one / "y").write_bytes(b"22")
        (tmp_path / one / f".{other}").write_bytes(b"not looked at")
    as_it_was = _source_files.summarise_files(tmp_path, ["a", "b", "no such"])
    assert (as_it_was["files"], as_it_was["bytes"]) == (4, 6)
    (tmp_path / "a/x").write_bytes(b"22")
    (tmp_path / "a/y").write_bytes(b"1")
    exchanged = _source_files.summarise_files(tmp_path, ["b", "a"])
    assert (exchanged["files"], exchanged["bytes"]) == (4, 6)
    assert exchanged["sha256"] != as_it_was["sha256"]


def test_other_options_need_another_folder(tmp_path: Path) -> None:
    prepare(SNLIVE, snli_ve(tmp_path / "source"), tmp_path / "made")
    with pytest.raises(DataError, match=r"prepared differently \(in: options\)"):
        prepare(SNLIVE, tmp_path / "source", tmp_path / "made", {"premise": True})
    with pytest.raises(DataError, match=r"prepared differently \(in: images\)"):
        prepare(SNLIVE, tmp_path / "source", tmp_path / "made", images="copy")


def test_a_file_or_the_source_as_destination_is_refused_and_an_empty_folder_is_filled(tmp_path: Path) -> None:
    source = snli_ve(tmp_path / "source")
    (tmp_path / "file").write_text("in the way")
    assert code_of(lambda: prepare(SNLIVE, source, tmp_path / "file")) == "MF-DATA-68"
    assert code_of(lambda: prepare(SNLIVE, source, source)) == "MF-DATA-73"
    assert code_of(lambda: prepare(SNLIVE, source, source / "made")) == "MF-DATA-73"
    assert code_of(lambda: prepare(SNLIVE, tmp_path / "nothing", tmp_path / "made")) == "MF-DATA-62"
    (tmp_path / "empty").mkdir()
    prepare(SNLIVE, source, tmp_path / "empty")
    assert len(rows_of(tmp_path / "empty", "train")) == 6


KILLED = """
import os, signal, sys
from pathlib import Path
from mopefuse.data.prepare import prepare
from mopefuse.data.sets.snli_ve import SNLIVE

def kill(stage, done, total):
    if stage == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

prepare(SNLIVE, Path(sys.argv[1]), Path(sys.argv[2]), advance=kill)
"""


@pytest.mark.parametrize("stage", ["train", "test", "images"])
def test_a_kill_leaves_no_partial_data_set_and_the_next_attempt_cleans_up(stage: str, tmp_path: Path) -> None:
    source, made = snli_ve(tmp_path / "source"), tmp_path / "made"
    done = subprocess.run([sys.executable, "-c", KILLED, source, made, stage], check=False)
    assert done.returncode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2 and re.fullmatch(r"made\.tmp-\d+", left[0]) and left[1] == "source"
    living = tmp_path / f"made.tmp-{os.getppid()}"
    living.mkdir()
    prepare(SNLIVE, source, made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", living.name, "source"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(SNLIVE, snli_ve(tmp_path / "source"), tmp_path / "made", advance=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# -- incomplete sources, and options


def test_a_missing_file_is_an_error_that_names_the_files_found(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "snli_ve_train.jsonl").write_text("")
    with pytest.raises(DataError) as caught:
        prepare(SNLIVE, tmp_path / "source", tmp_path / "made")
    assert caught.value.what == "snli_ve_dev.jsonl not found; the folder contains snli_ve_train.jsonl"
    assert caught.value.fix == "the folder must contain snli_ve_{train,dev,test}.jsonl and flickr30k_images/<Flickr30K_ID>.jpg"
    with pytest.raises(DataError, match=r"^split\.json not found; the folder contains snli_ve_train\.jsonl"):
        prepare(MMIMDb, tmp_path / "source", tmp_path / "made")
    with pytest.raises(DataError, match=r"^images/train not found; the folder contains snli_ve_train\.jsonl"):
        prepare(Food101, tmp_path / "source", tmp_path / "made")


def test_a_split_without_rows_is_an_error_that_says_why(tmp_path: Path) -> None:
    source = snli_ve(tmp_path / "source")
    (source / "snli_ve_dev.jsonl").write_bytes(b"\x1f\x8b\x08 not text \xff\n\xfe\n")
    with pytest.raises(DataError, match="no row of the val split can be used; skipped so far: no gold label") as caught:
        prepare(SNLIVE, source, tmp_path / "made")
    assert caught.value.code == "MF-DATA-66"
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("kind", "options", "code", "message"),
    [
        (Food101, {"premise": True}, "MF-DATA-60", "food101 has the options --text, --clean, --val, --seed"),
        (SNLIVE, {"text": "page"}, "MF-DATA-60", "snli-ve has the options --premise"),
        (MMIMDb, {"seed": 1}, "MF-DATA-60", "mm-imdb has no options"),
        (Food101, {"val": "many"}, "MF-DATA-61", "use an integer"),
        (Food101, {"val": True}, "MF-DATA-61", "use an integer"),
        (Food101, {"clean": 1}, "MF-DATA-61", "use true or false"),
        (Food101, {"text": 3}, "MF-DATA-61", "use a text value"),
        (Food101, {"text": "pages"}, "MF-DATA-61", "use page or title"),
        (Food101, {"val": 0}, "MF-DATA-67", "pass --val 3"),
        (Food101, {"val": 5}, "MF-DATA-67", "pass --val 3"),
    ],
)
def test_an_invalid_option_is_an_error_that_names_the_valid_ones(
    kind: type[Source], options: dict[str, Any], code: str, message: str, tmp_path: Path
) -> None:
    tree = {Food101: food101, MMIMDb: mm_imdb, SNLIVE: snli_ve}[kind]
    with pytest.raises(DataError) as caught:
        prepare(kind, tree(tmp_path / "source"), tmp_path / "made", options)
    assert caught.value.code == code and message in caught.value.fix
    assert not (tmp_path / "made").exists()


def test_the_option_images_accepts_only_link_or_copy(tmp_path: Path) -> None:
    assert code_of(lambda: prepare(MMIMDb, mm_imdb(tmp_path / "source"), tmp_path / "made", images="move")) == "MF-DATA-61"


# -- a data set from a plugin


class Anagrams(Source):
    """The minimum that a data set needs."""

    name = "anagrams"
    inputs = ("words",)
    layout = "words/<word>.jpg"

    def rows(self, split: str) -> Iterator[Sample | Skip]:
        for word in self.folder.names("words"):
            yield Sample(f"{split}/{word}", word, f"words/{word}", "".join(sorted(word)), f"words/{word}")
        yield Sample(f"{split}/tea", "tea", "words/tea", "again", "words/tea")

    @property
    def text(self) -> str:
        return "words"


def test_a_plugin_needs_a_name_its_inputs_and_its_rows(tmp_path: Path) -> None:
    (tmp_path / "source/words").mkdir(parents=True)
    (tmp_path / "source/words/tea").write_bytes(b"1")
    (tmp_path / "source/words/eat\n\\").write_bytes(b"2")
    (tmp_path / "source/words" / os.fsdecode(b"t\xe9")).write_bytes(b"3")
    about = prepare(Anagrams, tmp_path / "source", tmp_path / "made")
    assert [row["label"] for row in rows_of(tmp_path / "made", "val")] == ["\n\\aet", "aet"]
    assert about["skipped"] == {"duplicate id": 3, "file name is not UTF-8": 3}
    assert (about["published"], about["seed"], about["labels"]) == ({}, None, 2)
    sums = (tmp_path / "made/SHA256SUMS").read_text().splitlines()
    assert sums == [
        rf"\{hashlib.sha256(b'2').hexdigest()}  words/eat\n\\",
        f"{hashlib.sha256(b'1').hexdigest()}  words/tea",
    ]
