"""The configuration of a run: every setting, its default, its unit and its bounds. Unknown keys are refused.

Nothing here imports torch, so that a wrong value is reported at once. `mopefuse.config.recipe` reads YAML and ``--set``.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from mopefuse.config.messages import invalid, keys_in
from mopefuse.config.setting_paths import merge, nested
from mopefuse.errors import Notice

# Bounds that no useful model reaches: a mistyped size is refused here instead of filling the memory.
_MOST_TOKENS = 4096  # of a prompt; also experts of a layer
_WIDEST = 16_384  # width of a hidden layer
_MANY = 10**9  # of what takes no memory, so that arithmetic in 64 bits holds

Layers = Annotated[str | tuple[int, ...], Field(union_mode="left_to_right")]


class Section(BaseModel):
    """A group of settings: fixed once read, finite, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("true and false are no values for it")
        return value


class Prompts(Section):
    """The prompts of every prompted layer of the main encoder: static, dynamic and mapped."""

    static: int | None = Field(
        None, ge=0, le=_MOST_TOKENS, description="tokens of the static prompt; default 6 (image main), 4 (text main)"
    )
    dynamic: int | None = Field(
        None, ge=0, le=_MOST_TOKENS, description="tokens of the dynamic prompt; default 6 (image main), 4 (text main)"
    )
    mapped: int = Field(1, ge=0, le=_MOST_TOKENS, description="tokens of the mapped prompt")
    experts: int = Field(16, ge=1, le=_MOST_TOKENS, description="prompt experts per layer, k")
    layers: Layers = Field("all", description="layers to prompt: all, last:N, first:N, or a list of indices from 0")
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on prompts, in training")
    gate: Literal["none", "zero"] = Field(
        "zero", description="zero: prompts have a softmax of their own, gated from 0; none: the tokens', as in the papers"
    )
    init: float | None = Field(None, gt=0, description="prompts start in U(-init, init); default: the papers' rule by modality")
    bottleneck: int = Field(80, ge=1, le=_WIDEST, description="width of the mapper's trunk")
    mapper_norm: Literal["layer", "batch-frozen"] = Field("layer", description="norm in the mapper's trunk")
    route_stage_starts: bool = Field(True, description="give the first block of each stage a dynamic prompt too")

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(value, str) and not re.fullmatch(r"all|(first|last):[1-9]\d{0,3}", value, re.ASCII):
            raise ValueError("must be all, first:N, last:N or a list of indices from 0")
        if not isinstance(value, str) and (min(value, default=-1) < 0 or len(set(value)) < len(value)):
            raise ValueError("must be different indices from 0")
        return value


class Router(Section):
    """How an instance weighs the prompt experts of a layer."""

    kind: Literal["cross", "joint"] = Field("cross", description="cross: from the other modality; joint: from both")
    top_m: int | None = Field(
        None, ge=1, le=_MOST_TOKENS, description="keep only the m largest weights of an instance; default: all (dense)"
    )
    temperature: float = Field(0.1, gt=0, description="of the routing softmax; towards 0 is one-hot")
    noise: bool = Field(True, description="add N(0, 1/k^2) to the scores in training")
    noise_in_eval: bool = Field(False, description="add it in evaluation too, as the released code does")
    importance_weight: float = Field(0.01, ge=0, description="weight of the importance loss")
    importance_threshold: float = Field(0.1, ge=0, description="squared coefficient of variation that counts as balanced")


class CompTuning(Section):
    """What learns in the complementary encoder."""

    mode: Literal["frozen", "prompts", "lora", "full"] = Field(
        "frozen", description="frozen, deep static prompts, LoRA, or fully tuned"
    )
    length: int = Field(4, ge=1, le=_MOST_TOKENS, description="tokens of each static prompt, with mode prompts")


class Lora(Section):
    """Low-rank adaptation (LoRA), where an encoder learns by it."""

    rank: int = Field(8, ge=1, le=_WIDEST, description="r, width between the two matrices")
    alpha: float = Field(16.0, ge=0, description="what they add is scaled by alpha / r; 0 is the frozen encoder")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on what enters them, in training")
    targets: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)] | None = Field(
        None, description="last names of linear layers; default: the query and value projections, or the one that is both"
    )


class Inserted(Section):
    """Tokens ahead of the main encoder's own, in methods that put some there."""

    prompts: int = Field(20, ge=0, le=_MOST_TOKENS, description="learned tokens of promptfuse and blindprompt")
    images: int = Field(4, ge=1, le=_MOST_TOKENS, description="tokens that mmbt and p-mmbt make of an image")


