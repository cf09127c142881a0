"""Ranks of true partners, and the contrastive loss.

van den Oord et al., Representation Learning with Contrastive Predictive Coding, arXiv 1807.03748 (InfoNCE); both ways as in
Radford et al., Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020.

Shapes: S samples of the split, B samples of a batch, b samples of a block, E numbers of an embedding, K keys of a sample,
R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mopefuse.metrics.tally import Tally
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds

WAYS = ("main_to_comp", "comp_to_main")
"""Whether the query of a search is the main or the complementary value of a pair."""
_BLOCK = 8_000_000  # numbers of a block of scores
TIE = 1e-6  # difference of cosines from which one candidate is better than another

Floats = NDArray[np.float64]


def blocks(samples: int) -> Iterator[slice]:
    """Split samples into slices whose scores of all samples fit into memory."""
    size = max(1, _BLOCK // max(1, samples))
    return (slice(start, start + size) for start in range(0, samples, size))


def same_pair(key_bK: Tensor, key_SK: Tensor) -> Tensor:
    """Whether (b, S) two samples have an equal value of some modality, so that either answers a search for the other."""
    same_bS = torch.zeros(len(key_bK), len(key_SK), dtype=torch.bool, device=key_bK.device)
    for one_b, one_S in zip(key_bK.T, key_SK.T, strict=True):
        same_bS |= one_b[:, None] == one_S
    return same_bS


def contrastive_loss(query_SE: Tensor, gallery_SE: Tensor, key_SK: Tensor) -> Tensor:
    """The cross-entropy (S,) of each query's partners among all samples, which are equally likely if there are several."""
    parts = []
    for rows in blocks(len(query_SE)):
        true_bS = same_pair(key_SK[rows], key_SK).float()
        logits_bS = query_SE[rows] @ gallery_SE.T
        parts.append(-(true_bS / true_bS.sum(dim=1, keepdim=True) * logits_bS.log_softmax(dim=1)).sum(dim=1))
    return torch.cat(parts)


def partner_ranks(query_SE: Tensor, gallery_SE: Tensor, key_SK: Tensor) -> Tensor:
    """The rank (S,) of each query's best partner among all samples, from 1; other samples with an equal score come first."""
    parts = []
    longest = gallery_SE.norm(dim=1).max()
    for rows in blocks(len(query_SE)):
        true_bS = same_pair(key_SK[rows], key_SK)
        score_bS = query_SE[rows] @ gallery_SE.T
        best_b1 = score_bS.masked_fill(~true_bS, -torch.inf).amax(dim=1, keepdim=True)
        least_b1 = best_b1 - TIE * longest * query_SE[rows].norm(dim=1, keepdim=True)
        parts.append(1 + ((score_bS >= least_b1) & ~true_bS).sum(dim=1))
    return torch.cat(parts)


def best_candidates(query_SE: Tensor, gallery_SE: Tensor, count: int) -> Tensor:
    """The positions (S, count) in the gallery of each query's best candidates; the first of equal ones comes first."""
    parts = [torch.zeros(0, min(count, len(gallery_SE)), dtype=torch.long)]
    for rows in blocks(max(len(query_SE), len(gallery_SE))):
        score_bS = query_SE[rows] @ gallery_SE.T
        parts.append(score_bS.sort(dim=1, descending=True, stable=True)[1][:, :count])
    return torch.cat(parts)


