"""What the experts of a mixture are used for: how evenly, by which classes, and with which words.

Shapes: S samples of a split, L routed layers, K experts, N classes, V words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

UNUSED = 0.05
"""An expert below this share of an even load is unused, or dead."""

_PRIOR = 10.0  # words that the prior of `words_of_experts` is worth
_MOST_WORDS = 20_000
_NOTABLE = 1.96  # of a z-score: by chance in a word of forty
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")


def usage(load_LK: Tensor) -> Tensor:
    """Share of each expert of a layer (L, K), from weights summed over samples; rows sum to 1."""
    return load_LK / load_LK.sum(dim=-1, keepdim=True)


def entropy(share_LK: Tensor) -> Tensor:
    """Entropy of each row over that of an even one (L,): 1 is even, 0 a single expert; 1 for one expert."""
    experts = share_LK.shape[-1]
    if experts == 1:
        return torch.ones(share_LK.shape[:-1])
    return -(share_LK * share_LK.clamp(min=1e-12).log()).sum(dim=-1) / math.log(experts)


def variation(share_LK: Tensor) -> Tensor:
    """Coefficient of variation of the load of the experts of each layer (L,): 0 is even, sqrt(K - 1) a single expert."""
    return share_LK.std(dim=-1, correction=0) / share_LK.mean(dim=-1)


def unused(share_LK: Tensor) -> Tensor:
    """Which experts have less than `UNUSED` of an even load (L, K)."""
    return share_LK * share_LK.shape[-1] < UNUSED


def information(routing_SLK: Tensor) -> Tensor:
    """How much the choice of experts tells about the sample, in each layer (L,).

    The entropy of the mean weights less the mean entropy of the weights, over log K: 0 where all samples are routed alike,
    1 where each takes one expert and all experts are taken evenly.
    """
    return entropy(routing_SLK.mean(dim=0)) - entropy(routing_SLK).mean(dim=0)


def statistics(load_LK: Tensor) -> dict[str, Any]:
    """How evenly experts are used: what training logs at each validation.

    Returns:
        ``entropy`` and ``unused_share``, averaged over layers, and ``usage``, the share of each expert of each layer.
    """
    share_LK = usage(load_LK)
    return {
        "entropy": float(entropy(share_LK).mean()),
        "unused_share": float(unused(share_LK).float().mean()),
        "usage": [[round(share, 4) for share in row] for row in share_LK.tolist()],
    }


def by_class(weights_SK: Tensor, targets: Tensor, classes: int) -> Tensor:
    """Mean weight of each expert over the samples of each class (N, K); NaN for a class that no sample has.

    Args:
        targets: class indices (S,), or zeros and ones (S, N) where a sample may have several.
    """
    has_SN = torch.nn.functional.one_hot(targets, classes) if targets.ndim == 1 else targets
    has_SN = has_SN.to(weights_SK.dtype)
    return (has_SN.T @ weights_SK) / has_SN.sum(dim=0).unsqueeze(-1)


def words_of_experts(weights_SK: Tensor, texts: Sequence[str], *, most: int = 6) -> list[list[tuple[str, float]]]:
    """For each expert the words that its texts have more often than others, with the z-score of that.

    Log-odds ratio with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008, "Fightin' Words", section 3.5). A
    word counts once for each text that has it, with the expert's weight for the expert and with the rest of the weight
    against it; the prior is the frequency of words in all texts. Only what is above 1.96 is given.

    Returns:
        (word, z) of each expert, the highest first, at most `most`.
    """
    found = [sorted(set(_WORD.findall(text.lower()))) for text in texts]
    frequent = Counter(word for words in found for word in words).most_common(_MOST_WORDS)
    vocabulary = {word: number for number, (word, _) in enumerate(frequent)}
    if not vocabulary:
        return [[] for _ in range(weights_SK.shape[1])]
    rows = torch.tensor([row for row, words in enumerate(found) for word in words if word in vocabulary])
    columns = torch.tensor([vocabulary[word] for words in found for word in words if word in vocabulary])
    count_VK = torch.zeros(len(vocabulary), weights_SK.shape[1], dtype=torch.double)
    count_VK.index_add_(0, columns, weights_SK.double()[rows])
    z_VK = _log_odds(count_VK, columns.bincount(minlength=len(vocabulary)).double())
    names, order_VK = list(vocabulary), z_VK.argsort(dim=0, descending=True, stable=True)[:most]
    return [
        [(names[word], float(z_VK[word, expert])) for word in order_V if z_VK[word, expert] > _NOTABLE]
        for expert, order_V in enumerate(order_VK.T.tolist())
    ]


def _log_odds(count_VK: Tensor, total_V: Tensor) -> Tensor:
    """z-scores (V, K) of the log-odds of words with an expert against those without it."""
    prior_V1 = (_PRIOR * total_V / total_V.sum()).unsqueeze(-1)
    mine_VK, rest_VK = count_VK + prior_V1, (total_V.unsqueeze(-1) - count_VK).clamp(min=0) + prior_V1

    def odds(part_VK: Tensor) -> Tensor:
        return part_VK.log() - (part_VK.sum(dim=0) - part_VK).clamp(min=1e-12).log()

    return (odds(mine_VK) - odds(rest_VK)) / (1 / mine_VK + 1 / rest_VK).sqrt()
