"""The models whose weights are in memory: loaded when a request needs them, the least recently used one making room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from mopefuse.core.error_codes import DataCode
from mopefuse.errors import DataError
from mopefuse.inference.bundle import Bundle
from mopefuse.inference.predict import Model, ModelFacts, Prediction, describe
from mopefuse.serving.catalogue import Entry
from mopefuse.tasks.base import Task

if TYPE_CHECKING:  # bundles are served without torch
    from mopefuse.serving.content_cache import ContentCache
    from mopefuse.serving.shared_pair import SharedPair


@dataclass(frozen=True)
class Value:
    """One input, decoded.

    Attributes:
        key: digest of its content.
    """

    decoded: Any
    key: bytes


Values = Mapping[str, Value | None]
"""The values of one sample, by each modality that its model reads; None for a missing one."""


@dataclass(frozen=True)
class Outcome:
    """What a model returns for one sample.

    Attributes:
        decoded: what `Task.decode` returns for it, (N,) or more axes. routing: weights (routed layers, experts), or None.
    """

    decoded: NDArray[Any]
    routing: NDArray[Any] | None


@dataclass(frozen=True)
class Facts:
    """See `mopefuse.inference.predict.ModelFacts`."""

    labels: tuple[str, ...]
    task: Task
    thresholds: Sequence[float]
    modalities: tuple[str, ...]
    optional_modalities: tuple[str, ...]
    empty_is_missing: bool

    @classmethod
    def of(cls, model: ModelFacts) -> Facts:
        """The facts of a model."""
        return cls(**{name: getattr(model, name) for name in cls.__dataclass_fields__})


class Executor(Protocol):
    """Predicts samples of one or several models together. Several threads may share one."""

    def run(self, samples: Sequence[tuple[Resident, Values]]) -> list[Outcome]:
        """The outcome of each sample, in their order."""


@dataclass(frozen=True, eq=False)
class Resident:
    """A loaded model.

    Attributes:
        entry: the version that was loaded. model: its labels, task, thresholds and modalities.
        executor: what predicts its samples. weights: what the executor needs of it.
    """

    entry: Entry
    model: ModelFacts
    executor: Executor
    weights: Any = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities that it reads."""
        return self.model.modalities

    @property
    def empty_is_missing(self) -> bool:
        """Whether an empty text counts as missing."""
        return self.model.empty_is_missing

    def require(self, values: Values) -> None:
        """Refuse a sample without a modality that the model needs, or without any value.

        Raises:
            DataError: see above.
        """
        missing = [name for name in self.modalities if values[name] is None]
        needed = [name for name in missing if name not in self.model.optional_modalities]
        if needed or len(missing) == len(self.modalities):
            lacking = (needed or missing)[0]
            what = f"the request has no {lacking}, and {self.entry.name} cannot predict without it"
            raise DataError(DataCode.MODALITY_REQUIRED, what, where=lacking, fix=f'add "{lacking}"')

    def describe(self, outcome: Outcome, values: Values, top: int | None, routing: bool) -> Prediction:
        """The prediction for a sample."""
        found = describe(self.model, outcome.decoded, _decoded(values), top)
        if routing and outcome.routing is not None:
            found["routing"] = outcome.routing.tolist()
        return found


def _decoded(values: Values) -> dict[str, Any]:
    return {name: None if value is None else value.decoded for name, value in values.items()}


class Alone:
    """Predicts samples of one model, a run or a bundle, by its own forward pass.

    Args:
        encoders: what other models share with it, which are kept as long as it is.
    """

    def __init__(self, model: Model, encoders: object = None) -> None:
        self.model, self.encoders = model, encoders

    def run(self, samples: Sequence[tuple[Resident, Values]]) -> list[Outcome]:
        """See `Executor.run`."""
        decoded = [_decoded(values) for _, values in samples]
        values = {name: [sample[name] for sample in decoded] for name in self.model.modalities}
        decoded_BN, routing = self.model.predict_decoded(values)
        each = [None] * len(samples) if routing is None else [np.asarray(weights) for weights in routing]
        return [Outcome(*outcome) for outcome in zip(decoded_BN, each, strict=True)]


class Residents:
    """Loaded models by name, at most `limit` of them.

    Args:
        cache_bytes: see `mopefuse.serving.content_cache.ContentCache`.
    """

    def __init__(self, device: str, threads: int | None, limit: int, cache_bytes: int) -> None:
        self._device, self._threads, self._limit, self._cache_bytes = device, threads, limit, cache_bytes
        self._lock, self._loading_run = threading.Lock(), threading.Lock()
        self._loading: dict[str, threading.Lock] = {}
        self._models: OrderedDict[str, Resident] = OrderedDict()
        self._pairs: WeakValueDictionary[str, SharedPair] = WeakValueDictionary()
        self._cache: ContentCache | None = None
        self._loads = 0

    def get(self, entry: Entry) -> Resident:
        """The loaded model of an entry; a request for it keeps it even if it has to make room meanwhile.

        Raises:
            MopefuseError: it cannot be loaded.
        """
        with self._lock:
            found = self._found(entry)
            own = self._loading.setdefault(entry.name, threading.Lock())
        if found is not None:
            return found
        with own:
            with self._lock:
                found = self._found(entry)
            if found is not None:
                return found
            loaded = self._load(entry)
            with self._lock:
                self._models[entry.name] = loaded
                self._models.move_to_end(entry.name)
                self._loads += 1
                while len(self._models) > self._limit:
                    self._models.popitem(last=False)
            return loaded

    def stats(self) -> dict[str, int]:
        """See `mopefuse.serving.engine.Engine.stats`."""
        with self._lock:
            found = {"models_resident": len(self._models), "model_loads": self._loads}
            if (cache := self._cache) is not None:
                found |= {"cache_hits": cache.hits, "cache_misses": cache.misses, "cache_bytes": cache.bytes}
            return found

    def _found(self, entry: Entry) -> Resident | None:
        found = self._models.get(entry.name)
        if found is None or found.entry != entry:
            return None
        self._models.move_to_end(entry.name)
        return found

    def _load(self, entry: Entry) -> Resident:
        if entry.kind == "bundle":
            model = Bundle(entry.folder, self._device, threads=self._threads)
            return Resident(entry, model, Alone(model))
        with self._loading_run:  # so that two runs with the same encoders do not load them twice
            return self._load_run(entry)

    def _load_run(self, entry: Entry) -> Resident:
        from mopefuse.fusion.conditional import ConditionalFusion
        from mopefuse.inference.run_model import RunModel
        from mopefuse.serving.adapter_weights import can_share, take_weights
        from mopefuse.serving.content_cache import ContentCache
        from mopefuse.serving.shared_pair import SharedPair

        key = entry.encoders
        pair = self._pairs.get(key) if key else None
        model = RunModel(entry.folder, device=self._device, encoders=None if pair is None else pair.encoders)
        if not key:  # an encoder is tuned
            return Resident(entry, model, Alone(model))
        if pair is None:
            self._cache = self._cache or ContentCache(self._cache_bytes)
            pair = self._pairs[key] = SharedPair(model.fusion.encoders, model.device, self._cache, key)
        if not can_share(model.fusion):
            return Resident(entry, model, Alone(model, pair))
        assert isinstance(model.fusion, ConditionalFusion)
        return Resident(entry, Facts.of(model), pair, take_weights(model.fusion, model.precision))
