"""The index of a table that is read by columns equals that of one that is read row by row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as arrow
import pytest
from conftest import code_of
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from storage_cases import load

from mopefuse.config.schema import Data
from mopefuse.core.error_codes import DataCode
from mopefuse.data import index_build
from mopefuse.data.index import Index
from mopefuse.data.index_build import read_rows
from mopefuse.data.index_columns import read_columns
from mopefuse.data.row_store import ArrowRows
from mopefuse.data.strings import Strings
from mopefuse.data.tables import find_tables
from mopefuse.errors import DataError
from mopefuse.modalities.file_infos import FileInfos
from mopefuse.modalities.files import FileInfo

MODALITIES = ("text", "image")


def write(path: Path, rows: list[dict[str, Any]], schema: Any = None) -> Path:
    parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), path)
    return path


def both(path: Path, **settings: Any) -> tuple[Index | None, Index]:
    """The index by columns, None if the table is left to the other way, and the index row by row."""
    config = Data(path=str(path), **settings)
    table = find_tables(path, config)[""]
    by_row = read_rows(table._replace(batches=None), "train", MODALITIES, config)
    return read_columns(table, "train", MODALITIES, config, ""), by_row


def facts(index: Index) -> dict[str, Any]:
    values = {
        name: [values.is_missing().tolist(), values.keys().tolist(), values.loose_keys().tolist()]
        for name, values in index.values.items()
    }
    files = {name: ([*values.names], values.number_S.tolist(), [*values.infos]) for name, values in index.files.items()}
    used = ("id", "text", "img", "label")
    rows = [{name: index.store.row(number).get(name) for name in used} for number in range(len(index.store))]
    labels = [index.labels[number] for number in range(len(index.labels))]
    return {
        "values": values, "files": files, "rows": rows, "labels": labels, "names": index.labels.names, "ids": [*index.ids],
        "lines": index.lines_S.tolist(), "problems": index.row_problems, "left_out": index.left_out,
        "lists": index.list_S.tolist(),
    }  # fmt: skip


def rows(count: int, **changes: Any) -> list[dict[str, Any]]:
    listed = [
        {"id": f"r{number}", "text": f"Text  {number % 7} ß", "img": f"{number % 5}.png", "label": "abc"[number % 3]}
        for number in range(count)
    ]
    return [{**row, **{name: change(number) for name, change in changes.items()}} for number, row in enumerate(listed)]


CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "plain": (rows(40), {}),
    "no ids": ([{key: value for key, value in row.items() if key != "id"} for row in rows(30)], {}),
    "integer ids and labels": (rows(30, id=lambda n: n + 5, label=lambda n: n % 4), {}),
    "truth values": (rows(30, label=lambda n: n % 2 == 0), {}),
    "numbers": (rows(30, label=lambda n: n / 7), {}),
    "a number that is not finite": (rows(30, label=lambda n: float("nan") if n == 3 else 1.5), {}),
    "distinct files": (rows(30, img=lambda n: f"{n}.png"), {}),
    "texts that are missing": (rows(30, text=lambda n: None if n == 4 else "t"), {}),
    "missing texts that are left out": (rows(30, text=lambda n: None if n == 4 else "t"), {"on_missing": "skip"}),
    "missing files that are accepted": (rows(30, img=lambda n: None if n in (4, 9) else f"{n}.png"), {"on_missing": "absent"}),
    "null texts that are empty": (rows(30, text=lambda n: None if n == 4 else "t"), {"allow_missing_text": True}),
    "blank texts, labels and files": (
        rows(40, text=lambda n: " \x1c" if n == 4 else "t", label=lambda n: "" if n == 5 else "\u200b" if n == 6 else "a"),
        {},
    ),
    "an id that is null": (rows(30, id=lambda n: None if n == 7 else str(n)), {}),
}
ROW_BY_ROW: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "an id that occurs twice": (rows(30, id=lambda n: n % 29), {}),
    "lists of labels": (rows(30, label=lambda n: ["a", "b"][: n % 3]), {}),
    "many rows without a text": (rows(30, text=lambda n: None if n % 2 else "t"), {"on_missing": "absent"}),
    "separated labels": (rows(30, label=lambda n: "a|b"), {"label_sep": "|"}),
    "no column of labels": ([{"id": "1", "text": "t", "img": "i.png"}], {}),
}


@pytest.mark.parametrize("case", CASES)
def test_columns_give_the_index_of_the_rows(case: str, tmp_path: Path) -> None:
    listed, settings = CASES[case]
    by_column, by_row = both(write(tmp_path / "rows.parquet", listed), **settings)
    assert by_column is not None
    assert facts(by_column) == facts(by_row)


@pytest.mark.parametrize("case", ROW_BY_ROW)
def test_other_tables_are_read_row_by_row(case: str, tmp_path: Path) -> None:
    listed, settings = ROW_BY_ROW[case]
    by_column, by_row = both(write(tmp_path / "rows.parquet", listed), **settings)
    assert by_column is None
    config = Data(path=str(tmp_path / "rows.parquet"), **settings)
    assert facts(read_rows(find_tables(tmp_path / "rows.parquet", config)[""], "train", MODALITIES, config)) == facts(by_row)
    assert not [*tmp_path.glob("*.tmp-*")]


def test_batches_and_shards_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mopefuse.data.storage.arrow_shards._ROWS_AT_ONCE", 7)
    listed = rows(60, text=lambda n: None if n == 20 else f"t{n}")
    for number in range(3):
        table = arrow.Table.from_pylist(listed[number * 20 : number * 20 + 20])
        parquet.write_table(table, tmp_path / f"p-{number}.parquet", row_group_size=11)
    by_column, by_row = both(tmp_path / "p-{0..2}.parquet")
    assert by_column is not None
    assert facts(by_column) == facts(by_row)


def test_an_index_from_the_cache_has_its_rows_on_disk(pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))
    for name in ("train", "val"):
        listed = load(pairs).splits[name].rows
        cells = [(row.id, row.values["text"], row.values["image"], row.labels[0]) for row in listed]
        write(tmp_path / f"{name}.parquet", [dict(zip(("id", "text", "img", "label"), row, strict=True)) for row in cells])
    settings = {"image_roots": (str(pairs),)}
    first = load(tmp_path, **settings)
    monkeypatch.setattr(index_build, "read_rows", lambda *args: pytest.fail("read again"))
    again = load(tmp_path, **settings)
    for data in (first, again):
        store = data.splits["train"].rows.store  # type: ignore[attr-defined]
        assert isinstance(store, ArrowRows)
        assert store.path.name == "rows.arrow"
        assert [row.id for row in data.splits["train"].rows] == [f"train-{number}" for number in range(12)]
    assert first.fingerprint() == again.fingerprint()
    assert not [*(tmp_path / "cache" / "index").glob("*.tmp-*")]


def test_a_table_that_turns_out_to_be_damaged_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))
    config = Data(path=str(write(tmp_path / "rows.parquet", rows(20))))
    table = find_tables(tmp_path / "rows.parquet", config)[""]
    assert table.batches is not None
    whole = [*table.batches()]

    def damaged() -> Iterator[Any]:
        yield from whole
        raise DataError(DataCode.PARQUET_DAMAGED, "the file is damaged")

    assert code_of(lambda: read_columns(table._replace(batches=damaged), "train", MODALITIES, config, "")) == "MF-DATA-24"
    assert [*(tmp_path / "cache" / "index").iterdir()] == []


def test_without_a_cache_folder_rows_are_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPEFUSE_CACHE", "/dev/null/cache")
    by_column, by_row = both(write(tmp_path / "rows.parquet", rows(20)))
    assert by_column is None
    assert len(by_row.lines_S) == 20


# -- sequences in arrays


@given(st.lists(st.text(alphabet=st.characters(), max_size=5), max_size=9))
def test_strings_are_kept(listed: list[str]) -> None:
    strings = Strings.of(listed)
    assert [*strings] == listed == [strings[number] for number in range(len(listed))]
    assert strings == listed
    assert Strings.join([strings, strings]) == listed * 2
    assert strings[1:3] == listed[1:3]


def test_infos_of_files_are_kept() -> None:
    known = FileInfo(3, 4, 5, 6, True, 7, b"digest\0x", bytes(range(32)))
    infos = [FileInfo(), known, FileInfo(code="MF-1", what="w", fix="f")]
    found = FileInfos.of(infos)
    assert [*found] == infos == [found[number] for number in range(3)]
    changed = found.copy()
    changed.set(2, infos[1])
    assert [*changed] == [infos[0], infos[1], infos[1]]
    assert [*found] == infos
    unknown = FileInfos.unknown(2)
    assert unknown.known_columns == {}
    copied = unknown.copy()
    copied.set(1, infos[1])
    assert [*copied] == infos[:2]
    assert [*unknown] == [FileInfo()] * 2
    assert np.array_equal(found.bad_I, [False, False, True])
