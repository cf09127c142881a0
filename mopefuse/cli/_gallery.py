"""The gallery that a model for retrieval ranks, as flags name it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mopefuse.core.error_codes import ConfigCode

if TYPE_CHECKING:
    from mopefuse.config.schema import Data
    from mopefuse.inference.gallery import Gallery
    from mopefuse.inference.predict import Predictor


def find_gallery(
    predictor: Predictor, path: Path | None, named: str | None, given: Path | list[str], config: Data, batch: int
) -> tuple[Gallery | None, str | None]:
    """The gallery, and the modality of the queries; None for a model that does not rank.

    Raises:
        ConfigError: no gallery, one that the model cannot rank, or its modality is not clear.
    """
    from mopefuse.errors import ConfigError
    from mopefuse.inference.gallery import choose_modalities, open_gallery, query_modalities
    from mopefuse.inference.predict import Embedder

    model = predictor.model
    if path is None and not model.task.compares_samples:
        return None, None
    if not isinstance(model, Embedder) or not model.task.compares_samples:
        what = f"the model was trained for the task {model.task}, and cannot rank a gallery"
        raise ConfigError(ConfigCode.NO_EMBEDDINGS, what, where="--gallery", fix="remove --gallery")
    if path is None:
        nothing, fix = "the model ranks the rows of a gallery, and none was given", "add --gallery TABLE"
        raise ConfigError(ConfigCode.NO_GALLERY, nothing, where="predict", fix=fix)
    known = query_modalities(given, model, config) if isinstance(given, Path) else given
    query, ranked = choose_modalities(model, known or model.modalities, path, config, named)
    return open_gallery(predictor, path, config, ranked, query, batch=batch), query
