"""Fusion methods for segmentation: a decoder on the tokens of several layers of the main encoder.

`DenseConditional` prompts the main encoder with the complementary modality, as `mopefuse.fusion.conditional` does. The others
leave it untouched: they are what prompts have to be better than. All have the same decoder (`mopefuse.fusion.decoder`).

Shapes: B batch, L tokens, g and G rows and columns of their grid, D width of a layer, C width of psi, N classes, h and w of a
map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config.method_settings import CrossAttention as AttentionSettings
from mopefuse.config.schema import RunConfig
from mopefuse.core.error_codes import ConfigCode, EncoderCode
from mopefuse.core.precision import apply_in_own_type, normalize_feature, to_float32, weight_type
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, EncoderOutput, Prompt, PromptAt
from mopefuse.errors import ConfigError, EncoderError
from mopefuse.fusion.base import Fusion, Output
from mopefuse.fusion.conditional import ConditionalFusion
from mopefuse.fusion.decoder import DECODERS
from mopefuse.modalities.base import get_modality

LR = 2e-3
"""Default learning rate of a decoder; see "Digit masks" in docs/results.md."""
_LEVELS = 4
_MAX_LEADING = 16  # tokens ahead of the patches


class Tap:
    """A ``prompt_at`` that keeps the tokens that enter some layers.

    Args:
        prompt_at: provides the prompts; None for no prompts. layers: the layers whose input is kept.
    """

    def __init__(self, prompt_at: PromptAt | None, layers: Sequence[int]) -> None:
        self.prompt_at, self.layers = prompt_at, layers
        self.kept: dict[int, Tensor] = {}

    def __call__(self, layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt | None:
        """See `mopefuse.encoders.base.PromptAt`."""
        if layer in self.layers:
            self.kept[layer] = tokens_BLD
        return None if self.prompt_at is None else self.prompt_at(layer, tokens_BLD, mask_BL)


class DenseFusion(Fusion):
    """A decoder on the frozen main encoder and the pooled features of the others, if there are any (`uses`).

    Every place sees its own tokens and psi. Images are not cropped: they are stretched to the input size of the encoder.

    Raises:
        ConfigError: the main encoder does not read images; `either`.
        EncoderError: its tokens do not form a grid.
    """

    whole_images: ClassVar[bool] = True
    supports_multiple_comps: ClassVar[bool] = True
    sections: ClassVar[tuple[str, ...]] = ("segmentation",)
    parts: ClassVar[dict[str, str]] = {r"^decoder\.": "decoder", **Fusion.parts}
    dependencies: ClassVar[dict[str, str]] = {
        **Fusion.dependencies,
        r"^decoder\.(norms|levels)\.": "main",
        r"^decoder\.features\.(\w+)\.": r"\1 features",
    }

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        self.set_up_decoder(num_labels)
        self.frozen = self.uses[1:]
        self.prefix_layers = {"main": self.levels[0]} if self.levels else {}
        self.add_missing_embeddings([side for side in self.optional_sides if side != "main"])

    @classmethod
    def resolve(cls, config: RunConfig, encoders: Mapping[str, Encoder]) -> RunConfig:
        """Return `config` with the learning rate of a decoder, if none is given."""
        config = super().resolve(config, encoders)
        train = config.train if config.train.lr is not None else config.train.model_copy(update={"lr": LR})
        return config.model_copy(update={"train": train})

    def set_up_decoder(self, num_labels: int) -> None:
        """Add the decoder, the first level of which is the earliest layer."""
        main, settings = self.encoder("main"), self.config.segmentation
        if not get_modality(main.modality).is_picture:
            what = f"{main.spec} reads {main.modality}, and masks are of images"
            raise ConfigError(ConfigCode.MAIN_WITHOUT_GRID, what, where="--main", fix="use an image encoder as --main")
        if self.config.either:
            what = "a mask needs an image, which --either makes optional"
            raise ConfigError(ConfigCode.MAIN_NOT_OPTIONAL, what, where="--either", fix="remove --either")
        count = len(main.widths)
        chosen = settings.layers or tuple(count * part // _LEVELS for part in range(1, _LEVELS))
        self.levels = tuple(sorted({layer for layer in chosen if 0 < layer < count}))
        if settings.layers and len(self.levels) < len(settings.layers):
            what = f"the decoder takes the input of layers 1 to {count - 1}, got {list(settings.layers)}"
            raise ConfigError(ConfigCode.LAYER_OUT_OF_RANGE, what, where="segmentation.layers", fix="use layers in this range")
        widths = [*(main.widths[layer] for layer in self.levels), main.require_tokens(fix="use a ViT as --main")]
        features = {side: self.encoder(side).feature_width for side in self.uses[1:]}
        self.head = nn.Identity()
        self.decoder = DECODERS[settings.decoder](settings, widths, features, num_labels)

    @property
    def heads(self) -> dict[str, tuple[str, ...]]:
        """None: a decoder takes the place of a head on pooled features."""
        return {}

    def learning_rate_group(self, name: str) -> str:
        """See `Fusion.learning_rate_group`; a decoder learns as a head does."""
        return "head" if name.startswith(("decoder.", "place_readers.")) else super().learning_rate_group(name)

    def encode_main(self, batch: Batch, prompt_at: PromptAt | None = None) -> tuple[Tap, EncoderOutput]:
        """Run the main encoder, and keep the tokens that the decoder takes."""
        tap, main = Tap(prompt_at, self.levels), self.encoder("main")
        return tap, main.encode(batch.inputs["main"], tap if main.widths else None, start=self.prefix("main", batch))

    def grids(self, tap: Tap, encoded: EncoderOutput) -> list[Tensor]:
        """The levels (B, g, G, D) of the decoder.

        Raises:
            EncoderError: tokens do not form a grid.
        """
        main = self.encoder("main")
        height, width = main.preprocess.describe()["size"]
        levels = [*(tap.kept[layer] for layer in self.levels), encoded.tokens_BLD]
        return [to_float32(_as_grid(level, main, height / width)) for level in levels]

    def forward(self, batch: Batch) -> Output:
        """Compute maps (B, N, h, w)."""
        with torch.no_grad():
            tap, encoded = self.encode_main(batch)
        return Output(self.decode(self.grids(tap, encoded), self.conditions(batch)))

    def conditions(self, batch: Batch) -> dict[str, Tensor]:
        """The normalised pooled feature (B, C) of each complementary side, replaced where it is missing."""
        normed = {side: normalize_feature(self.pooled_feature(side, batch)) for side in self.uses[1:]}
        return {side: self.replace_missing(side, normed_BC, batch) for side, normed_BC in normed.items()}

    def decode(self, maps_BgGD: Sequence[Tensor], features_BC: Mapping[str, Tensor]) -> Tensor:
        """Maps (B, N, h, w) of the decoder, in float32."""
        own = weight_type(self.decoder)
        with torch.autocast(maps_BgGD[0].device.type, enabled=False):
            levels = [level.to(own) for level in maps_BgGD]
            maps: Tensor = self.decoder(levels, {side: feature_BC.to(own) for side, feature_BC in features_BC.items()})
        return maps


class DenseMain(DenseFusion):
    """A decoder on the frozen main encoder alone."""

    uses = ("main",)


class DenseConcat(DenseFusion):
    """A decoder on the frozen main encoder with the pooled features of the others at every place."""


class DenseCrossAttention(DenseFusion):
    """Each place also attends to the output tokens of the complementary encoders, ahead of the decoder.

    Attention is that of Vaswani et al., https://arxiv.org/abs/1706.03762, with the tokens of the last level as queries; what is
    read is added to them, as in encoder-decoder attention. Both encoders are frozen.
    """

    sections: ClassVar[tuple[str, ...]] = ("segmentation", "cross_attention")
    parts: ClassVar[dict[str, str]] = {r"^place_readers\.": "cross-attention", **DenseFusion.parts}
    dependencies: ClassVar[dict[str, str]] = {**DenseFusion.dependencies, r"^place_readers\.": "main"}

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders, num_labels)
        fix = "use --method late-concat, or a different encoder as --comp"
        widths = {side: self.encoder(side).require_tokens(fix=fix, where="--comp") for side in self.uses[1:]}
        width, attention = self.encoder("main").token_width, config.cross_attention
        self.place_readers = nn.ModuleDict({side: _PlaceReader(attention, width, size) for side, size in widths.items()})
        self.reads_tokens = self.uses[1:]

    def forward(self, batch: Batch) -> Output:
        """Compute maps (B, N, h, w)."""
        with torch.no_grad():
            tap, encoded = self.encode_main(batch)
        levels = self.grids(tap, encoded)
        for side, reader in self.place_readers.items():
            _, values_BLD, mask_BL = self.feature_and_tokens(side, batch)
            read_BgGD = reader(levels[-1], values_BLD, mask_BL)
            if side in batch.missing:
                read_BgGD = read_BgGD.masked_fill(batch.missing[side][:, None, None, None], 0.0)
            levels[-1] = levels[-1] + read_BgGD
        return Output(self.decode(levels, self.conditions(batch)))


class _PlaceReader(nn.Module):
    """Multi-head attention of places (B, g, G, D) to the tokens of a text."""

    def __init__(self, settings: AttentionSettings, width: int, token_width: int) -> None:
        super().__init__()
        self.heads, self.dropout = settings.heads, settings.dropout
        self.norm, self.query = nn.LayerNorm(width), nn.Linear(width, settings.width)
        self.key, self.value = (nn.Linear(token_width, settings.width) for _ in range(2))
        self.out = nn.Linear(settings.width, width)

    def forward(self, places_BgGD: Tensor, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        """What each place reads (B, g, G, D)."""
        normed_BPD = apply_in_own_type(self.norm, places_BgGD.flatten(1, 2))
        projected = (
            apply_in_own_type(layer, x)
            for layer, x in ((self.query, normed_BPD), (self.key, tokens_BLD), (self.value, tokens_BLD))
        )
        q, k, v = (one.unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in projected)
        mask = None if mask_BL is None else mask_BL[:, None, None]
        read = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0)
        out: Tensor = apply_in_own_type(self.out, read.transpose(1, 2).flatten(2))
        grid: Tensor = to_float32(out).unflatten(1, places_BgGD.shape[1:3])
        return grid


class DenseConditional(DenseFusion, ConditionalFusion):
    """The decoder of `DenseConcat` on a main encoder whose layers are prompted by the complementary modality.

    Prompts, FiLM, router, gates and tuning of the complementary encoder are those of `ConditionalFusion`. Limit: with gates of
    0, or without prompts, it is `DenseConcat`. Patches are not dropped, and there is no warm start.
    """

    sections: ClassVar[tuple[str, ...]] = ("segmentation", "prompts", "router", "comp_tuning")
    parts: ClassVar[dict[str, str]] = {r"^decoder\.": "decoder", **ConditionalFusion.parts}
    dependencies: ClassVar[dict[str, str]] = {**ConditionalFusion.dependencies, **DenseFusion.dependencies}

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        ConditionalFusion.__init__(self, config, encoders, num_labels)
        self.set_up_decoder(num_labels)
        if self.config.comp_tuning.mode == "frozen":  # the decoder takes psi even if the prompts do not
            self.reads, self.frozen = self.uses, self.comps
        absent = [side for side in self.optional_sides if side != "main" and side not in self.absent]
        self.add_missing_embeddings(absent)
        first = min([*map(int, self.stack.layers), *self.levels], default=0)
        self.prefix_layers = {"main": first} if first and not self.encoder("main").trainable else {}

    @classmethod
    def resolve(cls, config: RunConfig, encoders: Mapping[str, Encoder]) -> RunConfig:
        """Fill in the defaults of prompts and router, and switch off what only a classifier has."""
        prompts = config.prompts.model_copy(update={"token_dropout": 0.0})
        own = {"prompts": prompts, "head_features": "main", "head_hidden": 0, "head_dropout": None, "warm_start": "none"}
        return super().resolve(config.model_copy(update=own), encoders)

    def forward(self, batch: Batch) -> Output:
        """Compute maps (B, N, h, w), and the routing of each routed layer."""
        conditioned, conditions_BC, _ = self.condition(batch)
        tap, encoded = self.encode_main(batch, conditioned)
        logits = self.decode(self.grids(tap, encoded), conditions_BC)
        return Output(logits, conditioned.routing() if conditioned else None)


def _as_grid(tokens_BLD: Tensor, encoder: Encoder, ratio: float) -> Tensor:
    """Arrange the patches among the tokens of an encoder as a grid (B, g, G, D).

    Args:
        ratio: height over width of the encoder's input.
    """
    length = tokens_BLD.shape[1]
    leading = range(_MAX_LEADING) if encoder.leading_tokens is None else (encoder.leading_tokens,)
    for first in leading:
        rows = round(((length - first) * ratio) ** 0.5)
        columns = (length - first) // max(1, rows)
        if rows * columns == length - first and abs(rows / max(1, columns) - ratio) < 0.3 * ratio:
            grid: Tensor = tokens_BLD[:, first:].unflatten(1, (rows, columns))
            return grid
    what = f"the {length} tokens of {encoder.spec} do not form a grid"
    raise EncoderError(EncoderCode.UNSUITABLE, what, where="--main", fix="use a ViT or a Swin as --main")
