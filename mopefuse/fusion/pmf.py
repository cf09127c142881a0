"""PMF: two frozen encoders that question one another in their last layers, by prompts with three separate tasks.

Li et al., Efficient Multimodal Fusion via Interactive Prompting, https://arxiv.org/abs/2304.06306.
Shapes: B batch, L tokens, Q query prompts, X query context prompts, P fusion context prompts, D width of a layer, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config.schema import Interactive, RunConfig
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoded, Encoder, Prompt
from mopefuse.errors import ConfigError
from mopefuse.fusion._static import initial_bound
from mopefuse.fusion.base import Fusion, Output


class FusionLayer(nn.Module):
    """What one layer of one encoder learns. Prompts of length 0 have no parameters.

    Args:
        width, heads: of the layer.
        other_width: of the other encoder's layer, that `mapping` leads to.
    """

    def __init__(
        self, lengths: Interactive, *, width: int, heads: int, other_width: int, hidden: int, bound: float, gated: bool
    ) -> None:
        super().__init__()

        def learned(count: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(count, width).uniform_(-bound, bound)) if count else None

        asks = lengths.queries > 0
        self.query_QD = learned(lengths.queries)
        self.query_context_XD = learned(lengths.query_context if asks else 0)
        self.fusion_context_PD = learned(lengths.fusion_context)
        self.mapping: nn.Sequential | None = None
        if asks:
            self.mapping = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, other_width))
        self.gate_H = nn.Parameter(torch.zeros(heads)) if gated else None


class PMF(Fusion):
    """In each fusion layer, of both encoders: a querying stage and a fusion stage; then a head on both pooled features.

    Querying: the frozen layer is run on [tokens; query prompts; query context prompts]. What it makes of the query prompts,
    mapped to the other's width by a bottleneck of two layers, is what the other encoder gets. Fusion: the layer is run on
    [tokens; fusion context prompts; what the other encoder gives], and the tokens alone go on.

    Equal to the paper's: the two stages, prompts of three kinds in both directions, new ones in each layer and none below,
    so that no gradient is kept there. All three kinds learn. Different: of the querying stage only the query prompts are
    computed, which is exact; the fusion stage's prompts are gated unless ``--gate none``; prompts start and drop out as those
    of other methods; one linear head reads both features, which lose their scale, instead of the mean of two heads. Encoders of
    other depths are aligned at their last layers. Limits: no fusion layer, or gates of 0, is `late-concat` of frozen encoders;
    no query prompt is `p-late-concat` with static prompts in the last layers; all to the bit.

    Raises:
        ConfigError: more fusion layers than an encoder has.
        EncoderError: an encoder that takes no tokens beside its own (`Encoder.insertable`).
    """

    parts: ClassVar[dict[str, str]] = {
        r"query_QD$": "query prompts",
        r"query_context_XD$": "query context prompts",
        r"fusion_context_PD$": "fusion context prompts",
        r"\.mapping\.": "mappings",
        r"gate_H$": "gates",
        **Fusion.parts,
    }
    sections: ClassVar[tuple[str, ...]] = ("prompts", "pmf")
    bonds: ClassVar[dict[str, str]] = {
        **Fusion.bonds,
        r"^stacks\.main\.\d+\.mapping\.0\.": "main features",
        r"^stacks\.comp\.\d+\.mapping\.0\.": "comp features",
        r"^stacks\.main\.\d+\.mapping\.2\.": "comp",
        r"^stacks\.comp\.\d+\.mapping\.2\.": "main",
        r"^stacks\.main\.": "main",
        r"^stacks\.comp\.": "comp",
    }

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        own = config.pmf
        self.depth = own.layers if own.queries + own.fusion_context else 0
        for side in self.uses:
            self._refuse(side)
        hidden = self.resolve(config).pmf.bottleneck
        assert hidden is not None
        self.dropout = nn.Dropout(config.prompts.dropout)
        self.stacks = nn.ModuleDict()
        for side, other in zip(self.uses, reversed(self.uses), strict=True):
            encoder = self.encoder(side)
            self.stacks[side] = nn.ModuleList(
                FusionLayer(
                    own,
                    width=encoder.widths[layer],
                    heads=encoder.heads[layer],
                    other_width=self.encoder(other).widths[layer],
                    hidden=hidden,
                    bound=config.prompts.init or initial_bound(encoder),
                    gated=config.prompts.gate == "zero",
                )
                for layer in range(-self.depth, 0)
            )
        self.frozen = () if self.depth else self.uses
        self.head = self.make_head(sum(self.encoder(side).feature_width for side in self.uses), num_labels)

    def _refuse(self, side: str) -> None:
        encoder = self.encoder(side)
        encoder.require_insertable(side)
        if self.depth > len(encoder.widths):
            problem = f"{self.depth} fusion layers, but {encoder.spec} has {len(encoder.widths)} layers"
            raise ConfigError(103, problem, where="pmf.layers", fix="fuse in fewer layers")

    def resolve(self, config: RunConfig) -> RunConfig:
        """`config` with the width of the bottleneck where none is given."""
        widest = max(width for side in self.uses for width in self.encoder(side).widths)
        hidden = config.pmf.bottleneck or max(1, widest // 2)
        return config.model_copy(update={"pmf": config.pmf.model_copy(update={"bottleneck": hidden})})

    def layer(self, side: str, at: int) -> FusionLayer:
        """What the fusion layer `at` of a side learns."""
        layer = self.stacks[side][at]  # type: ignore[index]
        assert isinstance(layer, FusionLayer)
        return layer

    def number(self, side: str, at: int) -> int:
        """The encoder's own number of the fusion layer `at`."""
        return len(self.encoder(side).widths) - self.depth + at

    def query(self, side: str, at: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Tensor | None:
        """The querying stage of a side: what the other one gets (B, Q, D of the other); None without query prompts.

        The query prompts are the layer's tokens here, and all else that they see is its prompt (`Encoder.run_layer`).
        """
        layer = self.layer(side, at)
        if layer.query_QD is None or layer.mapping is None:
            return None
        context = [] if layer.query_context_XD is None else [self.expanded(layer.query_context_XD, tokens_BLD)]
        query_BQD = self.expanded(layer.query_QD, tokens_BLD)
        real_BK = None if mask_BL is None else F.pad(mask_BL, (0, query_BQD.shape[1]), value=True)
        seen = Prompt(torch.cat([*context, tokens_BLD], dim=1))
        answer_BQD = self.encoder(side).run_layer(self.number(side, at), query_BQD, real_BK, seen)
        mapped_BQD: Tensor = layer.mapping(answer_BQD)
        return mapped_BQD

    def prompt(self, side: str, at: int, given_BQD: Tensor | None, tokens_BLD: Tensor) -> Prompt:
        """The fusion stage's prompt of a side, with what the other one gives."""
        layer = self.layer(side, at)
        parts = [] if layer.fusion_context_PD is None else [self.expanded(layer.fusion_context_PD, tokens_BLD)]
        parts += [] if given_BQD is None else [self.dropout(given_BQD).to(tokens_BLD.dtype)]
        return Prompt(torch.cat(parts, dim=1), layer.gate_H)

    def expanded(self, learned_PD: Tensor, tokens_BLD: Tensor) -> Tensor:
        """Learned prompts for each sample (B, P, D)."""
        dropped_BPD: Tensor = self.dropout(learned_PD.expand(tokens_BLD.shape[0], -1, -1))
        return dropped_BPD.to(tokens_BLD.dtype)

    def forward(self, batch: Batch) -> Output:
        """Logits (B, N)."""
        if not self.depth:
            return Output(self.classify(*(self.feature(side, batch) for side in self.uses)))
        main, comp = _Exchange(self, batch).run()
        return Output(self.classify(main.pooled_BC, comp.pooled_BC))


class _Exchange:
    """One batch on its way through both encoders, which need one another's tokens at every fusion layer.

    The complementary encoder runs while the main one waits ahead of its first fusion layer, and steps the main one's tokens
    forward with it, layer by layer. The main encoder then goes on with the prompts found. So its fusion layers run twice, but
    for the last, and no encoder has to be able to stop halfway.
    """

    def __init__(self, pmf: PMF, batch: Batch) -> None:
        self.pmf, self.batch = pmf, batch
        self.main: tuple[Tensor, Tensor | None]  # tokens that are to enter the next fusion layer, and their mask
        self.comp: Encoded
        self.prompts: list[Prompt] = []  # of the main encoder's fusion layers

    def run(self) -> tuple[Encoded, Encoded]:
        """What the main and the complementary encoder return."""
        main = self.pmf.encoder("main").encode(self.batch.inputs["main"], self._main_at)
        return main, self.comp

    def _main_at(self, layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt | None:
        at = layer - self.pmf.number("main", 0)
        if at == 0:
            self.main = tokens_BLD, mask_BL
            self.comp = self.pmf.encoder("comp").encode(self.batch.inputs["comp"], self._comp_at)
        return self.prompts[at] if at >= 0 else None

    def _comp_at(self, layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt | None:
        pmf, at = self.pmf, layer - self.pmf.number("comp", 0)
        if at < 0:
            return None
        main_BLD, real_BL = self.main
        of_main, of_comp = pmf.query("main", at, main_BLD, real_BL), pmf.query("comp", at, tokens_BLD, mask_BL)
        self.prompts.append(pmf.prompt("main", at, of_comp, main_BLD))
        if at + 1 < pmf.depth:
            number = pmf.number("main", at)
            self.main = pmf.encoder("main").run_layer(number, main_BLD, real_BL, self.prompts[at]), real_BL
        return pmf.prompt("comp", at, of_main, tokens_BLD)
