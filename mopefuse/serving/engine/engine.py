"""Answers requests for any of many models, independent of how they arrive. Several threads may share one engine.

Requests for all models are taken together. Those for runs with the same frozen encoders are predicted in one forward pass
(`mopefuse.serving.engine.shared_pair`); those for other runs, and for bundles, by their own model. A request that cannot be
answered gets an error as its answer, and does not affect the others.
"""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mopefuse.config.schema import Data
from mopefuse.core.artifact import MANIFEST
from mopefuse.core.dependencies import convert_error
from mopefuse.core.error_codes import DataCode, NumericCode, RequestCode, ResourceCode
from mopefuse.errors import DataError, MopefuseError, NumericError, RequestError, ResourceError
from mopefuse.inference.predict import as_json
from mopefuse.modalities import base as modality
from mopefuse.modalities.files import Files
from mopefuse.modalities.image import MAX_PIXELS
from mopefuse.serving.engine.catalogue import Catalogue, Entry
from mopefuse.serving.engine.model_cache import ModelCache
from mopefuse.serving.engine.request import Answer, Request
from mopefuse.serving.engine.resident import Executor, Outcome, Resident, Value, Values

_LOG = logging.getLogger(__name__)
_PIXELS_AT_ONCE = 60_000_000  # of the decoded images that are held at once, three bytes each
_OUT_OF_MEMORY = (ResourceCode.GPU_MEMORY, ResourceCode.HOST_MEMORY)


