"""FiLM: a condition scales and shifts what the attention of a layer reads.

Perez et al., arXiv 1709.07871; initialised to 0 as in adaLN-Zero (Peebles and Xie, arXiv 2212.09748), so that it starts as the
unchanged layer and needs no gate. It adds no tokens and no attention.

Shapes: B batch, h width of the trunk, D width of the layer, K experts.
"""

from __future__ import annotations

from torch import Tensor, nn

from mopefuse.config.schema import Prompts as PromptConfig


class Film(nn.Module):
    """Scale and shift of one layer from the trunk of a condition: a linear map, or a softmax mixture of linear maps."""

    def __init__(self, config: PromptConfig, width: int) -> None:
        super().__init__()
        self.experts, outputs = config.film_mixture, 2 * width
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(config.bottleneck, self.experts * outputs)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.weigh = nn.Linear(config.bottleneck, self.experts) if self.experts > 1 else None

    def forward(self, trunk_Bh: Tensor) -> Tensor:
        """Compute scale and shift side by side, (B, 2 * D)."""
        out: Tensor = self.output(self.dropout(trunk_Bh))
        if self.weigh is None:
            return out
        weights_BK = self.weigh(trunk_Bh).softmax(dim=-1)
        mixed: Tensor = weights_BK[:, None] @ out.unflatten(1, (self.experts, -1))
        return mixed.squeeze(1)
