"""The gallery that a model for retrieval ranks, as flags name it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mopefuse.core.error_codes import ConfigCode

if TYPE_CHECKING:
    from mopefuse.cli._predict_tables import ModelOptions
    from mopefuse.config.schema import Data
    from mopefuse.inference.gallery import Gallery
    from mopefuse.inference.predict import Predictor
    from mopefuse.inference.rerank import Reranker


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


def find_reranker(predictor: Predictor, how: ModelOptions, config: Data, query: str | None) -> Reranker:
    """The re-ranker of ``--rerank``, for the gallery of ``--gallery``.

    Args:
        query: the modality of the queries; None for a model that does not rank.

    Raises:
        ConfigError: there is no gallery, the run of ``--rerank`` is not a matcher, or its weight has not been chosen.
    """
    from mopefuse.cli._render import err
    from mopefuse.errors import ConfigError
    from mopefuse.inference.predict import load
    from mopefuse.inference.rerank import open_reranker

    assert how.rerank is not None
    if how.gallery is None or query is None:
        what, fix = f"the model was trained for the task {predictor.model.task}, and ranks nothing", "remove --rerank"
        raise ConfigError(ConfigCode.CANNOT_RERANK, what, where="--rerank", fix=fix)
    matcher, models = load(how.rerank, device=how.device), (how.run, str(how.rerank))
    found = open_reranker(predictor, matcher, models, how.gallery, config, query, batch=how.batch)
    if not found.stored.weight:
        err().print("the weight of the matcher is 0: --rerank has no effect")
    return found