class Interactive(Section):
    """Interactive prompting, with method pmf: prompts by which both encoders ask and tell one another."""

    layers: int = Field(
        2, ge=0, le=_MANY, description="last layers of both encoders in which they fuse; those before have no prompts"
    )
    queries: int = Field(
        4, ge=0, le=_MOST_TOKENS, description="query prompts: what a layer makes of them is what the other encoder gets"
    )
    query_context: int = Field(4, ge=0, le=_MOST_TOKENS, description="query context prompts: seen by the query prompts alone")
    fusion_context: int = Field(
        4, ge=0, le=_MOST_TOKENS, description="fusion context prompts: beside what comes from the other encoder"
    )
    bottleneck: int | None = Field(
        None,
        ge=1,
        le=_WIDEST,
        description="hidden width of the mapping to the other encoder; default half the larger of both widths",
    )


class Linear(Section):
    """Logistic regression on standardised frozen features, with method linear or a warm start."""

    features: Literal["concat", "main", "comp", "average"] = Field(
        "concat", description="both side by side, one of them, or the mean of what one regression for each says"
    )
    strengths: tuple[Annotated[float, Field(ge=1e-10, le=1e10)], ...] = Field(
        (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0), min_length=1, max_length=100, description="C to try; validation chooses"
    )
    max_iter: int = Field(300, ge=1, le=100_000, description="most iterations for each C")


COLUMN_SETTINGS = {"text": "text_col", "image": "img_col"}
"""Modality to the setting of `data` that names its column; `data.columns` has those of others."""


class Data(Section):
    """Where the samples are and how they are read."""

    path: str | None = Field(None, description="folder with a table or a folder of images for each split, or one table")
    image_roots: tuple[str, ...] = Field((), description="other folders that images may be in, by relative or absolute path")
    text_col: str = Field("text", min_length=1, description="column with the text")
    img_col: str = Field("img", min_length=1, description="column with the image's path")
    columns: dict[str, Annotated[str, Field(min_length=1)]] = Field({}, description="column of other modalities, by their name")
    modalities: tuple[str, ...] | None = Field(
        None, min_length=1, description="what rows have; default: all that have a column, text and image if fewer than two"
    )
    on_missing: Literal["error", "skip", "absent"] = Field(
        "error", description="a row that has none of some modality: an error, left out (skip), or kept without (absent)"
    )
    label_col: str = Field("label", min_length=1, description="column with the label, or the list of labels")
    id_col: str = Field("id", min_length=1, description="column with the id; rows without are numbered")
    split_col: str | None = Field(None, description="column that names the split of each row, where all are in one table")
    label_sep: str | None = Field(
        None, min_length=1, description="what separates labels in a cell, or list for cells as [a, b]; makes data multi-label"
    )
    labels: str | None = Field(None, description="file with all labels, one a line; default labels.txt, else what train has")
    fold_labels: bool = Field(False, description="labels in lower case, with single spaces and in one Unicode form")
    allow_odd_labels: bool = Field(False, description="take lists in cells, and more labels than a third of the rows, as meant")
    val_fraction: float | None = Field(None, gt=0, lt=1, description="share of train held out as val, by class")
    test_fraction: float | None = Field(None, gt=0, lt=1, description="share of train held out as test, by class")
    shots: int | None = Field(None, ge=1, le=_MANY, description="train on so many rows of each class")
    fraction: float | None = Field(None, gt=0, le=1, description="train on this share of each class")
    seed: int = Field(0, ge=0, lt=2**63, description="of what is held out or drawn, whatever the seed of the run")
    on_bad: Literal["error", "skip"] = Field("error", description="what a bad row or image does: end the run, or be left out")
    max_bad_fraction: float = Field(0.01, ge=0, lt=1, description="most rows of a split that may be skipped, as a share")
    allow_missing_text: bool = Field(False, description="take a text that is null as empty")
    strict: bool = Field(False, description="images or texts of train that are also in val or test are an error")
    workers: int = Field(0, ge=0, le=256, description="processes that read and prepare samples; 0 reads in the main process")
    augment: Literal["none", "flip", "randaugment", "crop"] = Field(
        "none", description="training images only; crop: a random part of random size and shape, flipped at random"
    )
    randaugment_ops: int = Field(2, ge=1, le=100, description="operations per image, with augment randaugment")
    randaugment_magnitude: int = Field(9, ge=0, le=30, description="strength, with augment randaugment")
    crop_scale: float = Field(0.5, gt=0, le=1, description="least share of an image's area that augment crop keeps")
    cache_images: bool = Field(False, description="keep decoded, resized images in one file, which all runs share")
    cache_features: bool = Field(True, description="compute features of frozen encoders once per sample, for all runs")
    max_pixels: int = Field(50_000_000, ge=1, le=89_000_000, description="images with more pixels are refused unread")
    image_stats: Literal["encoder", "mmbt"] = Field("encoder", description="mean and deviation that images are normalised with")

    @model_validator(mode="before")
    @classmethod
    def _one_column_each(cls, values: Any) -> Any:
        """The column of a text or image that `columns` names is that of `text_col` or `img_col`."""
        if not isinstance(values, dict) or not isinstance(values.get("columns"), dict):
            return values
        values = {**values, "columns": dict(values["columns"])}
        for name, own in COLUMN_SETTINGS.items():
            default = cls.model_fields[own].default
            column, said = values["columns"].pop(name, None), values.get(own, default)
            if column is not None and said not in (default, column):
                raise ValueError(f"{own} is {said!r} and columns has {column!r} for {name}: name one column")
            values |= {own: column} if column is not None else {}
        return values

    @model_validator(mode="after")
    def _one_subset(self) -> Data:
        if self.shots is not None and self.fraction is not None:
            raise ValueError("shots and fraction are two ways to say the same: set one")
        if (self.val_fraction or 0) + (self.test_fraction or 0) >= 1:
            raise ValueError("val_fraction and test_fraction leave nothing to train on")
        return self


