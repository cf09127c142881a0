"""Flamingo: tokens of the complementary encoders enter the frozen main encoder by gated cross-attention between its layers.

Alayrac et al., Flamingo: a Visual Language Model for Few-Shot Learning, https://arxiv.org/abs/2204.14198.

Shapes: B batch, L tokens of the main encoder, D width of its layer, T tokens of a complementary encoder, R tokens that are
read from all complementary encoders, W width of the attention, H heads, E width of one head, X any number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config.method_settings import Flamingo as Settings
from mopefuse.config.schema import RunConfig
from mopefuse.core.precision import apply_in_own_type
from mopefuse.data.base import Batch
from mopefuse.encoders.attention import split_heads
from mopefuse.encoders.base import Encoder, EncoderOutput, Prompt, run_frozen
from mopefuse.fusion.base import Fusion, Output
from mopefuse.fusion.collator import Requirements
from mopefuse.prompts.stack import select_layers


class Attention(nn.Module):
    """Multi-head attention of normalised tokens to others, without biases.

    Args:
        reader: width of the tokens that attend, and of the output. read: width of the tokens that they attend to.
        reads_itself: whether they also attend to one another; the widths are then equal.
    """

    def __init__(self, settings: Settings, reader: int, read: int, *, reads_itself: bool = False) -> None:
        super().__init__()
        self.heads, self.dropout, self.reads_itself = settings.heads, settings.dropout, reads_itself
        self.norm = nn.LayerNorm(reader)
        self.query = nn.Linear(reader, settings.width, bias=False)
        self.key_value = nn.Linear(read, 2 * settings.width, bias=False)
        self.output = nn.Linear(settings.width, reader, bias=False)

    def forward(self, x_BXD: Tensor, read_BRW: Tensor, mask_BR: Tensor) -> Tensor:
        """What `x_BXD` reads where the mask is True, (B, X, D); 0 in samples where it is True nowhere."""
        normed_BXD = self.norm(x_BXD)
        if self.reads_itself:
            read_BRW = torch.cat([read_BRW, normed_BXD.to(read_BRW.dtype)], dim=1)
            mask_BR = F.pad(mask_BR, (0, x_BXD.shape[1]), value=True)
        q_BHXE = split_heads(self.query(normed_BXD), self.heads)
        k_BHRE, v_BHRE = (split_heads(part, self.heads) for part in self.key_value(read_BRW).chunk(2, dim=-1))
        any_B1 = mask_BR.any(dim=1, keepdim=True)
        mask_B11R = (mask_BR | ~any_B1)[:, None, None]  # a softmax over no keys gives NaN
        dropout = self.dropout if self.training else 0.0
        seen_BHXE = F.scaled_dot_product_attention(q_BHXE, k_BHRE, v_BHRE, attn_mask=mask_B11R, dropout_p=dropout)
        out_BXD: Tensor = self.output(seen_BHXE.transpose(1, 2).flatten(2))
        return out_BXD * any_B1[..., None]


class FeedForward(nn.Sequential):
    """A network with one hidden layer on each normalised token, without biases."""

    def __init__(self, settings: Settings, width: int) -> None:
        hidden = settings.hidden
        super().__init__(
            nn.LayerNorm(width),
            nn.Linear(width, hidden, bias=False),
            nn.GELU(),
            nn.Dropout(settings.dropout),
            nn.Linear(hidden, width, bias=False),
        )


class Resampler(nn.Module):
    """Reduces the tokens of an encoder to a fixed number of tokens of width W, by learned queries in one or more layers.

    In each layer the queries attend to the tokens and to themselves, followed by a feed-forward network, each with a residual
    connection. With ``flamingo.resampled: 0``, the tokens themselves are projected to width W instead.
    """

    def __init__(self, settings: Settings, token_width: int) -> None:
        super().__init__()
        width, count = settings.width, settings.resampled
        self.norm_in, self.project = nn.LayerNorm(token_width), nn.Linear(token_width, width)
        self.query_RW = nn.Parameter(torch.randn(count, width)) if count else None
        depth = settings.resampler_layers if count else 0
        self.attentions = nn.ModuleList(Attention(settings, width, width, reads_itself=True) for _ in range(depth))
        self.feed_forwards = nn.ModuleList(FeedForward(settings, width) for _ in range(depth))
        self.norm_out = nn.LayerNorm(width)

    def forward(self, tokens_BTC: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Resampled tokens (B, R, W), and their mask (B, R)."""
        tokens_BTW = self.project(apply_in_own_type(self.norm_in, tokens_BTC))
        if self.query_RW is None:
            return apply_in_own_type(self.norm_out, tokens_BTW), mask_BT
        x_BRW = self.query_RW.expand(tokens_BTC.shape[0], -1, -1)
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            x_BRW = x_BRW + attention(x_BRW, tokens_BTW, mask_BT)
            x_BRW = x_BRW + feed_forward(x_BRW)
        return apply_in_own_type(self.norm_out, x_BRW), torch.ones_like(x_BRW[..., 0], dtype=torch.bool)


