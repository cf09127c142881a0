"""Data sets in tar shards, Parquet files and Hugging Face's folders: the same rows in the same order as from a folder."""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from conftest import TINY, call, code_of, write_rows
from pyarrow import parquet
from storage_cases import contents, cut, damage_image, load, losses, packed, write_tar

from mopefuse.config.schema import Data
from mopefuse.data.storage import paths, tar_shards
from mopefuse.data.storage.name_table import NameTable, name_key
from mopefuse.data.tables import find_tables
from mopefuse.errors import DataError, Notice

FORMATS = ("tar", "parquet")


@pytest.fixture(scope="module")
def shards(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder, done = tmp_path_factory.mktemp("shards"), {}

    def find(kind: str) -> Path:
        if kind not in done:
            done[kind] = packed(pairs, folder / kind, kind)
        return done[kind]

    return find


@pytest.mark.parametrize("kind", FORMATS)
def test_shards_have_the_rows_of_the_folder(kind: str, pairs: Path, shards: Callable[[str], Path]) -> None:
    assert contents(load(shards(kind))) == contents(load(pairs))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_rows_are_held_out_of_shards(kind: str, pairs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(pairs, folder)
    (folder / "val.jsonl").unlink()
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    again = [{**row, "id": f"again-{row['id']}", "text": "and now?"} for row in rows]  # two rows for each image
    write_rows(folder / "train.jsonl", [*rows, *again])
    out = packed(folder, tmp_path / kind, kind)
    assert contents(load(out, val_fraction=0.3)) == contents(load(folder, val_fraction=0.3))


@pytest.mark.parametrize("kind", FORMATS)
def test_training_on_shards_takes_the_course_of_training_on_the_folder(
    kind: str, trained: Path, shards: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))
    done = call("train", *TINY, "--data", shards(kind), "--out", tmp_path / "run", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(trained)


def test_several_shards_are_read_one_after_another(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mopefuse.data.storage.pack import pack

    for kind in FORMATS:
        done = pack(Data(path=str(pairs)), tmp_path / kind, kind=kind, shard_bytes=2000)
        assert done.shards["train"] > 2
        wanted = contents(load(pairs))
        assert contents(load(tmp_path / kind)) == wanted
        numbers = f"{{000000..{done.shards['train'] - 1:06d}}}"
        for pattern in ("train-*", f"train-{numbers}"):
            assert contents(load(f"{tmp_path}/{kind}/{pattern}.{kind}")) == {"train": wanted["train"]}


def test_regression_and_masks_can_be_packed(tmp_path: Path) -> None:
    for name in ("digit-values", "digit-masks"):
        assert call("data", "make", name, tmp_path / name, "--train", 12, "--val", 6, "--test", 6).returncode == 0
        folder = load(tmp_path / name)
        for kind in FORMATS:
            shards = load(packed(tmp_path / name, tmp_path / f"{name}-{kind}", kind))
            assert shards.task == folder.task
            assert (shards.targets("train") == folder.targets("train")).all()


# -- shards that other tools wrote


def test_shards_of_webdataset_are_read(pairs: Path, tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    wanted = contents(load(pairs))["train"]
    with webdataset.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=5, verbose=0) as writer:
        for row in load(pairs).splits["train"].rows:
            sample = {"txt": row.values["text"], "cls": row.labels[0], "png": (pairs / str(row.values["image"])).read_bytes()}
            writer.write({"__key__": row.id, **sample})
    found = contents(load(tmp_path))["train"]
    assert [(labels, values["text"], pixels) for _, labels, values, pixels in found] == [
        (labels, values["text"], pixels) for _, labels, values, pixels in wanted
    ]
    assert found[5][0] == "train-0001/train-5"
    assert found[5][2]["image"] == "train-0001.tar/train-5.png"


def test_webdataset_reads_packed_shards(pairs: Path, shards: Callable[[str], Path]) -> None:
    webdataset = pytest.importorskip("webdataset")
    files = sorted(map(str, shards("tar").glob("train-*.tar")))
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    rows = load(pairs).splits["train"].rows
    assert [json.loads(sample["json"])["text"] for sample in samples] == [row.values["text"] for row in rows]
    assert [sample["png"] for sample in samples] == [(pairs / str(row.values["image"])).read_bytes() for row in rows]


def test_hugging_face_reads_packed_shards(pairs: Path, shards: Callable[[str], Path], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (file,) = shards("parquet").glob("train-*.parquet")
    found = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path)).cast_column("img", datasets.Image())
    assert [row["text"] for row in found] == [row.values["text"] for row in load(pairs).splits["train"].rows]
    assert found[3]["img"].size == (16, 16)


def test_parts_can_name_their_column(pairs: Path, tmp_path: Path) -> None:
    picture = (pairs / "images" / "train-0.png").read_bytes()
    members = {}
    for number, label in enumerate("abab"):
        members |= {f"d/{number}.title.txt": f"text {number}", f"d/{number}.JPG": picture}
        members |= {f"d/{number}.json": json.dumps({"label": label})}
    write_tar(tmp_path / "all.tar", members)
    data = load(tmp_path / "all.tar", text_col="title")
    assert [row.values["text"] for row in data.splits["train"].rows] == [f"text {number}" for number in range(4)]
    assert data.splits["train"].rows[1].id == "all/d/1"


@pytest.mark.parametrize("kind", ["save_to_disk", "parquet"])
def test_data_sets_of_hugging_face_are_read(kind: str, pairs: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    found = load(pairs)
    features = datasets.Features(
        {"text": datasets.Value("string"), "img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    parts = {}
    for name, split in found.splits.items():
        rows = [
            {
                "text": row.values["text"],
                "img": {"bytes": (pairs / str(row.values["image"])).read_bytes(), "path": "picture.png"},
                "label": row.labels[0],
            }
            for row in split.rows
        ]
        parts["validation" if name == "val" else name] = datasets.Dataset.from_list(rows, features=features)
    if kind == "parquet":  # as on the hub
        (tmp_path / "data").mkdir()
        for name, part in parts.items():
            part.to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    else:
        datasets.DatasetDict(parts).save_to_disk(tmp_path)
    names = {"train", "val", "test"}
    pixels = {name: [row[3] for row in contents(found)[name]] for name in names}
    read = contents(load(tmp_path))
    assert read.keys() == names
    assert {name: [row[3] for row in read[name]] for name in names} == pixels
    assert [row[1] for row in read["train"]] == [row[1] for row in contents(found)["train"]]


# -- damage


def _check(path: Path, *flags: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call("data", "check", path, "--json", "--fresh", *flags).stdout)
    return found


@pytest.mark.parametrize("kind", [*FORMATS, "folder"])
def test_a_damaged_image_is_found_in_every_format(kind: str, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / kind
    if kind == "folder":
        shutil.copytree(pairs, out)
    else:
        packed(pairs, out, kind)
    assert _check(out)["ok"]
    damage_image(out, kind)
    (problem,) = (problem for problem in _check(out)["problems"] if problem["severity"] == "error")
    assert "images/train-3.png" in problem["message"]
    assert problem["kind"] == "unreadable-image"


def test_a_shard_that_was_cut_off_is_a_bad_row(pairs: Path, tmp_path: Path) -> None:
    out = packed(pairs, tmp_path / "tar", "tar")
    (file,) = out.glob("train-*.tar")
    file.write_bytes(file.read_bytes()[:-13_000])
    problems = {problem["kind"]: problem["message"] for problem in _check(out)["problems"] if problem["severity"] == "error"}
    assert problems.keys() == {"bad-row", "unreadable-image"}
    assert "train-000000.tar) is damaged after 000000" in problems["bad-row"]
    assert "the shard ends before the file does" in problems["unreadable-image"]
    assert code_of(lambda: load(out)) == "MF-DATA-03"


def test_a_damaged_header_in_a_shard_is_found(pairs: Path, tmp_path: Path) -> None:
    out = packed(pairs, tmp_path / "tar", "tar")
    (file,) = out.glob("train-*.tar")
    content = file.read_bytes()
    place = content.index(b"00000006.json")
    file.write_bytes(content[:place] + b"\xff" * 512 + content[place + 512 :])
    (problem,) = (problem for problem in _check(out)["problems"] if problem["severity"] == "error")
    assert "is damaged after 00000005: a header is damaged" in problem["message"]


def test_a_damaged_page_of_parquet_spoils_only_its_rows(pairs: Path, tmp_path: Path) -> None:
    out = packed(pairs, tmp_path / "parquet", "parquet")
    (file,) = out.glob("train-*.parquet")
    content = file.read_bytes()
    image = (pairs / "images" / "train-3.png").read_bytes()
    assert content.count(image) == 1
    file.write_bytes(content.replace(image, cut(image)))
    problems = [problem for problem in _check(out)["problems"] if problem["severity"] == "error"]
    assert len(problems) == 12
    assert {problem["kind"] for problem in problems} == {"unreadable-image"}
    assert "train-0.png cannot be read from train-000000.parquet" in problems[0]["message"]
    file.write_bytes(content[:-100])
    (problem,) = (problem for problem in _check(out)["problems"] if problem["severity"] == "error")
    assert (problem["kind"], problem["code"]) == ("unreadable-table", "MF-DATA-24")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"0.jpg": b"a", "0.png": b"b", "0.cls": "a", "0.txt": "t"}, "has two files for img"),
        ({"0.jpg": b"a", "0.txt": "t", "0.json": '{"text": "other", "label": "a"}'}, "has text twice"),
        ({"0.jpg": b"a", "0.txt": "t", "0.json": "[" * 100_000}, "which is nested too deeply"),
        ({"0.jpg": b"a", "0.txt": b"\xff", "0.cls": "a"}, "which is not UTF-8"),
    ],
)
def test_a_row_of_a_shard_that_contradicts_itself_is_bad(members: dict[str, Any], words: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "train.tar", members)
    messages = [problem["message"] for problem in _check(tmp_path)["problems"] if problem["kind"] == "bad-row"]
    assert any(words in message for message in messages), messages


def test_hidden_files_are_skipped_and_hard_links_are_followed(pairs: Path, tmp_path: Path) -> None:
    picture = (pairs / "images" / "train-0.png").read_bytes()
    members = {"._0.png": b"x", "0.png": picture, "0.txt": "t", "0.cls": "a", "1.txt": "u", "1.cls": "b"}
    path = write_tar(tmp_path / "train.tar", members)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        archive.addfile(link)
    rows = contents(load(path))["train"]
    assert [row[2]["text"] for row in rows] == ["t", "u"]
    assert rows[0][3] == rows[1][3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[: content.rindex(b"00000008.json")], "the end of the archive is missing"),
        (lambda content: content + content, "another archive follows its end"),
        (lambda content: gzip.compress(content), "is compressed"),
        (lambda content: b"", "is damaged"),
    ],
)
def test_a_file_that_is_not_one_whole_archive_is_refused(
    change: Callable[[bytes], bytes], words: str, shards: Callable[[str], Path], tmp_path: Path
) -> None:
    (file,) = shards("tar").glob("train-*.tar")
    (tmp_path / "train.tar").write_bytes(change(file.read_bytes()))
    assert any(words in problem["message"] for problem in _check(tmp_path)["problems"])


