"""The models that a server offers: their names, folders and facts. Nothing here loads weights or imports torch.

A folder of adapters is read again every `RESCAN` seconds at most, and an unknown name is looked up in it at once, so that a
model is added by moving its folder there, and removed by moving it away. A folder whose manifest changed is another version
of its model. Files of a run are not verified before it is loaded.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mopefuse.core.artifact import MANIFEST
from mopefuse.core.error_codes import CheckpointCode, RequestCode
from mopefuse.errors import CheckpointError, MopefuseError, RequestError, did_you_mean
from mopefuse.inference.bundle_manifest import read_labels, read_preprocess
from mopefuse.runs.locate import find_run, get_kind, locate
from mopefuse.tasks.base import task_from_facts

RESCAN = 2.0
_COMPARED = 20  # models whose names are compared with an unknown one; more would take long
_LISTED = 12
_KINDS = ("run", "adapter", "bundle")


@dataclass(frozen=True)
class Entry:
    """One version of one model.

    Attributes:
        name: how requests call it. folder: its run, adapter or bundle. stamp: changes with its files.
    """

    name: str
    folder: Path
    kind: str
    stamp: tuple[int, ...]

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What clients may know of it: task, method, labels, and the modalities that its encoders read.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        if self.kind == "bundle":
            labels, task, _ = read_labels(self.folder)
            sides, _ = read_preprocess(self.folder)
            modalities, method = [str(how["modality"]) for how in sides.values()], "bundle"
        else:
            manifest = self.run.manifest()
            labels, task, method = tuple(manifest["labels"]), task_from_facts(manifest["task"]), manifest["method"]
            modalities = [str(encoder["modality"]) for encoder in manifest["encoders"].values()]
        return {
            "name": self.name,
            "kind": self.kind,
            "task": task.name,
            "method": method,
            "labels": list(labels),
            "modalities": list(dict.fromkeys(modalities)),
        }

    @property
    def run(self) -> Any:
        """The folder as a `mopefuse.runs.folder.RunFolder`; not for bundles."""
        return find_run(self.folder)

    @property
    def encoders(self) -> str:
        """Identifies the frozen encoders of a run by side, their weights and preprocessing; empty if one of them is tuned."""
        sides: Mapping[str, Any] = self.run.manifest()["encoders"]
        config = self.run.config()  # LoRA is added to an encoder, whose fingerprint leaves it out
        is_tuned = any(encoder["fingerprint"] is None for encoder in sides.values())
        if is_tuned or "lora" in (config.tune, config.comp_tuning.mode):
            return ""
        return " ".join(f"{side}:{encoder['fingerprint']}:{encoder['digest']}" for side, encoder in sorted(sides.items()))


class Catalogue:
    """The models by name. Several threads may share one.

    Args:
        models: ``PATH`` or ``NAME=PATH`` of runs, adapters and bundles; the default name is that of the folder.
        adapters: folder whose subfolders are more models, each by the name of its folder.

    Raises:
        CheckpointError: one of `models` is none. RequestError: two models have one name, or there is nothing to serve.
    """

    def __init__(self, models: Iterable[str] = (), adapters: Path | None = None) -> None:
        self.adapters = adapters
        self._named = _named_folders(models)
        self._lock, self._scanned = threading.Lock(), -RESCAN
        self._entries: dict[str, Entry] = {}
        self._refresh()
        if not self._named and adapters is None:
            fix = "pass a run or an exported bundle, or --adapters DIR"
            raise RequestError(RequestCode.NOTHING_TO_SERVE, "no model was given", where="serve", fix=fix)

    def entries(self) -> dict[str, Entry]:
        """All models of this moment, by name."""
        with self._lock:
            self._rescan()
            return dict(self._entries)

    def named(self) -> list[Entry]:
        """The models that were named one by one."""
        entries = self.entries()
        return [entries[name] for name in self._named if name in entries]

    def find(self, name: str | None) -> Entry:
        """The model of a name; the only one without a name.

        Raises:
            RequestError: there is no such model, or several and no name.
        """
        with self._lock:
            self._rescan()
            found = self._entries.get(name) if name is not None else None
            if name is not None and found is None and (found := self._new(name)) is not None:
                self._entries = {**self._entries, name: found}
            entries = self._entries
        if found is not None:
            return found
        if name is None and len(entries) == 1:
            return next(iter(entries.values()))
        known = ", ".join(sorted(entries)[:_LISTED])
        if name is None:
            what = f"the request names no model, and {len(entries)} are served"
            fix = f'add "model", one of {known}' if known else "add a model to the server's folder"
            raise RequestError(RequestCode.MODEL_NOT_NAMED, what, where="model", fix=fix)
        fix = did_you_mean(name[:100], entries) if len(entries) <= _COMPARED else f"use one of {known}, …"
        fix = fix or "add a model to the server's folder"
        name = name if len(name) <= 100 else f"{name[:100]}…"
        raise RequestError(RequestCode.NO_SUCH_MODEL, f"no model {name!r} is served", where="model", fix=fix)

    def _new(self, name: str) -> Entry | None:
        """A model that was added to the folder since it was read; None if there is none of this name."""
        if self.adapters is None or name.startswith(".") or name != Path(name).name or "\0" in name:
            return None
        return _entry(name, self.adapters / name)

    def _rescan(self) -> None:
        if time.monotonic() - self._scanned >= RESCAN:
            self._refresh()

    def _refresh(self) -> None:
        found = {name: _entry(name, folder) for name, folder in self._named.items()}
        folders = sorted(self.adapters.iterdir()) if self.adapters is not None and self.adapters.is_dir() else []
        for folder in folders:
            if folder.name not in found and not folder.name.startswith("."):
                found[folder.name] = _entry(folder.name, folder)
        before = self._entries  # an unchanged entry keeps the facts that it has read
        self._entries = {name: before[name] if before.get(name) == one else one for name, one in found.items() if one}
        self._scanned = time.monotonic()


def _named_folders(models: Iterable[str]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for text in models:
        name, separator, path = text.partition("=")
        folder = locate(path if separator and not Path(text).exists() else text)
        name = name if separator and not Path(text).exists() else folder.resolve().name
        if _entry(name, folder) is None:
            what = f"{folder} is neither a run, nor an adapter, nor a bundle"
            fix = "pass a folder written by mopefuse train or mopefuse export"
            raise CheckpointError(CheckpointCode.NOT_FOUND, what, where="serve", fix=fix)
        if name in named:
            what, fix = f"two models are called {name}", f"name them, as in {name}-2={path or text}"
            raise RequestError(RequestCode.EQUAL_MODEL_NAMES, what, where="serve", fix=fix)
        named[name] = folder
    return named


def _entry(name: str, folder: Path) -> Entry | None:
    """The model in a folder; None if there is none, or it is being written or removed."""
    try:
        kind = get_kind(folder)
        if kind not in _KINDS:
            return None
        parts = [folder / MANIFEST, folder / "checkpoints" / "best"]
        stats = [part.stat() for part in parts if part.exists()]
    except (OSError, MopefuseError):
        return None
    return Entry(name, folder, kind, tuple(number for stat in stats for number in (stat.st_mtime_ns, stat.st_ino)))
