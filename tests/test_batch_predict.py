"""Many tables become one file per partition: every row once and in order, equal to `predict`, however often it is stopped."""

from __future__ import annotations

import io
import json
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from conftest import call, code_of, write_rows
from pyarrow import parquet
from storage_cases import write_tar
from tasks_of import MULTI, SINGLE

from mopefuse.config.schema import Data
from mopefuse.data.tables import find_tables
from mopefuse.errors import MopefuseError
from mopefuse.inference.batch import inputs, local
from mopefuse.inference.batch.parquet_file import to_parquet
from mopefuse.inference.run_model import RunModel
from mopefuse.tasks.regression import Regression

COLUMNS = ("text", "img", "id")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Let partitions be predicted in this process. Attributes: predicted: their names. stop_after: how many, until a signal."""
    state = SimpleNamespace(predicted=[], stop_after=None)

    def run(job: Any, partitions: Sequence[Any], devices: Sequence[str], stop: Any, on_rows: Any) -> Iterator[Any]:
        computer = job.model.load("cpu")
        for partition in partitions:
            if len(state.predicted) == state.stop_after:
                stop.signal_number = 15
                return
            try:
                yield job.run(partition, computer, on_rows)
                state.predicted.append(partition.name)
            except MopefuseError as error:
                yield partition, error

    monkeypatch.setattr(local, "run", run)
    return state


@pytest.fixture
def tables(pairs: Path, tmp_path: Path) -> Path:
    """A folder with three tables of the same images."""
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copytree(pairs / "images", folder / "images")
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    write_rows(folder / "a.jsonl", rows[:9])
    write_rows(folder / "c.jsonl", rows[9:])
    cells = "".join(f"{row['id']},{row['text']},{row['img']}\n" for row in rows[:5])
    (folder / "b.csv").write_text(f"id,text,img\n{cells}")
    (folder / "_note.jsonl").write_text("not a table of rows")
    return folder


def batch(run: Path, *words: object, engine: str = "local") -> Any:
    return call("predict", run, *words, "--engine", engine, "--device", "cpu", "--batch", "2", "--partition-rows", "4")


def lines_in(folder: Path) -> list[str]:
    return [line for file in sorted(folder.glob("part-*.jsonl")) for line in file.read_text().splitlines()]


def expected(run: Path, folder: Path, *names: str) -> list[str]:
    found: list[str] = []
    for name in names:
        done = call("predict", run, folder / name, "--batch", "2", "--device", "cpu")
        assert done.returncode == 0, done.stderr
        found += done.stdout.splitlines()
    return found


# -- every row once, in order, equal to predict


def test_the_files_of_a_folder_equal_predict_byte_for_byte(
    trained: Path, tables: Path, here: SimpleNamespace, tmp_path: Path
) -> None:
    done = batch(trained, tables, "-o", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert lines_in(tmp_path / "out") == expected(trained, tables, "a.jsonl", "b.csv", "c.jsonl")
    assert here.predicted == ["part-00000-00000", "part-00000-00001", "part-00000-00002", "part-00001-00000",
                              "part-00001-00001", "part-00002-00000"]  # fmt: skip
    summary = json.loads(done.stdout)
    assert (summary["ok"], summary["rows"], summary["partitions"], summary["rows_with_error"]) == (True, 17, 6, 0)
    assert (tmp_path / "out" / "_SUCCESS").is_file()


@pytest.mark.parametrize("cell", ["bytes", "struct"])
def test_images_in_parquet_equal_those_in_files(
    trained: Path, tables: Path, here: SimpleNamespace, tmp_path: Path, cell: str
) -> None:
    rows = [json.loads(line) for line in (tables / "a.jsonl").read_text().splitlines()]
    for row in rows:
        content = (tables / row["img"]).read_bytes()
        row["img"] = content if cell == "bytes" else {"bytes": content, "path": "a.png"}
    rows[3]["img"] = b"<html>" if cell == "bytes" else {"bytes": None, "path": rows[3].pop("img")["path"]}
    parquet.write_table(arrow.Table.from_pylist(rows), tables / "a.parquet", row_group_size=3)
    done = batch(trained, tables / "a.parquet", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = [row for file in sorted((tmp_path / "out").glob("*.parquet")) for row in parquet.read_table(file).to_pylist()]
    wanted = [json.loads(line) for line in expected(trained, tables, "a.jsonl")]
    assert [row["id"] for row in found] == [row["id"] for row in wanted]
    for number, (mine, theirs) in enumerate(zip(found, wanted, strict=True)):
        if number == 3:
            assert mine["error"]["code"] == ("MF-DATA-13" if cell == "bytes" else "MF-DATA-11") and mine["label"] is None
        elif number != 2:  # the other row of the batch with the error is predicted alone
            assert (mine["label"], dict(mine["probabilities"]), mine["error"]) == (
                theirs["label"], theirs["probabilities"], None
            )  # fmt: skip


@pytest.fixture
def shards(tables: Path, tmp_path: Path) -> Path:
    """A folder with two tar shards of the rows of a.jsonl, in the format of WebDataset."""
    folder = tmp_path / "shards"
    folder.mkdir()
    rows = [json.loads(line) for line in (tables / "a.jsonl").read_text().splitlines()]
    for name, part in (("x-0-of-2.tar", rows[:5]), ("x-1-of-2.tar", rows[5:])):
        members: dict[str, bytes | str] = {}
        for row in part:
            members |= {f"{row['id']}.png": (tables / row["img"]).read_bytes(), f"{row['id']}.txt": row["text"]}
        write_tar(folder / name, members)
    return folder


def test_tar_shards_equal_predict_byte_for_byte(
    trained: Path, tables: Path, shards: Path, here: SimpleNamespace, tmp_path: Path
) -> None:
    done = batch(trained, f"{shards}/x-{{0,1}}-of-2.tar", "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert here.predicted == ["part-00000-00000", "part-00000-00001", "part-00001-00000"]
    assert lines_in(tmp_path / "out") == expected(trained, shards, "x-0-of-2.tar", "x-1-of-2.tar")
    found, wanted = (
        [json.loads(line) for line in lines] for lines in (lines_in(tmp_path / "out"), expected(trained, tables, "a.jsonl"))
    )
    assert [row["label"] for row in found] == [row["label"] for row in wanted]
    assert [row["id"] for row in found] == [f"x-{at // 5}-of-2/{row['id']}" for at, row in enumerate(wanted)]


def test_an_archive_next_to_tables_is_not_one_of_them(tables: Path, shards: Path) -> None:
    shutil.copy(shards / "x-0-of-2.tar", tables / "photos.tar")
    assert [file.name for file in inputs.list_files([str(tables)])] == ["a.jsonl", "b.csv", "c.jsonl"]
    assert [file.name for file in inputs.list_files([str(shards)])] == ["x-0-of-2.tar", "x-1-of-2.tar"]
    assert [file.name for file in inputs.list_files([f"{tables}/*.tar"])] == ["photos.tar"]


def test_a_damaged_shard_costs_only_its_own_rows(trained: Path, shards: Path, here: SimpleNamespace, tmp_path: Path) -> None:
    whole = (shards / "x-1-of-2.tar").read_bytes()
    (shards / "x-1-of-2.tar").write_bytes(whole[:2048])
    done = batch(trained, shards, "-o", tmp_path / "out")
    assert done.returncode == 4 and "x-1-of-2.tar is damaged" in done.stderr and "replace it" in done.stderr, done.stderr
    assert len(lines_in(tmp_path / "out")) == 5
    (shards / "x-1-of-2.tar").write_bytes(whole)
    assert batch(trained, shards, "-o", tmp_path / "out").returncode == 0
    assert lines_in(tmp_path / "out") == expected(trained, shards, "x-0-of-2.tar", "x-1-of-2.tar")


def test_partitions_together_are_the_whole_table(tmp_path: Path) -> None:
    rows = [{"id": str(at), "text": f"a\u2028b, {at}", "img": "x\n.png"} for at in range(11)]
    lines = [json.dumps(row, ensure_ascii=False) + ("\n" if at % 3 else "\r\n\n") for at, row in enumerate(rows)]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n" + "".join(lines).encode().rstrip() + b"\nbad")
    (tmp_path / "b.csv").write_text("id;text;img\n" + "".join(f'{at};"a\nb";x.png\n' for at in range(9)) + '1;"open;x\n2;c;d\n')
    parquet.write_table(arrow.Table.from_pylist([{**row, "n": 1} for row in rows]), tmp_path / "c.parquet", row_group_size=4)
    for name in ("a.jsonl", "b.csv", "c.parquet"):
        whole = [(row.line, row.value) for row in find_tables(tmp_path / name, Data())[""].rows()]
        if name == "c.parquet":  # of which only the columns that are needed are read
            whole = [(line, {key: value for key, value in row.items() if key != "n"}) for line, row in whole]  # type: ignore
        for size in (1, 3, 100):
            file = inputs.list_files([str(tmp_path / name)])[0]
            spans = inputs.divide(file, size, COLUMNS, Data())
            assert [span.start for span in spans] == list(range(0, len(whole), size))
            found = [row for span in spans for row in inputs.read_rows(file, span, COLUMNS, Data())]
            assert [(row.line, row.value) for row in found] == whole, (name, size)


def test_bad_rows_are_rows_with_an_error(trained: Path, tables: Path, here: SimpleNamespace, tmp_path: Path) -> None:
    rows = (tables / "a.jsonl").read_text().splitlines()
    rows[1:3] = ["nonsense", json.dumps({"id": "x", "text": "t", "img": "../a.png"})]
    (tables / "a.jsonl").write_text("\n".join(rows))
    done = batch(trained, tables / "a.jsonl", "-o", tmp_path / "out")
    assert done.returncode == 0 and "2 could not be read" in done.stderr
    assert lines_in(tmp_path / "out") == expected(trained, tables, "a.jsonl")


def test_only_bad_rows_are_an_error(trained: Path, here: SimpleNamespace, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"title": "x"}] * 5)
    done = batch(trained, tmp_path / "a.jsonl", "-o", tmp_path / "out")
    assert done.returncode == 4 and "could not read any of 5 rows" in done.stderr
    assert len(lines_in(tmp_path / "out")) == 5 and not (tmp_path / "out" / "_SUCCESS").exists()


# -- stopped and continued


def test_what_was_stopped_continues_where_it_was(trained: Path, tables: Path, here: SimpleNamespace, tmp_path: Path) -> None:
    out, here.stop_after = tmp_path / "out", 2
    done = batch(trained, tables, "-o", out)
    assert done.returncode == 143 and "2 of 6 partitions complete" in done.stderr and not (out / "_SUCCESS").exists()
    here.stop_after = None
    (out / "part-00000-00000.jsonl").write_text("half")  # damaged
    (out / "_records" / "part-00000-00002.json.tmp-0-999999999").write_text("{")  # of a process that was killed
    assert batch(trained, tables, "-o", out).returncode == 0
    assert here.predicted == [f"part-0000{name}" for name in ("0-00000", "0-00001", "0-00000", "0-00002", "1-00000", "1-00001",
                                                              "2-00000")]  # fmt: skip
    assert lines_in(out) == expected(trained, tables, "a.jsonl", "b.csv", "c.jsonl")
    assert not list(out.rglob("*.tmp-*"))
    before = len(here.predicted)
    done = batch(trained, tables, "-o", out, "--json")
    assert len(here.predicted) == before and json.loads(done.stdout)["rows_before"] == 17


def test_other_settings_or_inputs_are_refused_until_overwritten(
    trained: Path, tables: Path, here: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert batch(trained, tables, "-o", out).returncode == 0
    (out / "README").write_text("mine")
    for words, what in (([tables, "--top", "1"], "another top (None before, 1 now)"), ([tables / "a.jsonl"], "other inputs")):
        done = batch(trained, *words, "-o", out)
        assert done.returncode == 3 and what in done.stderr and "--overwrite" in done.stderr, done.stderr
    with monkeypatch.context() as patch:
        patch.setattr(RunModel, "digest", "of other weights")
        done = batch(trained, tables, "-o", out)
        assert done.returncode == 3 and "begun with another model" in done.stderr
    (tables / "c.jsonl").write_text((tables / "a.jsonl").read_text())
    done = batch(trained, tables, "-o", out)
    assert done.returncode == 3 and "c.jsonl has changed" in done.stderr
    done = batch(trained, tables / "c.jsonl", "-o", out, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert lines_in(out) == expected(trained, tables, "c.jsonl") and (out / "README").read_text() == "mine"


def test_a_table_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"id": "1"}] * 4)
    file = inputs.list_files([str(tmp_path / "a.jsonl")])[0]
    span = inputs.divide(file, 2, COLUMNS, Data())[1]
    for changed in ([{"id": "1"}] * 3, [{"id": "2"}] * 4):
        write_rows(tmp_path / "a.jsonl", changed)
        assert code_of(lambda: list(inputs.read_rows(file, span, COLUMNS, Data()))) == "MF-DATA-09"


def test_a_damaged_table_is_reported_and_the_others_are_complete(
    trained: Path, tables: Path, here: SimpleNamespace, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (tables / "c.jsonl").read_text().splitlines()]
    content = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), content)
    (tables / "d.parquet").write_bytes(content.getvalue()[:-50])
    out = tmp_path / "out"
    done = batch(trained, tables, "-o", out)
    assert done.returncode == 4 and "d.parquet is damaged" in done.stderr and "6 partitions could" in done.stderr
    assert lines_in(out) == expected(trained, tables, "a.jsonl", "b.csv", "c.jsonl") and not (out / "_SUCCESS").exists()
    (tables / "d.parquet").write_bytes(content.getvalue())
    before = len(here.predicted)
    done = batch(trained, tables, "-o", out)
    assert done.returncode == 0 and here.predicted[before:] == ["part-00003-00000"], done.stderr


def test_a_table_that_is_damaged_inside_can_be_replaced(
    trained: Path, tables: Path, here: SimpleNamespace, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in (tables / "a.jsonl").read_text().splitlines()]
    file, out = tables / "d.parquet", tmp_path / "out"
    parquet.write_table(arrow.Table.from_pylist(rows), file, row_group_size=4, compression="none", use_dictionary=False)
    content = bytearray(file.read_bytes())
    start = parquet.read_metadata(file).row_group(1).column(0).data_page_offset
    content[start : start + 30] = b"\xff" * 30
    file.write_bytes(content)
    done = batch(trained, tables, "-o", out)
    assert done.returncode == 4 and "8 partitions could" in done.stderr, done.stderr
    parquet.write_table(arrow.Table.from_pylist(rows[:5]), file)  # with fewer partitions
    before = len(here.predicted)
    assert batch(trained, tables, "-o", out).returncode == 0
    assert here.predicted[before:] == ["part-00003-00000", "part-00003-00001"]
    assert len(lines_in(out)) == 17 + 5


def test_success_means_that_every_file_is_there(
    trained: Path, tables: Path, here: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "run", lambda *_: iter(()))  # an engine that loses partitions
    done = batch(trained, tables, "-o", tmp_path / "out")
    assert done.returncode == 7 and "6 partitions missing" in done.stderr and not (tmp_path / "out" / "_SUCCESS").exists()


# -- inputs and output


def test_inputs_are_paths_folders_patterns_and_urls(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tables)

    def names(*texts: str) -> list[str]:
        return [file.name for file in inputs.list_files(texts)]

    assert names("c.jsonl", ".") == ["c.jsonl", "a.jsonl", "b.csv"]
    assert names("{c,a}.jsonl") == ["c.jsonl", "a.jsonl"] and names("*.jsonl") == ["a.jsonl", "c.jsonl"]
    for number in (8, 9, 10):
        (tables / f"n-{number:03}.jsonl").touch()
    assert names(f"{tables}/n-{{008..010}}.jsonl") == ["n-008.jsonl", "n-009.jsonl", "n-010.jsonl"]
    import fsspec

    fsspec.filesystem("memory").pipe("/bucket/in/x.jsonl", b"{}\n")
    (file,) = inputs.list_files(["memory://bucket/in/*.jsonl"])
    assert (file.path, file.size) == ("memory:///bucket/in/x.jsonl", 3) and file.version


def test_masks_and_numbers_and_lists_have_columns() -> None:
    rows = [{"id": "1", "labels": [], "probabilities": {"a": 0.5}}, {"id": "2", "error": {"code": "MF-DATA-03", "exit": 4}}]
    table = parquet.read_table(io.BytesIO(to_parquet(rows, MULTI, ["a"])))
    assert table.schema.equals(parquet.read_schema(io.BytesIO(to_parquet([], MULTI, ["a"]))))
    assert table["labels"].to_pylist() == [[], None] and table["error"].to_pylist()[1]["exit"] == 4
    assert parquet.read_schema(io.BytesIO(to_parquet([], SINGLE, ["a"]))).names == [
        "id", "label", "probabilities", "routing", "error"
    ]  # fmt: skip
    task = Regression([0.0] * 2, [1.0] * 2, loss="quantile", quantiles=(0.1, 0.5, 0.9))
    one = {"id": "1", **task.predict(np.arange(6.0).tolist(), ["x", "y"], [])}
    (found,) = parquet.read_table(io.BytesIO(to_parquet([one], task, ["x", "y"]))).to_pylist()
    assert dict(found["value"]) == one["value"]
    assert {name: dict(each) for name, each in found["quantiles"]} == one["quantiles"]


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["{in}/none.jsonl", "-o", "{out}", "--engine", "local"], "no table matches"),
        (["{in}/*.parquet", "-o", "{out}", "--engine", "local"], "no table matches"),
        (["{in}/images", "-o", "{out}", "--engine", "local"], "no table matches"),
        (["{in}", "--engine", "local"], "add --out FOLDER"),
        (["{in}", "-o", "{out}.jsonl", "--engine", "local"], "is not a folder"),
        (["{in}", "-o", "{in}", "--engine", "local"], "files that are no batch predictions"),
        (["{in}", "-o", "{out}", "--engine", "spark"], "use local or ray"),
        (["{in}", "-o", "{out}", "--engine", "local", "--format", "csv"], "use jsonl or parquet"),
        (["-", "-o", "{out}", "--engine", "local"], "pass tables"),
        (["{in}", "-o", "{out}", "--engine", "local", "--strict"], "remove --strict"),
        (["{in}", "-o", "{out}", "--engine", "local", "--ray-address", "x"], "add --engine ray"),
        (["{in}/a.jsonl", "{in}/c.jsonl", "-o", "{out}"], "add --engine local"),
        (["{in}/*.jsonl", "-o", "{out}"], "add --engine local"),
        (["{in}/a.jsonl", "--workers", "2"], "add --engine local"),
        (["no://bucket/x.jsonl", "-o", "{out}", "--engine", "local"], "use a local path or a URL"),
    ],
)
def test_wrong_usage_is_an_error_with_a_fix(trained: Path, tables: Path, tmp_path: Path, words: list[str], what: str) -> None:
    paths = {"{in}": str(tables), "{out}": str(tmp_path / "out")}
    for name, path in paths.items():
        words = [word.replace(name, path) for word in words]
    done = call("predict", trained, *words)
    assert done.returncode == 3 and what in done.stderr and "fix: " in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_without_ray_the_extra_is_named(trained: Path, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = batch(trained, tables, "-o", tmp_path / "out", engine="ray")
    assert done.returncode == 5 and 'pip install "mopefuse[ray]"' in done.stderr


def test_a_cluster_that_does_not_answer_is_an_error(trained: Path, tables: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = batch(trained, tables, "-o", tmp_path / "out", "--ray-address", f"127.0.0.1:{port}", engine="ray")
    assert done.returncode == 7 and "cannot connect to the Ray cluster" in done.stderr and "--ray-address" in done.stderr


def test_without_the_package_of_a_store_the_extra_is_named(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_it(*arguments: object, **options: object) -> None:
        raise ImportError("Install s3fs to access S3")  # as fsspec says it, which keeps what it has imported

    for name in ("filesystem", "get_filesystem_class"):
        monkeypatch.setattr(f"fsspec.core.{name}", import_it)
    done = batch(trained, "s3://bucket/*.jsonl", "-o", tmp_path / "out")
    assert done.returncode == 5 and 'pip install "mopefuse[remote]"' in done.stderr


# -- other tasks


@pytest.mark.matrix
@pytest.mark.parametrize("task", ["retrieval", "segmentation"])
def test_rankings_and_masks_equal_those_of_predict(task: str, pairs: Path, here: SimpleNamespace, tmp_path: Path) -> None:
    data, more = pairs, ["--task", "retrieval"]
    if task == "segmentation":
        data, more = tmp_path / "masks", []
        assert call("data", "make", "digit-masks", data, "--train", 20, "--val", 10, "--test", 9).returncode == 0
    tiny = ("--main", "tiny:vision", "--comp", "tiny:text", "--device", "cpu", "--experts", "2", "--steps", "1")
    done = call("train", *tiny, "--data", data, "--out", tmp_path / "run", *more)
    assert done.returncode == 0, done.stderr
    ranked = ["--gallery", data / "val.jsonl", "--gallery-of", "text", "--top", "2"] if task == "retrieval" else []
    done = batch(tmp_path / "run", data / "test.jsonl", "-o", tmp_path / "out", *ranked)
    assert done.returncode == 0, done.stderr
    one = call("predict", tmp_path / "run", data / "test.jsonl", "-o", tmp_path / "one.jsonl", "--batch", "2", *ranked)
    assert one.returncode == 0, one.stderr
    found = [json.loads(line) for line in lines_in(tmp_path / "out")]
    wanted = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    if task == "retrieval":
        assert found == wanted
        return
    assert [row["id"] for row in found] == [row["id"] for row in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        assert (tmp_path / "out" / mine["mask"]).read_bytes() == (tmp_path / theirs["mask"]).read_bytes()
    remote = batch(tmp_path / "run", data / "test.jsonl", "-o", "memory://out")
    assert remote.returncode == 3 and "use --engine local and a local --out" in remote.stderr


@pytest.mark.matrix
def test_a_bundle_predicts_many_tables(exported: Path, tables: Path, here: SimpleNamespace, tmp_path: Path) -> None:
    done = batch(exported, tables / "a.jsonl", "-o", tmp_path / "out", "--routing")
    assert done.returncode == 0, done.stderr
    one = call("predict", exported, tables / "a.jsonl", "--batch", "2", "--device", "cpu", "--routing")
    assert lines_in(tmp_path / "out") == one.stdout.splitlines()
