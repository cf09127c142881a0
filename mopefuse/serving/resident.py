"""The models whose weights are in memory: loaded when a request needs them, the least recently used one making room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from mopefuse.core.error_codes import DataCode
from mopefuse.errors import DataError
from mopefuse.inference.predict import Model, Prediction, describe
from mopefuse.serving.catalogue import Entry

Values = Mapping[str, Any]
"""The decoded values of one sample, by each modality that its model reads; None for a missing one."""


@dataclass(frozen=True)
class Outcome:
    """What a model returns for one sample.

    Attributes:
        decoded: what `Task.decode` returns for it, (N,) or more axes. routing: weights (routed layers, experts), or None.
    """

    decoded: NDArray[Any]
    routing: list[Any] | None


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
    model: Model
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
        found = describe(self.model, outcome.decoded, values, top)
        if routing and outcome.routing is not None:
            found["routing"] = outcome.routing
        return found


class Alone:
    """Predicts samples of one model, a run or a bundle, by its own forward pass."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def run(self, samples: Sequence[tuple[Resident, Values]]) -> list[Outcome]:
        """See `Executor.run`."""
        values = {name: [sample[name] for _, sample in samples] for name in self.model.modalities}
        decoded_BN, routing = self.model.predict_decoded(values)
        return [Outcome(decoded, None if routing is None else routing[at]) for at, decoded in enumerate(decoded_BN)]


class Residents:
    """Loaded models by name, at most `limit` of them.

    Args:
        cache_bytes: see `mopefuse.serving.content_cache.ContentCache`.
    """

    def __init__(self, device: str, threads: int | None, limit: int, cache_bytes: int) -> None:
        self._device, self._threads, self._limit, self._cache_bytes = device, threads, limit, cache_bytes
        self._lock = threading.Lock()
        self._loading: dict[str, threading.Lock] = {}
        self._models: OrderedDict[str, Resident] = OrderedDict()
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
            return {"models_resident": len(self._models), "model_loads": self._loads}

    def _found(self, entry: Entry) -> Resident | None:
        found = self._models.get(entry.name)
        if found is None or found.entry != entry:
            return None
        self._models.move_to_end(entry.name)
        return found

    def _load(self, entry: Entry) -> Resident:
        from mopefuse.inference.predict import load

        model = load(entry.folder, device=self._device).model
        return Resident(entry, model, Alone(model))
