"""The three steps of a batch prediction: rows are read and prepared, the model predicts, a partition is written.

`Reader` needs no weights, so that the first step can run in other processes than the second. Each object here is small to send
to another process.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core import cache
from mopefuse.core.dependencies import convert_error
from mopefuse.data.columns import Layout
from mopefuse.data.storage.table import TableRow
from mopefuse.errors import MopefuseError
from mopefuse.inference.batch.contents import Contents
from mopefuse.inference.batch.inputs import InputFile, files_in, read_rows
from mopefuse.inference.batch.output import Output, Record
from mopefuse.inference.batch.plan import Partition
from mopefuse.inference.batch.storage import is_url
from mopefuse.inference.gallery import Gallery, open_gallery, rank_pairs
from mopefuse.inference.mask_files import MaskWriter
from mopefuse.inference.pairs import Pair, make_layouts, make_pair
from mopefuse.inference.predict import Prediction, Predictor, load, predict_pairs
from mopefuse.modalities import base as modality
from mopefuse.modalities.file_source import Folders

_AHEAD = 2  # chunks that are ready before they are needed
_THREADS = 8  # that read and decode files, in each process that does


@dataclass(frozen=True)
class Chunk:
    """Rows that are predicted together.

    Args:
        pairs: their ids and errors; and their values, if `batch` is None.
        batch: what ``model.collate`` returned for those without an error.
        problem: why the partition cannot be read any further.
    """

    pairs: Sequence[Pair] = ()
    batch: Any = None
    problem: MopefuseError | None = None


@dataclass(frozen=True)
class Reader:
    """Reads and prepares the rows of partitions.

    Args:
        config: names of columns, and limits. modalities, optional_modalities, empty_is_missing: see `make_layouts`.
        batch: rows of a chunk. collate: prepares values for the model; None if it needs them as they are.
    """

    config: DataConfig
    modalities: tuple[str, ...]
    optional_modalities: tuple[str, ...]
    empty_is_missing: bool
    batch: int
    collate: Callable[..., Any] | None = None

    def layouts(self) -> list[Layout]:
        """How rows are read."""
        return make_layouts(
            self.config, self.modalities, self.optional_modalities, empty_is_missing=self.empty_is_missing
        )

    def columns(self) -> tuple[str, ...]:
        """The columns that are read, that of the id last."""
        return (*dict.fromkeys(column for layout in self.layouts() for column in layout.columns.values()), self.config.id_col)

    def chunks(self, partition: Partition) -> Iterator[Chunk]:
        """The rows of a partition, in their order; an error of the file ends them with a chunk that has it."""
        try:
            rows = read_rows(partition.file, partition.span, self.columns(), self.config)
            pair = self._reader_of(partition.file)
            with ThreadPoolExecutor(_THREADS) as pool:
                while group := list(islice(rows, self.batch)):
                    yield self._prepare(list(pool.map(pair, group)))
        except MopefuseError as error:
            yield Chunk(problem=error)

    def _reader_of(self, file: InputFile) -> Callable[[TableRow], Pair]:
        """Makes the sample of a row of a table."""
        folder, layouts, shard = file.path.rpartition("/")[0], self.layouts(), files_in(file, self.config)
        files = shard or Folders(() if is_url(file.path) else (Path(folder or "/"), *map(Path, self.config.image_roots)))
        columns = {name: layout.columns[name] for layout in layouts for name in layout.columns if name not in layout.in_rows}
        contents = Contents(columns, folder if is_url(file.path) and shard is None else None)

        def pair(found: TableRow) -> Pair:
            row, own = contents.take(found)

            def fetch(what: str, name: str, where: str) -> bytes | None:
                return own[what] if what in own else contents.fetch(what, name, where)

            return make_pair(row, file.name, files, layouts, self.config, fetch)

        return pair

    def _prepare(self, pairs: list[Pair]) -> Chunk:
        good = [pair for pair in pairs if pair.error is None]
        if self.collate is None or not good:
            return Chunk(pairs)
        values = {name: [pair.values[name] for pair in good] for name in good[0].values}
        return Chunk([replace(pair, values={}) for pair in pairs], self.collate(**modality.to_arguments(values)))


@dataclass(frozen=True)
class ModelSource:
    """How to load the model in each process, and what to do with it.

    Args:
        path, checkpoint, main, comp: see `mopefuse.load`. top, routing: see `Predictor.predict`.
        gallery: table, and the modalities of its rows and of the queries; None for models that do not rank.
        config: how tables are read.
    """

    path: str
    checkpoint: str
    main: str | None
    comp: Sequence[str] | None
    top: int | None
    routing: bool
    batch: int
    config: DataConfig
    gallery: tuple[str, str, str] | None = None

    def load(self, device: str) -> Computer:
        """The model, loaded on a device.

        Raises:
            MopefuseError: see `mopefuse.load`.
        """
        predictor = load(self.path, checkpoint=self.checkpoint, device=device, main=self.main, comp=self.comp)
        return Computer(predictor, self)


class Computer:
    """A loaded model that predicts chunks."""

    def __init__(self, predictor: Predictor, source: ModelSource) -> None:
        self.predictor, self._source = predictor, source
        self._gallery: Gallery | None = None
        if source.gallery is not None:
            table, ranked, query = source.gallery
            self._gallery = open_gallery(predictor, Path(table), source.config, ranked, query, batch=source.batch)

    @property
    def gallery_digest(self) -> str:
        """Digest of the rows that are ranked."""
        if self._gallery is None:
            return ""
        return cache.make_key(self._gallery.ids, hashlib.sha256(self._gallery.embedding_GE.tobytes()).hexdigest())

    def predict(self, chunk: Chunk, masks: MaskWriter | None = None) -> list[Prediction]:
        """The prediction for each row, in their order.

        Raises:
            MopefuseError: the problem of the chunk; a prediction is not finite; or memory ran out.
        """
        if chunk.problem is not None:
            raise chunk.problem
        source, pairs = self._source, chunk.pairs
        try:
            if self._gallery is not None:
                return list(rank_pairs(self.predictor, pairs, self._gallery, batch=source.batch, top=source.top))
            if chunk.batch is None:
                how: Mapping[str, Any] = {"top": source.top, "routing": source.routing, "masks": masks}
                return list(predict_pairs(self.predictor, pairs, batch=max(len(pairs), 1), **how))
            good = sum(pair.error is None for pair in pairs)
            found = iter(self.predictor.predict_batch(chunk.batch, good, top=source.top, routing=source.routing))
            each = [{"error": pair.error.as_dict()} if pair.error is not None else next(found) for pair in pairs]
            return [{"id": pair.id, **one} for pair, one in zip(pairs, each, strict=True)]
        except Exception as error:
            known = None if isinstance(error, MopefuseError) else convert_error(error)
            if known is not None:
                raise known from error
            raise


@dataclass(frozen=True)
class Job:
    """Everything that a process needs to predict partitions.

    Args:
        prepares: whether rows are prepared for the model when they are read. writes_masks: whether predictions are files.
    """

    reader: Reader
    model: ModelSource
    output: Output
    prepares: bool = True
    writes_masks: bool = False

    def run(self, partition: Partition, computer: Computer, on_rows: Callable[[int], None]) -> Record:
        """Predict and write a partition; its rows are read and prepared ahead by a thread.

        Args:
            on_rows: called with the number of rows of each chunk that is predicted.

        Raises:
            MopefuseError: the partition cannot be read, predicted or written.
        """
        began, masks = time.monotonic(), None
        if self.writes_masks:
            masks = MaskWriter(Path(self.output.path_of(f"{partition.name}-masks")), self.output.labels)
        predictions: list[Prediction] = []
        reader = replace(self.reader, collate=computer.predictor.model.collate if self.prepares else None)
        for chunk in _ahead(reader.chunks(partition)):
            predictions += computer.predict(chunk, masks)
            on_rows(len(chunk.pairs))
        return self.output.write(partition, predictions, time.monotonic() - began)


def _ahead(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Let a thread compute the next chunks while the current one is used."""
    ready: queue.Queue[Chunk | BaseException | None] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(item: Chunk | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def fill() -> None:
        try:
            for chunk in chunks:
                put(chunk)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # raised in the other thread
            put(error)

    threading.Thread(target=fill, daemon=True).start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
