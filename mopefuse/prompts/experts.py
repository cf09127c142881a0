"""A mixture of prompt experts: how an instance weighs the experts of every layer, and what keeps the load even.

Jiang et al., arXiv 2312.03734 (router `cross`), revised as MoPE, arXiv 2403.10568 (router `joint`). One object routes all
prompted layers, so that the scores of the `cross` router are one matrix product.
Shapes: B batch, N prompted layers, K experts, C conditioning width, D width of a layer, Q query width, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mopefuse.config.schema import Router as RouterConfig
from mopefuse.core.precision import exact


class Routed(NamedTuple):
    """Weights of the experts of one layer; rows sum to 1."""

    weights_BK: Tensor  # what the experts are mixed with
    clean_BK: Tensor  # without noise and before top-m: what the importance loss balances


class Router(nn.Module):
    """softmax(scores / temperature + noise) over the experts of each layer; see `RouterConfig` for the settings.

    Args:
        conditions: name of each condition to its width C. What they say is added up, each with an equal share at the start.
        widths: D of each prompted layer.
        experts: K. One expert needs no routing: its weight is 1 and the router has no parameters.
    """

    def __init__(self, config: RouterConfig, *, conditions: Mapping[str, int], widths: Sequence[int], experts: int) -> None:
        super().__init__()
        self.config, self.experts = config, experts
        self.joint = config.kind == "joint" and experts > 1
        self.others = nn.ParameterDict()  # of conditions beyond the first: what weight_NKC or of_comp_NQC is of that
        layers = len(widths)
        if experts == 1:
            return

        def drawn(rows: int, width: int) -> nn.Parameter:
            # Scores of conditions with unit variance start with a deviation of one temperature: far from saturated.
            spread = config.temperature / math.sqrt(width * len(conditions))
            return nn.Parameter(torch.randn(layers, rows, width) * spread)

        first, *rest = conditions
        if not self.joint:
            self.weight_NKC = drawn(experts, conditions[first])
            self.bias_NK = nn.Parameter(torch.zeros(layers, experts))
            self.others.update({name: drawn(experts, conditions[name]) for name in rest})
            return
        # Keys can be orthogonal only if the query is at least as wide as there are experts; a fifth of it (2 of 10 in the
        # released code) is the main modality's.
        query = max(10, experts)
        of_main = math.ceil(query / 5)
        self.of_comp_NQC = drawn(query - of_main, conditions[first])
        self.of_main = nn.ParameterList(
            nn.Parameter(torch.randn(of_main, d) * config.temperature / math.sqrt(d)) for d in widths
        )
        keys = torch.stack([torch.linalg.qr(torch.randn(query, experts))[0] for _ in range(layers)])
        self.register_buffer("keys_NQK", keys * math.sqrt(query / experts))
        self.keys_NQK: Tensor
        self.others.update({name: drawn(query - of_main, conditions[name]) for name in rest})

    def conditioned(self, conditions_BC: Sequence[Tensor]) -> Tensor:
        """What the conditions say of all layers at once: scores (B, N, K), or queries (B, N, Q) of the joint router.

        In float32 also under autocast: a tenth of a temperature's rounding would already move the weights.
        """
        first_BC = conditions_BC[0]
        if self.experts == 1:
            return first_BC.new_ones(first_BC.shape[0], 1, 1)
        with torch.autocast(first_BC.device.type, enabled=False):
            weights_NXC = (self.of_comp_NQC if self.joint else self.weight_NKC, *self.others.values())
            said_BNX = torch.einsum("bc,nxc->bnx", exact(first_BC), exact(weights_NXC[0]))
            for other_BC, weight_NXC in zip(conditions_BC[1:], weights_NXC[1:], strict=True):
                said_BNX = said_BNX + torch.einsum("bc,nxc->bnx", exact(other_BC), exact(weight_NXC))
            return said_BNX if self.joint else said_BNX + self.bias_NK

    def forward(self, said_BNX: Tensor, position: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Routed:
        """Route layer number `position` among the prompted ones.

        Args:
            said_BNX: from `conditioned`.
            tokens_BLD, mask_BL: what enters the layer; only the joint router looks at it, and only at real tokens.
        """
        if self.experts == 1:
            ones_BK = said_BNX[:, 0]
            return Routed(ones_BK, ones_BK)
        scores_BK = said_BNX[:, position]
        if self.joint:
            with torch.autocast(tokens_BLD.device.type, enabled=False):
                mean_BD = masked_mean(exact(tokens_BLD), mask_BL)
                mean_BD = nn.functional.layer_norm(mean_BD, mean_BD.shape[-1:])
                query_BQ = torch.cat([mean_BD @ exact(self.of_main[position]).T, scores_BK], dim=-1)
                scores_BK = query_BQ @ exact(self.keys_NQK[position])
        logits_BK = exact(scores_BK) / self.config.temperature
        clean_BK = logits_BK.softmax(dim=-1)
        weights_BK = clean_BK
        if self.config.noise and (self.training or self.config.noise_in_eval):
            weights_BK = (logits_BK + torch.randn_like(logits_BK) / self.experts).softmax(dim=-1)
        return Routed(keep_largest(weights_BK, self.config.top_m), clean_BK)


def masked_mean(tokens_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Mean of the real tokens, (B, D)."""
    if mask_BL is None:
        return tokens_BLD.mean(dim=1)
    mask_BL1 = mask_BL.to(tokens_BLD.dtype).unsqueeze(-1)
    return (tokens_BLD * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1).clamp(min=1)


def keep_largest(weights_BK: Tensor, m: int | None) -> Tensor:
    """Each row with all but its `m` largest weights set to 0, summing to 1 again; unchanged for None."""
    if m is None or m >= weights_BK.shape[-1]:
        return weights_BK
    largest, index = weights_BK.topk(m, dim=-1)
    return torch.zeros_like(weights_BK).scatter(-1, index, largest / largest.sum(dim=-1, keepdim=True))


def mix(weights_BK: Tensor, experts_KX: Tensor, m: int | None) -> Tensor:
    """Experts weighed and added up, (B, X): one matrix product, in which nothing of size B * K * X is ever made.

    Where at most `m` of many weights are not 0, only the experts that they belong to are read.
    """
    if m is None or m * 16 > experts_KX.shape[0]:
        return weights_BK @ experts_KX
    largest_BM, index_BM = weights_BK.topk(m, dim=-1)
    return (largest_BM[:, None] @ nn.functional.embedding(index_BM, experts_KX))[:, 0]


def importance_loss(load_NK: Tensor, threshold: float = 0.0) -> Tensor:
    """Mean over layers of the squared coefficient of variation of expert load.

    0 if the load is even, K - 1 if one expert takes all; a layer counts only above `threshold`.

    Args:
        load_NK: noise-free weights summed over the (global) batch, per layer.
    """
    squared_N = load_NK.var(dim=-1, correction=0) / load_NK.mean(dim=-1) ** 2
    return torch.where(squared_N > threshold, squared_N, 0.0).mean()