def test_missing_shards_are_noticed(shards: Callable[[str], Path], tmp_path: Path) -> None:
    for kind, numbers in (("parquet", "{}-of-00003"), ("tar", "{}")):
        (file,) = shards(kind).glob(f"train-*.{kind}")
        for number in ("00000", "00002"):
            shutil.copy(file, tmp_path / f"train-{numbers.format(number)}.{kind}")
    with pytest.raises(DataError, match="1 shard of 3 missing, such as number 1"):
        find_tables(tmp_path / "train-*.parquet", Data())
    with pytest.warns(Notice, match="1 is missing"):
        find_tables(tmp_path / "train-*.tar", Data())


@pytest.mark.parametrize("kind", ["binary", "large_binary"])
def test_a_column_of_plain_bytes_has_the_images(kind: str, pairs: Path, tmp_path: Path) -> None:
    rows = [
        (row.values["text"], (pairs / str(row.values["image"])).read_bytes(), row.labels[0] == "a", b"x")
        for row in load(pairs).splits["train"].rows
    ]
    types = {"text": arrow.string(), "img": getattr(arrow, kind)(), "label": arrow.bool_(), "md5": arrow.binary()}
    table = arrow.Table.from_pylist([dict(zip(types, row, strict=True)) for row in rows], arrow.schema(types))
    parquet.write_table(table, tmp_path / "train.parquet")
    found = contents(load(tmp_path))["train"]
    assert [row[3] for row in found] == [row[3] for row in contents(load(pairs))["train"]]
    assert found[0][1:3] == (("true",), {"text": "what is the red digit", "image": "train.parquet/0/img"})
    parquet.write_table(arrow.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "train.parquet")
    assert code_of(lambda: load(tmp_path)) == "MF-DATA-22"


