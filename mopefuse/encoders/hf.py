"""Encoders of transformers: ``hf:bert-base``, ``hf:org/name@revision``, ``hf:/path/to/folder``, ``hf:clip-text``.

Which layers can be prompted is found by a probe and not by name (`_probe`); a model whose layers it cannot verify gives its
pooled feature. Decoder-only language models are encoders of text as well, summed up by their last token.

Weights are read from safetensors only and no repository's code is ever run.

Options: ``pretrained``, ``weights``, ``pool``, ``max_tokens`` (text); others replace values of the configuration.

Shapes: B batch, L tokens, D width, C width of the pooled feature.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers.models.auto import modeling_auto as auto

from mopefuse.checkpoint import check_tensors
from mopefuse.encoders import _hf_images, _hf_source, _hf_text, _numbers, _options, _weights
from mopefuse.encoders._base import Encoded, Inputs
from mopefuse.encoders._hf_attention import TransformersEncoder, quietly
from mopefuse.encoders._hf_families import DECODER, FAMILIES, IMAGE, TEXT, TOWERS, Family
from mopefuse.encoders._hf_source import Source
from mopefuse.encoders._preprocess import ImagePreprocess, TextPreprocess
from mopefuse.errors import CheckpointError, EncoderError
from mopefuse.registry import Spec

_OURS = ("pretrained", "weights", "pool", "max_tokens")
_MASKED = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
_CAUSAL = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class HFEncoder(TransformersEncoder):
    """A transformers encoder. ``encode`` takes ``{"pixels": (B, 3, H, W)}`` or ``{"ids", "mask": (B, L)}``.

    Raises (on construction):
        EncoderError: no such folder or repository, or it holds no encoder that can be used, or an unknown option.
        CheckpointError: its weights are damaged, a pickle, incomplete, or do not fit.
        ResourceError: the hub's cache cannot be written.
    """


    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        source = _hf_source.find(spec)
        self.revision = source.revision
        config = _configure(spec, source)
        kind: str = config.model_type
        known = FAMILIES.get(kind)
        model = getattr(transformers, known.model) if known and known.model else _model_class(spec, config)
        self._family = family = known or _family(kind, model, spec)
        self.modality, self.insertable = family.modality, family.insertable
        optional = "add_pooling_layer" in inspect.signature(model.__init__).parameters
        pools = (*family.pools, *(["pooler"] if optional and "pooler" not in family.pools else []))
        declared = _hf_text.declared_pool(source.folder, str(spec)) if "pool" not in spec.options else None
        self._pool = _options.one_of(spec, "pool", declared or source.pool or family.pool, pools)
        options = {"add_pooling_layer": self._pool == "pooler"} if optional else {}
        self.backbone: Any = _build(spec, source, config, model, options)
        if self.modality == "text":
            self.preprocess = _texts(spec, source, config, filled=family.filled)
            example = self.preprocess.batch(["a b", "c"])
        else:
            self.preprocess = images = _images(spec, source, config, family)
            size = images.size
            example = {"pixels": torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))}
        self._prefix = 0  # tokens ahead of the patches
        encoded: list[Encoded] = []
        try:
            self._prompt(self.backbone, lambda: encoded.append(self._run(example)))
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise _unsuitable(f"a {kind} model does not run on {self.modality} alone: {error}", spec) from error
        self._mask_BL = None
        self.feature_width, (_, length, self.token_width) = encoded[0].pooled_BC.shape[1], encoded[0].tokens_BLD.shape
        side = getattr(config, "patch_size", None)
        if self.modality == "image" and isinstance(side, int):
            self.patch_size, self._prefix = side, max(0, length - (size[0] // side) * (size[1] // side))

    def _run(self, inputs: Inputs) -> Encoded:
        if self.modality == "text":
            mask_BL = self._mask_BL = inputs["mask"]
            seen = None if self._family.filled else mask_BL.long()
            out = self.backbone(input_ids=inputs["ids"], attention_mask=seen)
        else:
            mask_BL = None
            out = self.backbone(pixel_values=inputs["pixels"])
        tokens_BLD: Tensor = out.last_hidden_state
        if tokens_BLD.dim() == 4:
            tokens_BLD = tokens_BLD.flatten(2).transpose(1, 2)
        return Encoded(self._pooled(out, tokens_BLD, mask_BL), tokens_BLD, mask_BL)

    def _pooled(self, out: Any, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        """The summary that `pool` names."""
        if self._pool == "pooler" and getattr(out, "pooler_output", None) is not None:
            pooled_BC: Tensor = out.pooler_output.flatten(1)
            return pooled_BC
        if self._pool == "cls":
            return tokens_BLD[:, 0]
        if mask_BL is None:
            return tokens_BLD[:, self._prefix :].mean(dim=1)
        if self._pool == "mean":
            weights_BL1 = mask_BL[:, :, None].to(tokens_BLD.dtype)
            return (tokens_BLD * weights_BL1).sum(dim=1) / weights_BL1.sum(dim=1)
        last_B = mask_BL.sum(dim=1) - 1  # also eot: padding is on the right
        return tokens_BLD[torch.arange(last_B.shape[0], device=last_B.device), last_B]


def _configure(spec: Spec, source: Source) -> Any:
    """The configuration of the encoder (of one tower, where there are two) with the options applied."""
    try:
        if source.folder is None:
            values = dict(source.config)
            config = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        else:
            config = transformers.AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise EncoderError(
            _numbers.UNSUITABLE,
            f"transformers {transformers.__version__} cannot read the configuration: {error}",
            where=str(spec),
            fix="use another model, or upgrade transformers",
        ) from error
    if config.model_type in TOWERS:
        config = config.text_config if source.part == "text" else config.vision_config
    accepted = {key for key in config.to_dict() if not key.startswith("_")} - {"model_type", "auto_map", "architectures"}
    for key, value in _options.library_options(spec, _OURS).items():
        if key not in accepted:
            raise _options.unknown_option(spec, key, accepted)
        try:
            setattr(config, key, list(value) if isinstance(value, tuple) else value)
        except StrictDataclassError as error:
            raise EncoderError(
                _numbers.BAD_OPTION, f"{key}={value} is not possible: {error}", where=str(spec), fix=f"change {key}"
            ) from error
    return config


def _family(kind: str, model: Any, spec: Spec) -> Family:
    """Of a model type that has no row."""
    if model.main_input_name == "pixel_values":
        return IMAGE
    if model.main_input_name == "input_ids" and kind in _MASKED | _CAUSAL:
        return TEXT if kind in _MASKED else DECODER
    raise _unsuitable(f"a {kind} model reads neither text nor images alone", spec)


def _unsuitable(what: str, spec: Spec) -> EncoderError:
    return EncoderError(_numbers.UNSUITABLE, what, where=str(spec), fix=f"use another one, for example {', '.join(FAMILIES)}")


def _model_class(spec: Spec, config: Any) -> Any:
    """The model without a head."""
    found = auto.MODEL_MAPPING.get(type(config), None)
    if found is None:
        raise _unsuitable(f"transformers {transformers.__version__} has no {config.model_type} model without a head", spec)
    return found[0] if isinstance(found, tuple) else found


def _build(spec: Spec, source: Source, config: Any, model: Any, options: dict[str, Any]) -> Any:
    """The model with its weights, in float32."""
    try:
        if not source.random:
            return _pretrained(spec, source, config, model, options)
        built = model._from_config(config, dtype=torch.float32, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise EncoderError(
            _numbers.CANNOT_BUILD,
            f"transformers cannot build this {config.model_type} model: {error}",
            where=str(spec),
            fix="change the options, or check config.json",
        ) from error
    if "weights" in spec.options:
        state = _weights.read_float(Path(spec.options["weights"]).expanduser())
        _weights.load_strictly(built, state, where=str(spec))
    return built


def _pretrained(spec: Spec, source: Source, config: Any, kind: Any, options: dict[str, Any]) -> Any:
    assert source.folder is not None
    for path in sorted(source.folder.glob("*.safetensors")):
        check_tensors(path)
    try:
        with quietly():
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
            _numbers.DAMAGED_FILE, f"weights in {source.folder} are damaged: {error}", where=str(spec), fix="fetch them again"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            _numbers.KEYS_DIFFER,
            f"the weights of {spec.name} lack {len(missing)} that the encoder needs: {', '.join(missing[:4])}",
            where=str(spec),
            fix="change ?pool= or the other options, or use other weights",
        )
    return model


def _texts(spec: Spec, source: Source, config: Any, *, filled: bool) -> TextPreprocess:
    """The encoder's own tokenizer and length."""
    values = {**config.to_dict(), "model_type": config.model_type}
    limit = _hf_text.limit_of(values)
    if source.folder is None or not any((source.folder / name).is_file() for name in _hf_text.VOCABULARIES):
        if (source.trained and source.folder is not None) or "weights" in spec.options:
            raise EncoderError(
                _numbers.NO_TOKENIZER,
                f"{source.folder or spec.name} has no tokenizer (tokenizer.json, vocab.txt, ...)",
                where=str(spec),
                fix="save the tokenizer beside the model, or add ?pretrained=false for random weights",
            )
        most = _options.max_tokens(spec, min(limit, _hf_text.declared_length(source.folder) or limit), limit)
        hashing = _hf_text.hashing_for(values)
        hashing.length = limit if filled else None
        return TextPreprocess(hashing, most, "hashing", int(config.vocab_size), hashing.save, hashing.length)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.folder, config=config, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise EncoderError(
            _numbers.NO_TOKENIZER, f"the tokenizer of {spec.name} cannot be read: {error}", where=str(spec), fix="save it again"
        ) from error
    own = min(limit, _hf_text.declared_length(source.folder) or limit, tokenizer.model_max_length)
    pad_id = config.pad_token_id if isinstance(config.pad_token_id, int) else tokenizer.pad_token_id or 0
    tokenize, most = _hf_text.Tokenize(tokenizer, pad_id, limit if filled else None), _options.max_tokens(spec, own, limit)
    return TextPreprocess(tokenize, most, spec.name, int(config.vocab_size), tokenize.save, tokenize.length)


def _images(spec: Spec, source: Source, config: Any, family: Family) -> ImagePreprocess:
    """The encoder's own size and statistics."""
    if "max_tokens" in spec.options:
        raise _options.unknown_option(spec, "max_tokens", {*_OURS} - {"max_tokens"})
    side = getattr(config, "image_size", None) or 224
    built_for = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
    if source.folder is None or not any((source.folder / name).is_file() for name in _hf_source.IMAGE_FILES):
        if source.trained and source.folder is not None:
            raise EncoderError(
                _numbers.NO_IMAGE_CONFIG,
                f"{source.folder} has no preprocessor_config.json: size and statistics of its images are not known",
                where=str(spec),
                fix="save the image processor beside the model",
            )
        return _hf_images.by_default(family.statistics, built_for)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            source.folder, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise EncoderError(
            _numbers.NO_IMAGE_CONFIG, f"the image processor cannot be read: {error}", where=str(spec), fix="save it again"
        ) from error
    return _hf_images.of_processor(processor, built_for if getattr(config, "image_size", None) else None)
