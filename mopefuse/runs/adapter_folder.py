"""Adapters: the trained weights of a run without its history, used with the encoders that they name.

An adapter is a folder with ``weights.safetensors``, ``config.yaml``, ``model.json`` (labels, encoders, thresholds, metrics) and
a model card. It can be read wherever a run can: it is a run with a single checkpoint and no log.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from mopefuse.config.recipe import saved_config
from mopefuse.config.schema import RunConfig
from mopefuse.core import registry
from mopefuse.core.artifact import check_manifest, read_json, verify
from mopefuse.core.error_codes import CheckpointCode
from mopefuse.errors import CheckpointError
from mopefuse.runs.check_facts import check_facts
from mopefuse.runs.folder import RunFolder

KIND = "adapter"
FACTS = "model.json"


class AdapterFolder(RunFolder):
    """An adapter on disk, read only. Every file is verified against the manifest before it is opened."""

    def exists(self) -> bool:
        """Whether the folder is an adapter."""
        return self.manifest_file.is_file() and read_json(self.manifest_file).get("kind") == KIND

    def config(self) -> RunConfig:
        """The configuration of the run that was exported, without the paths of its data.

        Raises:
            CheckpointError: the folder is not an adapter, or one of its files was changed after the export.
            PluginError: a plugin that the model needs is not installed.
        """
        registry.require(self.manifest()["plugins"], where=str(self.path))
        return saved_config(self.config_file)

    def manifest(self) -> dict[str, Any]:
        """Encoders and their fingerprints, labels and data hashes, as recorded by the run."""
        return self._facts

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """Read and verified once, because the weights of a tuned encoder are large."""
        if not verify(self.path, kind=KIND)["files"].keys() >= {FACTS, "config.yaml", "weights.safetensors"}:
            raise CheckpointError(
                CheckpointCode.CONTENT_DAMAGED,
                "the manifest lists no weights",
                where=str(self.path),
                fix="export the run again",
            )
        facts = {**read_json(self.manifest_file), **read_json(self.path / FACTS)}
        return check_facts(check_manifest(facts, KIND, str(self.path)), self.path / FACTS)

    def checkpoint(self, which: str = "best") -> tuple[Path, dict[str, Any]]:
        """The folder with the only weights of an adapter, and its facts.

        Raises:
            CheckpointError: `which` is not ``best``, or the folder is not an adapter.
        """
        if which != "best":
            what = f"an adapter has no checkpoint {which}"
            raise CheckpointError(CheckpointCode.NOT_FOUND, what, where=str(self.path), fix="remove --checkpoint")
        return self.path, self.manifest()

    def result(self) -> dict[str, Any]:
        """The metrics of the run that was exported, among the other facts."""
        return self.manifest()