@dataclass(frozen=True)
class EngineSettings:
    """What an engine serves, and with which resources; plain values, so that it can be sent to another process.

    Attributes:
        models, adapters: see `mopefuse.serving.engine.catalogue.Catalogue`.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps". threads: CPU threads of one model; None for the library's default.
        resident: models whose weights are kept in memory; the least recently used one makes room for another.
        cache_mb: size of the cache of encoder features, in megabytes of 2**20 bytes; 0 for none.
        max_pixels: larger images are refused by their header.
    """

    models: tuple[str, ...] = ()
    adapters: str | None = None
    device: str = "auto"
    threads: int | None = None
    resident: int = 256
    cache_mb: int = 256
    max_pixels: int = MAX_PIXELS

    def catalogue(self) -> Catalogue:
        """The models; see `Catalogue` for errors."""
        return Catalogue(self.models, None if self.adapters is None else Path(self.adapters))

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON can hold them; ``EngineSettings(**settings)`` is the inverse."""
        return asdict(self) | {"models": list(self.models)}


class Engine:
    """Predicts with all models of a catalogue.

    Raises:
        RequestError, CheckpointError: see `Catalogue`.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self.settings, self.catalogue = settings, settings.catalogue()
        self._data = Data(max_pixels=settings.max_pixels)
        self._failed = 0
        self._models = ModelCache(settings.device, settings.threads, settings.resident, settings.cache_mb * 2**20)

    def load(self) -> None:
        """Load the models that were named one by one, so that the first request does not wait for it.

        Raises:
            MopefuseError: one of them cannot be loaded.
        """
        for entry in self.catalogue.named():
            self._models.get(entry)

    def stats(self) -> dict[str, int]:
        """Counts for monitoring: resident models, loads, batches that failed as a whole, and the cache of features."""
        return {**self._models.stats(), "batches_failed": self._failed}

    def predict(self, requests: Sequence[Request]) -> list[Answer]:
        """The answer to each request, in their order; an error is an answer as well and is never raised."""
        answers: dict[int, Answer] = {}
        residents: dict[str, Resident] = {}  # kept, even if there are more of them than the cache holds
        groups: dict[Executor, list[_Sample]] = {}
        pixels = 0
        for number, request in enumerate(requests):
            try:
                resident = residents.get(request.model) or self._resident(request)
                residents[request.model] = resident
                sample = _Sample(number, request, resident, self._values(request, resident))
            except Exception as error:
                answers[number] = _as_known(error)
                continue
            groups.setdefault(resident.executor, []).append(sample)
            pixels += sample.pixels()
            if pixels > _PIXELS_AT_ONCE:
                answers |= self._run_all(groups)
                groups, pixels = {}, 0
        answers |= self._run_all(groups)
        return [answers[number] for number in range(len(requests))]

    def _run_all(self, groups: Mapping[Executor, Sequence[_Sample]]) -> dict[int, Answer]:
        """The answers to samples of several executors, by the number of the request."""
        found: dict[int, Answer] = {}
        for executor, samples in groups.items():
            answers = self._run(executor, samples)
            found |= {sample.number: answer for sample, answer in zip(samples, answers, strict=True)}
        return found

    def _run(self, executor: Executor, samples: Sequence[_Sample]) -> list[Answer]:
        """The answers to samples of one executor.

        If memory is short, each half is tried once; any other error of several samples is attributed by trying each alone.
        """
        known = _try(executor, samples)
        if not isinstance(known, MopefuseError):
            return known
        self._failed += 1
        _release_memory()
        if len(samples) == 1:
            return [known]
        is_short = isinstance(known, ResourceError) and known.number in _OUT_OF_MEMORY
        size = -(-len(samples) // 2) if is_short else 1
        answers: list[Answer] = []
        for start in range(0, len(samples), size):
            part = samples[start : start + size]
            again = _try(executor, part)
            answers += [again] * len(part) if isinstance(again, MopefuseError) else again
        return answers

    def _resident(self, request: Request) -> Resident:
        entry = self.catalogue.find(request.model)
        try:
            return self._models.get(entry)
        except MopefuseError:
            if self._is_gone(entry):  # its folder was removed while it was being loaded
                self.catalogue.find(request.model)
            raise

    def _is_gone(self, entry: Entry) -> bool:
        return not (entry.folder / MANIFEST).is_file()

    def _values(self, request: Request, resident: Resident) -> Values:
        """The values of a sample, decoded, by each modality that the model reads.

        Raises:
            DataError: a value cannot be read, or one is missing that the model needs.
        """
        if request.top is not None and request.top < 1:
            what = f"top must be at least 1, got {request.top}"
            raise RequestError(RequestCode.BAD_REQUEST, what, where="top", fix="use 1 or more")
        values: dict[str, Value | None] = {}
        for name in resident.modalities:
            value = request.values.get(name)
            if value is not None and resident.empty_is_missing and isinstance(value, str) and not value.strip():
                value = None
            values[name] = None if value is None else self._decoded(name, value)
        resident.require(values)
        return values

    def _decoded(self, name: str, value: str | bytes) -> Value:
        kind = modality.get_modality(name)
        if isinstance(kind, Files) != isinstance(value, bytes):
            what = f"{name} must be {'a file' if isinstance(kind, Files) else 'a text'}"
            raise DataError(DataCode.WRONG_VALUE_KIND, what, where=name, fix=kind.type_fix)
        if isinstance(kind, Files):
            assert isinstance(value, bytes)
            decoded = kind.decode(value, f"the {name}", where=name, config=self._data)
            return Value(decoded, hashlib.blake2b(value, digest_size=16).digest())
        assert isinstance(value, str)
        return Value(value, modality.digest(value))


@dataclass(frozen=True)
class _Sample:
    """A request whose values were read."""

    number: int
    request: Request
    resident: Resident
    values: Values

    def pixels(self) -> int:
        """The pixels of its images."""
        images = (value.decoded for value in self.values.values() if value is not None)
        return sum(image.width * image.height for image in images if isinstance(image, Image.Image))


def _try(executor: Executor, samples: Sequence[_Sample]) -> list[Answer] | MopefuseError:
    """The answers to samples, or why there are none for all of them together."""
    try:
        outcomes = executor.run([(sample.resident, sample.values) for sample in samples])
        return [_answer(sample, outcome) for sample, outcome in zip(samples, outcomes, strict=True)]
    except Exception as error:
        return _as_known(error)


def _answer(sample: _Sample, outcome: Outcome) -> Answer:
    resident, request = sample.resident, sample.request
    if not np.isfinite(outcome.decoded).all():
        what, fix = "the model's prediction is NaN or infinite", "train the model again"
        return NumericError(NumericCode.PREDICTION_NOT_FINITE, what, where=request.model, fix=fix)
    found = resident.describe(outcome, sample.values, request.top, request.routing)
    return as_json(found)


def _as_known(error: Exception) -> MopefuseError:
    """An error as an answer; an unknown one is a bug, whose details stay in the log of the server."""
    known = error if isinstance(error, MopefuseError) else convert_error(error)
    if known is not None:
        return known
    _LOG.exception("a request failed", exc_info=error)
    what = f"internal error: {type(error).__name__}"
    failure = RequestError(RequestCode.SERVER_FAILED, what, fix="please report it, with the log of the server")
    failure.__cause__ = error
    return failure


def _release_memory() -> None:
    """Return memory that a failed batch held to the GPU, before a smaller one is tried."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
