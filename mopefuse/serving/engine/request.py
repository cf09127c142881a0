"""What a server is asked, and what it answers; independent of how either travels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mopefuse.errors import MopefuseError
from mopefuse.inference.predict import Prediction

Answer = Prediction | MopefuseError
"""The prediction for one request as JSON can hold it, see `mopefuse.inference.predict.as_json`, or why there is none."""


@dataclass(frozen=True)
class Request:
    """One sample, and the model that predicts it.

    Attributes:
        model: name of the model, see `mopefuse.serving.engine.catalogue.Catalogue`.
        values: by modality, a text, or the content of a file (a JPEG, a PNG) as it was received; None, or left out, for a
            sample without a value.
        top: number of labels in "probabilities", the most likely first; None for all.
        routing: whether to add the weights of the experts.
    """

    model: str
    values: Mapping[str, str | bytes | None]
    top: int | None = None
    routing: bool = False
