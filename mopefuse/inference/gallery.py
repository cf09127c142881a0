"""Rank the rows of a gallery for each query, with a model that was trained for retrieval.

The embeddings of a gallery are cached by the weights of the model and the contents of the gallery. Nothing here needs torch.

Shapes: B queries, G rows of the gallery, E numbers of an embedding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.schema import Data as DataConfig
from mopefuse.core import cache
from mopefuse.core.artifact import dump_json, read_json
from mopefuse.core.atomic_files import write_atomically
from mopefuse.core.error_codes import ConfigCode, DataCode
from mopefuse.core.formatting import several
from mopefuse.data.columns import Layout, flag_for, get_column
from mopefuse.data.index_build import build
from mopefuse.data.storage.shards import open_files
from mopefuse.data.tables import columns_in, find_tables
from mopefuse.errors import ConfigError, DataError
from mopefuse.inference.pairs import Pair, read_pairs
from mopefuse.inference.predict import Embedder, Prediction, Predictor
from mopefuse.modalities.base import to_arguments

VERSION, TOP = 1, 10
_IDS, _EMBEDDINGS = "ids.json", "embeddings.npy"
DIGITS = 6  # of a score

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Gallery:
    """The rows that are ranked.

    Args:
        modality: that of their values. query: that of the queries.
        ids: of the rows. embedding_GE: their embeddings, of length 1.
    """

    modality: str
    query: str
    ids: tuple[str, ...]
    embedding_GE: Floats

    def best(self, query_BE: Floats, count: int) -> tuple[NDArray[np.int64], Floats]:
        """The numbers of the `count` best rows for each query, the best first, and the cosines of the embeddings."""
        score_BG = query_BE @ self.embedding_GE.T
        order_BT = np.argsort(-score_BG, axis=1, kind="stable")[:, :count]
        return order_BT, np.take_along_axis(score_BG, order_BT, axis=1)

    def describe(self, order_T: Sequence[int], score_T: Floats) -> list[dict[str, Any]]:
        """Rows as ``{"id", "score"}``."""
        both = zip(order_T, score_T.tolist(), strict=True)
        return [{"id": self.ids[number], "score": round(score, DIGITS)} for number, score in both]

    def rank(self, query_BE: Floats, top: int = TOP) -> list[list[dict[str, Any]]]:
        """The best rows for each query, ``{"id", "score"}``; the score is the cosine of the embeddings."""
        return [self.describe(*one) for one in zip(*self.best(query_BE, top), strict=True)]


class Ranker(Protocol):
    """Ranks a gallery in its own way; see `mopefuse.inference.rerank.Reranker`."""

    def rank(self, values: Sequence[Any], query_BE: Floats, gallery: Gallery, top: int) -> list[list[dict[str, Any]]]:
        """The best rows for each query, as `Gallery.rank` returns them, from the queries and their embeddings."""


def choose_modalities(
    model: Embedder, queries: Collection[str], gallery: Path, config: DataConfig, named: str | None = None
) -> tuple[str, str]:
    """The modality of the queries and that of the gallery.

    Args:
        queries: the modalities that queries have; those of the model if that is not known.
        named: the modality of the gallery, if the user names it.

    Raises:
        ConfigError: there are no such two, or more than one choice. DataError: the gallery has no rows.
    """
    if named is not None and named not in model.modalities:
        what, fix = f"the model reads {' and '.join(model.modalities)}, not {named}", f"use {' or '.join(model.modalities)}"
        raise ConfigError(ConfigCode.GALLERY_UNCLEAR, what, where="--gallery-of", fix=fix)
    if {*queries} == {named}:
        what, fix = f"the query is of the modality {named}, and only another one can be ranked for it", "remove --gallery-of"
        raise ConfigError(ConfigCode.GALLERY_UNCLEAR, what, where="--gallery-of", fix=fix)
    table = find_tables(gallery, config)[""]
    first = next((row.value for row in table.rows()), None)
    if first is None:
        raise DataError(DataCode.EMPTY_SPLIT, "the gallery has no rows", where=str(gallery), fix="add at least one row")
    columns = {name: get_column(name, config) for name in model.modalities}
    present = columns_in(table, {*columns.values()})
    wanted = [name for name in columns if named in (None, name) and any(query != name for query in queries)]
    possible = [(query, name) for query in queries for name in wanted if query != name and columns[name] in present]
    if len(possible) == 1:
        return possible[0]
    if possible:
        both, fix = "queries and gallery have the same modalities", f"add --gallery-of {' or '.join(model.modalities)}"
        raise ConfigError(ConfigCode.GALLERY_UNCLEAR, both, where="--gallery", fix=fix)
    raise _no_column(wanted, columns, gallery, first if isinstance(first, dict) else {}, config)


def _no_column(
    wanted: Sequence[str], columns: Mapping[str, str], gallery: Path, row: Mapping[str, Any], config: DataConfig
) -> ConfigError:
    """The error for a gallery without a column of the modalities that can be ranked."""
    of_each = " or ".join(f"{columns[name]} ({name})" for name in wanted)
    what = f"the gallery has no column {of_each}; its columns: {', '.join(map(str, row)) or 'none'}"
    flags = Layout.from_config([*columns], config).suggest_flags(wanted, False, row)
    fix = f"did you mean {flags[0]}?" if flags else f"name its column with {flag_for(wanted[0], 'NAME')}"
    return ConfigError(ConfigCode.GALLERY_UNCLEAR, what, where=str(gallery), fix=fix)


def query_modalities(source: Path, model: Embedder, config: DataConfig) -> list[str]:
    """The modalities of the model that a table of queries has a column of."""
    columns = {name: get_column(name, config) for name in model.modalities}
    present = columns_in(find_tables(source, config)[""], {*columns.values()})
    return [name for name, column in columns.items() if column in present]


def open_gallery(
    predictor: Predictor, path: Path, config: DataConfig, modality: str, query: str, *, batch: int = 32
) -> Gallery:
    """Embed the rows of a table, or read their embeddings from the cache.

    Args:
        modality, query: those of the gallery and of the queries.

    Raises:
        DataError: there is no such table, it has no rows, or one of them cannot be read.
    """
    model = predictor.model
    assert isinstance(model, Embedder)
    table = find_tables(path, config)[""]
    config = config.model_copy(update={"split_col": None, "task": model.task.name})
    index = build(table, "test", open_files(path, config, [table]), [modality], config)
    if problems := index.problems():
        what = f"could not read {several(len(problems), 'row')} of the gallery; the first: {problems[0]}"
        raise DataError(DataCode.BAD_ROW, what, where=problems[0].where, fix=problems[0].fix or "correct or remove the rows")
    if not len(index.lines_S):
        raise DataError(DataCode.EMPTY_SPLIT, "the gallery has no rows", where=str(path), fix="add at least one row")
    key = cache.make_key(VERSION, model.embedding_key, modality, index.digest, index.values[modality].keys().tobytes().hex())
    if (found := cache.find("galleries", key)) is not None:
        ids, embedding_GE = read_json(found[0] / _IDS)["ids"], np.load(found[0] / _EMBEDDINGS, allow_pickle=False)
        return Gallery(modality, query, tuple(ids), embedding_GE)
    pairs = list(read_pairs(path, config, [modality]))
    parts = [_embed(predictor, modality, pairs[start : start + batch]) for start in range(0, len(pairs), batch)]
    gallery = Gallery(modality, query, tuple(pair.id for pair in pairs), np.concatenate(parts))

    def write(folder: Path) -> None:
        write_atomically(folder / _IDS, dump_json({"ids": list(gallery.ids)}))
        np.save(folder / _EMBEDDINGS, gallery.embedding_GE, allow_pickle=False)

    cache.store("galleries", key, write, {"rows": len(pairs), "table": str(path)})
    return gallery


def rank_pairs(
    predictor: Predictor,
    pairs: Iterable[Pair],
    gallery: Gallery,
    *,
    batch: int = 32,
    top: int | None = None,
    strict: bool = False,
    reranker: Ranker | None = None,
) -> Iterator[Prediction]:
    """``{"id", "ranked": [{"id", "score"}, ...]}`` for each query, in their order; ``{"id", "error"}`` for an invalid one.

    Args:
        top: number of rows for each query, default 10. reranker: changes the order of the best of them.

    Raises:
        MopefuseError: with `strict`, the error of the first invalid query.
    """
    pairs = iter(pairs)
    while group := list(islice(pairs, batch)):
        good = [pair for pair in group if pair.error is None]
        ranked = iter(_rank(predictor, good, gallery, top or TOP, reranker) if good else ())
        for pair in group:
            if pair.error is not None and strict:
                raise pair.error
            yield {"id": pair.id, **({"error": pair.error.as_dict()} if pair.error else {"ranked": next(ranked)})}


def _rank(
    predictor: Predictor, pairs: list[Pair], gallery: Gallery, top: int, reranker: Ranker | None
) -> list[list[dict[str, Any]]]:
    query_BE = _embed(predictor, gallery.query, pairs)
    if reranker is None:
        return gallery.rank(query_BE, top)
    return reranker.rank([pair.values[gallery.query] for pair in pairs], query_BE, gallery, top)


def _embed(predictor: Predictor, modality: str, pairs: list[Pair]) -> Floats:
    """Embeddings (B, E) of the values of rows."""
    for pair in pairs:
        if pair.error is not None:
            raise pair.error
    return predictor.embed(**to_arguments({modality: [pair.values[modality] for pair in pairs]}))
