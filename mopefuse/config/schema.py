"""The configuration of a run: every setting, its default, its unit and its bounds. Unknown keys are rejected.

Nothing here imports torch, so that a wrong value is reported at once. `mopefuse.config.recipe` reads YAML and ``--set``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from mopefuse.config import method_settings as methods
from mopefuse.config.data_section import COLUMN_SETTINGS as COLUMN_SETTINGS
from mopefuse.config.data_section import Data as Data
from mopefuse.config.messages import field_at, invalid_settings_error, keys_in, shortened
from mopefuse.config.method_defaults import defaults_of, without_idle_side
from mopefuse.config.section import MAX_TOKENS as _MAX_TOKENS
from mopefuse.config.section import WIDEST as _WIDEST
from mopefuse.config.section import Section
from mopefuse.config.setting_paths import merge
from mopefuse.config.train_section import Train as Train
from mopefuse.core.error_codes import ConfigCode
from mopefuse.core.registry import FUSION, check_name
from mopefuse.errors import ConfigError

Layers = Annotated[str | tuple[int, ...], Field(union_mode="left_to_right")]


class Prompts(Section):
    """The prompts of every prompted layer of the main encoder: static, dynamic and mapped tokens."""

    static: int | None = Field(
        None,
        ge=0,
        le=_MAX_TOKENS,
        description="tokens of the static prompt; default: 6 if main reads images, else 4; map: 16, maple: 2",
    )
    dynamic: int | None = Field(
        None, ge=0, le=_MAX_TOKENS, description="tokens of the dynamic prompt; default: 6 if main reads images, else 4"
    )
    mapped: int = Field(1, ge=0, le=_MAX_TOKENS, description="tokens of the mapped prompt, computed from comp")
    condition: Literal["pooled", "tokens"] = Field(
        "pooled", description="what the mapped prompt is computed from: comp's pooled feature, or its output tokens"
    )
    condition_tokens: int = Field(
        8, ge=0, le=_MAX_TOKENS, description="with condition=tokens: learned queries that read comp's tokens; 0: use them all"
    )
    experts: int = Field(16, ge=1, le=_MAX_TOKENS, description="prompt experts per layer (K)")
    film: bool = Field(
        False, description="also scale and shift the attention input of each prompted layer (FiLM), computed from comp"
    )
    film_mixture: int = Field(
        1, ge=1, le=256, description="linear maps that a softmax mixes into the scale and shift of each layer; 1: a single map"
    )
    layers: Layers = Field(
        "all", description="layers to prompt: all, first:N, last:N, last:1/N for a fraction, or indices such as 0,3,5 (from 0)"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="dropout on prompts, in training")
    token_dropout: float | None = Field(
        0.0,
        ge=0,
        lt=1,
        description="fraction of main's patches dropped ahead of the first prompted layer, in training; null: 0.4 if main is a "
        "ViT, else 0",
    )
    gate: Literal["none", "zero"] = Field(
        "zero", description="gate on the prompts: learned, starting at 0 (zero), or none, as in the papers"
    )
    init: float | None = Field(
        None, gt=0, description="initialise prompts uniformly in (-init, init); default: as in the papers"
    )
    bottleneck: int = Field(80, ge=1, le=_WIDEST, description="hidden width of the network for the mapped prompt and FiLM")
    mapper_norm: Literal["layer", "batch-frozen"] = Field(
        "layer", description="normalisation in the network for the mapped prompt and FiLM"
    )
    route_stage_starts: bool = Field(
        True, description="in hierarchical encoders such as Swin, also give the first block of each stage a dynamic prompt"
    )

    @model_validator(mode="after")
    def _tokens_are_mapped(self) -> Prompts:
        if self.condition == "tokens" and not self.mapped:
            raise ValueError("condition is tokens, but mapped is 0, and only mapped prompts are computed from tokens")
        return self

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: str | tuple[int, ...]) -> str | tuple[int, ...]:
        if isinstance(value, str) and re.fullmatch(r"\d{1,4}(,\d{1,4})*", value, re.ASCII):
            value = tuple(int(number) for number in value.split(","))
        if isinstance(value, str) and not re.fullmatch(r"all|(first|last):(1/)?[1-9]\d{0,3}", value, re.ASCII):
            raise ValueError("all, first:N, last:N, last:1/N, or a list of indices from 0")
        if not isinstance(value, str) and (min(value, default=-1) < 0 or len(set(value)) < len(value)):
            raise ValueError("distinct indices, with 0 for the first layer")
        return value


class Router(Section):
    """How the router weighs the prompt experts of a layer for a sample."""

    kind: Literal["cross", "joint"] = Field(
        "cross", description="input of the router: the other modality (cross) or both (joint)"
    )
    top_m: int | None = Field(
        None, ge=1, le=_MAX_TOKENS, description="use only the m highest-scoring experts per sample; default: all"
    )
    temperature: float = Field(0.1, gt=0, description="temperature of the routing softmax; towards 0 a single expert is chosen")
    lr_factor: float | None = Field(
        1.0,
        gt=0,
        description="learning rate of the router, as a multiple of lr; null: 4 temperature / sqrt(width of its input), so that "
        "a step changes the routing only a little",
    )
    noise: bool = Field(True, description="add noise to the routing scores in training, with standard deviation 1/K")
    noise_in_eval: bool = Field(False, description="add the noise in evaluation too, as the papers' released code does")
    importance_weight: float = Field(0.01, ge=0, description="weight of the importance loss")
    importance_threshold: float = Field(
        0.1, ge=0, description="squared coefficient of variation up to which the expert load counts as balanced"
    )


class RunConfig(Section):
    """All settings of a run."""

    main: str = Field(
        description="main encoder: the one that is prompted",
        examples=["timm:vit_base"],
    )
    comp: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        union_mode="left_to_right",
        description="complementary encoder: its features condition the prompts",
        examples=["hf:bert-base"],
    )
    method: str = Field(
        "conditional",
        description="fusion method: conditional, linear, mlp, main-only, ...; main-only needs no comp, comp-only no main",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="random seed of everything in training")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="device to compute on: auto, cpu, cuda, cuda:N or mps"
    )
    compat: Literal["none", "paper", "official"] = Field(
        "none", description="use the defaults of the papers (paper), or of their released code (official)"
    )
    head_norm: Literal["layer", "none"] = Field(
        "layer", description="normalisation of the pooled features before the head; none: as in the papers"
    )
    head_hidden: int = Field(
        0, ge=0, le=_WIDEST, description="width of a hidden layer in the head; 0: a linear head, as in the papers"
    )
    head_dropout: float | None = Field(
        None, ge=0, lt=1, description="dropout on the hidden layer of the head of conditional; default: mlp.dropout"
    )
    head_features: Literal["main", "all", "tokens"] | None = Field(
        "main",
        description="what the head of conditional or flamingo classifies: the pooled feature of main, as in the papers (main), "
        "all pooled features, concatenated (all), or also what cross-attention reads from the output tokens of main (tokens, "
        "conditional only); default of conditional without compat: tokens if main provides its tokens, else all",
    )
    warm_start: Literal["none", "linear", "auto"] = Field(
        "none",
        description="what step 0 is: the best of several simple models on the frozen features (auto), logistic regression on "
        "all of them (linear), or an untrained model (none)",
    )
    either: bool = Field(False, description="also train a head that predicts rows without the main modality")
    tune: Literal["probe", "prompt", "lora", "full"] | None = Field(
        None,
        description="how methods other than conditional train their encoders: not at all (probe), with static prompts "
        "(prompt), with LoRA (lora) or fully (full)",
    )
    prompts: Prompts = Prompts()
    router: Router = Router()
    comp_tuning: methods.CompTuning = methods.CompTuning()
    lora: methods.Lora = methods.Lora()
    inserted: methods.Inserted = methods.Inserted()
    pmf: methods.Interactive = methods.Interactive()
    linear: methods.Linear = methods.Linear()
    mlp: methods.MLP = methods.MLP()
    cross_attention: methods.CrossAttention = methods.CrossAttention()
    qmf: methods.QMF = methods.QMF()
    flamingo: methods.Flamingo = methods.Flamingo()
    regression: methods.Regression = methods.Regression()
    segmentation: methods.Segmentation = methods.Segmentation()
    retrieval: methods.Retrieval = methods.Retrieval()
    data: Data = Data()
    train: Train = Train()

    @field_validator("comp")
    @classmethod
    def _unwrap_single(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return value[0] if not isinstance(value, str) and len(value) == 1 else value

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.router.top_m is not None and self.router.top_m > self.prompts.experts:
            raise ValueError(f"router.top_m is {self.router.top_m}, but there are only {self.prompts.experts} experts")
        if self.head_features == "tokens" and self.method == "flamingo":
            raise ValueError("head_features is tokens, which flamingo does not support: use main or all")
        return self


def build_config(
    values: dict[str, Any], *, source: str = "", names: Mapping[str, str] | None = None, saved: bool = False
) -> RunConfig:
    """Validate `values` as a `RunConfig`, with the defaults of the method and of ``compat``.

    Args:
        saved: the values were saved with a model: settings that did not exist then get their neutral value, that of the
            schema, not the default of the method.
        names: names of settings in messages, if they differ from the path: path to flag.

    Raises:
        ConfigError: every problem at once, each with its path; unknown keys with the nearest known one.
    """
    if not isinstance(values, Mapping):
        what = f"settings are {shortened(values)}, expected a dictionary"
        raise ConfigError(ConfigCode.INVALID_SETTINGS, what, where="build_config", fix='write {"main": "hf:minilm", ...}')
    values = without_idle_side(values)
    values = values if saved else merge(defaults_of(values), values)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        if isinstance(method := values.get("method"), str) and "comp" not in values:
            check_name(FUSION, method)  # a misspelt method may be one that needs no other encoder
        raise invalid_settings_error(error, RunConfig, values, source, names or {}) from None


def check_is_config(config: object) -> None:
    """Check that an argument is a configuration.

    Raises:
        ConfigError: it is something else, such as a dictionary.
    """
    if not isinstance(config, RunConfig):
        what = f"config is {shortened(config)}, expected a RunConfig"
        fix = 'pass mopefuse.build_config({"main": SPEC, "comp": SPEC, "data": {"path": DIR}})'
        raise ConfigError(ConfigCode.INVALID_SETTINGS, what, where="train", fix=fix)


WITHOUT_EFFECT = frozenset(
    (
        "data.workers data.cache_images data.cache_features data.cache_remote_limit data.cache_prefix_limit data.strict "
        "data.allow_odd_labels data.modalities train.log_every train.checkpoint_every train.checkpoint_activations train.shard"
    ).split()
)
"""Settings that do not change the results of a run."""


def known_keys(path: tuple[str, ...]) -> list[str]:
    """The keys of the section at `path`; empty if it is not a section."""
    return keys_in(RunConfig, path)


def setting(path: str) -> FieldInfo:
    """The field of the setting at a dotted path."""
    return field_at(RunConfig, tuple(path.split(".")))
