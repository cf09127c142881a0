"""Retrieval: each sample is a pair, and the partner of either value is found among those of all samples.

A model embeds both values; the score of two values is the dot product of their embeddings. Rows need no label: every row is a
positive example, and so are two rows that have the same text or the same file.

Shapes: B samples of a batch, S of a split, E numbers of an embedding, K keys of a sample, one for each modality; the N = 2 E
outputs of a model are the embedding of main, times the learned scale of the scores, and that of comp.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mopefuse.core import registry
from mopefuse.core.error_codes import ConfigCode, DataCode
from mopefuse.core.formatting import json_text
from mopefuse.errors import ConfigError, DataError
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds
from mopefuse.tasks.base import Array, Labelled, Task, TrainingTargets

if TYPE_CHECKING:
    from torch import Tensor

    from mopefuse.config.schema import RunConfig
    from mopefuse.metrics.bootstrap import Outcome
    from mopefuse.metrics.retrieval import RankTally

WAYS = ("main_to_comp", "comp_to_main")
_LISTED = 10  # candidates in a line of predictions
_DIGITS = 15  # hexadecimal digits of a key, which is an int64


class Retrieval(Task):
    """Texts for an image, images for a text, or those of any two modalities; targets are keys (B, K), int64.

    Args:
        width: E. keys: K, the number of modalities of the rows.
    """

    name, metric, metric_title = "retrieval", "recall_at_10", "recall at 10"
    metrics = (
        "recall_at_10",
        "recall_at_5",
        "recall_at_1",
        *(f"recall_at_10_{way}" for way in WAYS),
        *(f"median_rank_{way}" for way in WAYS),
    )
    more_metrics = tuple(f"recall_at_{limit}_{way}" for way in WAYS for limit in (5, 1))
    label_kind = "pair"
    methods = registry.RETRIEVAL
    linear_name = "linear projection"
    ways = WAYS
    compares_samples = True

    def __init__(self, width: int = 256, keys: int = 2) -> None:
        self.width, self.keys = width, keys

    def facts(self) -> dict[str, Any]:
        """See `Task.facts`."""
        return {"name": self.name, "width": self.width, "keys": self.keys}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Retrieval:
        """See `Task.from_facts`."""
        width, keys = (int(facts[key]) for key in ("width", "keys"))
        if min(width, keys) < 1:
            raise ValueError("width and keys must be positive")
        return cls(width, keys)

    def fitted(self, targets: TrainingTargets, config: RunConfig) -> Retrieval:
        """See `Task.fitted`."""
        _check_settings(config)
        return Retrieval(config.retrieval.width, targets.numbers().shape[1])

    def describe(self, labels: Sequence[str]) -> str:
        """See `Task.describe`."""
        return "the partner of either value of a pair"

    def outputs(self, labels: Sequence[str]) -> int:
        """N = 2 E."""
        return 2 * self.width

    # -- data

    def encode(self, names: Sequence[str], known: Sequence[str]) -> Array:
        """Keys (U,) int64: the hexadecimal digits after the last space of each name, see `mopefuse.data.labels_task`."""
        try:
            return np.array([int(name.rpartition(" ")[2][:_DIGITS], 16) for name in names], dtype=np.int64)
        except ValueError as error:
            raise KeyError(str(error)) from None

    def unknown_labels(self, names: Iterable[str], known: Sequence[str]) -> list[str]:
        """None: a pair need not be known from training."""
        return []

    def targets(self, start_B1: Array, number_Z: Array, count: int) -> Tensor:
        """The keys (B, K) of the values of each sample, int64; equal values have equal keys."""
        import torch

        return torch.from_numpy(number_Z.reshape(len(start_B1) - 1, self.keys))

    def check_label(self, label: Any, count: int, where: str) -> None:
        """See `Task.check_label`."""
        keys = list(label) if isinstance(label, Sequence) and not isinstance(label, str) else [label]
        if len(keys) != self.keys or not all(isinstance(key, int) and not isinstance(key, bool) for key in keys):
            what = f"the label is {label!r:.60}, expected {self.keys} keys, an integer for each modality"
            fix = "pass a list of integers, equal for equal values; mopefuse.PairDataset does this"
            raise DataError(DataCode.INVALID_LABEL_VALUE, what, where=where, fix=fix)

    def stack_labels(self, labels: Sequence[Any], count: int) -> Tensor:
        """The keys (B, K), int64."""
        import torch

        return torch.tensor([[*keys] for keys in labels], dtype=torch.long).reshape(len(labels), self.keys)

    # -- training

    def loss(self, outputs_BN: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
        """The contrastive loss of each sample (B,) among those of its batch, averaged over both ways, in float32."""
        from mopefuse.metrics.retrieval import contrastive_loss

        main_BE, comp_BE = outputs_BN.float().chunk(2, dim=-1)
        return (contrastive_loss(main_BE, comp_BE, targets) + contrastive_loss(comp_BE, main_BE, targets)) / 2

    def average(self, each: Sequence[Tensor]) -> Tensor:
        """The mean of embeddings."""
        import torch

        return torch.stack([*each]).mean(dim=0)

    # -- evaluation

    def tally(self, samples: int, outputs: int) -> RankTally:
        """See `Task.tally`."""
        from mopefuse.metrics.retrieval import RankTally

        return RankTally(samples, outputs // 2, self.keys)

    def outcome(self, outputs_SN: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD) -> Outcome:
        """See `Task.outcome`."""
        from mopefuse.metrics.retrieval import RankOutcome

        return RankOutcome(self._ranks(outputs_SN, targets).numpy())

    def _ranks(self, outputs_SN: Tensor, targets: Tensor) -> Tensor:
        """The rank (S, 2) of each partner."""
        import torch

        tally = self.tally(*outputs_SN.shape)
        tally.add(torch.arange(len(outputs_SN)), outputs_SN, targets)
        return tally.ranks()

    def changed(self, before_SN: Tensor, after_SN: Tensor, thresholds: Thresholds = THRESHOLD) -> Tensor:
        """Whether (S,) the best candidate of either way differs."""
        firsts = [first for outputs_SN in (before_SN, after_SN) for first in _best(outputs_SN, 1)]
        return ((firsts[0] != firsts[2]) | (firsts[1] != firsts[3]))[:, 0]

    def constant(self, counts: Mapping[str, int], labels: Sequence[str]) -> tuple[str, Tensor]:
        """See `Task.constant`."""
        import torch

        return "the same embedding for all", torch.zeros(self.outputs(labels))

    # -- predictions

    def decode(self, outputs_BN: Array) -> Array:
        """The embeddings (B, N), float64."""
        return outputs_BN.astype(np.float64)

    def predict(
        self, decoded_N: Sequence[float], labels: Sequence[str], thresholds: Sequence[float], top: int | None = None
    ) -> dict[str, Any]:
        """``{"main": embedding, "comp": embedding}``; candidates of a gallery are ranked by `mopefuse.inference.gallery`."""
        half = len(decoded_N) // 2
        return {"main": list(decoded_N[:half]), "comp": list(decoded_N[half:])}

    def table_header(self, labels: Sequence[str]) -> list[str]:
        """See `Task.table_header`."""
        return ["ranked", "scores"]

    def table_cells(self, prediction: Mapping[str, Any], labels: Sequence[str]) -> list[Any]:
        """The ids of the candidates and the scores that decide, separated by ``|``."""
        ranked = prediction.get("ranked", ())
        scores = (one.get("reranked", one["score"]) for one in ranked)
        return ["|".join(str(one["id"]) for one in ranked), "|".join(map(str, scores))]

    def collect(
        self, index_B: Tensor, outputs_BN: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD
    ) -> tuple[Tensor, ...]:
        """Positions of the samples (B,), and their outputs and keys, sample by sample (B N,) and (B K,)."""
        return index_B, outputs_BN.float().flatten(), targets.flatten()

    def prediction_lines(
        self, parts: Iterable[Sequence[Tensor]], rows: Sequence[Labelled], labels: Sequence[str]
    ) -> Iterator[str]:
        """Lines with the ids of the best candidates and the rank of the partner; see `Task.prediction_lines`.

        ``{"id", "ranked", "rank", "ranked_comp_to_main", "rank_comp_to_main"}``: the first two are those of main to comp.
        """
        import torch

        index_S, outputs_Z, key_Z = (torch.cat(each) for each in zip(*parts, strict=True))
        order_S = index_S.argsort()
        outputs_SN, key_SK = (each_Z.reshape(len(index_S), -1)[order_S] for each_Z in (outputs_Z, key_Z))
        ids = [rows[index].id for index in index_S[order_S].tolist()]
        yield from ranking_lines(ids, _best(outputs_SN, _LISTED), self._ranks(outputs_SN, key_SK))

    def read_outcome(self, lines: Iterable[tuple[int, Mapping[str, Any]]], samples: int, labels: Sequence[str]) -> Outcome:
        """See `Task.read_outcome`."""
        from mopefuse.metrics.retrieval import RankOutcome

        rank_S2 = np.zeros((samples, 2), dtype=np.int64)
        for sample, line in lines:
            rank_S2[sample] = [int(line[key]) for key in ("rank", "rank_comp_to_main")]
        return RankOutcome(rank_S2)


def ranking_lines(ids: Sequence[str], orders: Sequence[Tensor], rank_S2: Tensor) -> Iterator[str]:
    """See `Retrieval.prediction_lines`.

    Args:
        orders: the positions of the candidates of each sample, the best first, both ways. rank_S2: of each partner.
    """
    found = zip(ids, *(order_ST[:, :_LISTED].tolist() for order_ST in orders), rank_S2.tolist(), strict=True)
    for identity, comps, mains, (rank, rank_back) in found:
        there, back = ([ids[number] for number in numbers] for numbers in (comps, mains))
        line = {"id": identity, "ranked": there, "rank": rank, "ranked_comp_to_main": back, "rank_comp_to_main": rank_back}
        yield json_text(line) + "\n"


def _best(outputs_SN: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The positions (S, count) of the best candidates of each sample, both ways."""
    from mopefuse.metrics.retrieval import best_candidates

    main_SE, comp_SE = outputs_SN.float().chunk(2, dim=-1)
    return best_candidates(main_SE, comp_SE, count), best_candidates(comp_SE, main_SE, count)


