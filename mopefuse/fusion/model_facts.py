"""The facts about a model that are stored with a run or an adapter, and compared when it is loaded."""

from __future__ import annotations

from typing import Any

from mopefuse import __version__
from mopefuse.core import registry
from mopefuse.fusion.base import Fusion


def model_facts(model: Fusion, method: str) -> dict[str, Any]:
    """Version, method, encoders with the fingerprints of their weights, and the plugins that loading the model needs.

    Args:
        method: full name of the fusion method.
    """
    fingerprints = unsaved_fingerprints(model)
    encoders = {side: model.encoder(side) for side in model.uses}
    return {
        "mopefuse": __version__,
        "method": method,
        "encoders": {
            side: {
                "spec": str(encoder.spec),
                "modality": encoder.modality,
                "feature_width": encoder.feature_width,
                "layers": len(encoder.widths),
                "revision": encoder.revision,
                "fingerprint": fingerprints.get(side),
                "digest": encoder.digest(),
                "description": encoder.describe(),
            }
            for side, encoder in encoders.items()
        },
        "plugins": registry.describe_plugins(
            {(model.task.methods, method), (registry.TASKS, model.task.name)}
            | {(registry.ENCODERS, encoder.spec.scheme) for encoder in encoders.values()}
            | {(registry.MODALITIES, encoder.modality) for encoder in encoders.values()}
        ),
    }


def unsaved_fingerprints(model: Fusion) -> dict[str, str]:
    """The fingerprints, by side, of encoders whose weights are not saved with the model (those of tuned encoders are)."""
    return {side: model.encoder(side).fingerprint() for side in model.uses if not model.encoder(side).tuned}