class RankTally(Tally):
    """The embeddings of a split, from which the rank of each true partner is found.

    Args:
        width: E. keys: K.
    """

    def __init__(self, samples: int, width: int, keys: int) -> None:
        self.main_SE, self.comp_SE = (torch.zeros(samples, width) for _ in range(2))
        self.key_SK = torch.zeros(samples, keys, dtype=torch.long)
        self._rank_S2: Tensor | None = None

    def add(
        self, index_B: Tensor, outputs_Bn: Tensor, targets: Tensor, thresholds: Thresholds = THRESHOLD, *, first: int = 0
    ) -> None:
        """See `Tally.add`; `targets` are (B, K)."""
        self.main_SE[index_B], self.comp_SE[index_B] = outputs_Bn.float().chunk(2, dim=-1)
        self.key_SK[index_B] = targets
        self._rank_S2 = None

    def sums(self) -> tuple[Tensor, ...]:
        """See `Tally.sums`."""
        self._rank_S2 = None
        return self.main_SE, self.comp_SE, self.key_SK

    def ranks(self) -> Tensor:
        """The rank (S, 2) of each sample's partner, in the order of `WAYS`."""
        if self._rank_S2 is None:
            both = (self.main_SE, self.comp_SE)
            each = [partner_ranks(query, gallery, self.key_SK) for query, gallery in (both, both[::-1])]
            self._rank_S2 = torch.stack(each, dim=1)
        return self._rank_S2

    def metrics(self, *, ranking: bool = True) -> dict[str, float]:
        """Compute the recall among the first 1, 5 and 10 candidates and the median rank, both ways; and the mean loss."""
        found = rank_metrics(self.ranks())
        each = [
            contrastive_loss(query_SE, gallery_SE, self.key_SK).double().mean()
            for query_SE, gallery_SE in ((self.main_SE, self.comp_SE), (self.comp_SE, self.main_SE))
        ]
        return found | {"loss": float(sum(each)) / 2}

    def by_sample(self) -> Tensor:
        """The negative logarithm of the rank of each sample (S,), averaged over both ways."""
        return -self.ranks().double().log().mean(dim=1)

    def per_label(self, labels: Sequence[str]) -> list[dict[str, Any]]:
        """Compute the metrics of each way."""
        found = self.metrics(ranking=False)
        names = ("recall_at_1", "recall_at_5", "recall_at_10", "median_rank")
        return [
            {"label": way, **{name: found[f"{name}_{way}"] for name in names}, "support": len(self.key_SK)} for way in WAYS
        ]


@dataclass(frozen=True)
class RankOutcome:
    """The rank of the partner of each test sample in one run, both ways; see `mopefuse.metrics.bootstrap.Outcome`.

    A sample that is drawn several times is a query several times; the candidates stay the same.
    """

    rank_S2: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int]:
        """(S, 2)."""
        samples, ways = self.rank_S2.shape
        return samples, ways

    def measure(self, metric: str, weights_RS: Floats) -> Floats:
        """The metric (R,) of resamples; `metric` is one of `MEASURES`."""
        return MEASURES[metric](self.rank_S2, weights_RS)


def _recall(limit: int, ways: Sequence[int]) -> Callable[[NDArray[np.int64], Floats], Floats]:
    """The share of queries whose partner is among the first `limit` candidates."""

    def measure(rank_S2: NDArray[np.int64], weights_RS: Floats) -> Floats:
        found_S = (rank_S2[:, list(ways)] <= limit).mean(axis=1)
        return np.asarray(weights_RS @ found_S / weights_RS.sum(axis=1))

    return measure


def _median(way: int) -> Callable[[NDArray[np.int64], Floats], Floats]:
    """The median rank; the lower one of two in the middle."""

    def measure(rank_S2: NDArray[np.int64], weights_RS: Floats) -> Floats:
        order_S = np.argsort(rank_S2[:, way], kind="stable")
        below_RS = np.cumsum(weights_RS[:, order_S], axis=1)
        middle_R = (2 * below_RS >= below_RS[:, -1:]).argmax(axis=1)
        return np.asarray(rank_S2[order_S[middle_R], way], dtype=np.float64)

    return measure


MEASURES: dict[str, Callable[[NDArray[np.int64], Floats], Floats]] = {
    **{f"recall_at_{limit}": _recall(limit, (0, 1)) for limit in (10, 5, 1)},
    **{f"recall_at_{limit}_{way}": _recall(limit, (number,)) for number, way in enumerate(WAYS) for limit in (10, 5, 1)},
    **{f"median_rank_{way}": _median(number) for number, way in enumerate(WAYS)},
}


def rank_metrics(rank_S2: Tensor) -> dict[str, float]:
    """All of `MEASURES`, of the ranks of the partners both ways."""
    outcome, once = RankOutcome(rank_S2.numpy()), np.ones((1, len(rank_S2)))
    return {name: float(outcome.measure(name, once)[0]) for name in MEASURES}
