"""Base class of encoders around a transformers model: locates, configures, builds, loads and probes it.

Subclasses define the modality. Weights are read from safetensors only, and code from a repository is never run.

Shapes: B batch, L tokens, D width, C width of the pooled feature.
"""

from __future__ import annotations

import inspect
import os
from abc import abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers.models.auto import modeling_auto as auto

from mopefuse.core.error_codes import CheckpointCode, EncoderCode
from mopefuse.core.registry import Spec
from mopefuse.core.tensor_files import check_tensors
from mopefuse.encoders import _hf_source, _hf_text, _lora, _options, _weights
from mopefuse.encoders._hf_architectures import BUILT_IN, TOWERS, BuiltIn, Family
from mopefuse.encoders._hf_attention import ATTENTION, silence_transformers
from mopefuse.encoders._hf_source import Source
from mopefuse.encoders._prompted import PromptedEncoder
from mopefuse.encoders.base import EncoderOutput, Inputs, Preprocess
from mopefuse.encoders.probe import find_sites
from mopefuse.errors import CheckpointError, EncoderError

_NO_PART = frozenset({
    "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "id2label", "label2id", "num_labels",
    "problem_type", "return_dict", "output_hidden_states", "output_attentions", "use_cache", "finetuning_task",
})  # fmt: skip
"""Fields of a configuration that do not affect features."""
_TYPES = {"dtype", "torch_dtype"}
_NOT_OPTIONS = {"model_type", "auto_map", "architectures", *_TYPES}


class TransformersEncoder(PromptedEncoder):
    """A transformers model as an encoder; its layers are promptable if the probe verifies them.

    A subclass lists the model types that it knows, and defines preprocessing and the forward pass.

    Raises (on construction):
        EncoderError: no such folder or repository, no usable encoder there, or an unknown option.
        CheckpointError: the weights are damaged, a pickle, incomplete, or do not fit.
        ResourceError: the hub's cache is not writable.
    """

    families: ClassVar[Mapping[str, Family]] = {}
    built_in: ClassVar[Mapping[str, BuiltIn]] = BUILT_IN
    own_options: ClassVar[Collection[str]] = ("pretrained", "weights", "pool")
    libraries: tuple[str, ...] = ("transformers", "tokenizers", "pillow")

    @classmethod
    def check_name(cls, spec: Spec) -> None:
        """See `Encoder.check_name`."""
        _hf_source.check_name(spec, cls.built_in)

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        source = _hf_source.find(spec, self.built_in, {kind for kind, family in self.families.items() if family.part})
        self.revision = source.revision
        self.model_config = config = _configure(spec, source, self.own_options)
        known = self.families.get(config.model_type)
        model = getattr(transformers, known.model) if known and known.model else _model_class(spec, config)
        self._family = family = known or self._other_family(config.model_type, model)
        self.modality, self.supports_inserted_tokens = family.modality, family.supports_inserted_tokens
        optional = "add_pooling_layer" in inspect.signature(model.__init__).parameters
        pools = (*family.pools, *(["pooler"] if optional and "pooler" not in family.pools else []))
        declared = _hf_text.declared_pool(source.folder, str(spec)) if "pool" not in spec.options else None
        self._pool = _options.one_of(spec, "pool", declared or source.pool or family.pool, pools)
        options = {"add_pooling_layer": self._pool == "pooler"} if optional else {}
        whole = _build(spec, source, config, model, options)
        self.backbone: Any = getattr(whole, family.part) if family.part else whole
        self.preprocess = self._preprocess(source)
        encoded = self._probe(self._example_inputs())
        self.feature_width, self.token_width = encoded.pooled_BC.shape[1], encoded.tokens_BLD.shape[2]

    def architecture(self) -> dict[str, Any]:
        """Describe the class, the pooling and the configuration with options applied."""
        values = {key: value for key, value in self.model_config.to_dict().items() if key not in _NO_PART}
        values = {key: value for key, value in values.items() if not key.startswith("_")}
        return {"class": type(self.backbone).__name__, "pool": self._pool, **values}

    @abstractmethod
    def _preprocess(self, source: Source) -> Preprocess:
        """Build preprocessing from the files next to the model."""

    @abstractmethod
    def _example_inputs(self) -> Inputs:
        """Inputs of two samples, for the probe."""

    def _other_family(self, kind: str, model: Any) -> Family:
        """Family of a model type that is not in `families`.

        Raises:
            EncoderError: the type is not supported.
        """
        raise unsuitable_model_error(f"{self.spec.scheme}: does not support {kind} models", self.spec, self.families)

    def _probe(self, example: Inputs) -> EncoderOutput:
        """Find the promptable layers and hook them; if there are none, set `unpromptable_reason`."""
        encoded: list[EncoderOutput] = []
        self.eval()
        own = self.backbone.config._attn_implementation
        if own == "sdpa":  # else ours would differ from the unmodified model
            with silence_transformers():
                self.backbone.set_attn_implementation(ATTENTION)
        try:
            sites, reason = find_sites(self.backbone, lambda: encoded.append(self._run(example)))
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            what = f"this {self.model_config.model_type} model does not accept {self.modality} input alone: {error}"
            raise unsuitable_model_error(what, self.spec, self.families) from error
        if not sites:
            self.backbone.set_attn_implementation(own)  # which also determines the form of masks
            reason = reason if own == "sdpa" else "transformers has no scaled-dot-product attention for it"
            self.unpromptable_reason = f"cannot be prompted: {reason}; usable as --comp (pooled feature)"
            return encoded[0]
        parts = [(site.block, site.norm, site.attention) for site in sites]
        slots = self._prompt_blocks(*zip(*parts, strict=True))
        adapted: dict[nn.Module, None] = {}  # ordered set, since layers can share projections
        for slot, site in zip(slots, sites, strict=True):
            slot.site = site
            site.attention.prompt_slot = slot  # type: ignore[assignment]
            projections = (*([site.query] if site.query else []), (site.value.parent, site.value.name))
            adapted |= dict.fromkeys(getattr(parent, name) for parent, name in projections)
        self.widths = tuple(site.width for site in sites)
        self.heads = tuple(site.heads for site in sites)
        self.lora_targets = _lora.names_of(self, [module for module in adapted if isinstance(module, nn.Linear)])
        return encoded[0]


