"""Decoders of segmentation: from the tokens of several layers of an encoder, and features of a condition, to maps of classes.

`LinearDecoder` treats each place by itself; its last layer predicts a block of values for each token (pixel shuffle: Shi et
al., https://arxiv.org/abs/1609.05158). `PyramidDecoder` is a light feature pyramid on a plain transformer (Lin et al., FPN,
https://arxiv.org/abs/1612.03144), whose levels come from several layers of it. In both, the condition is added to the projected
tokens ahead of a nonlinearity, which equals a linear layer on the concatenation of tokens and condition.

Shapes: B batch, g and G rows and columns of the grid of tokens, D width of a layer, C width of a feature, W width of the
decoder, N classes, u values per token and side, h and w of a map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config.method_settings import Segmentation as Settings


class Decoder(nn.Module):
    """What the decoders share: projections of each level and of each feature.

    Args:
        widths: D of each level, the earliest layer first. conditions: C of each feature, by side. classes: N.
    """

    def __init__(self, settings: Settings, widths: Sequence[int], conditions: Mapping[str, int], classes: int) -> None:
        super().__init__()
        width = settings.width
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in widths)
        self.levels = nn.ModuleList(nn.Linear(size, width) for size in widths)
        self.features = nn.ModuleDict({side: nn.Linear(size, width, bias=False) for side, size in conditions.items()})
        self.dropout = nn.Dropout(settings.dropout)

    def project(self, maps_BgGD: Sequence[Tensor], features_BC: Mapping[str, Tensor]) -> list[Tensor]:
        """Project each level to (B, W, g, G), and add the projected features."""
        added = [self.features[side](feature_BC)[:, None, None] for side, feature_BC in features_BC.items()]
        found = []
        for norm, level, map_BgGD in zip(self.norms, self.levels, maps_BgGD, strict=True):
            projected_BgGW = level(norm(map_BgGD))
            for added_B11W in added:
                projected_BgGW = projected_BgGW + added_B11W
            found.append(projected_BgGW.movedim(-1, 1))
        return found


class LinearDecoder(Decoder):
    """A network with one hidden layer on the tokens of all levels at each place."""

    def __init__(self, settings: Settings, widths: Sequence[int], conditions: Mapping[str, int], classes: int) -> None:
        super().__init__(settings, widths, conditions, classes)
        self.upsample = settings.upsample
        self.out = nn.Linear(settings.width, classes * settings.upsample**2)

    def forward(self, maps_BgGD: Sequence[Tensor], features_BC: Mapping[str, Tensor]) -> Tensor:
        """Predict maps (B, N, u g, u G); levels with a coarser grid than the finest are enlarged."""
        levels = self.project(maps_BgGD, features_BC)
        size = max((tuple(level.shape[-2:]) for level in levels), key=lambda sides: sides[0] * sides[1])
        hidden = torch.stack([_enlarged(level, size) for level in levels]).sum(dim=0)
        hidden = self.dropout(F.gelu(hidden)).movedim(1, -1)
        return F.pixel_shuffle(self.out(hidden).movedim(-1, 1), self.upsample)


class PyramidDecoder(Decoder):
    """Adds the levels from the last to the first on ever finer grids, with a separable convolution after each sum.

    As in the feature pyramid of Lin et al., nothing between the levels and the sums is nonlinear.
    """

    def __init__(self, settings: Settings, widths: Sequence[int], conditions: Mapping[str, int], classes: int) -> None:
        super().__init__(settings, widths, conditions, classes)
        width = settings.width
        self.mixers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, width, 1)) for _ in widths
        )
        self.out = nn.Conv2d(width, classes, 1)

    def forward(self, maps_BgGD: Sequence[Tensor], features_BC: Mapping[str, Tensor]) -> Tensor:
        """Predict maps (B, N, h, w); with n levels of one grid, they are 2^(n-2) times as fine as it, at least as fine."""
        merged: Tensor | None = None
        for number, (level, mixer) in enumerate(zip(self.project(maps_BgGD, features_BC)[::-1], self.mixers, strict=True)):
            if merged is not None:
                scale = 2 if number > 1 else 1
                size = tuple(max(scale * mine, own) for mine, own in zip(merged.shape[-2:], level.shape[-2:], strict=True))
                level = _enlarged(merged, size) + _enlarged(level, size)
            merged = mixer(level)
        assert merged is not None
        maps: Tensor = self.out(self.dropout(F.gelu(merged)))
        return maps


DECODERS: dict[str, type[LinearDecoder] | type[PyramidDecoder]] = {"linear": LinearDecoder, "fpn": PyramidDecoder}


def _enlarged(map_BWgG: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(map_BWgG.shape[-2:]) == size:
        return map_BWgG
    return F.interpolate(map_BWgG, size=size, mode="bilinear", align_corners=False)
