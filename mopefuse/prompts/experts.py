"""A mixture of prompt experts: routes each sample to the experts of every layer, and balances their load.

Jiang et al., arXiv 2312.03734 (router `cross`), revised as MoPE, arXiv 2403.10568 (router `joint`). One router serves all
prompted layers, so that the scores of the `cross` router are a single matrix product.
Shapes: B batch, N prompted layers, K experts, C conditioning width, D width of a layer, Q query width, L tokens,
X experts (`cross`) or query components (`joint`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mopefuse.config.schema import Router as RouterConfig
from mopefuse.core.precision import to_float32


class Routed(NamedTuple):
    """Expert weights of one layer; rows sum to 1."""

    weights_BK: Tensor  # used to mix the experts
    clean_BK: Tensor  # without noise and before top-m; balanced by the importance loss


class Router(nn.Module):
    """Computes softmax(scores / temperature + noise) over the experts of each layer; see `RouterConfig` for the settings.

    Args:
        conditions: width C of each condition by name. Their scores are summed; at initialisation each contributes equally.
        widths: D of each prompted layer.
        experts: K. One expert needs no routing: its weight is 1 and the router has no parameters.
    """

    def __init__(self, config: RouterConfig, *, conditions: Mapping[str, int], widths: Sequence[int], experts: int) -> None:
        super().__init__()
        self.config, self.experts = config, experts
        self.joint = config.kind == "joint" and experts > 1
        self.others = nn.ParameterDict()  # counterparts of weight_NKC or of_comp_NQC for conditions beyond the first
        layers = len(widths)
        if experts == 1:
            return

        def random_weight(rows: int, width: int) -> nn.Parameter:
            # For conditions of unit variance, initial scores have a standard deviation of one temperature, which
            # keeps the softmax far from saturation.
            std = config.temperature / math.sqrt(width * len(conditions))
            return nn.Parameter(torch.randn(layers, rows, width) * std)

        first, *rest = conditions
        if not self.joint:
            self.weight_NKC = random_weight(experts, conditions[first])
            self.bias_NK = nn.Parameter(torch.zeros(layers, experts))
            self.others.update({name: random_weight(experts, conditions[name]) for name in rest})
            return
        # Keys can only be orthogonal if the query is at least as wide as the number of experts. As in the released code
        # (2 of 10), a fifth of the query comes from the main modality.
        query = max(10, experts)
        main_share = math.ceil(query / 5)
        self.of_comp_NQC = random_weight(query - main_share, conditions[first])
        self.of_main = nn.ParameterList(
            nn.Parameter(torch.randn(main_share, d) * config.temperature / math.sqrt(d)) for d in widths
        )
        keys = torch.stack([torch.linalg.qr(torch.randn(query, experts))[0] for _ in range(layers)])
        self.register_buffer("keys_NQK", keys * math.sqrt(query / experts))
        self.keys_NQK: Tensor
        self.others.update({name: random_weight(query - main_share, conditions[name]) for name in rest})

    def score_conditions(self, conditions_BC: Sequence[Tensor]) -> Tensor:
        """Compute the conditions' part of the routing for all layers at once.

        Runs in float32 even under autocast, because at a temperature of 0.1 rounding errors would change the weights.

        Returns:
            Scores (B, N, K), or for the joint router the conditions' part of the queries (B, N, Q).
        """
        first_BC = conditions_BC[0]
        if self.experts == 1:
            return first_BC.new_ones(first_BC.shape[0], 1, 1)
        with torch.autocast(first_BC.device.type, enabled=False):
            weights_NXC = (self.of_comp_NQC if self.joint else self.weight_NKC, *self.others.values())
            scores_BNX = torch.einsum("bc,nxc->bnx", to_float32(first_BC), to_float32(weights_NXC[0]))
            for other_BC, weight_NXC in zip(conditions_BC[1:], weights_NXC[1:], strict=True):
                scores_BNX = scores_BNX + torch.einsum("bc,nxc->bnx", to_float32(other_BC), to_float32(weight_NXC))
            return scores_BNX if self.joint else scores_BNX + self.bias_NK

    def forward(self, scores_BNX: Tensor, position: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Routed:
        """Route one layer.

        Args:
            scores_BNX: from `score_conditions`.
            position: index of the layer among the routed ones.
            tokens_BLD, mask_BL: input of the layer; used by the joint router only, which ignores padding.
        """
        if self.experts == 1:
            ones_BK = scores_BNX[:, 0]
            return Routed(ones_BK, ones_BK)
        scores_BK = scores_BNX[:, position]
        if self.joint:
            with torch.autocast(tokens_BLD.device.type, enabled=False):
                mean_BD = masked_mean(to_float32(tokens_BLD), mask_BL)
                mean_BD = nn.functional.layer_norm(mean_BD, mean_BD.shape[-1:])
                query_BQ = torch.cat([mean_BD @ to_float32(self.of_main[position]).T, scores_BK], dim=-1)
                scores_BK = query_BQ @ to_float32(self.keys_NQK[position])
        logits_BK = to_float32(scores_BK) / self.config.temperature
        clean_BK = logits_BK.softmax(dim=-1)
        weights_BK = clean_BK
        if self.config.noise and (self.training or self.config.noise_in_eval):
            weights_BK = (logits_BK + torch.randn_like(logits_BK) / self.experts).softmax(dim=-1)
        return Routed(keep_largest(weights_BK, self.config.top_m), clean_BK)


def masked_mean(tokens_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
    """Mean over the tokens that are not padding, (B, D)."""
    if mask_BL is None:
        return tokens_BLD.mean(dim=1)
    mask_BL1 = mask_BL.to(tokens_BLD.dtype).unsqueeze(-1)
    return (tokens_BLD * mask_BL1).sum(dim=1) / mask_BL1.sum(dim=1).clamp(min=1)


def keep_largest(weights_BK: Tensor, m: int | None) -> Tensor:
    """Zero all but the `m` largest weights of each row and renormalise it to sum to 1; None keeps all."""
    if m is None or m >= weights_BK.shape[-1]:
        return weights_BK
    largest, index = weights_BK.topk(m, dim=-1)
    return torch.zeros_like(weights_BK).scatter(-1, index, largest / largest.sum(dim=-1, keepdim=True))


def mix(weights_BK: Tensor, experts_KX: Tensor, m: int | None) -> Tensor:
    """Weighted sum of the experts (B, X), computed as one matrix product without a B x K x X intermediate.

    If at most `m` of many weights are nonzero, only the experts with nonzero weights are read.
    """
    if m is None or m * 16 > experts_KX.shape[0]:
        return weights_BK @ experts_KX
    largest_BM, index_BM = weights_BK.topk(m, dim=-1)
    return (largest_BM[:, None] @ nn.functional.embedding(index_BM, experts_KX))[:, 0]


def importance_loss(load_NK: Tensor, threshold: float = 0.0) -> Tensor:
    """Mean over layers of the squared coefficient of variation of the expert load.

    It is 0 if the load is balanced and K - 1 if a single expert gets all the weight.

    Args:
        load_NK: noise-free weights summed over the (global) batch, per layer.
        threshold: layers whose value is not above it contribute 0.
    """
    squared_N = load_NK.var(dim=-1, correction=0) / load_NK.mean(dim=-1) ** 2
    return torch.where(squared_N > threshold, squared_N, 0.0).mean()