class GatedLayer(nn.Module):
    """What precedes one layer of the main encoder: cross-attention and a feed-forward network, each scaled by tanh(gate)."""

    def __init__(self, settings: Settings, width: int) -> None:
        super().__init__()
        self.attention = Attention(settings, width, settings.width)
        self.feed_forward = FeedForward(settings, width)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, tokens_BLD: Tensor, read_BRW: Tensor, mask_BR: Tensor) -> Tensor:
        """What is added to the tokens (B, L, D): 0 if both gates are 0."""
        attended_BLD = torch.tanh(self.attention_gate) * self.attention(tokens_BLD, read_BRW, mask_BR)
        processed_BLD = torch.tanh(self.feed_forward_gate) * self.feed_forward(tokens_BLD + attended_BLD)
        added_BLD: Tensor = attended_BLD + processed_BLD
        return added_BLD


class Flamingo(Fusion):
    """A gated layer precedes each chosen layer of the main encoder, whose pooled feature is classified.

    The gated layer adds to all tokens what they read by cross-attention to the output tokens of the complementary encoders,
    which a resampler reduces to ``flamingo.resampled`` tokens. All encoders are frozen; gradients pass through the main one.
    ``prompts.layers`` chooses the layers. With ``--head-features all`` the head also takes the complementary features.

    As in the paper: cross-attention and feed-forward network ahead of frozen layers, tanh gates that start at 0, a
    Perceiver resampler whose queries attend to the tokens and to themselves. Unlike the paper: a classifier of any
    two encoders instead of a language model that reads interleaved images, so that no token is hidden from another; one
    resampler layer instead of six, smaller widths, and dropout; the resampler projects the tokens to its width first.
    The attention to a modality that a sample lacks is left out, which gives 0 if it lacks all complementary ones. Limits: with
    gates of 0 it equals `main-only`, with ``--head-features all`` `late-concat`, bit for bit.

    Raises:
        ConfigError: `prompts.layers` names a layer that the main encoder does not have.
        EncoderError: the main encoder has no promptable layer, or a complementary encoder does not provide its tokens.
    """

    supports_multiple_comps: ClassVar[bool] = True
    sections: ClassVar[tuple[str, ...]] = ("head_features", "prompts", "flamingo")
    parts: ClassVar[dict[str, str]] = {
        r"^resamplers\.": "resamplers",
        r"^layers\..*_gate$": "gates",
        r"^layers\.\d+\.attention\.": "cross-attention",
        r"^layers\.\d+\.feed_forward\.": "feed-forward",
        **Fusion.parts,
    }
    dependencies: ClassVar[dict[str, str]] = {
        **Fusion.dependencies,
        r"^resamplers\.(\w+)\.(norm_in|project)\.": r"\1 features",
        r"^layers\.": "main",
    }

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders)
        main, settings = self.encoder("main"), config.flamingo
        main.require_promptable(fix="use it as --comp instead")
        self.comps = self.uses[1:]
        self.resamplers = nn.ModuleDict()
        for side in self.comps:
            comp = self.encoder(side)
            width = comp.require_tokens(fix="use a different encoder, or --method conditional")
            self.resamplers[side] = Resampler(settings, width)
        chosen = select_layers(config.prompts.layers, len(main.widths))
        self.layers = nn.ModuleDict({str(layer): GatedLayer(settings, main.widths[layer]) for layer in chosen})
        self.prefix_layers = {"main": chosen[0]} if chosen and chosen[0] else {}
        self.head = self.make_head(sum(self.encoder(side).feature_width for side in self.head_sides), num_labels)
        if len(self.head_sides) > 1:
            self.add_missing_embeddings(self.optional_sides)

    @property
    def head_sides(self) -> tuple[str, ...]:
        """The main encoder alone; every side with `head_features` all."""
        return self.uses if self.config.head_features == "all" else ("main",)

    @property
    def droppable_sides(self) -> tuple[str, ...]:
        """The complementary sides of other modalities than the main one."""
        return tuple(side for side in self.uses[1:] if self.encoder(side).modality != self.encoder("main").modality)

    @property
    def requirements(self) -> Requirements:
        """Which modalities a sample must have; ``--either`` does not help."""
        return replace(super().requirements, either_helps=False)

    def forward(self, batch: Batch) -> Output:
        """Compute logits (B, N)."""
        encoded = {side: run_frozen(self.encoder(side), batch.inputs[side]) for side in self.comps}
        read_BRW, mask_BR = self.resample(encoded, batch)

        def prompt_at(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt | None:
            if str(layer) not in self.layers:
                return None
            added_BLD = self.layers[str(layer)](tokens_BLD.to(read_BRW.dtype), read_BRW, mask_BR)
            return Prompt(tokens_BLD[:, :0], added_BLD=added_BLD)

        pooled_BC = self.encoder("main").encode(batch.inputs["main"], prompt_at, start=self.prefix("main", batch)).pooled_BC
        others = [encoded[side].pooled_BC for side in self.head_sides if side != "main"]
        return Output(self.classify(pooled_BC, *others, batch=batch))

    def resample(self, encoded: Mapping[str, EncoderOutput], batch: Batch) -> tuple[Tensor, Tensor]:
        """The tokens of all complementary sides that main tokens attend to (B, R, W), and their mask (B, R)."""
        every, masks = [], []
        for side, one in encoded.items():
            mask_BT = torch.ones_like(one.tokens_BLD[..., 0], dtype=torch.bool) if one.mask_BL is None else one.mask_BL
            read_BRW, mask_BR = self.resamplers[side](one.tokens_BLD, mask_BT)
            every.append(read_BRW)
            masks.append(mask_BR & ~batch.missing[side][:, None] if side in batch.missing else mask_BR)
        return torch.cat(every, dim=1), torch.cat(masks, dim=1)
