"""What was trained, without the run around it: a few MB of safetensors that load onto the named encoders.

An adapter is a folder with ``weights.safetensors``, ``config.yaml``, ``model.json`` (labels, encoders, thresholds, metrics) and
a model card. Wherever a run is read, an adapter can be: it is a run with one checkpoint and no history.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from mopefuse.config.recipe import read_saved
from mopefuse.config.schema import RunConfig, build_config
from mopefuse.core import registry
from mopefuse.core.artifact import read_json, understood, verify
from mopefuse.errors import CheckpointError
from mopefuse.runs.facts import check_facts
from mopefuse.runs.folder import RunFolder

KIND = "adapter"
FACTS = "model.json"


class AdapterFolder(RunFolder):
    """An adapter on disk, read only. Every file is compared with the manifest before it is opened."""

    def exists(self) -> bool:
        """Whether this is an adapter."""
        return self.manifest_file.is_file() and read_json(self.manifest_file).get("kind") == KIND

    def config(self) -> RunConfig:
        """The configuration of the run that it comes from, without the places of its data.

        Raises:
            CheckpointError: this is no adapter, or a file of it is not what was exported.
            PluginError: it needs a plugin that is not installed.
        """
        registry.require(self.manifest().get("plugins", ()), where=str(self.path))
        return build_config(read_saved(self.config_file), source=str(self.config_file))

    def manifest(self) -> dict[str, Any]:
        """Encoders and their fingerprints, labels, data hashes; as of the run."""
        return self._facts

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """Read, and all files compared, once: weights of a tuned encoder are large."""
        if not verify(self.path, kind=KIND)["files"].keys() >= {FACTS, "config.yaml", "weights.safetensors"}:
            raise CheckpointError(3, "the manifest names no weights", where=str(self.path), fix="export the run again")
        facts = {**read_json(self.manifest_file), **read_json(self.path / FACTS)}  # of one format, and migrated as one
        return check_facts(understood(facts, KIND, str(self.path)), self.path / FACTS)

    def checkpoint(self, which: str = "best") -> tuple[Path, dict[str, Any]]:
        """The folder with the only weights that there are, and their facts."""
        if which != "best":
            what = f"an adapter has no checkpoint {which}"
            raise CheckpointError(4, what, where=str(self.path), fix="leave --checkpoint out")
        return self.path, self.manifest()

    def result(self) -> dict[str, Any]:
        """How good the run was that it comes from."""
        return self.manifest()
