"""Retrieval with two towers: each side is embedded by itself, and the score of a pair is the dot product of its embeddings.

* `linear` projects the pooled features of the frozen encoders: the simplest model, and the one that others must beat.
* `conditional` projects similarities to training rows, which starts fitted (`mopefuse.fusion.projection_fit`), and prompts the
  main encoder with static prompts. A later step is selected only if it is better on validation by more than noise.

Both are trained with the contrastive loss of `mopefuse.tasks.retrieval` and a learned scale of the scores.

Shapes: B batch, C width of a pooled feature, E numbers of an embedding, N = 2 E outputs, M landmarks, S samples.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mopefuse.config.encoder_sides import is_comp, specs
from mopefuse.config.schema import RunConfig
from mopefuse.core.error_codes import ConfigCode
from mopefuse.core.precision import apply_without_autocast, to_float32
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder
from mopefuse.errors import ConfigError
from mopefuse.fusion._static_prompts import build_static_stack, initial_bound
from mopefuse.fusion.base import Fusion, Output
from mopefuse.fusion.projection_fit import KERNELS, Landmarks, Projection, fit_projection
from mopefuse.fusion.regression import Advance, FitSettings, Fitted, Fold, standard_state
from mopefuse.prompts.stack import fill_prompt_lengths

SIDES = ("main", "comp")
_START, _HIGHEST = 10.0, 100.0  # scale of the scores at the start, and at most
_FIT_ROWS, _VAL_ROWS = 20_000, 2_000  # rows that a fit uses at most


class Towers(Fusion):
    """Base of retrieval methods, which implement `embed`.

    Raises:
        ConfigError: several complementary encoders, two of the same modality, or `either`.
    """

    sections: ClassVar[tuple[str, ...]] = ("retrieval",)
    parts: ClassVar[dict[str, str]] = {**Fusion.parts, r"^head\.": "projections", r"^log_scale$": "scale"}

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        if config.either:
            what = "rows are pairs, so none can lack the main modality"
            raise ConfigError(ConfigCode.MAIN_NOT_OPTIONAL, what, where="--either", fix="remove --either")
        if len({encoders[side].modality for side in SIDES}) == 1:
            what = f"main and comp both read {encoders['main'].modality}, and a search needs two modalities"
            raise ConfigError(ConfigCode.ONE_MODALITY, what, where="--comp", fix="use an encoder of the other modality")
        super().__init__(config, encoders)
        self.width = num_labels // 2
        self.standardise_features()
        self.log_scale = nn.Parameter(torch.tensor(math.log(_START)))

    @classmethod
    def sides(cls, config: RunConfig) -> tuple[str, ...]:
        """Main and one complementary side."""
        count = sum(is_comp(side) for side in specs(config))
        if count > 1:
            what = f"a pair has one complementary value, got {count} encoders"
            raise ConfigError(ConfigCode.TOO_MANY_ENCODERS, what, where="--comp", fix="pass --comp once")
        return SIDES

    @abstractmethod
    def embed(self, side: str, batch: Batch) -> Tensor:
        """The embeddings (B, E) of the values of a side, of any length; the batch needs no values of the other side."""

    def directions(self, side: str, batch: Batch) -> Tensor:
        """`embed` with length 1, in float32."""
        return F.normalize(to_float32(self.embed(side, batch)), dim=-1)

    @property
    def scale(self) -> Tensor:
        """The scale of the cosines in the scores."""
        return self.log_scale.clamp(max=math.log(_HIGHEST)).exp()

    def forward(self, batch: Batch) -> Output:
        """The scaled embeddings of main and those of comp (B, N)."""
        return Output(torch.cat([self.scale * self.directions("main", batch), self.directions("comp", batch)], dim=-1))

    def standardised(self, side: str, pooled_BC: Tensor) -> Tensor:
        """Standardise the pooled features (B, C) of a side."""
        assert self.standard is not None
        feature_BC: Tensor = self.standard[side](pooled_BC)
        return feature_BC


class LinearRetrieval(Towers):
    """Linear projections of standardised frozen features, trained by steps."""

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders, num_labels)
        self.frozen, dropout = self.uses, config.retrieval.dropout
        self.head = nn.ModuleDict(
            {
                side: nn.Sequential(nn.Dropout(dropout), nn.Linear(self.encoder(side).feature_width, self.width))
                for side in SIDES
            }
        )

    def embed(self, side: str, batch: Batch) -> Tensor:
        """See `Towers.embed`."""
        assert isinstance(self.head, nn.ModuleDict)
        return apply_without_autocast(self.head[side], self.standardised(side, self.pooled_feature(side, batch)))


class ConditionalRetrieval(Towers):
    """Projections of similarities to training rows, which start fitted, and static prompts in the main encoder.

    Limits: without prompts, and at step 0, it is kernel canonical correlation analysis of the frozen features.

    Raises:
        EncoderError: the main encoder has no promptable layer.
    """

    parts: ClassVar[dict[str, str]] = {
        r"^stack\..*static_SD$": "static prompts",
        r"^stack\..*gate_H$": "gates",
        **Towers.parts,
    }
    sections: ClassVar[tuple[str, ...]] = ("retrieval", "prompts")

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder], num_labels: int) -> None:
        super().__init__(config, encoders, num_labels)
        self.starts_fitted = True
        main, prompts, count = self.encoder("main"), self.config.prompts, self.config.retrieval.landmarks
        main.require_promptable(fix="use it as --comp instead, or --method linear")
        self.stack = build_static_stack(prompts, main)
        prompted = bool(len(self.stack.layers))
        self.frozen = ("comp",) if prompted else self.uses
        first = min(map(int, self.stack.layers), default=0)
        self.prefix_layers = {"main": first} if first else {}
        self.head = nn.ModuleDict({side: self._tower(side, count) for side in SIDES})

    def _tower(self, side: str, count: int) -> nn.Sequential:
        landmarks = Landmarks(self.encoder(side).feature_width, count)
        return nn.Sequential(landmarks, nn.Dropout(self.config.retrieval.dropout), nn.Linear(count, self.width))

    @classmethod
    def resolve(cls, config: RunConfig, encoders: Mapping[str, Encoder]) -> RunConfig:
        """Return `config` with unset prompt lengths and initial bound replaced by the papers'."""
        main = encoders["main"]
        if not main.widths:
            return config
        prompts = fill_prompt_lengths(config.prompts, main.modality)
        return config.model_copy(update={"prompts": prompts.model_copy(update={"init": prompts.init or initial_bound(main)})})

    @property
    def prompt_kinds(self) -> tuple[str, ...]:
        """The kinds of prompts that the main encoder has: static, or none."""
        return self.stack.kinds

    def without_prompts(self, kind: str) -> AbstractContextManager[None]:
        """Disable the main encoder's prompts within the context."""
        return self.stack.without_prompts(kind)

    def embed(self, side: str, batch: Batch) -> Tensor:
        """See `Towers.embed`."""
        if side in self.frozen:
            pooled_BC = self.pooled_feature(side, batch)
        else:
            start = self.prefix(side, batch)
            pooled_BC = self.encoder(side).encode(batch.inputs[side], self.stack.condition({}), start=start).pooled_BC
        assert isinstance(self.head, nn.ModuleDict)
        return apply_without_autocast(self.head[side], self.standardised(side, pooled_BC))

    def fit(self, train: Fold, val: Fold, how: FitSettings, advance: Advance) -> Fitted:
        """Fit the projections on the features of the frozen encoders; see `Fusion.fit`."""
        # 1. Standardised features of both sides, of some rows if there are very many.
        known = {side: train.statistics(side) for side in SIDES}
        draw = torch.Generator().manual_seed(self.config.seed)
        train_S = torch.randperm(len(train.targets), generator=draw)[:_FIT_ROWS]
        val_S = torch.randperm(len(val.targets), generator=draw)[:_VAL_ROWS]
        of_train = {side: _standardised(train, side, known[side], train_S) for side in SIDES}
        of_val = {side: _standardised(val, side, known[side], val_S) for side in SIDES}
        # 2. The kernel and the projections with the lowest loss on validation.
        key_SK = val.targets[val_S]
        best: tuple[float, dict[str, Landmarks], Projection] | None = None
        for number, sharpness in enumerate(KERNELS):
            advance(f"projections, kernel {sharpness:g}", number / len(KERNELS))
            towers = {side: self._landmarks(of_train[side], sharpness) for side in SIDES}
            train_pair, val_pair = ((towers["main"](one["main"]), towers["comp"](one["comp"])) for one in (of_train, of_val))
            loss = lambda outputs_SN: how.task.loss(outputs_SN, key_SK).mean()  # noqa: E731
            found = fit_projection(train_pair, val_pair, self.width, loss)
            if best is None or found.loss < best[2].loss:
                best = sharpness, towers, found
        assert best is not None
        # 3. The state of the model.
        sharpness, towers, found = best
        state = standard_state(known) | {"log_scale": torch.tensor(found.scale).log()}
        for side, weight_EM, bias_E in zip(SIDES, found.weights_EM, found.biases_E, strict=True):
            state |= self._tower_state(side, towers[side], weight_EM, bias_E)
        what = f"kernel canonical correlation analysis, chosen on validation: kernel {sharpness:g}, loss {found.loss:.3f}"
        return Fitted(state, what)

    def _landmarks(self, feature_SC: Tensor, sharpness: float) -> Landmarks:
        """Landmarks at the first distinct rows."""
        first = {row_C.tobytes(): number for number, row_C in reversed([*enumerate(feature_SC.numpy())])}
        rows = sorted(first.values())[: self.config.retrieval.landmarks]
        landmarks = Landmarks(feature_SC.shape[1], len(rows))
        landmarks.place(feature_SC[rows], sharpness)
        return landmarks

    def _tower_state(self, side: str, landmarks: Landmarks, weight_EM: Tensor, bias_E: Tensor) -> dict[str, Tensor]:
        """The tensors of a tower; a small training split has fewer landmarks than the model has places for."""
        free = self.config.retrieval.landmarks - len(landmarks.landmark_MC)
        own = {
            "0.landmark_MC": F.pad(landmarks.landmark_MC, (0, 0, 0, free)),
            "0.whiten_MM": F.pad(landmarks.whiten_MM, (0, free, 0, free)),
            "0.sharpness": landmarks.sharpness,
            "2.weight": F.pad(weight_EM, (0, free)),
            "2.bias": bias_E,
        }
        return {f"head.{side}.{name}": tensor for name, tensor in own.items()}


def _standardised(fold: Fold, side: str, known: Mapping[str, Tensor], rows_S: Tensor) -> Tensor:
    """The standardised features (S, C) of some rows."""
    return (fold.features[side][rows_S].float() - known["mean_C"]) / known["deviation_C"]