class Train(Section):
    """The optimiser and its schedule."""

    epochs: int = Field(10, ge=0, le=_MANY, description="passes over the training split")
    max_steps: int | None = Field(
        None, ge=1, le=_MANY, description="stop after this many optimiser steps, whatever epochs says"
    )
    batch_size: int = Field(32, ge=1, le=_MANY, description="samples per optimiser step, over all processes")
    accumulate: int = Field(
        1, ge=1, le=65_536, description="parts that a process computes its share of a batch in, to save memory"
    )
    lr: float | None = Field(None, gt=0, description="main side; default 4e-4 for an image encoder, 5e-4 for a text encoder")
    lr_comp: float | None = Field(
        None, gt=0, description="complementary side, where it learns; default as lr, and lr_tuned if fully tuned"
    )
    lr_tuned: float = Field(2e-5, gt=0, description="weights of a main encoder that is fully tuned")
    lr_head: float | None = Field(None, gt=0, description="head; default as lr, and a fiftieth of it after a warm start")
    weight_decay: float = Field(1e-3, ge=0, description="of AdamW")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    schedule: Literal["paper", "cosine", "one-cycle", "constant"] = Field(
        "paper", description="paper: x 0.4 after 3/10 and 6/10 of training; cosine; one-cycle; constant"
    )
    warmup: float = Field(0.0, ge=0, lt=1, description="share of training with a linear warm-up")
    evals_per_epoch: int = Field(1, ge=1, le=1000, description="validations per epoch")
    patience: int | None = Field(None, ge=1, le=_MANY, description="stop after this many validations without a better one")
    modality_dropout: float = Field(
        0.0, ge=0, lt=1, description="in training, share of samples that each modality that may be missing is taken from"
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="balanced: every class counts the same in the loss, however rare"
    )
    threshold: Annotated[float, Field(gt=0, lt=1)] | Literal["tuned"] = Field(
        0.5, description="multi-label: probability from which a label is predicted; tuned: for each label on validation"
    )
    select: Literal["best", "last"] = Field("best", description="which checkpoint is tested: best on validation, or last")
    checkpoint_every: int | None = Field(500, ge=1, le=_MANY, description="also publish a checkpoint every so many steps")
    log_every: int = Field(20, ge=1, le=_MANY, description="steps between lines of metrics.jsonl")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU that has it, else fp32")
    compile: bool = Field(False, description="compile the model with torch.compile")
    checkpoint_activations: bool = Field(
        False, description="compute an encoder's blocks again in the backward pass instead of keeping activations"
    )


