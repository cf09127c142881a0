"""What a run records about its encoders, its data and the software that it depends on."""

from __future__ import annotations

import platform
from typing import Any

from mopefuse import __version__
from mopefuse.config.schema import Data as DataConfig
from mopefuse.config.schema import RunConfig
from mopefuse.data.base import SPLITS, DataSet
from mopefuse.encoders import description
from mopefuse.fusion.base import Fusion
from mopefuse.fusion.model_facts import model_facts


def run_facts(config: RunConfig, data: DataSet, model: Fusion) -> dict[str, Any]:
    """The facts in the manifest of a run, which loading and resuming compare with what they find."""
    return {
        **model_facts(model, config.method),
        "labels": list(data.labels),
        "task": data.task.facts(),
        "data": data.fingerprint(),
        "skipped": {name: [f"{problem.code} {problem}" for problem in split.skipped] for name, split in data.splits.items()},
    }


def sampled_ids(config: DataConfig, data: DataSet) -> dict[str, list[str]]:
    """Ids of the rows of each split that was drawn or held out at random; empty if the files define all splits."""
    drawn = {"train"} if config.shots or config.fraction or config.val_fraction or config.test_fraction else set()
    drawn |= {name for name, share in (("val", config.val_fraction), ("test", config.test_fraction)) if share}
    return {name: [row.id for row in data.splits[name].rows] for name in SPLITS if name in drawn}


def get_versions() -> dict[str, str]:
    """Versions of the software that a result depends on."""
    names = ("torch", "torchvision", "timm", "transformers", "open_clip_torch", "numpy")
    return {"mopefuse": __version__, "python": platform.python_version(), **description.get_versions(names)}
