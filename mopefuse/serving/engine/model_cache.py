"""The models whose weights are in memory: loaded when a request needs them, the least recently used one making room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from mopefuse.inference.bundle import Bundle
from mopefuse.serving.engine.catalogue import Entry
from mopefuse.serving.engine.resident import Alone, Facts, Resident

if TYPE_CHECKING:  # bundles are served without torch
    from mopefuse.serving.engine.content_cache import ContentCache
    from mopefuse.serving.engine.shared_pair import SharedPair


class ModelCache:
    """Loaded models by name, at most `limit` of them.

    Args:
        cache_bytes: see `mopefuse.serving.engine.content_cache.ContentCache`.
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
        """See `mopefuse.serving.engine.engine.Engine.stats`."""
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
        from mopefuse.core import device as devices
        from mopefuse.fusion.conditional import ConditionalFusion
        from mopefuse.inference.run_model import RunModel
        from mopefuse.serving.engine.adapter_weights import can_share, take_weights
        from mopefuse.serving.engine.content_cache import ContentCache
        from mopefuse.serving.engine.shared_pair import SharedPair

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
        precision = devices.precision(model.precision, model.device)
        return Resident(entry, Facts.of(model), pair, take_weights(model.fusion, precision))