class RunConfig(Section):
    """Everything that decides a run."""

    main: str = Field(description="encoder that is prompted and classifies", examples=["timm:vit_base"])
    comp: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        union_mode="left_to_right",
        description="encoder whose representation conditions the prompts, or a list of several",
        examples=["hf:bert-base"],
    )
    method: str = Field("conditional", description="fusion method, an entry point of mopefuse.fusion")
    seed: int = Field(0, ge=0, lt=2**63, description="of initialisation, order, noise, dropout and augmentation")
    device: str = Field("auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N or mps")
    compat: Literal["none", "official"] = Field("none", description="official: the released code's choices as defaults")
    head_norm: Literal["layer", "none"] = Field(
        "layer", description="layer: pooled features lose their scale before the head; none: as in the papers"
    )
    head_hidden: int = Field(
        0, ge=0, le=_WIDEST, description="width of a hidden layer in the head; 0 is the papers' linear head"
    )
    warm_start: Literal["none", "linear"] = Field(
        "none", description="linear: begin as logistic regression on standardised features of both, prompts gated to 0"
    )
    either: bool = Field(False, description="also learn to answer without the main modality, for samples that lack it")
    tune: Literal["probe", "prompt", "lora", "full"] | None = Field(
        None, description="how the encoders of other methods learn: not, by static prompts, by LoRA, or fully; default: its own"
    )
    prompts: Prompts = Prompts()
    router: Router = Router()
    comp_tuning: CompTuning = CompTuning()
    lora: Lora = Lora()
    inserted: Inserted = Inserted()
    pmf: Interactive = Interactive()
    linear: Linear = Linear()
    data: Data = Data()
    train: Train = Train()

    @field_validator("comp")
    @classmethod
    def _one_is_no_list(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return value[0] if not isinstance(value, str) and len(value) == 1 else value

    @model_validator(mode="after")
    def _experts(self) -> RunConfig:
        if self.router.top_m is not None and self.router.top_m > self.prompts.experts:
            raise ValueError(f"router.top_m is {self.router.top_m}, but there are only {self.prompts.experts} experts")
        return self


ONE_SIDED = {"main-only": "comp", "comp-only": "main"}
"""Of methods that read one side, the other, whose encoder need not be named."""

OFFICIAL: dict[str, Any] = {
    "head_norm": "none",
    "prompts": {"experts": 4, "gate": "none", "mapper_norm": "batch-frozen", "route_stage_starts": False},
    "router": {"kind": "joint", "noise_in_eval": True},
    "data": {"image_stats": "mmbt"},
    "train": {"select": "last"},
}
"""What ``compat: official`` sets unless it is set explicitly: the choices of the authors' released code, without its leak
between samples. Its average over prompts and patches at the end has no counterpart here: prompts have no output."""


RENAMED: dict[str, str] = {}
"""Paths of settings of earlier versions, and what they are called now. A path stays here for good."""


def build_config(values: dict[str, Any], *, source: str = "", names: Mapping[str, str] | None = None) -> RunConfig:
    """`values` as a `RunConfig`, with the defaults that ``compat`` names underneath; a notice tells of `RENAMED` ones.

    Args:
        names: what a message calls settings that have another name where they were set: path to flag.

    Raises:
        ConfigError: every problem at once, each with its path; unknown keys with the nearest known one.
    """
    values = _without_idle_side(_with_new_names(values, source))
    if values.get("compat") == "official":
        values = merge(OFFICIAL, values)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise invalid(error, RunConfig, values, source, names or {}) from None


def _without_idle_side(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with an empty encoder for the side that the method has no use for, where none is named."""
    section = values.get("linear")
    features = section.get("features") if isinstance(section, dict) and values.get("method") == "linear" else None
    method = f"{features}-only" if isinstance(features, str) else values.get("method")
    idle = ONE_SIDED.get(method) if isinstance(method, str) else None
    return {idle: "", **values} if idle else values


def _with_new_names(values: dict[str, Any], source: str) -> dict[str, Any]:
    values = copy.deepcopy(values) if RENAMED else values
    for old in RENAMED:
        *sections, key = old.split(".")
        holder: Any = values
        for section in sections:
            holder = holder.get(section) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and key in holder:
            values = merge(nested(new_name(old, source or "the configuration"), holder.pop(key)), values)
    return values


def new_name(path: str, source: str) -> str:
    """What the setting at `path` is called now; a notice tells of one that was renamed."""
    if path in RENAMED:
        warnings.warn(f"{source}: {path} is now called {RENAMED[path]}", Notice, stacklevel=2)
    return RENAMED.get(path, path)


WITHOUT_EFFECT = frozenset(
    (
        "data.workers data.cache_images data.cache_features data.strict data.allow_odd_labels data.modalities train.log_every "
        "train.checkpoint_every train.checkpoint_activations"
    ).split()
)
"""Settings that change no number of a run."""


def known_keys(path: tuple[str, ...]) -> list[str]:
    """The keys of the section at `path`; empty if it is no section."""
    return keys_in(RunConfig, path)
