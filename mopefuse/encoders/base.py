"""The base class of encoders, and the only interface between a frozen backbone and the prompts that condition it.

An encoder does not know where prompts come from. It takes one callback, ``prompt_at(layer, tokens_BLD, mask_BL)``, calls it
with the input tokens of each layer, and inserts the returned prompt into that layer's attention and masks. To add a family
of encoders, write a module with a subclass of `Encoder` and register it in the entry-point group ``mopefuse.encoders``;
`mopefuse.testing.check_encoder` tests the contract.

Shapes: B batch, L tokens, P prompt tokens, D width of a layer, C width of the pooled feature, H heads.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mopefuse.config.method_settings import Lora
from mopefuse.core import registry
from mopefuse.core.encoder_aliases import ALIASES
from mopefuse.core.error_codes import EncoderCode, PluginCode
from mopefuse.core.precision import weight_type
from mopefuse.core.registry import Spec
from mopefuse.core.threads import PerThread
from mopefuse.encoders import _lora, _quantize
from mopefuse.encoders import description as _description
from mopefuse.encoders._fingerprint import fingerprint
from mopefuse.encoders._types import Call, EncoderOutput, Inputs, Prefix, Preprocess, PromptAt
from mopefuse.encoders.attention import InsertedTokens, Modulation, Prompt
from mopefuse.errors import EncoderError, MopefuseError, PluginError
from mopefuse.modalities.base import get_modality

__all__ = [
    "Call",
    "Encoder",
    "EncoderOutput",
    "Inputs",
    "InsertedTokens",
    "Modulation",
    "Prefix",
    "Preprocess",
    "Prompt",
    "PromptAt",
    "create_encoder",
]


class _StopAtLayer(Exception):
    """Ends a forward pass at the layer whose input is wanted."""

    def __init__(self, tokens_BLD: Tensor) -> None:
        super().__init__()
        self.tokens_BLD = tokens_BLD


class Encoder(nn.Module):
    """A frozen pretrained backbone of one modality.

    A subclass builds its backbone in `__init__`, sets the attributes below, calls `_request_prompt(layer, tokens, mask)`
    with the input tokens of block `layer`, and passes the returned prompt to the attention of that block
    (`attention.attend`).
    Without a prompt its output equals that of the unmodified backbone, bit for bit. A sample's output does not depend on
    its batch.
    """

    spec: Spec  # with the full name, as recorded in a run
    modality: str  # name of an entry point in the group ``mopefuse.modalities``, for example text
    widths: tuple[int, ...] = ()  # D of each promptable layer; empty if the encoder can only be complementary
    heads: tuple[int, ...] = ()  # H of each promptable layer
    feature_width: int  # C
    token_width: int = 0  # D of the tokens that `encode` returns, for a CNN the locations of its feature map; 0 if unknown
    preprocess: Preprocess
    patch_size: int = 16  # side of a patch in pixels; images only, used by the papers' initialisation
    revision: str = ""  # commit of the hub repository from which the weights were loaded
    recompute: bool = False  # whether promptable blocks recompute activations in the backward pass, see `_recompute`
    supports_inserted_tokens: bool = False  # whether its layers support inserted tokens, see `InsertedTokens` and `run_layer`
    leading_tokens: int | None = None  # tokens ahead of the patches; None if layers depend on the place or number of tokens
    lora_targets: tuple[str, ...] = ()  # names of the submodules that project queries and values
    libraries: tuple[str, ...] = ()  # distributions besides torch and mopefuse that affect its features
    quantized: str = ""  # format of its linear layers, see `_quantize`; empty for floating point
    is_shared: bool = False  # whether other models use it, so that its parameters must not be changed
    unpromptable_reason: str = ""  # if there are no promptable layers: the reason, for the error message

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.tuned = self.adapted = False
        self._current_call = PerThread()  # a `Call`

    @classmethod
    def check_name(cls, spec: Spec) -> None:
        """Check that the scheme knows a name, without loading weights or using the network.

        Raises:
            EncoderError: there is no such encoder.
        """

    @abstractmethod
    def _encode(self, inputs: Inputs) -> EncoderOutput:
        """Run the forward pass; blocks get their prompts from `_request_prompt`."""

    def encode(
        self,
        inputs: Inputs,
        prompt_at: PromptAt | None = None,
        insert: InsertedTokens | None = None,
        start: Prefix | None = None,
    ) -> EncoderOutput:
        """Encode a batch, with a prompt in every layer for which `prompt_at` returns one.

        Args:
            insert: tokens that precede the encoder's own through all layers; they are part of the tokens passed to
                `prompt_at`, but not of the output.
            start: continue from the tokens that enter a promptable layer; earlier layers are not run. Of `inputs`, only the
                batch size, the length and the mask then matter; see `blank_inputs`.

        Raises:
            EncoderError: the encoder does not support prompts, or does not support inserted tokens.
        """
        assert start is None or insert is None, "inserted tokens pass through all layers"
        if prompt_at is not None or start is not None:
            self.require_promptable(fix="use it as --comp instead")
        if insert is not None:
            self.require_insertable()
            found, need = insert.tokens_BPD.shape[2], self.widths[0]
            assert found == need, f"inserted tokens of width {found}, expected {need}"
            insert = insert if insert.tokens_BPD.shape[1] else None
        with self._current_call.set(Call(prompt_at, insert, start)):
            return self._encode(self._finish_inputs(inputs))

    @torch.no_grad()
    def compute_prefix(self, inputs: Inputs, layer: int) -> Prefix:
        """Run the layers before `layer`, without prompts and gradients.

        ``encode(inputs, prompt_at, start=compute_prefix(inputs, layer))`` equals ``encode(inputs, prompt_at)`` if `prompt_at`
        returns None for the layers before `layer`.

        Raises:
            EncoderError: the encoder does not support prompts.
        """
        assert 0 <= layer < len(self.widths) or not self.widths, f"layer {layer} of {len(self.widths)}"

        def stop(at: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> None:
            if at == layer:
                raise _StopAtLayer(tokens_BLD)

        try:
            self.encode(inputs, stop)
        except _StopAtLayer as reached:
            return Prefix(layer, reached.tokens_BLD)
        raise AssertionError(f"{self.spec}: layer {layer} did not request a prompt")

    def blank_inputs(self, count: int) -> Inputs:
        """Inputs of `count` samples for `encode` with `start`, for an encoder whose inputs have no mask."""
        blank = self.preprocess.batch([self.preprocess.item(get_modality(self.modality).blank_value())])
        return {name: tensor.expand(count, *tensor.shape[1:]) for name, tensor in blank.items()}

    def _finish_inputs(self, inputs: Inputs) -> Inputs:
        """Finish preprocessing and cast floating-point inputs to the type of the weights."""
        dtype = weight_type(self)
        finished = self.preprocess.finish(inputs)
        return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in finished.items()}

    def require_promptable(self, *, fix: str) -> None:
        """Check that there are promptable layers.

        Raises:
            EncoderError: there are none; the message gives the reason.
        """
        if not self.widths:
            raise EncoderError(
                EncoderCode.NOT_PROMPTABLE, f"{self.spec} {self.unpromptable_reason or 'has no promptable layer'}", fix=fix
            )

    def require_tokens(self, *, fix: str, where: str = "") -> int:
        """Check that the encoder provides its output tokens; returns their width.

        Raises:
            EncoderError: it does not.
        """
        if not self.token_width:
            what = f"{self.spec} does not provide its tokens"
            raise EncoderError(EncoderCode.TOKEN_WIDTH_UNKNOWN, what, where=where, fix=fix)
        return self.token_width

    def require_insertable(self, side: str = "main") -> None:
        """Check that the encoder supports inserted tokens.

        Raises:
            EncoderError: it does not.
        """
        if not self.supports_inserted_tokens:
            fix = f"use tiny:, a ViT of timm: or a BERT of hf: as --{side}, or a different --method"
            raise EncoderError(EncoderCode.NOT_INSERTABLE, f"{self.spec} does not support inserted tokens", fix=fix)

    def run_layer(
        self, layer: int, tokens_BLD: Tensor, mask_BK: Tensor | None = None, prompt: Prompt | None = None
    ) -> Tensor:
        """Run one promptable layer on its own; may be called from within ``prompt_at``.

        Tokens whose outputs are not needed can be passed as an ungated prompt instead.

        Args:
            mask_BK: mask of the last K keys, where keys are the prompt followed by the tokens; False for padding, None
                without padding.

        Returns:
            Output tokens (B, L, D).

        Raises:
            EncoderError: the encoder does not support inserted tokens.
        """
        self.require_insertable()
        tokens_BLD = tokens_BLD if prompt is None else prompt.add_to(tokens_BLD)
        with self._current_call.set(Call()):
            return self._run_layer(layer, tokens_BLD, None if mask_BK is None else mask_BK[:, None, None], prompt)

    def _run_layer(self, layer: int, tokens_BLD: Tensor, mask_B11K: Tensor | None, prompt: Prompt | None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} sets supports_inserted_tokens but does not implement `_run_layer`")

    def forward(
        self,
        inputs: Inputs,
        prompt_at: PromptAt | None = None,
        insert: InsertedTokens | None = None,
        start: Prefix | None = None,
    ) -> EncoderOutput:
        """Same as `encode`."""
        return self.encode(inputs, prompt_at, insert, start)

    @property
    def _call(self) -> Call:
        """State of the current call in this thread; an empty one if the backbone is called directly."""
        call = self._current_call.value
        return call if isinstance(call, Call) else Call()

    def _request_prompt(self, layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None = None) -> Prompt | None:
        """Return the prompt of a layer for its input tokens, or None where there is none."""
        prompt_at = self._call.prompt_at
        return None if prompt_at is None else prompt_at(layer, tokens_BLD, mask_BL)

    def _resume(self, x_BLD: Tensor) -> tuple[int, Tensor]:
        """The first layer to run and its input: 0 and `x_BLD`, unless the call continues from a `Prefix`."""
        start = self._call.start
        return (0, x_BLD) if start is None else (start.layer, start.tokens_BLD.to(x_BLD.dtype))

    def freeze(self) -> None:
        """Make no parameter trainable; the backbone stays in evaluation mode (no dropout) even after `train()`."""
        self.tuned = self.adapted = False
        self.requires_grad_(False).eval()

    def tune(self) -> None:
        """Make every parameter trainable."""
        assert not self.is_shared, "other models use the encoder"
        _quantize.require_float(self, "full tuning")
        self.tuned = True
        self.requires_grad_(True)

    def adapt(self, lora: Lora) -> None:
        """Add trainable LoRA parameters, see `_lora.adapt`. May be called once."""
        assert not (self.adapted or self.is_shared), "the encoder was adapted before, or other models use it"
        _quantize.require_float(self, "LoRA")
        _lora.adapt(self, lora)
        self.adapted = True
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.is_trainable(name))

    @property
    def trainable(self) -> bool:
        """Whether any parameter is trainable, so that features change during training."""
        return self.tuned or self.adapted

    def is_trainable(self, name: str) -> bool:
        """Whether a parameter or buffer of this encoder is trained rather than loaded from the pretrained weights."""
        return self.tuned or (self.adapted and _lora.is_lora(name))

    def train(self, mode: bool = True) -> Encoder:
        """Set training mode: of the backbone only if it is fully tuned, else only of LoRA's dropout.

        Batch norms always stay in evaluation mode: otherwise a sample's output would depend on its batch, and statistics
        would differ between processes.
        """
        super().train(mode and self.tuned)
        for module in self.modules() if mode and self.tuned else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        if self.adapted:
            _lora.train_dropout(self, mode)
        return self

    def architecture(self) -> dict[str, Any]:
        """Plain values besides the weights that determine the features: resolved configuration, pooling.

        By default the name and the options in the spec; a family that reads a configuration returns that, without paths.
        """
        options = {key: value for key, value in self.spec.options.items() if key not in _description.SOURCES}
        stored = os.path.exists(os.path.expanduser(self.spec.name))  # a path does not identify a model
        return {"class": type(self).__name__, **({} if stored else {"name": self.spec.name}), **options}

    def describe(self) -> dict[str, Any]:
        """Describe what determines the features besides the weights: ``model``, ``preprocess`` and ``libraries``."""
        owners = [registry.distribution(point) for point in registry.find_candidates(registry.ENCODERS, self.spec.scheme)]
        quantized = {_quantize.OPTION: self.quantized} if self.quantized else {}
        libraries = ("mopefuse", "torch", *self.libraries, *owners, *(["torchao"] if quantized else []))
        description = {
            "model": {**self.architecture(), **quantized},
            "preprocess": _description.preprocess_values(self.preprocess),
            "libraries": _description.get_versions(libraries),
        }
        plain: dict[str, Any] = _description.to_json_values(description)
        return plain

    def count_tokens(self) -> int:
        """Count the tokens of an empty value by a forward pass: of an image, its patches and class token.

        Counts the input of the first promptable layer, or the output if there is none.
        """
        counted: list[int] = []

        def count(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> None:
            counted.append(tokens_BLD.shape[1])

        inputs = self.preprocess.batch([self.preprocess.item(get_modality(self.modality).blank_value())])
        with torch.no_grad():
            encoded = self.encode(inputs, count if self.widths else None)
        return counted[0] if counted else encoded.tokens_BLD.shape[1]

    def digest(self) -> str:
        """Hash of `describe`, including library versions: 16 hex digits."""
        return _description.digest(self.describe())

    def fingerprint(self) -> str:
        """Hash of names, shapes, types and values of the weights, without LoRA's: 16 hex digits."""
        weights = self.state_dict()
        if self.adapted:
            weights = {_lora.original_name(name): tensor for name, tensor in weights.items() if not _lora.is_lora(name)}
        return fingerprint(weights)


