"""Batch prediction in other processes, some of which are killed, and from and to an object store on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import call, write_rows
from storage_cases import write_tar

from mopefuse.config.schema import Data
from mopefuse.errors import Interrupted
from mopefuse.inference.batch.inputs import divide, files_in, list_files, read_rows
from mopefuse.inference.batch.job import Computer, ModelSource
from mopefuse.inference.batch.run import BatchSettings, Progress, start
from mopefuse.inference.predict import input_settings, load

pytestmark = [pytest.mark.process, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # those of Ray
BATCH, ROWS = 4, 8


@pytest.fixture
def table(pairs: Path, tmp_path: Path) -> Path:
    """48 rows, six partitions, in a folder with their images."""
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "rows.jsonl", [{**rows[at % len(rows)], "id": f"{at}"} for at in range(48)])
    (tmp_path / "images").mkdir()
    for row in rows:
        (tmp_path / row["img"]).write_bytes((pairs / row["img"]).read_bytes())
    return tmp_path / "rows.jsonl"


@pytest.fixture(autouse=True)
def modules_of_tests_are_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker processes import `mopefuse` from where it is here."""
    import mopefuse

    monkeypatch.setenv("PYTHONPATH", str(Path(mopefuse.__file__).parents[1]))


def predict(run: Path, table: Path | str, out: Path | str, on_progress: Callable[[Progress], None], **more: Any) -> Any:
    source = ModelSource(str(run), "best", None, None, None, False, BATCH, input_settings(run))
    computer = Computer(load(run, device="cpu"), source)
    settings = BatchSettings(list_files([str(table)]), str(out), rows=ROWS, device="cpu", **more)
    return start(source, computer, settings, on_progress)


def assert_equal_to_predict(run: Path, table: Path, out: Path) -> None:
    done = call("predict", run, table, "--batch", BATCH, "--device", "cpu")
    found = [line for file in sorted(out.glob("part-*.jsonl")) for line in file.read_text().splitlines()]
    assert found == done.stdout.splitlines() and len(found) == 48


def kill_below(engine: str) -> set[int]:
    """Kill a process with the model that this one started, directly or through others."""
    script = Path(__file__).parents[1] / "scripts" / "batch_predict_kill.py"
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.processes_below(os.getpid(), module.TITLES[engine])[:1]
    for process in found:
        os.kill(process, signal.SIGKILL)
    return set(found)


def test_a_killed_worker_is_replaced_and_a_signal_stops_for_later(trained: Path, table: Path, tmp_path: Path) -> None:
    killed: set[int] = set()

    def interfere(progress: Progress) -> None:
        nonlocal killed
        if progress.current and not killed:
            killed = kill_below("local")
        if progress.complete >= 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="partitions complete") as stopped:
        predict(trained, table, tmp_path / "out", interfere)
    assert stopped.value.exit_code == 143 and killed
    assert 2 <= len(list((tmp_path / "out").glob("part-*"))) < 6
    summary = predict(trained, table, tmp_path / "out", lambda progress: None, workers=2)
    assert summary["rows"] == 48 and summary["rows_before"] >= 16
    assert_equal_to_predict(trained, table, tmp_path / "out")


def test_a_killed_actor_of_ray_is_replaced(trained: Path, table: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    killed: set[int] = set()

    def interfere(progress: Progress) -> None:
        nonlocal killed
        if progress.complete and not killed:
            killed = kill_below("ray")

    summary = predict(trained, table, tmp_path / "out", interfere, engine="ray")
    assert summary["rows"] == 48 and summary["partitions"] == 6 and killed
    assert_equal_to_predict(trained, table, tmp_path / "out")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A bucket of an S3 server on this machine."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "for-this-test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        storage = s3fs.S3FileSystem()
        storage.makedirs("bucket", exist_ok=True)  # the server keeps it for the next test
        yield storage
    finally:
        server.stop()
        s3fs.S3FileSystem.clear_instance_cache()


def test_tables_images_and_output_can_be_in_s3(trained: Path, table: Path, tmp_path: Path, bucket: Any) -> None:
    for file in [table, *(tmp_path / "images").iterdir()]:
        bucket.pipe(f"bucket/in/{file.relative_to(tmp_path)}", file.read_bytes())
    done = call("predict", trained, "s3://bucket/in/*.jsonl", "-o", "s3://bucket/out/", "--engine", "local", "--device", "cpu",
                "--batch", BATCH, "--partition-rows", ROWS)  # fmt: skip
    assert done.returncode == 0, done.stderr
    bucket.invalidate_cache()
    (tmp_path / "out").mkdir()
    for path in bucket.glob("bucket/out/part-*"):
        (tmp_path / "out" / Path(path).name).write_bytes(bucket.cat_file(path))
    assert_equal_to_predict(trained, table, tmp_path / "out")
    again = call("predict", trained, "s3://bucket/in/*.jsonl", "-o", "s3://bucket/out/", "--engine", "local", "--device", "cpu",
                 "--batch", BATCH, "--partition-rows", ROWS, "--json")  # fmt: skip
    assert json.loads(again.stdout)["rows_before"] == 48
    bucket.pipe("bucket/in/rows.jsonl", table.read_bytes()[:-1] + b" \n")
    changed = call("predict", trained, "s3://bucket/in/*.jsonl", "-o", "s3://bucket/out", "--engine", "local", "--batch", BATCH,
                   "--partition-rows", ROWS)  # fmt: skip
    assert changed.returncode == 3 and "has changed" in changed.stderr


def test_tar_shards_can_be_in_s3(table: Path, tmp_path: Path, bucket: Any) -> None:
    rows = [json.loads(line) for line in table.read_text().splitlines()][:5]
    images = [(tmp_path / row["img"]).read_bytes() for row in rows]
    parts = [{f"{at}.png": image, f"{at}.txt": row["text"]} for at, (row, image) in enumerate(zip(rows, images, strict=True))]
    shard = write_tar(tmp_path / "x.tar", {name: value for part in parts for name, value in part.items()})
    bucket.pipe("bucket/in/x.tar", shard.read_bytes())
    [file] = list_files(["s3://bucket/in/*.tar"])
    spans = divide(file, 3, ("text", "img", "id"), Data())
    found = [row.value for span in spans for row in read_rows(file, span, ("text", "img", "id"), Data())]
    assert [(row["id"], row["text"]) for row in found] == [(f"x/{at}", row["text"]) for at, row in enumerate(rows)]
    files = files_in(file, Data())
    assert files is not None
    assert [files.read(row["img"], where="", what="image") for row in found] == images
