"""Routing statistics: how evenly the experts of a mixture are used, by which classes, and for which words.

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
"""An expert whose load is below this fraction of a balanced load is unused."""

_PRIOR = 10.0  # total pseudo-count of the prior of `words_of_experts`
_MAX_WORDS = 20_000
_NOTABLE = 1.96  # z-score that one word in forty exceeds by chance
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")


def usage(load_LK: Tensor) -> Tensor:
    """Fraction of the load of each expert in each layer (L, K), from weights summed over samples; rows sum to 1."""
    return load_LK / load_LK.sum(dim=-1, keepdim=True)


def entropy(share_LK: Tensor) -> Tensor:
    """Normalised entropy of each row (L,): 1 for a balanced load, 0 if one expert takes everything; 1 if K = 1."""
    experts = share_LK.shape[-1]
    if experts == 1:
        return torch.ones(share_LK.shape[:-1])
    return -(share_LK * share_LK.clamp(min=1e-12).log()).sum(dim=-1) / math.log(experts)


def variation(share_LK: Tensor) -> Tensor:
    """Coefficient of variation of the load in each layer (L,): 0 if balanced, sqrt(K - 1) if one expert takes everything."""
    return share_LK.std(dim=-1, correction=0) / share_LK.mean(dim=-1)


def unused(share_LK: Tensor) -> Tensor:
    """Which experts have less than `UNUSED` of a balanced load (L, K)."""
    return share_LK * share_LK.shape[-1] < UNUSED


def information(routing_SLK: Tensor) -> Tensor:
    """Normalised mutual information of sample and expert in each layer (L,).

    The entropy of the mean weights minus the mean entropy of the weights, divided by log K: 0 if all samples are routed
    alike, 1 if each sample uses a single expert and the load is balanced.
    """
    return entropy(routing_SLK.mean(dim=0)) - entropy(routing_SLK).mean(dim=0)


def statistics(load_LK: Tensor) -> dict[str, Any]:
    """Summarise the load, as training logs it at each validation.

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
    """Find the words that are most characteristic of each expert's texts.

    Log-odds ratio with an informative Dirichlet prior (Monroe, Colaresi and Quinn 2008, "Fightin' Words", section 3.5). A
    word counts once for each text that contains it: the expert's weight for the expert, and the remaining weight against it;
    the prior is the frequency of words in all texts. Only words with a z-score above 1.96 are returned.

    Returns:
        For each expert (word, z-score), highest first, at most `most`.
    """
    found = [sorted(set(_WORD.findall(text.lower()))) for text in texts]
    frequent = Counter(word for words in found for word in words).most_common(_MAX_WORDS)
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
    """z-scores (V, K) of the log-odds of words with an expert compared to those without it."""
    prior_V1 = (_PRIOR * total_V / total_V.sum()).unsqueeze(-1)
    with_VK, without_VK = count_VK + prior_V1, (total_V.unsqueeze(-1) - count_VK).clamp(min=0) + prior_V1

    def odds(part_VK: Tensor) -> Tensor:
        return part_VK.log() - (part_VK.sum(dim=0) - part_VK).clamp(min=1e-12).log()

    return (odds(with_VK) - odds(without_VK)) / (1 / with_VK + 1 / without_VK).sqrt()