def create_encoder(text: str) -> Encoder:
    """Create the frozen encoder that a spec names; ``encoder.spec`` has the full name of an alias.

    The option ``quantize`` applies to every encoder, see `_quantize`.

    Raises:
        ConfigError: not a spec.
        EncoderError: an unknown scheme, an unknown encoder of the scheme, or one that cannot be loaded.
        PackageError: the option needs a package that is not installed.
        PluginError: the plugin that provides the scheme cannot be used.
    """
    spec, quantized = _quantize.split_option(full_spec(text))
    build = registry.load(registry.ENCODERS, spec.scheme)
    owner, of_plugin, _ = spec.scheme.rpartition(":")
    try:
        with registry.redirect_stdout_to_stderr():
            encoder = build(spec)
    except Exception as error:
        if not of_plugin or isinstance(error, MopefuseError):
            raise
        what = f"the plugin {owner} failed to create {spec.name}: {type(error).__name__}: {error}"
        raise PluginError(PluginCode.ENCODER_FAILED, what, where=str(spec), fix=f"upgrade or uninstall {owner}") from error
    if not isinstance(encoder, Encoder):
        what = f"the plugin {owner} returned a {type(encoder).__name__} instead of a mopefuse.encoders.Encoder"
        raise PluginError(PluginCode.NOT_AN_ENCODER, what, where=str(spec), fix=f"upgrade or uninstall {owner}")
    encoder.freeze()
    if quantized:
        _quantize.quantize(encoder, quantized)
    return encoder


def check_name(text: str) -> None:
    """Check that the scheme and the name of a spec exist, as far as can be known without the network.

    Raises:
        ConfigError, EncoderError, PluginError: see `create_encoder`.
    """
    spec, _ = _quantize.split_option(full_spec(text))
    check = getattr(registry.load(registry.ENCODERS, spec.scheme), "check_name", None)  # a plugin may be a function
    if check is not None:
        check(spec)


def full_spec(text: str) -> Spec:
    """Parse a spec and resolve its alias to the full name, without importing an encoder."""
    spec = registry.parse_spec(text)
    return replace(spec, name=ALIASES.get(spec.scheme, {}).get(spec.name, spec.name))


def run_frozen(encoder: Encoder, inputs: Inputs) -> EncoderOutput:
    """Encode without prompts and without building an autograd graph."""
    with torch.no_grad():
        return encoder.encode(inputs)
