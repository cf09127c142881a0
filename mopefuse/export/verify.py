"""Verify that an exported folder is unchanged and still predicts the same. Needs torch only for a pt2 bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mopefuse.core.artifact import read_json
from mopefuse.core.error_codes import CheckpointCode, GateCode
from mopefuse.errors import CheckpointError, DataError, GateError
from mopefuse.inference.bundle import Bundle
from mopefuse.modalities.image import open_image
from mopefuse.runs.adapter_folder import KIND as ADAPTER
from mopefuse.runs.adapter_folder import AdapterFolder
from mopefuse.runs.locate import get_kind


def verify_export(folder: Path) -> str:
    """Compare an exported folder with its manifest, and a bundle's logits for its example with those at export.

    Returns:
        The result, in words.

    Raises:
        CheckpointError: a file is missing, changed, or not in the manifest. GateError: the logits differ.
    """
    if get_kind(folder) == ADAPTER:
        config = AdapterFolder(folder).config()
        return f"every file of this adapter ({config.method}) is as it was exported"
    bundle = Bundle(folder, "cpu")
    image, text, logits_N, tolerance = _example(bundle)
    logits_BN, _ = bundle.run(bundle.collate([image], [text]))
    off = float(np.abs(logits_BN[0] - logits_N).max())
    if not off <= tolerance:
        raise GateError(
            GateCode.EXAMPLE_DIFFERS,
            f"the prediction for the stored example differs by {off:.2g}, more than {tolerance:g}",
            where=str(folder),
            fix="export again with the packages of this machine",
        )
    return f"every file is as it was exported, and the prediction for the stored example differs by {off:.2g}"


def _example(bundle: Bundle) -> tuple[Image.Image, str, NDArray[np.float64], float]:
    """The image, text, logits (N,) and tolerance of a bundle's example.

    Raises:
        CheckpointError: the example is missing or cannot be read.
    """
    example, fix = read_json(bundle.folder / "example.json"), "export the run again"
    try:
        name, text, tolerance = str(example["image"]), str(example["text"]), float(example["tolerance"])
        logits_N = np.array(example["logits"], dtype=np.float64)
        if logits_N.shape[:1] != (bundle.task.outputs(bundle.labels),):
            raise ValueError(f"{logits_N.size} logits of {len(bundle.labels)} labels")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = f"example.json is damaged: {error}"
        raise CheckpointError(CheckpointCode.CONTENT_DAMAGED, what, where=str(bundle.folder), fix=fix) from None
    if name not in bundle.manifest["files"]:
        what = f"the image of the example, {name}, is not a file of the manifest"
        raise CheckpointError(CheckpointCode.CONTENT_DAMAGED, what, where=str(bundle.folder), fix=fix)
    try:
        return open_image([bundle.folder], name, where=str(bundle.folder)), text, logits_N, tolerance
    except DataError as error:
        what = f"the image of the example, {name}, cannot be read: {error.what}"
        raise CheckpointError(CheckpointCode.FILE_DAMAGED, what, where=str(bundle.folder), fix=fix) from None