def unsuitable_model_error(what: str, spec: Spec, families: Collection[str]) -> EncoderError:
    """Build the error for an unsuitable model, which lists the supported families."""
    return EncoderError(
        EncoderCode.UNSUITABLE, what, where=str(spec), fix=f"use a supported model, for example {', '.join(families)}"
    )


def _configure(spec: Spec, source: Source, ours: Collection[str]) -> Any:
    """Load the configuration of the encoder, or of one tower, and apply the options."""
    try:
        if source.folder is None:
            values = dict(source.config)
            config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        else:
            config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise EncoderError(
            EncoderCode.UNSUITABLE,
            f"transformers {transformers.__version__} cannot read the configuration: {error}",
            where=str(spec),
            fix="upgrade transformers, or use a different model",
        ) from error
    if hasattr(config, "use_cache"):
        config.use_cache = False  # the cache of keys and values is for text generation
    if config.model_type in TOWERS:
        config = config.text_config if source.part == "text" else config.vision_config
    accepted = {key for key in config.to_dict() if not key.startswith("_")} - _NOT_OPTIONS
    if any(key in spec.options for key in _TYPES):
        what, fix = "weights are loaded in float32", "add ?quantize=int8 to save memory, or --precision bf16 to save time"
        raise EncoderError(EncoderCode.BAD_OPTION, f"dtype is not an option: {what}", where=str(spec), fix=fix)
    for key, value in _options.library_options(spec, ours).items():
        if key not in accepted:
            raise _options.unknown_option(spec, key, accepted)
        try:
            setattr(config, key, list(value) if isinstance(value, tuple) else value)
        except StrictDataclassError as error:
            raise EncoderError(
                EncoderCode.BAD_OPTION,
                f"{key}={value} is invalid: {error}",
                where=str(spec),
                fix=f"remove {key}= from the spec",
            ) from error
    return config


def _model_class(spec: Spec, config: Any) -> Any:
    """Class of the model without a head."""
    found = auto.MODEL_MAPPING.get(type(config), None)
    if found is None:
        what = f"transformers {transformers.__version__} has no {config.model_type} model without a head"
        raise unsuitable_model_error(what, spec, BUILT_IN)
    return found[0] if isinstance(found, tuple) else found


def _build(spec: Spec, source: Source, config: Any, model: Any, options: dict[str, Any]) -> Any:
    """Build the model and load its weights, in float32."""
    try:
        if not source.random:
            return _pretrained(spec, source, config, model, options)
        built = model._from_config(config, dtype=torch.float32, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise EncoderError(
            EncoderCode.CANNOT_BUILD,
            f"transformers cannot build this {config.model_type} model: {error}",
            where=str(spec),
            fix="remove the options after ? from the spec, or correct config.json",
        ) from error
    if "weights" in spec.options:
        state = _weights.read_float(Path(os.path.expanduser(spec.options["weights"])))
        _weights.load_strictly(built, state, where=str(spec))
    return built


def _pretrained(spec: Spec, source: Source, config: Any, kind: Any, options: dict[str, Any]) -> Any:
    assert source.folder is not None
    for path in sorted(source.folder.glob("*.safetensors")):
        check_tensors(path)
    try:
        with silence_transformers():
            model, info = kind.from_pretrained(
                source.folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            CheckpointCode.FILE_DAMAGED,
            f"weights in {source.folder} are damaged: {error}",
            where=str(spec),
            fix="download them again",
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            CheckpointCode.ENCODER_WEIGHTS_MISMATCH,
            f"the weights of {spec.name} lack {len(missing)} tensors of the encoder: {', '.join(missing[:4])}",
            where=str(spec),
            fix="use a different ?pool=, or weights that contain these tensors",
        )
    return model
