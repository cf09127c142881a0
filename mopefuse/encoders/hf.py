"""Encoders of transformers: ``hf:bert-base``, ``hf:org/name@revision``, ``hf:/path/to/folder``, ``hf:clip-text``.

The families of `_hf_families.FAMILIES` can be prompted: the attention of each layer is an argument of transformers'
attention interface, under a name of our own, and adds the keys and values of the prompt in the layer's slot. With no
prompt it is transformers' own scaled-dot-product function. Other encoders give their pooled feature.

Weights are read from safetensors only and no repository's code is ever run.

Options: ``pretrained``, ``weights``, ``pool``, ``max_tokens`` (text); others replace values of the configuration.

Shapes: B batch, L tokens, P prompt tokens, D width, H heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.auto import modeling_auto as auto
from transformers.utils import logging

from mopefuse.checkpoint import check_tensors
from mopefuse.encoders import _hf_images, _hf_source, _hf_text, _lora, _numbers, _options, _weights
from mopefuse.encoders._attention import attend, attend_prompts, split_heads
from mopefuse.encoders._base import Encoded, Inputs
from mopefuse.encoders._hf_families import FAMILIES, QUERY, UNKNOWN, Family, attention_of
from mopefuse.encoders._hf_source import Source
from mopefuse.encoders._preprocess import ImagePreprocess, TextPreprocess
from mopefuse.encoders._prompted import PromptedEncoder, Slot
from mopefuse.errors import CheckpointError, EncoderError
from mopefuse.registry import Spec

_OURS = ("pretrained", "weights", "pool", "max_tokens")
_ATTENTION = "mopefuse"  # our name in transformers' attention interface
_MASKED = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
_CAUSAL_ONLY = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - _MASKED
_IMAGE = set(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)


class HFEncoder(PromptedEncoder):
    """A transformers encoder. ``encode`` takes ``{"pixels": (B, 3, H, W)}`` or ``{"ids", "mask": (B, L)}``.

    Raises (on construction):
        EncoderError: no such folder or repository, or it holds no encoder that can be used, or an unknown option.
        CheckpointError: its weights are damaged, a pickle, incomplete, or do not fit.
        ResourceError: the hub's cache cannot be written.
    """


    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        source = _hf_source.find(spec, _CAUSAL_ONLY)
        self.revision = source.revision
        config = _configure(spec, source)
        kind = config.model_type
        family = FAMILIES.get(kind)
        self.modality = family.modality if family else _modality(kind, spec)
        known = family or UNKNOWN[self.modality]
        declared = _hf_text.declared_pool(source.folder, str(spec)) if "pool" not in spec.options else None
        self._pool = _options.one_of(spec, "pool", declared or source.pool or known.pool, known.pools)
        self._prefix = known.prefix
        self.backbone: Any = _build(spec, source, config, known, self._pool)
        if self.modality == "text":
            self.preprocess = _texts(spec, source, config)
        else:
            self.preprocess = _images(spec, source, config, known)
        if family and self.backbone._supports_attention_backend:
            self._hook(family)
            self.feature_width = self.token_width = self.widths[-1]
            self.patch_size = int(getattr(config, "patch_size", self.patch_size))
        else:
            version = f" in transformers {transformers.__version__}" if family else ""
            self.why_not_main = f"is a {kind} model, which cannot be prompted{version}; usable as --comp (pooled feature)"
            self.feature_width, self.token_width = self._probe()

    def _hook(self, family: Family) -> None:
        layers = [module for module in self.backbone.modules() if type(module).__name__ == family.layer]
        self.insertable = family.insertable
        norms = [getattr(layer, family.norm) if family.norm else None for layer in layers]
        attentions = [attention_of(layer) for layer in layers]
        for slot, (attention, key, value) in zip(self._prompt_blocks(layers, norms), attentions, strict=True):
            attention.prompt_slot, attention.prompt_projections = slot, (key, value)
        self.widths = tuple(int(getattr(attention, key).in_features) for attention, key, _ in attentions)
        self.heads = tuple(_heads(attention) for attention, _, _ in attentions)
        adapted = [getattr(attention, name) for attention, key, value in attentions for name in (QUERY[key], value)]
        self.lora_targets = _lora.names_of(self, adapted)

    def _run(self, inputs: Inputs) -> Encoded:
        if self.modality == "text":
            mask_BL = self._mask_BL = inputs["mask"]
            out = self.backbone(input_ids=inputs["ids"], attention_mask=mask_BL.long())
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
        last_B = mask_BL.sum(dim=1) - 1  # eot: padding is on the right
        return tokens_BLD[torch.arange(last_B.shape[0], device=last_B.device), last_B]

    def _probe(self) -> tuple[int, int]:
        """Widths of the pooled feature and the tokens of a model that we know nothing of."""
        height, width = getattr(self.preprocess, "size", (0, 0))
        inputs = self.preprocess.batch(["a"]) if self.modality == "text" else {"pixels": torch.zeros(1, 3, height, width)}
        self.eval()
        with torch.no_grad():
            out = self._run(inputs)
        return out.pooled_BC.shape[1], out.tokens_BLD.shape[2]


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' scaled-dot-product attention, with the prompt in the module's slot. Query (B, H, L, E)."""
    slot: Slot | None = getattr(module, "prompt_slot", None)
    prompt = slot.take() if slot is not None else None
    if slot is not None and slot.insert is not None:
        attention_mask = slot.insert.mask(attention_mask, query.shape[2])
    if prompt is None or prompt.gate_H is not None:
        out_BLHE, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
        if prompt is None:
            return out_BLHE, None
    keys, values = (
        split_heads(getattr(module, name)(prompt.tokens_BPD), query.shape[1]) for name in module.prompt_projections
    )
    if prompt.gate_H is not None:
        return out_BLHE + attend_prompts(query, keys, values, prompt.gate_H, scale=scaling).transpose(1, 2), None
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    out = attend(query, key, value, keys, values, mask=attention_mask, causal=causal, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, sdpa_mask)


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
    if config.model_type == "clip":
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


