"""Data on other machines: a real S3 server on this one, and what is said if data cannot be reached."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import s3fs
from conftest import TINY, call, code_of
from storage_cases import BUCKET, contents, damage_image, load, losses, packed, upload
from storage_cases import s3 as s3

import mopefuse
from mopefuse.core.error_codes import DataCode
from mopefuse.data.storage.byte_cache import ByteCache
from mopefuse.data.storage.paths import data_path
from mopefuse.errors import PackageError

FORMATS = ("folder", "tar", "parquet")


@pytest.fixture(scope="module")
def remote(pairs: Path, s3: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("shards")
    upload(s3, pairs, "folder")
    for kind in FORMATS[1:]:
        upload(s3, packed(pairs, folder / kind, kind), kind)
    return lambda kind: f"s3://{BUCKET}/{kind}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOPEFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.process
@pytest.mark.parametrize("kind", FORMATS)
def test_training_on_remote_data_takes_the_course_of_training_on_the_folder(
    kind: str, remote: Callable[[str], str], trained: Path, tmp_path: Path
) -> None:
    done = call("train", *TINY, "--data", remote(kind), "--out", tmp_path / "run", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == losses(trained)
    again = call("eval", tmp_path / "run", "--data", remote(kind), "--json")
    assert again.returncode == 0, again.stderr


@pytest.mark.process
def test_data_workers_read_remote_files(remote: Callable[[str], str], trained: Path, tmp_path: Path, own_cache: Path) -> None:
    options = ("--set", "data.workers=2", "--set", "data.cache_features=false", "--cache-prefix", "off")
    load(remote("tar"))
    for file in (own_cache / "remote").glob("*/*"):
        file.unlink()  # so that workers have to fetch
    done = call("train", *TINY, *options, "--data", remote("tar"), "--out", tmp_path / "run", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run")[0]["loss"] == pytest.approx(losses(trained)[0]["loss"], rel=1e-5)


@pytest.mark.process
@pytest.mark.parametrize("kind", FORMATS)
def test_remote_files_are_fetched_once(kind: str, remote: Callable[[str], str], pairs: Path) -> None:
    assert contents(load(remote(kind))) == contents(load(pairs))
    with patch("s3fs.S3FileSystem._cat_file", side_effect=AssertionError("fetched again")):
        data = load(remote(kind)) if kind != "folder" else None  # the table of a folder is always read
        if data is not None:
            assert contents(data) == contents(load(pairs))


@pytest.mark.process
def test_a_remote_image_that_changed_is_read_again(s3: Any, pairs: Path, tmp_path: Path) -> None:
    address = upload(s3, pairs, "changing")
    before = contents(load(address))["train"]
    other = (pairs / "images" / "train-5.png").read_bytes()
    s3.put_object(Bucket=BUCKET, Key="changing/images/train-3.png", Body=other)
    after = contents(load(address))["train"]
    assert after[3][3] == before[5][3] != before[3][3]
    s3.put_object(Bucket=BUCKET, Key="changing/images/train-4.png", Body=other[:50])
    done = call("data", "check", address, "--json")
    assert done.returncode == 4
    assert "images/train-4.png is not a readable image" in done.stdout


@pytest.mark.process
@pytest.mark.parametrize("kind", FORMATS[1:])
def test_a_damaged_image_in_a_remote_shard_is_found(kind: str, s3: Any, pairs: Path, tmp_path: Path) -> None:
    out = packed(pairs, tmp_path / kind, kind)
    damage_image(out, kind)
    done = call("data", "check", upload(s3, out, f"damaged-{kind}"))
    assert done.returncode == 4
    assert "images/train-3.png is not a readable image" in done.stdout


@pytest.mark.process
def test_rows_cannot_name_files_outside_the_remote_folder(s3: Any, pairs: Path) -> None:
    upload(s3, pairs, "deep/er")
    row = '{"id": "x", "text": "t", "img": "../secret.png", "label": "a"}\n'
    s3.put_object(Bucket=BUCKET, Key="deep/secret.png", Body=(pairs / "images" / "train-3.png").read_bytes())
    s3.put_object(Bucket=BUCKET, Key="deep/er/test.jsonl", Body=row.encode())
    assert code_of(lambda: load(f"s3://{BUCKET}/deep/er")) == "MF-SEC-01"


@pytest.mark.process
def test_the_rows_of_remote_data_are_a_data_set_of_torch(remote: Callable[[str], str], pairs: Path) -> None:
    rows = mopefuse.PairDataset(remote("parquet"), "train")
    assert [row["text"] for row in rows] == [row["text"] for row in mopefuse.PairDataset(pairs, "train")]


@pytest.mark.process
@pytest.mark.parametrize(
    ("address", "code", "words"),
    [
        (f"s3://{BUCKET}/nothing-here", "MF-DATA-01", "data folder not found"),
        ("s3://no-such-bucket/data", "MF-DATA-", "no-such-bucket"),
        (f"s3://{BUCKET}/none-*.tar", "MF-DATA-80", "no file matches"),
    ],
)
def test_remote_data_that_do_not_exist_are_an_error(address: str, code: str, words: str, remote: object) -> None:
    done = call("data", "check", address)
    assert done.returncode == 4, done.stderr
    assert code in done.stderr
    assert words in done.stderr + done.stdout


def test_an_unreachable_server_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("ENDPOINT_URL", "http://127.0.0.1:9"), ("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()  # they remember the server
    done = call("data", "check", "s3://other-bucket/data")
    assert (done.returncode, DataCode.REMOTE_UNREADABLE.text in done.stderr) == (4, True), done.stderr
    assert "check the address, your credentials and the connection" in done.stderr


def test_unknown_places_and_missing_packages_are_named() -> None:
    assert code_of(lambda: data_path("ftp://host/data")) == DataCode.UNKNOWN_SCHEME.text
    with patch("importlib.util.find_spec", return_value=None), pytest.raises(PackageError, match="gcsfs"):
        data_path("gs://bucket/data")
    assert str(data_path("hf:owner/name")) == "hf://datasets/owner/name"
    assert data_path("C:/data") == Path("C:/data")


# -- copies


def test_the_oldest_copies_are_removed_beyond_the_limit(own_cache: Path) -> None:
    kept = ByteCache(limit=5000)
    for number in range(10):
        kept.get(f"{number:02d}{'0' * 30}", lambda: bytes(1000))
        os.utime(own_cache / "remote" / f"{number:02d}" / f"{number:02d}{'0' * 30}", (number, number))
    names = sorted(file.name[:2] for file in (own_cache / "remote").glob("*/*"))
    assert names[-3:] == ["07", "08", "09"]
    assert sum(file.stat().st_size for file in (own_cache / "remote").glob("*/*")) <= 5000


def test_a_damaged_copy_is_fetched_again(own_cache: Path) -> None:
    kept = ByteCache(limit=5000)
    key = "ab" + "0" * 30
    assert kept.get(key, lambda: b"content") == b"content"
    (file,) = (own_cache / "remote").glob("*/*")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert kept.get(key, lambda: b"fetched again") == b"fetched again"
    assert kept.get(key, lambda: pytest.fail("fetched a third time")) == b"fetched again"


def test_copies_are_made_without_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOPEFUSE_CACHE", "/dev/null/cache")
    assert ByteCache(limit=10).get("key", lambda: b"content") == b"content"
