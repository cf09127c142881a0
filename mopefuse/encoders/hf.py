"""Encoders of transformers: ``hf:bert-base``, ``hf:org/name@revision``, ``hf:/path/to/folder``, ``hf:clip-text``.

Promptable layers are found by a probe and not by name (`probe`); a model whose layers it cannot verify provides its pooled
feature only. Decoder-only language models are text encoders too, pooled by their last token.

Images have the size that the model's image processor declares; the model's positions are interpolated to it if necessary.
``?size=`` overrides it.

Options: ``pretrained``, ``weights``, ``pool``, ``max_tokens`` (text), ``size`` (images); others override values of the
configuration, except ``dtype``: weights are loaded in float32.

Shapes: B batch, L tokens, D width, C width of the pooled feature.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto as auto

from mopefuse.core.error_codes import EncoderCode
from mopefuse.core.registry import Spec
from mopefuse.encoders import _hf_images, _hf_source, _hf_text, _options
from mopefuse.encoders._hf_architectures import DECODER, FAMILIES, IMAGE, TEXT, Family
from mopefuse.encoders._hf_model import TransformersEncoder, unsuitable_model_error
from mopefuse.encoders._hf_source import Source
from mopefuse.encoders.base import EncoderOutput, Inputs
from mopefuse.encoders.pooling import mean_of
from mopefuse.encoders.preprocess import ImagePreprocess, TextPreprocess
from mopefuse.errors import EncoderError

_OURS = ("pretrained", "weights", "pool", "max_tokens", "size")
_POSITIONS_AT_INPUT = ("vit", "deit", "dinov2", "dinov2_with_registers", "clip_vision_model", "siglip_vision_model")
_MASKED = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
_CAUSAL = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


class HFEncoder(TransformersEncoder):
    """A transformers encoder. ``encode`` takes ``{"pixels": (B, 3, H, W)}`` or ``{"ids", "mask": (B, L)}``."""

    families = FAMILIES
    own_options = _OURS
    _interpolate = False  # whether positions are interpolated to another image size than the model's

    def _other_family(self, kind: str, model: Any) -> Family:
        if model.main_input_name == "pixel_values":
            return IMAGE
        if model.main_input_name == "input_ids" and kind in _MASKED | _CAUSAL:
            return TEXT if kind in _MASKED else DECODER
        raise unsuitable_model_error(f"a {kind} model accepts neither text nor images alone", self.spec, FAMILIES)

    def _preprocess(self, source: Source) -> TextPreprocess | ImagePreprocess:
        if self.modality == "text":
            return _texts(self.spec, source, self.model_config, self._family)
        return self._images(source)

    def _images(self, source: Source) -> ImagePreprocess:
        """Build preprocessing from the image processor and ``?size=``; if the model supports neither size, use its own."""
        native, requested = _native_size(self.model_config), _options.image_size(self.spec)
        if requested is None and "image_size" in self.spec.options:
            requested = native
        patch = getattr(self.model_config, "patch_size", None)
        if "size" in self.spec.options and requested and isinstance(patch, int):
            _options.require_patches(self.spec, requested, patch)
        processor = _processor(self.spec, source)
        if processor is None:
            found = _hf_images.default_preprocess(self._family.statistics, requested or native or (224, 224))
        else:
            found = _hf_images.from_processor(processor, size=requested)
        if native is None or found.size == native:
            return found
        self._interpolate = "interpolate_pos_encoding" in inspect.signature(self.backbone.forward).parameters
        error = self._try_size(found.size)
        if error is None:
            return found
        if "size" in self.spec.options:
            raise _options.cannot_resize(self.spec, error)
        self._interpolate = False
        return _hf_images.from_processor(processor, squeeze=native)

    @torch.no_grad()
    def _try_size(self, size: tuple[int, int]) -> Exception | None:
        """Run the model on an image of a size; return the error, None if it runs."""
        was_training = self.backbone.training
        try:
            self.backbone.eval()(pixel_values=torch.zeros(1, 3, *size), **self._image_options())
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            return error
        finally:
            self.backbone.train(was_training)
        return None

    def _image_options(self) -> dict[str, bool]:
        return {"interpolate_pos_encoding": True} if self._interpolate else {}

    def _example_inputs(self) -> Inputs:
        if isinstance(self.preprocess, ImagePreprocess):
            return {"pixels": torch.randn(2, 3, *self.preprocess.size, generator=torch.Generator().manual_seed(0))}
        return self.preprocess.batch(["a b", "c"])

    def _probe(self, example: Inputs) -> EncoderOutput:
        self._prefix = 0  # number of tokens before the patches
        encoded = super()._probe(example)
        side = getattr(self.model_config, "patch_size", None)
        if isinstance(self.preprocess, ImagePreprocess) and isinstance(side, int):
            height, width = self.preprocess.size
            self.patch_size = side
            self._prefix = max(0, encoded.tokens_BLD.shape[1] - (height // side) * (width // side))
            self.leading_tokens = self._prefix if self.model_config.model_type in _POSITIONS_AT_INPUT else None
        return encoded

    def _run(self, inputs: Inputs) -> EncoderOutput:
        if self.modality == "text":
            mask_BL = self._call.mask_BL = inputs["mask"]
            attention_mask = None if self._family.filled else mask_BL.long()
            out = self.backbone(input_ids=inputs["ids"], attention_mask=attention_mask)
        else:
            mask_BL = None
            out = self.backbone(pixel_values=inputs["pixels"], **self._image_options())
        tokens_BLD: Tensor = out.last_hidden_state
        if tokens_BLD.dim() == 4:
            tokens_BLD = tokens_BLD.flatten(2).transpose(1, 2)
        return EncoderOutput(self._pooled(out, tokens_BLD, mask_BL), tokens_BLD, mask_BL)

    def _pooled(self, out: Any, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        """Pool the output as the option `pool` selects, (B, C)."""
        if self._pool == "pooler" and getattr(out, "pooler_output", None) is not None:
            pooled_BC: Tensor = out.pooler_output.flatten(1)
            return pooled_BC
        if self._pool == "cls":
            return tokens_BLD[:, 0]
        if self._pool == "cls+mean":
            return torch.cat([tokens_BLD[:, 0], self._mean(tokens_BLD, mask_BL)], dim=1)
        if mask_BL is None or self._pool == "mean":
            return self._mean(tokens_BLD, mask_BL)
        last_B = mask_BL.sum(dim=1) - 1  # also eot: padding is on the right
        return tokens_BLD[torch.arange(last_B.shape[0], device=last_B.device), last_B]


    def _mean(self, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        """Mean of the tokens of a text, or of the patches of an image, (B, D)."""
        return tokens_BLD[:, self._prefix :].mean(dim=1) if mask_BL is None else mean_of(tokens_BLD, mask_BL)


def _texts(spec: Spec, source: Source, config: Any, family: Family) -> TextPreprocess:
    """Build preprocessing with the encoder's tokenizer and length."""
    if "size" in spec.options:
        raise _options.unknown_option(spec, "size", {*_OURS} - {"size"})
    values = {**config.to_dict(), "model_type": config.model_type}
    limit = _hf_text.limit_of(values)
    usual = _hf_text.declared_length(source.folder) or min(limit, family.max_tokens or limit)
    length = limit if family.filled else None
    if source.folder is None or not any((source.folder / name).is_file() for name in _hf_text.VOCABULARIES):
        if (source.trained and source.folder is not None) or "weights" in spec.options:
            raise EncoderError(
                EncoderCode.NO_TOKENIZER,
                f"{source.folder or spec.name} has no tokenizer (tokenizer.json, vocab.txt, ...)",
                where=str(spec),
                fix="save the tokenizer beside the model, or add ?pretrained=false for random weights",
            )
        most = _options.max_tokens(spec, min(limit, usual), limit)
        hashing = _hf_text.hashing_for(values)
        hashing.length = length
        return TextPreprocess(hashing, most, "hashing", int(config.vocab_size), hashing.save, hashing.length)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source.folder, config=config, trust_remote_code=False, local_files_only=True
        )
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise EncoderError(
            EncoderCode.NO_TOKENIZER,
            f"the tokenizer of {spec.name} cannot be read: {error}",
            where=str(spec),
            fix="save it again with save_pretrained()",
        ) from error
    tokenize = _hf_text.TokenizerWrapper(tokenizer, _hf_text.padding_id(values, tokenizer), length)
    most = _options.max_tokens(spec, min(limit, usual, tokenizer.model_max_length), limit)
    return TextPreprocess(tokenize, most, spec.name, int(config.vocab_size), tokenize.save, tokenize.length)


def _native_size(config: Any) -> tuple[int, int] | None:
    """(height, width) in pixels of the images that a model's positions are for."""
    side = getattr(config, "image_size", None)
    if not side:
        return None
    return (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))


def _processor(spec: Spec, source: Source) -> Any:
    """Load the image processor next to the model; None for random weights without one.

    Raises:
        EncoderError: pretrained weights without an image processor, or one that cannot be read.
    """
    if "max_tokens" in spec.options:
        raise _options.unknown_option(spec, "max_tokens", {*_OURS} - {"max_tokens"})
    if source.folder is None or not any((source.folder / name).is_file() for name in _hf_source.IMAGE_FILES):
        if source.trained and source.folder is not None:
            raise EncoderError(
                EncoderCode.NO_IMAGE_CONFIG,
                f"{source.folder} has no preprocessor_config.json, which gives the size and statistics of images",
                where=str(spec),
                fix="save the image processor beside the model",
            )
        return None
    try:
        return transformers.AutoImageProcessor.from_pretrained(source.folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        raise EncoderError(
            EncoderCode.NO_IMAGE_CONFIG, f"the image processor cannot be read: {error}", where=str(spec), fix="save it again"
        ) from error
