"""Re-rank the best rows of a gallery with a matcher: a classifier of pairs, which sees the query and the candidate together.

The score of a candidate is its score by the first stage, scaled as in training, plus a weight times the log-odds of `MATCH`.
``mopefuse eval --rerank`` chooses the weight on validation and stores it in the run of the first stage.

Shapes: B queries, G rows of the gallery, K candidates of a query, E numbers of an embedding, T rows that are returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core.artifact import dump_json, read_json
from mopefuse.core.atomic_files import write_atomically
from mopefuse.core.error_codes import ConfigCode
from mopefuse.errors import ConfigError
from mopefuse.inference.gallery import DIGITS, Floats, Gallery
from mopefuse.inference.pairs import RowReader
from mopefuse.inference.predict import Predictor
from mopefuse.inference.run_model import RunModel
from mopefuse.runs.locate import locate
from mopefuse.tasks.base import Task

MATCH, OTHER = "match", "other"
"""The labels of a matcher."""
STORED = "rerank.json"


@dataclass(frozen=True)
class Stored:
    """How a matcher re-ranks what a run finds, as chosen on validation.

    Args:
        weight: of the log-odds; 0 if the matcher does not improve the ranking. candidates: K.
        metrics: by split, ranks ``without`` and ``with`` re-ranking.
    """

    weight: float
    candidates: int
    metrics: Mapping[str, Mapping[str, Mapping[str, float]]]


def store(run: Path, first: str, matcher: str, name: str, stored: Stored) -> None:
    """Add to the file `STORED` of a run, or replace what it has for these two models.

    Args:
        first, matcher: `Model.digest` of both models. name: of the matcher, for readers of the file.
    """
    file = run / STORED
    known = read_json(file) if file.is_file() else {}
    write_atomically(file, dump_json({**known, _key(first, matcher): {"matcher": name, **vars(stored)}}))


def read_stored(run: Path, first: str, matcher: str, name: str) -> Stored:
    """What `store` wrote for these two models.

    Raises:
        ConfigError: it was not called for them. CheckpointError: the file is damaged.
    """
    file = run / STORED
    found = (read_json(file) if file.is_file() else {}).get(_key(first, matcher))
    if found is None:
        what = f"no weight has been chosen for re-ranking with {name}, or one of the models was trained again"
        fix = f"mopefuse eval {run} --rerank {name}, with the same --checkpoint"
        raise ConfigError(ConfigCode.RERANK_NOT_CHOSEN, what, where=str(run), fix=fix)
    return Stored(**{key: found[key] for key in ("weight", "candidates", "metrics")})


def _key(first: str, matcher: str) -> str:
    return f"{first} {matcher}"


def check_matcher(task: Task, labels: Sequence[str], matcher: Sequence[str], first: Sequence[str], name: str) -> None:
    """Refuse a model that cannot re-rank.

    Args:
        task, labels: of the matcher. matcher, first: modalities of the matcher and of the first stage.

    Raises:
        ConfigError: it does not choose between `MATCH` and `OTHER`, or the modalities differ.
    """
    fix = "pass a run that was trained on the data of mopefuse data candidates"
    if {*labels} != {MATCH, OTHER} or task != "single-label":
        what = f"{name} predicts {', '.join(labels[:4])}, and a matcher predicts {MATCH} or {OTHER}"
        raise ConfigError(ConfigCode.CANNOT_RERANK, what, where="--rerank", fix=fix)
    if {*matcher} != {*first}:
        what = f"{name} reads {' and '.join(matcher)}, and the first stage {' and '.join(first)}"
        raise ConfigError(ConfigCode.CANNOT_RERANK, what, where="--rerank", fix=fix)


def log_odds(outputs_BN: Any, labels: Sequence[str]) -> Any:
    """The log-odds (B,) of `MATCH`, from the logits of a matcher."""
    return outputs_BN[:, labels.index(MATCH)] - outputs_BN[:, labels.index(OTHER)]


@dataclass(frozen=True)
class Reranker:
    """Re-ranks the rows of a gallery.

    Args:
        matcher: a trained run. rows: those of the gallery.
        scale: of the first stage's cosines. batch: pairs in one forward pass.
    """

    matcher: RunModel
    rows: RowReader
    scale: float
    stored: Stored
    batch: int = 32

    def rank(self, values: Sequence[Any], query_BE: Floats, gallery: Gallery, top: int) -> list[list[dict[str, Any]]]:
        """The best rows for each query, as `Gallery.rank` returns them, re-ranked; ``"reranked"`` is the score of a candidate.

        Args:
            values: the queries, as read. query_BE: their embeddings.
        """
        order_BT, score_BT = gallery.best(query_BE, max(top, self.stored.candidates))
        return [self._rank(*one, gallery)[:top] for one in zip(values, order_BT.tolist(), score_BT, strict=True)]

    def _rank(self, value: Any, order_T: list[int], score_T: Floats, gallery: Gallery) -> list[dict[str, Any]]:
        listed = gallery.describe(order_T, score_T)
        if not self.stored.weight:
            return listed
        best = order_T[: self.stored.candidates]
        candidates = [self.rows.values(number)[gallery.modality] for number in best]
        places = {gallery.query: np.zeros(len(best), np.int64), gallery.modality: np.arange(len(best))}
        outputs_KN = self.matcher.outputs_of_pairs({gallery.query: [value], gallery.modality: candidates}, places, self.batch)
        score_K = self.scale * score_T[: len(best)] + self.stored.weight * log_odds(outputs_KN, self.matcher.labels)
        order_K = np.argsort(-score_K, kind="stable").tolist()
        return [{**listed[k], "reranked": round(float(score_K[k]), DIGITS)} for k in order_K] + listed[len(best) :]


def open_reranker(
    first: Predictor,
    matcher: Predictor,
    paths: tuple[str, str],
    gallery: Path,
    config: DataConfig,
    query: str,
    *,
    batch: int = 32,
) -> Reranker:
    """The re-ranker of a gallery, with what `store` wrote.

    Args:
        first, matcher: both models. paths: of both.
        gallery, config, query: see `mopefuse.inference.gallery.open_gallery`.

    Raises:
        ConfigError: the second model is not a matcher, or nothing was stored for these two models.
    """
    if not (isinstance(first.model, RunModel) and isinstance(matcher.model, RunModel)):
        what = "re-ranking needs two runs, and one of these is an exported bundle"
        raise ConfigError(ConfigCode.CANNOT_RERANK, what, where="--rerank", fix="pass the runs that were exported")
    run, name = paths
    check_matcher(matcher.model.task, matcher.model.labels, matcher.model.modalities, first.model.modalities, name)
    stored = read_stored(locate(run), first.model.digest, matcher.model.digest, name)
    modality = next(one for one in first.model.modalities if one != query)
    return Reranker(matcher.model, RowReader(gallery, config, [modality]), first.model.scale, stored, batch)
