"""The base class of fusion methods. One predicate, `Fusion.is_trainable`, decides what is trained, saved and exported.

To add a method, write one module with a subclass of `Fusion` and name it in the entry-point group ``mopefuse.fusion``.
Shapes: B batch, N labels, C width of a pooled feature.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from mopefuse.config.encoder_sides import is_comp, specs
from mopefuse.config.schema import RunConfig
from mopefuse.core.error_codes import CheckpointCode, ConfigCode
from mopefuse.core.precision import apply_without_autocast, normalize_feature, to_float32
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder, Prefix, Preprocess, run_frozen
from mopefuse.errors import CheckpointError, ConfigError
from mopefuse.fusion.collator import Collator, Requirements
from mopefuse.fusion.output import Output as Output
from mopefuse.fusion.regression import Advance, FitSettings, Fitted, Fold, Standard
from mopefuse.tasks.base import Task, get_task


class Fusion(nn.Module):
    """Encoders, the modules that fuse their features, and a head.

    A subclass is built from ``(config, encoders, num_labels)``, sets `head` with `make_head` and implements `forward`.

    Attributes:
        uses: the sides that the method needs, such as ("main", "comp").
        frozen: the sides whose encoder gets no prompts and is never trained, so that its features can be cached.
        reads: the sides whose samples the forward pass reads.
        reads_tokens: the sides of `frozen` of which it also reads the output tokens, from `Batch.tokens` if these were cached.
        tokens_to_fit: the sides of which `fit` takes the output tokens, if they can be cached.
        prefix_layers: by side, the first layer of the encoder that is prompted, if all before it are frozen: `forward` then
            starts from `prefix`, so that training can cache the input of that layer.
    """

    uses: tuple[str, ...] = ("main", "comp")
    parts: ClassVar[dict[str, str]] = {
        r"^head\.": "head",
        r"^absent\.": "replacements for missing modalities",
        r"^comp\d*\..*\.lora_[AB]\.": "LoRA of the complementary encoder",
        r"^main\..*\.lora_[AB]\.": "LoRA of the main encoder",
        r"^comp\d*\.": "complementary encoder",
        r"^main\.": "main encoder",
    }

    sections: ClassVar[tuple[str, ...]] = ()  # optional sections of the configuration that the method uses
    dependencies: ClassVar[dict[str, str]] = {r"^(?:standard|absent)\.(\w+)": r"\1 features"}
    """Maps a pattern of tensor names to what such tensors depend on, for `mopefuse swap-encoder`: "main" or "comp" for the
    shape of that encoder's layers, "main features" or "comp features" for the features of that particular encoder; ``\\1``
    stands for the pattern's first group. A tensor that matches no pattern is valid with any encoder."""
    supports_multiple_comps: ClassVar[bool] = False
    """Whether the method takes any number of complementary encoders, and handles samples that lack their modalities."""
    whole_images: ClassVar[bool] = False
    """Whether the main encoder gets images that are stretched to its input size instead of cropped."""
    closed_form: ClassVar[bool] = False  # whether `fit` trains everything, so that no training step is made
    starts_fitted: bool = False  # whether `fit` computes the initial weights
    head: nn.Module
    num_labels: int = 0
    """N, set by `mopefuse.fusion.build.build_model`."""
    labels: tuple[str, ...] = ()
    """The names of the labels in the order of the logits, if known."""
    task: Task
    """What a label is, set by `mopefuse.fusion.build.build_model`; single-label until then."""

    def __init__(self, config: RunConfig, encoders: Mapping[str, Encoder]) -> None:
        super().__init__()
        self.config = config = self.resolve(config, encoders)
        self.uses, self.task = self.sides(config), get_task("single-label")
        for side in self.uses:
            self.add_module(side, encoders[side])
        self.frozen: tuple[str, ...] = ()
        self.reads_tokens: tuple[str, ...] = ()
        self.tokens_to_fit: tuple[str, ...] = ()
        self.reads: tuple[str, ...] = self.uses
        self.prefix_layers: dict[str, int] = {}
        self.standard: nn.ModuleDict | None = None  # by side, if the head takes standardised features
        self.absent = nn.ParameterDict()
        if config.either and "main" not in self.droppable_sides:
            what = f"{config.method} requires the main modality"
            raise ConfigError(
                ConfigCode.MAIN_NOT_OPTIONAL, what, where="--either", fix="use --method conditional, mlp or late-concat"
            )
        if config.either and len({self.encoder(side).modality for side in self.uses}) == 1:
            what = f"all encoders read {self.encoder('main').modality}, so a sample without it has no input"
            raise ConfigError(ConfigCode.MAIN_NOT_OPTIONAL, what, where="--either", fix="remove --either")
        if config.train.modality_dropout and not self.droppable_sides:
            what = f"{config.method} needs every modality, so none can be dropped"
            raise ConfigError(ConfigCode.NOTHING_TO_DROP, what, where="--modality-dropout", fix="remove --modality-dropout")

    def add_missing_embeddings(self, sides: Sequence[str]) -> None:
        """Add for each of `sides` a trainable vector, by which `replace_missing` replaces features that a sample lacks."""
        widths = {side: self.encoder(side).feature_width for side in sides}
        self.absent.update({side: nn.Parameter(torch.zeros(width)) for side, width in widths.items()})

    def add_optional_missing_embeddings(self) -> None:
        """`add_missing_embeddings` of all `optional_sides`.

        Raises:
            ConfigError: `either` without training samples that lack the main modality.
        """
        if self.config.either and not self.optional_sides:
            what = "no training sample would lack the main modality"
            raise ConfigError(
                ConfigCode.NEVER_TRAINED_WITHOUT_MAIN,
                what,
                where="--either",
                fix="add --modality-dropout 0.1, or --on-missing absent",
            )
        self.add_missing_embeddings(self.optional_sides)

    @classmethod
    def sides(cls, config: RunConfig) -> tuple[str, ...]:
        """The sides that a model of this configuration needs: `uses`, with all complementary sides in place of "comp".

        Raises:
            ConfigError: several complementary encoders for a method that takes one.
        """
        complementary = [side for side in specs(config) if is_comp(side)]
        if "comp" in cls.uses and len(complementary) > 1 and not cls.supports_multiple_comps:
            what = f"{config.method} takes one complementary encoder, got {len(complementary)}"
            raise ConfigError(
                ConfigCode.TOO_MANY_ENCODERS,
                what,
                where="--comp",
                fix="pass --comp once, or use --method conditional, mlp, late-concat or linear",
            )
        return tuple(one for side in cls.uses for one in (complementary if side == "comp" else [side]))

    @abstractmethod
    def forward(self, batch: Batch) -> Output:
        """The logits of a batch (B, N), with the routing and everything else that training needs."""

    @classmethod
    def resolve(cls, config: RunConfig, encoders: Mapping[str, Encoder]) -> RunConfig:
        """Fill in the defaults that depend on the encoders; called before anything is built, and idempotent.

        Args:
            encoders: by side; encoders that do not suit the method are left for the constructor to refuse.
        """
        return config

    @property
    def encoders(self) -> dict[str, Encoder]:
        """The encoders by side."""
        return {side: self.encoder(side) for side in self.uses}

    @property
    def prompt_kinds(self) -> tuple[str, ...]:
        """The kinds of prompts that `without_prompts` can switch off."""
        return ()

    def without_prompts(self, kind: str) -> AbstractContextManager[None]:
        """A context in which the model ignores one kind of prompts."""
        raise NotImplementedError(f"{type(self).__name__} has no {kind} prompts")

    def unused_sections(self) -> list[str]:
        """Sections and settings that differ from their defaults and that this method does not use."""
        default = RunConfig(main="", comp="")
        settings = ["train.modality_dropout"] if self.config.train.modality_dropout and self.closed_form else []
        optional = (
            "warm_start head_features head_dropout tune prompts router comp_tuning lora inserted pmf linear mlp "
            "cross_attention qmf flamingo segmentation"
        )
        used = (*self.sections, "lora") if any(self.encoder(side).adapted for side in self.uses) else self.sections
        return [s for s in optional.split() if s not in used and getattr(self.config, s) != getattr(default, s)] + settings

    @property
    def head_sides(self) -> tuple[str, ...]:
        """The sides whose pooled features are concatenated for the head."""
        return self.uses

    @property
    def heads(self) -> dict[str, tuple[str, ...]]:
        """The sides whose features each head takes, by the name of its module."""
        return {"head": self.head_sides}

    def dependency_of(self, name: str) -> str:
        """What a trainable tensor depends on, see `dependencies`; a tensor of a tuned encoder depends on that encoder."""
        side = name.partition(".")[0]
        if side in self.uses:
            return f"{side} features"
        found = (match.expand(bond) for pattern, bond in self.dependencies.items() if (match := re.search(pattern, name)))
        return next(found, "")

    @property
    def droppable_sides(self) -> tuple[str, ...]:
        """The sides that a sample can lack; the main modality only with `either`."""
        if not self.supports_multiple_comps or len(self.uses) == 1:
            return ()
        needed = () if self.config.either or "main" not in self.uses else (self.encoder("main").modality,)
        return tuple(side for side in self.uses if self.encoder(side).modality not in needed)

    @property
    def optional_sides(self) -> tuple[str, ...]:
        """Those of `droppable_sides` that are missing in training: by modality dropout, or in rows (`data.on_missing`)."""
        dropped = self.config.train.modality_dropout > 0 and not self.closed_form
        return self.droppable_sides if dropped or self.config.data.on_missing == "absent" else ()

    @property
    def requirements(self) -> Requirements:
        """Which modalities a sample must have."""
        modality_of = {side: self.encoder(side).modality for side in self.reads}
        either_helps = self.supports_multiple_comps and len(self.uses) > 1
        return Requirements(self.config.method, modality_of, self.droppable_sides, either_helps)

    def require_modalities(self, lacking: Mapping[str, NDArray[np.bool_] | Tensor], *, where: str) -> None:
        """Refuse samples that lack a required modality; see `Requirements.check`."""
        self.requirements.check(lacking, where=where)

    def replace_missing(self, side: str, normed_BC: Tensor, batch: Batch) -> Tensor:
        """Replace a side's normalised features (B, C) by the absent condition in the rows of samples that lack the side.

        The absent condition is trained from 0, the feature of an average sample; without `add_missing_embeddings` it is 0.
        """
        missing_B = batch.missing.get(side)
        if missing_B is None:
            return normed_BC
        absent_C = self.absent[side] if side in self.absent else normed_BC.new_zeros(normed_BC.shape[-1])
        return torch.where(missing_B[:, None], absent_C.to(normed_BC.dtype), normed_BC)

    def encoder(self, side: str) -> Encoder:
        """The encoder of a side."""
        encoder = getattr(self, side)
        assert isinstance(encoder, Encoder)
        return encoder

    def pooled_feature(self, side: str, batch: Batch) -> Tensor:
        """Pooled features (B, C) of a frozen side: from the batch if they were cached, else computed now."""
        if side in batch.features:
            return batch.features[side]
        return to_float32(run_frozen(self.encoder(side), batch.inputs[side]).pooled_BC)

    def feature_and_tokens(self, side: str, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """Pooled features (B, C), normalised output tokens (B, L, D) and their mask (B, L) of a frozen side in `reads_tokens`.

        They are from the batch if they were cached, else computed now.
        """
        if side in batch.tokens:
            tokens = batch.tokens[side]
            return batch.features[side], tokens["values_BLC"], tokens["mask_BL"]
        encoded = run_frozen(self.encoder(side), batch.inputs[side])
        return to_float32(encoded.pooled_BC), normalize_feature(encoded.tokens_BLD), encoded.mask_BL

    def prefix(self, side: str, batch: Batch) -> Prefix | None:
        """The precomputed tokens from which the encoder of a side continues; None if the batch has none."""
        tokens_BLD = batch.prefixes.get(side)
        return None if tokens_BLD is None else Prefix(self.prefix_layers[side], tokens_BLD)

    def make_head(self, width: int, num_labels: int, dropout: float = 0.0) -> nn.Module:
        """A head from features (B, width) to logits (B, N): linear, or with one hidden layer (`head_hidden`).

        Args:
            dropout: on the hidden layer.
        """
        hidden = self.config.head_hidden
        if not hidden:
            return nn.Linear(width, num_labels)
        activation = nn.Sequential(nn.GELU(), nn.Dropout(dropout)) if dropout else nn.GELU()
        return nn.Sequential(nn.Linear(width, hidden), activation, nn.Linear(hidden, num_labels))

    def classify(self, *pooled_BC: Tensor, batch: Batch | None = None) -> Tensor:
        """Logits (B, N) of the head on the concatenated features of `normalise`, in float32."""
        return apply_without_autocast(self.head, torch.cat(self.normalise(*pooled_BC, batch=batch), dim=-1))

    def normalise(self, *pooled_BC: Tensor, batch: Batch | None = None) -> tuple[Tensor, ...]:
        """Normalise the pooled features of sides for the head (`head_norm`, `standard`).

        Args:
            pooled_BC: the pooled features of each of `head_sides`, in order.
            batch: pass it if samples may lack a side; its features are then replaced, see `replace_missing`.
        """
        if self.standard is not None:
            pooled_BC = self.standardise(*pooled_BC)
        elif self.config.head_norm == "layer":
            pooled_BC = tuple(F.layer_norm(to_float32(pooled), pooled.shape[-1:]) for pooled in pooled_BC)
        if batch is not None:
            both = zip(self.head_sides, pooled_BC, strict=True)
            pooled_BC = tuple(self.replace_missing(side, pooled, batch) for side, pooled in both)
        return pooled_BC

    def standardise_features(self) -> int:
        """Let the head take standardised features of all sides (`standard`); returns their total width."""
        widths = {side: self.encoder(side).feature_width for side in self.uses}
        self.standard = nn.ModuleDict({side: Standard(width) for side, width in widths.items()})
        return sum(widths.values())

    def standardise(self, *pooled_BC: Tensor) -> tuple[Tensor, ...]:
        """Standardise the pooled features of the sides in `standard`, in its order, with statistics of the training split."""
        assert self.standard is not None
        return tuple(one(pooled) for one, pooled in zip(self.standard.values(), pooled_BC, strict=True))

    def readers(self) -> dict[str, tuple[str, Preprocess]]:
        """Map each side that the model reads to its modality and preprocessing."""
        return {side: (self.encoder(side).modality, self.encoder(side).preprocess) for side in self.reads}

    @property
    def collate(self) -> Collator:
        """``model.collate(images, texts)`` or ``DataLoader(dataset, collate_fn=model.collate)``: a batch on the CPU.

        See `mopefuse.fusion.collator.Collator`. It holds the preprocessing of the encoders and none of their weights.
        """
        return Collator(self.readers(), self.requirements, self.num_labels, self.task)

    def is_trainable(self, name: str) -> bool:
        """Whether a parameter or buffer, by its name here, is trained, saved and exported: all but the frozen encoders."""
        side, _, own = name.partition(".")
        return side not in self.uses or self.encoder(side).is_trainable(own)

    def named_trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if self.is_trainable(name)}

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return list(self.named_trainable_parameters().values())

    def parameter_groups(self, lr: float, **rates: float | None) -> list[dict[str, Any]]:
        """The parameters that training changes, by learning rate: ``torch.optim.AdamW(model.parameter_groups(1e-3))``.

        Args:
            lr: learning rate of groups without one of their own. The router's is a fraction of it, see `router.lr_factor`.
            rates: learning rates of other groups, by their name (`learning_rate_group`).
        """
        rates = {"router": lr * (self.config.router.lr_factor or 1.0), **rates}
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self.named_trainable_parameters().items():
            groups.setdefault(self.learning_rate_group(name), []).append(parameter)
        return [{"params": parameters, "lr": rates.get(group) or lr} for group, parameters in groups.items()]

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """What a run saves: the trainable parameters, and the constants that belong to them, such as the keys of the router."""
        return {name: tensor.detach() for name, tensor in self.state_dict().items() if self.is_trainable(name)}

    def load_trainable_state_dict(self, state: Mapping[str, Tensor], *, where: str = "load_trainable_state_dict") -> None:
        """Load what `trainable_state_dict` returned, all of it; the encoders keep their weights.

        Args:
            state: values of any floating-point type. where: their origin, for messages.

        Raises:
            CheckpointError: other names or shapes than this model has, or values that are not finite.
        """
        expected = self.trainable_state_dict()
        problems = [f"{name} is missing" for name in sorted(expected.keys() - state.keys())]
        problems += [f"{name} is not expected" for name in sorted(state.keys() - expected.keys())]
        for name in sorted(expected.keys() & state.keys()):
            if state[name].shape != expected[name].shape:
                problems.append(f"{name} is {tuple(state[name].shape)}, expected {tuple(expected[name].shape)}")
            elif state[name].is_floating_point() and not state[name].isfinite().all():
                problems.append(f"{name} has values that are not finite")
        if problems:
            raise CheckpointError(
                CheckpointCode.STATE_MISMATCH,
                f"the weights do not fit the model: {'; '.join(problems[:8])}",
                where=where,
                fix="use a checkpoint of this model",
            )
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(state[name])

    def fit(self, train: Fold, val: Fold, how: FitSettings, advance: Advance) -> Fitted:
        """Compute the weights of a `closed_form` method, or the initial ones of a model that `starts_fitted`.

        Args:
            train, val: pooled features of the sides in `standard`.
            advance: called periodically with a name of the current step and the completed fraction of the work.
        """
        raise NotImplementedError(f"{type(self).__name__} is trained by steps only")

    def learning_rate_group(self, name: str) -> str:
        """The learning rate of a trainable parameter: "main", "comp", "head", "router", or "tuned" for a tuned main encoder."""
        part = re.split(r"[._\d]", name.removeprefix("stacks."))[0]
        if name.startswith("main.") and self.encoder("main").tuned:
            return "tuned"
        return part if part in ("comp", "head") else "main"

    def breakdown(self) -> dict[str, int]:
        """Trainable parameters by part, largest first."""
        count: Counter[str] = Counter()
        for name, parameter in self.named_trainable_parameters().items():
            part = next((part for pattern, part in self.parts.items() if re.search(pattern, name)), "other")
            count[part] += parameter.numel()
        return dict(count.most_common())
