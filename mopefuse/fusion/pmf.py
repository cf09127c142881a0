"""PMF: two frozen encoders query each other in their last layers, through prompts with three separate roles.

Li et al., Efficient Multimodal Fusion via Interactive Prompting, https://arxiv.org/abs/2304.06306.
Shapes: B batch, L tokens, Q query prompts, X query context prompts, P fusion context prompts, D width of a layer, H heads,
K keys of the querying stage (L + Q), N labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config.method_settings import Interactive
from mopefuse.config.schema import RunConfig
from mopefuse.core.error_codes import ConfigCode
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, EncoderOutput, Prompt
from mopefuse.errors import ConfigError
from mopefuse.fusion._static_prompts import initial_bound
from mopefuse.fusion.base import Fusion, Output


class FusionLayer(nn.Module):
    """Learned parameters of one layer of one encoder. Prompts of length 0 have no parameters.

    Args:
        width, heads: width and number of heads of the layer.
        other_width: width of the other encoder's layer, the output of `mapping`.
        hidden: width of the bottleneck of `mapping`.
        bound: prompts are initialised from U(-bound, bound).
    """

    def __init__(
        self, lengths: Interactive, *, width: int, heads: int, other_width: int, hidden: int, bound: float, gated: bool
    ) -> None:
        super().__init__()

        def random_prompt(length: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(length, width).uniform_(-bound, bound)) if length else None

        has_queries = lengths.queries > 0
        self.query_QD = random_prompt(lengths.queries)
        self.query_context_XD = random_prompt(lengths.query_context if has_queries else 0)
        self.fusion_context_PD = random_prompt(lengths.fusion_context)
        self.mapping: nn.Sequential | None = None
        if has_queries:
            self.mapping = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, other_width))
        self.gate_H = nn.Parameter(torch.zeros(heads)) if gated else None


class PMF(Fusion):
    """Runs a querying stage and a fusion stage in each fusion layer of both encoders; one head reads both pooled features.

    Querying: the frozen layer processes [tokens; query prompts; query context prompts]. Its output at the query prompts,
    mapped to the other encoder's width by a two-layer bottleneck, is passed to the other encoder. Fusion: the layer
    processes [tokens; fusion context prompts; tokens passed by the other encoder], and only the tokens are kept.

    As in the paper: both stages; prompts of three kinds, all trained, in both directions; separate prompts in each fusion
    layer and none below, so that no activations are kept there for the backward pass. Unlike the paper: the querying stage
    computes the query prompts only, which gives the same result; the fusion stage's prompts are gated unless ``--gate
    none``; initialisation and dropout of prompts are those of the other methods; one linear head on both normalised
    features replaces the mean of two heads. Encoders of different depths are aligned at their last layers. Limits: without
    fusion layers, or with gates of 0, it equals `late-concat` of frozen encoders; without query prompts it equals
    `p-late-concat` with static prompts in the last layers; both bit for bit.

    Raises:
        ConfigError: more fusion layers than an encoder has.
        EncoderError: an encoder that does not support inserted tokens (`Encoder.supports_inserted_tokens`).
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
    dependencies: ClassVar[dict[str, str]] = {
        **Fusion.dependencies,
        r"^stacks\.main\.\d+\.mapping\.0\.": "main features",
        r"^stacks\.comp\.\d+\.mapping\.0\.": "comp features",
        r"^stacks\.main\.\d+\.mapping\.2\.": "comp",
        r"^stacks\.comp\.\d+\.mapping\.2\.": "main",
        r"^stacks\.main\.": "main",
        r"^stacks\.comp\.": "comp",
    }

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        lengths = config.pmf
        self.depth = lengths.layers if lengths.queries + lengths.fusion_context else 0
        for side in self.uses:
            self._check_encoder(side)
        hidden = self.config.pmf.bottleneck
        assert hidden is not None
        self.dropout = nn.Dropout(config.prompts.dropout)
        self.stacks = nn.ModuleDict()
        for side, other in zip(self.uses, reversed(self.uses), strict=True):
            encoder = self.encoder(side)
            self.stacks[side] = nn.ModuleList(
                FusionLayer(
                    lengths,
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

    def _check_encoder(self, side: str) -> None:
        encoder = self.encoder(side)
        encoder.require_insertable(side)
        if self.depth > len(encoder.widths):
            what = f"{self.depth} fusion layers, but {encoder.spec} has {len(encoder.widths)} layers"
            raise ConfigError(
                ConfigCode.TOO_MANY_FUSION_LAYERS,
                what,
                where="pmf.layers",
                fix=f"set pmf.layers to {len(encoder.widths)} or less",
            )

    @classmethod
    def resolve(cls, config: RunConfig, encoders: Mapping[str, Encoder]) -> RunConfig:
        """Return `config` with the width of the bottleneck set."""
        widest = max((width for encoder in encoders.values() for width in encoder.widths), default=1)
        hidden = config.pmf.bottleneck or max(1, widest // 2)
        return config.model_copy(update={"pmf": config.pmf.model_copy(update={"bottleneck": hidden})})

    def fusion_layer(self, side: str, at: int) -> FusionLayer:
        """Learned parameters of fusion layer number `at` of a side."""
        layer = self.stacks[side][at]  # type: ignore[index]
        assert isinstance(layer, FusionLayer)
        return layer

    def encoder_layer(self, side: str, at: int) -> int:
        """Index of fusion layer number `at` among the layers of the encoder."""
        return len(self.encoder(side).widths) - self.depth + at

    def query(self, side: str, at: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Tensor | None:
        """Run the querying stage of a side.

        The query prompts are passed as the layer's tokens, and everything that they attend to as its prompt
        (`Encoder.run_layer`).

        Returns:
            Tokens for the other encoder (B, Q, its D); None without query prompts.
        """
        layer = self.fusion_layer(side, at)
        if layer.query_QD is None or layer.mapping is None:
            return None
        context = [] if layer.query_context_XD is None else [self.expand_prompt(layer.query_context_XD, tokens_BLD)]
        query_BQD = self.expand_prompt(layer.query_QD, tokens_BLD)
        mask_BK = None if mask_BL is None else F.pad(mask_BL, (0, query_BQD.shape[1]), value=True)
        attended = Prompt(torch.cat([*context, tokens_BLD], dim=1))
        out_BQD = self.encoder(side).run_layer(self.encoder_layer(side, at), query_BQD, mask_BK, attended)
        mapped_BQD: Tensor = layer.mapping(out_BQD)
        return mapped_BQD

    def fusion_prompt(self, side: str, at: int, passed_BQD: Tensor | None, tokens_BLD: Tensor) -> Prompt:
        """Build the fusion stage's prompt of a side: fusion context prompts and the tokens passed by the other side."""
        layer = self.fusion_layer(side, at)
        parts = [] if layer.fusion_context_PD is None else [self.expand_prompt(layer.fusion_context_PD, tokens_BLD)]
        parts += [] if passed_BQD is None else [self.dropout(passed_BQD).to(tokens_BLD.dtype)]
        return Prompt(torch.cat(parts, dim=1), layer.gate_H)

    def expand_prompt(self, learned_PD: Tensor, tokens_BLD: Tensor) -> Tensor:
        """Repeat a learned prompt for each sample, with dropout: (B, P, D)."""
        dropped_BPD: Tensor = self.dropout(learned_PD.expand(tokens_BLD.shape[0], -1, -1))
        return dropped_BPD.to(tokens_BLD.dtype)

    def forward(self, batch: Batch) -> Output:
        """Compute logits (B, N)."""
        if not self.depth:
            return Output(self.classify(*(self.pooled_feature(side, batch) for side in self.uses)))
        main, comp = _Exchange(self, batch).run()
        return Output(self.classify(main.pooled_BC, comp.pooled_BC))


class _Exchange:
    """The forward pass of one batch through both encoders, which need each other's tokens at every fusion layer.

    When the main encoder reaches its first fusion layer, the complementary encoder is run from within the callback; at each
    of its fusion layers it also advances the main encoder's tokens by one layer. The main encoder then continues with the
    prompts computed on the way. Its fusion layers except the last thus run twice, but no encoder needs to support
    suspending its forward pass.
    """

    def __init__(self, pmf: PMF, batch: Batch) -> None:
        self.pmf, self.batch = pmf, batch
        self.main: tuple[Tensor, Tensor | None]  # input tokens of the main encoder's next fusion layer, and their mask
        self.comp: EncoderOutput
        self.main_prompts: list[Prompt] = []  # one for each of the main encoder's fusion layers

    def run(self) -> tuple[EncoderOutput, EncoderOutput]:
        """Return the outputs of the main and the complementary encoder."""
        main = self.pmf.encoder("main").encode(self.batch.inputs["main"], self._prompt_main_at)
        return main, self.comp

    def _prompt_main_at(self, layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt | None:
        at = layer - self.pmf.encoder_layer("main", 0)
        if at == 0:
            self.main = tokens_BLD, mask_BL
            self.comp = self.pmf.encoder("comp").encode(self.batch.inputs["comp"], self._prompt_comp_at)
        return self.main_prompts[at] if at >= 0 else None

    def _prompt_comp_at(self, layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt | None:
        pmf, at = self.pmf, layer - self.pmf.encoder_layer("comp", 0)
        if at < 0:
            return None
        main_BLD, main_mask_BL = self.main
        from_main_BQD = pmf.query("main", at, main_BLD, main_mask_BL)
        from_comp_BQD = pmf.query("comp", at, tokens_BLD, mask_BL)
        self.main_prompts.append(pmf.fusion_prompt("main", at, from_comp_BQD, main_BLD))
        if at + 1 < pmf.depth:
            number = pmf.encoder_layer("main", at)
            next_BLD = pmf.encoder("main").run_layer(number, main_BLD, main_mask_BL, self.main_prompts[at])
            self.main = next_BLD, main_mask_BL
        return pmf.fusion_prompt("comp", at, from_main_BQD, tokens_BLD)