def _check_settings(config: RunConfig) -> None:
    """Refuse settings that retrieval cannot be trained with.

    Raises:
        ConfigError: a batch would be divided, or a setting has no meaning for pairs.
    """
    from mopefuse.core import distributed

    whole = "the loss compares each pair with all others of its batch"
    if config.train.class_weights == "balanced":
        what = "rows are pairs, so there are no classes to balance"
        raise ConfigError(ConfigCode.SETTING_OF_OTHER_TASK, what, where="--class-weights", fix="remove --class-weights")
    if config.data.on_missing == "absent":
        what = "rows are pairs, so none can lack a modality"
        raise ConfigError(ConfigCode.SETTING_OF_OTHER_TASK, what, where="--on-missing", fix="use --on-missing skip")
    if config.train.batch_size == 1:
        what = f"{whole}, and a batch has 1 row"
        raise ConfigError(ConfigCode.BATCH_NOT_WHOLE, what, where="--batch", fix="use --batch 128")
    if config.train.accumulate > 1:
        what = f"{whole}, so a batch cannot be divided into {config.train.accumulate} parts"
        raise ConfigError(ConfigCode.BATCH_NOT_WHOLE, what, where="train.accumulate", fix="remove train.accumulate")
    if distributed.world_size() > 1:
        what = f"{whole}, so it cannot be divided among {distributed.world_size()} processes"
        raise ConfigError(ConfigCode.BATCH_NOT_WHOLE, what, where="torchrun", fix="train without torchrun")
