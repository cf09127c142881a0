"""Whether an exported folder is still what was exported, and still says the same. Needs no torch, but for a pt2 bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mopefuse.adapter import KIND as ADAPTER
from mopefuse.adapter import AdapterFolder
from mopefuse.checkpoint import read_json
from mopefuse.errors import GateError
from mopefuse.predictor import Bundle
from mopefuse.source import kind_of


def verify_export(folder: Path) -> str:
    """Compare an exported folder with its manifest, and a bundle's answer to its example with the one it was exported with.

    Returns:
        What was found to hold, in words.

    Raises:
        CheckpointError: a file is missing, was changed, or is none of the manifest's. GateError: another answer.
    """
    if kind_of(folder) == ADAPTER:
        config = AdapterFolder(folder).config()
        return f"every file of this adapter ({config.method}) is as it was exported"
    bundle = Bundle(folder, "cpu")
    example = read_json(folder / "example.json")
    with Image.open(folder / example["image"]) as image:
        logits_BN, _ = bundle.run(bundle.collate([image], [example["text"]]))
    off = float(np.abs(logits_BN[0] - np.array(example["logits"])).max())
    if not off <= example["tolerance"]:
        raise GateError(
            3,
            f"the answer to the example differs by {off:.2g}, more than {example['tolerance']:g}",
            where=str(folder),
            fix="export again with the packages of this machine",
        )
    return f"every file is as it was exported, and the answer to the example differs by {off:.2g}"