# -- names and patterns


def test_patterns_stand_for_files(tmp_path: Path) -> None:
    for name in ("b-2.tar", "b-1.tar", "c.txt"):
        (tmp_path / name).touch()
    expand = lambda text: [str(path) for path in paths.expand(Path(text))]  # noqa: E731
    assert expand("x/{08..11}.tar") == [f"x/{number}.tar" for number in ("08", "09", "10", "11")]
    assert expand("{b,a}-{1..0}.tar") == ["b-1.tar", "b-0.tar", "a-1.tar", "a-0.tar"]
    assert expand(f"{tmp_path}/b-?.tar") == [f"{tmp_path}/b-1.tar", f"{tmp_path}/b-2.tar"]
    assert code_of(lambda: paths.expand(Path("{0..99999999}.tar"))) == "MF-DATA-01"


@pytest.mark.parametrize(
    ("pattern", "code", "words"),
    [
        ("none-*.tar", "MF-DATA-01", "no file matches"),
        ("train-{000000..000001}.tar", "MF-DATA-01", "shard not found"),
        ("*.txt", "MF-DATA-05", "is not a shard"),
    ],
)
def test_a_wrong_pattern_is_explained(
    pattern: str, code: str, words: str, shards: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(shards("tar"), tmp_path / "tar")
    (tmp_path / "tar" / "notes.txt").touch()
    done = call("data", "check", tmp_path / "tar" / pattern)
    assert done.returncode == 4
    assert words in done.stderr + done.stdout


def test_names_are_found_among_many() -> None:
    names = [f"images/{number % 700}.jpg" for number in range(1000)]
    table = NameTable(np.array([name_key(name) for name in names], dtype=np.uint64))
    assert [table.find(name) for name in names] == [number % 700 for number in range(1000)]
    assert table.find("images/700.jpg") is None


def test_a_shard_is_scanned_once(shards: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = contents(load(shards("tar")))
    monkeypatch.setattr(tar_shards, "_scan", lambda *args: pytest.fail("scanned again"))
    assert contents(load(shards("tar"))) == wanted


def test_nothing_is_packed_over_other_files(pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    done = call("data", "pack", pairs, tmp_path)
    assert done.returncode == 4
    assert "the folder is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert "did you mean tar" in call("data", "pack", pairs, tmp_path / "new", "--format", "tra").stderr
