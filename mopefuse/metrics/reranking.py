"""Ranks after a second model has scored the best candidates of each query again, and how much its scores count.

Only these candidates change their order; all others stay behind them. Nothing is re-ranked unless that is better on validation.

Shapes: S samples of the split, B queries of a block, E numbers of an embedding, K candidates of a query, k keys of a sample,
P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mopefuse.metrics.retrieval import TIE, best_candidates, blocks, partner_ranks, same_pair
from mopefuse.metrics.significance import difference_in_errors, exceeds_noise

WEIGHTS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""The weights of the second model's scores that are tried, besides 0."""


@dataclass(frozen=True)
class Shortlist:
    """The best candidates of each query, in one way of the search.

    Args:
        place_SK: their positions in the gallery, the best first. score_SK: their scores by the first stage.
        partner_SK: which of them are partners of the query.
        rank_S: the rank of the best partner among all samples by the first stage.
        tie_S1: difference of scores from which one candidate is better than another.
    """

    place_SK: Tensor
    score_SK: Tensor
    partner_SK: Tensor
    rank_S: Tensor
    tie_S1: Tensor

    def ranks(self, weight: float, odds_SK: Tensor) -> Tensor:
        """The rank (S,) of each query's best partner after re-ranking; equal scores count as errors.

        Args:
            weight: w of the score, first stage + w * odds. odds_SK: scores of the candidates by the second model.
        """
        if weight == 0:
            return self.rank_S
        score_SK = self.score_SK + weight * odds_SK
        best_S1 = score_SK.masked_fill(~self.partner_SK, -torch.inf).amax(dim=1, keepdim=True)
        ahead_S = ((score_SK >= best_S1 - self.tie_S1) & ~self.partner_SK).sum(dim=1)
        return torch.where(self.rank_S <= self.place_SK.shape[1], 1 + ahead_S, self.rank_S)

    def order(self, weight: float, odds_SK: Tensor) -> Tensor:
        """The positions (S, K) of the candidates in the gallery after re-ranking."""
        order_SK = (self.score_SK + weight * odds_SK).sort(dim=1, descending=True, stable=True)[1]
        return self.place_SK.gather(1, order_SK)


def shortlist(query_SE: Tensor, gallery_SE: Tensor, key_Sk: Tensor, count: int) -> Shortlist:
    """The `count` best candidates of each query among all samples."""
    place_SK, longest = best_candidates(query_SE, gallery_SE, count), gallery_SE.norm(dim=1).max()
    scores, partners = [], []
    for rows in blocks(len(query_SE)):
        scores.append((query_SE[rows] @ gallery_SE.T).gather(1, place_SK[rows]))
        partners.append(same_pair(key_Sk[rows], key_Sk).gather(1, place_SK[rows]))
    rank_S = partner_ranks(query_SE, gallery_SE, key_Sk)
    tie_S1 = TIE * longest * query_SE.norm(dim=1, keepdim=True)
    return Shortlist(place_SK, torch.cat(scores), torch.cat(partners), rank_S, tie_S1)


@dataclass(frozen=True)
class BothWays:
    """The shortlists of main to comp and of comp to main, and the pairs of which the second model has to score each once.

    Args:
        pair_P2: the sample that each pair has the main value of, and the one that it has the comp value of.
        number_2SK: for either way, the pair that each candidate forms with its query.
    """

    ways: tuple[Shortlist, Shortlist]
    pair_P2: Tensor
    number_2SK: Tensor

    @classmethod
    def find(cls, main_SE: Tensor, comp_SE: Tensor, key_Sk: Tensor, count: int) -> BothWays:
        """The `count` best candidates of each value."""
        ways = shortlist(main_SE, comp_SE, key_Sk, count), shortlist(comp_SE, main_SE, key_Sk, count)
        query_S1, samples = torch.arange(len(key_Sk))[:, None], len(key_Sk)
        code_2SK = torch.stack([query_S1 * samples + ways[0].place_SK, ways[1].place_SK * samples + query_S1])
        code_P, number_2SK = code_2SK.unique(return_inverse=True)
        return cls(ways, torch.stack([code_P // samples, code_P % samples], dim=1), number_2SK)

    def ranks(self, weight: float, odds_P: Tensor) -> Tensor:
        """The rank (S, 2) of each sample's partner after re-ranking, in the order of `mopefuse.metrics.retrieval.WAYS`."""
        both = zip(self.ways, odds_P[self.number_2SK], strict=True)
        return torch.stack([way.ranks(weight, odds_SK) for way, odds_SK in both], dim=1)

    def orders(self, weight: float, odds_P: Tensor) -> list[Tensor]:
        """The positions (S, K) of the candidates after re-ranking, both ways."""
        both = zip(self.ways, odds_P[self.number_2SK], strict=True)
        return [way.order(weight, odds_SK) for way, odds_SK in both]

    def choose_weight(self, odds_P: Tensor, weights: Sequence[float] = WEIGHTS) -> float:
        """The weight with the lowest mean log rank; 0 unless it is better than the first stage by more than noise.

        Only for a validation split.
        """
        score_WS = {weight: -self.ranks(weight, odds_P).double().log().mean(dim=1) for weight in (0.0, *weights)}
        best = max(score_WS, key=lambda weight: float(score_WS[weight].mean()))
        return best if exceeds_noise([difference_in_errors(score_WS[best], score_WS[0.0])]) else 0.0


def hard_negatives(query_SE: Tensor, gallery_SE: Tensor, key_Sk: Tensor, count: int) -> list[list[int]]:
    """For each query, the positions of its best candidates that are not partners of it: `count`, or all if there are fewer."""
    found: list[list[int]] = []
    for rows in blocks(max(len(query_SE), len(gallery_SE))):
        true_BS = same_pair(key_Sk[rows], key_Sk)
        score_BS = (query_SE[rows] @ gallery_SE.T).masked_fill(true_BS, -torch.inf)
        place_BK = score_BS.sort(dim=1, descending=True, stable=True)[1][:, :count]
        left_B = (~true_BS).sum(dim=1).tolist()
        found += [place_K[:left] for place_K, left in zip(place_BK.tolist(), left_B, strict=True)]
    return found
