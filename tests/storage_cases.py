"""Data in other places than a folder: shards of several formats, and a server for S3 on this machine."""

from __future__ import annotations

import io
import json
import os
import socket
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as arrow
import pytest
from conftest import call
from pyarrow import parquet

from mopefuse.config.schema import Data
from mopefuse.data.base import DataSet
from mopefuse.data.load import load_data

BUCKET = "pairs"


def packed(data: Path, out: Path, kind: str, *flags: object) -> Path:
    """Pack a data set with the command line."""
    done = call("data", "pack", data, out, "--format", kind, *flags)
    assert done.returncode == 0, done.stderr
    return out


def load(path: Path | str, **settings: Any) -> DataSet:
    return load_data(Data(path=str(path), **settings), require=("train",))


def contents(data: DataSet) -> dict[str, list[Any]]:
    """Everything that a model learns from, by split, in order."""
    config = Data()
    return {
        name: [
            (row.id, row.labels, dict(row.values), data.read(split, row, "image", config).tobytes()) for row in split.rows
        ]
        for name, split in data.splits.items()
    }


def write_tar(path: Path, members: Mapping[str, bytes | str]) -> Path:
    """Write a tar file as other tools do."""
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def upload(client: Any, folder: Path, prefix: str) -> str:
    """Copy a folder to the server; returns its address."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.upload_file(str(file), BUCKET, f"{prefix}/{file.relative_to(folder).as_posix()}")
    return f"s3://{BUCKET}/{prefix}"


def cut(content: bytes) -> bytes:
    """The beginning of a file, then zeros."""
    return content[:60] + bytes(len(content) - 60)


def damage_image(folder: Path, kind: str) -> None:
    """Damage the image train-3.png, in a format that is otherwise whole."""
    if kind == "folder":
        broken = folder / "images" / "train-3.png"
        broken.write_bytes(cut(broken.read_bytes()))
        return
    (file,) = folder.glob(f"train-*.{kind}")
    if kind == "tar":
        with tarfile.open(file) as archive:
            member = archive.getmember("00000003.png")
        content = file.read_bytes()
        end = member.offset_data + member.size
        file.write_bytes(content[: member.offset_data] + cut(content[member.offset_data : end]) + content[end:])
        return
    table = parquet.read_table(file)
    rows = table.to_pylist()
    rows[3]["img"]["bytes"] = cut(rows[3]["img"]["bytes"])
    parquet.write_table(arrow.Table.from_pylist(rows, schema=table.schema), file)


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A client of an S3 server on this machine, which the environment names."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    address = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    s3fs.S3FileSystem.clear_instance_cache()  # of those that know another server
    with patch.dict(os.environ, {**address, **keys}):
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        yield client
    server.stop()


def losses(run: Path) -> list[Any]:
    """Every line that training wrote, as it stands."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
