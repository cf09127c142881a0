"""The folder of a batch prediction, here or in an object store: its plan, one file for each partition, and records of them.

A file appears complete or not at all: it is renamed into place here, and written by one request in an object store. The record
of a partition is written after its file; a file without a record is written again.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mopefuse.core.artifact import dump_json
from mopefuse.core.atomic_files import TEMPORARY, check_parent, remove_leftovers, replace_atomically
from mopefuse.core.error_codes import ConfigCode, ResourceCode
from mopefuse.core.formatting import json_text
from mopefuse.errors import ConfigError, ResourceError
from mopefuse.inference.batch.parquet_file import to_parquet
from mopefuse.inference.batch.plan import Partition, Plan
from mopefuse.inference.batch.storage import is_local, is_url, open_storage, reading
from mopefuse.inference.predict import Prediction, as_jsonl
from mopefuse.tasks.base import Task

FORMATS = ("jsonl", "parquet")
PLAN, SUCCESS, _RECORDS = "_plan.json", "_SUCCESS", "_records"


class Record(NamedTuple):
    """What is known of a complete partition.

    Args:
        digest: see `Partition`. rows: of the file, `errors` of them with an error. first_error: the first of these.
        size: of the file, in bytes. seconds: what it took.
    """

    name: str
    digest: str
    rows: int
    errors: int
    first_error: Mapping[str, Any] | None
    size: int
    seconds: float


class Output:
    """Reads and writes the folder.

    Args:
        url: a path or URL. format: one of `FORMATS`. task, labels: those of the model, which decide the columns of Parquet.

    Raises:
        PackageError, ConfigError: see `open_storage`; or the folder cannot be one.
    """

    def __init__(self, url: str, format: str, task: Task, labels: Sequence[str]) -> None:
        self.url = url if is_url(url) else os.path.abspath(url)  # other processes may be in other folders
        self.format, self.task, self.labels = format, task, tuple(labels)
        self._connect()
        if self.is_local:
            check_parent(Path(self._base) / PLAN)

    def _connect(self) -> None:
        self._storage, self._base = open_storage(self.url)
        self.is_local = is_local(self._storage)

    def __reduce__(self) -> tuple[Any, ...]:
        return Output, (self.url, self.format, self.task, self.labels)

    # -- files

    def path_of(self, name: str) -> str:
        """Where a file of the folder is."""
        return f"{self._base}/{name}"

    def put(self, name: str, content: bytes) -> None:
        """Write a file, which is there completely or not at all.

        Raises:
            ResourceError: it cannot be written.
        """
        if self.is_local:
            with replace_atomically(Path(self.path_of(name))) as temporary:
                temporary.write_bytes(content)
            return
        try:
            self._storage.pipe_file(self.path_of(name), content)
        except Exception as error:  # the libraries of object stores have errors of their own
            reason = str(error).partition("\n")[0] or type(error).__name__
            fix = "check the URL, the credentials and the connection; for S3, AWS_ENDPOINT_URL names the server"
            raise ResourceError(ResourceCode.CANNOT_WRITE, f"cannot write {name}: {reason}", where=self.url, fix=fix) from None

    def get(self, name: str) -> bytes | None:
        """The content of a file; None if there is none."""
        self._storage.invalidate_cache()
        with reading(self.path_of(name)):
            return bytes(self._storage.cat_file(self.path_of(name))) if self._storage.exists(self.path_of(name)) else None

    def sizes(self) -> dict[str, int]:
        """The size of every file of the folder, by its name in it."""
        with reading(self.url):
            self._storage.invalidate_cache()
            found = self._storage.find(self._base, detail=True) if self._storage.exists(self._base) else {}
        return {name[len(self._base) :].lstrip("/"): info["size"] for name, info in found.items()}

    # -- plan

    def read_plan(self) -> Plan | None:
        """The plan of the prediction that was begun here; None if the folder is new.

        Raises:
            ConfigError: the folder has other files. CheckpointError: the plan is damaged.
        """
        if self.is_local and Path(self._base).is_dir():
            remove_leftovers(Path(self._base))
            remove_leftovers(Path(self.path_of(_RECORDS)))
        content = self.get(PLAN)
        if content is not None:
            try:
                return Plan.from_json(json.loads(content), f"{self.url}/{PLAN}")
            except ValueError:
                return Plan.from_json(None, f"{self.url}/{PLAN}")
        foreign = sorted(name for name in self.sizes() if TEMPORARY not in name)
        if foreign:
            what = f"the folder has files that are no batch predictions, such as {foreign[0]}"
            fix = "choose an empty or new folder with --out"
            raise ConfigError(ConfigCode.BATCH_FOLDER_IN_USE, what, where=self.url, fix=fix)
        return None

    def write_plan(self, plan: Plan) -> None:
        """Write the plan."""
        self.put(PLAN, json_text(plan.as_json(), indent=None).encode())

    def clear(self, plan: Plan) -> None:
        """Remove what was written by a plan, the plan last; other files stay."""
        self.remove_success()
        self.remove({partition.name for partition in plan.partitions})
        self._storage.rm_file(self.path_of(PLAN))

    def remove(self, partitions: Collection[str]) -> None:
        """Remove what was written of partitions, by their names."""
        for name in self.sizes() if partitions else ():
            if _partition_of(name) in partitions:
                self._storage.rm_file(self.path_of(name))

    # -- partitions

    def complete(self, plan: Plan) -> list[Record]:
        """The records of partitions that are complete."""
        sizes = self.sizes()
        names = [partition for partition in plan.partitions if f"{_RECORDS}/{partition.name}.json" in sizes]
        if not names:
            return []
        paths = {self.path_of(f"{_RECORDS}/{partition.name}.json"): partition for partition in names}
        with reading(self.url):
            contents = self._storage.cat([*paths], on_error="return") if len(paths) > 1 else None
            contents = contents or {path: self._storage.cat_file(path) for path in paths}
        found = []
        for path, partition in paths.items():
            try:
                record = Record(**json.loads(contents[path]))
            except (KeyError, TypeError, ValueError):
                continue
            if record.digest == partition.digest and record.size == sizes.get(f"{partition.name}.{self.format}"):
                found.append(record)
        return found

    def missing(self, plan: Plan) -> list[str]:
        """The names of partitions without a file or a record."""
        sizes = self.sizes()
        names = [partition.name for partition in plan.partitions]
        return [name for name in names if not {f"{name}.{self.format}", f"{_RECORDS}/{name}.json"} <= sizes.keys()]

    def write(self, partition: Partition, predictions: Sequence[Prediction], seconds: float) -> Record:
        """Write the predictions of a partition, one for each of its rows.

        Raises:
            ResourceError: see `put`.
        """
        assert len(predictions) == partition.span.rows, "one prediction for each row"
        content = to_parquet(predictions, self.task, self.labels) if self.format == "parquet" else _lines(predictions)
        errors = [one["error"] for one in predictions if "error" in one]
        record = Record(
            partition.name, partition.digest, len(predictions), len(errors), next(iter(errors), None), len(content), seconds
        )
        self.put(f"{partition.name}.{self.format}", content)
        self.put(f"{_RECORDS}/{partition.name}.json", json_text(record._asdict()).encode())
        return record

    # -- the end

    def write_success(self, summary: Mapping[str, Any]) -> None:
        """Write the file that says that everything is complete."""
        self.put(SUCCESS, dump_json(summary).encode())

    def remove_success(self) -> None:
        """Remove that file."""
        if SUCCESS in self.sizes():
            self._storage.rm_file(self.path_of(SUCCESS))


def _lines(predictions: Iterable[Prediction]) -> bytes:
    content = io.BytesIO()
    for line in as_jsonl(predictions):
        content.write(line.encode("utf-8"))
    return content.getvalue()


def _partition_of(name: str) -> str:
    """The partition that a file belongs to, by its name: its own file, its record, or a file of its folder of masks."""
    parts = PurePosixPath(name).parts
    return parts[0].removesuffix("-masks") if len(parts) > 1 and parts[0] != _RECORDS else parts[-1].partition(".")[0]