def _modality(kind: str, spec: Spec) -> str:
    """Of a family that cannot be prompted."""
    if kind in _IMAGE:
        return "image"
    if kind in _MASKED:
        return "text"
    raise EncoderError(
        _numbers.UNSUITABLE,
        f"a {kind} model is neither a text nor an image encoder",
        where=str(spec),
        fix=f"use an encoder, for example {', '.join(sorted(FAMILIES))}",
    )


def _build(spec: Spec, source: Source, config: Any, family: Family, pool: str) -> Any:
    """The model with its weights, in float32."""
    options: dict[str, Any] = {"add_pooling_layer": pool == "pooler"} if family.optional_pooler else {}
    if family.layer:
        options["attn_implementation"] = _ATTENTION
    try:
        if not source.random:
            return _pretrained(spec, source, config, family, options)
        model = transformers.AutoModel.from_config(config, dtype=torch.float32, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise EncoderError(
            _numbers.CANNOT_BUILD,
            f"transformers cannot build this {config.model_type} model: {error}",
            where=str(spec),
            fix="change the options, or check config.json",
        ) from error
    if "weights" in spec.options:
        state = _weights.read_float(Path(spec.options["weights"]).expanduser())
        _weights.load_strictly(model, state, where=str(spec))
    return model


def _pretrained(spec: Spec, source: Source, config: Any, family: Family, options: dict[str, Any]) -> Any:
    assert source.folder is not None
    for path in sorted(source.folder.glob("*.safetensors")):
        check_tensors(path)
    try:
        with _quietly():
            model, info = getattr(transformers, family.model).from_pretrained(
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


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bar and its report of heads that an encoder has no use for."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _texts(spec: Spec, source: Source, config: Any) -> TextPreprocess:
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
        return TextPreprocess(hashing, most, "hashing", int(config.vocab_size), hashing.save)
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
    tokenize = _hf_text.Tokenize(tokenizer, pad_id)
    return TextPreprocess(tokenize, _options.max_tokens(spec, own, limit), spec.name, int(config.vocab_size), tokenize.save)


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


def _heads(attention: Any) -> int:
    for name in ("num_attention_heads", "num_heads", "n_heads"):
        if hasattr(attention, name):
            return int(getattr(attention, name))
    raise AssertionError(f"{type(attention).__name__} does not say how many heads it has")
