"""What an encoder is: the one seam between a frozen backbone and the prompts that condition it.

An encoder knows nothing of where prompts come from. It takes one callback, ``prompt_at(layer, tokens_BLD, mask_BL)``,
hands it the tokens that are about to enter a layer, and owns how the answer enters that layer's attention and masks.
To add a family of encoders, write one module with a subclass of `Encoder` and name it in the entry-point group
``mopefuse.encoders``; `mopefuse.testing.check_encoder` says whether it keeps the contract.

Shapes: B batch, L tokens, P prompt tokens, D width of a layer, C width of the pooled feature, H heads.
"""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mopefuse.config.schema import Lora
from mopefuse.core import registry
from mopefuse.core.aliases import ALIASES
from mopefuse.core.precision import weight_type
from mopefuse.core.registry import Spec
from mopefuse.core.threads import PerThread
from mopefuse.encoders import _lora
from mopefuse.encoders import description as _description
from mopefuse.encoders.attention import Insert, Prompt
from mopefuse.errors import EncoderError, MopefuseError, PluginError
from mopefuse.modalities.base import of

__all__ = ["Encoded", "Encoder", "Inputs", "Insert", "Preprocess", "Prompt", "PromptAt", "create_encoder"]

Inputs = dict[str, Tensor]
PromptAt = Callable[[int, Tensor, "Tensor | None"], "Prompt | None"]


class Encoded(NamedTuple):
    """What an encoder returns."""

    pooled_BC: Tensor  # the encoder's own summary: [CLS], mean, EOT, ...
    tokens_BLD: Tensor  # last layer, prompts never among them
    mask_BL: Tensor | None  # True where a token is real; None if all are


class Call:
    """One `Encoder.encode` or `Encoder.run_layer` on its way through the layers. Each thread has its own.

    Attributes:
        mask_BL: which tokens of the texts being encoded are real; None if all are.
        waiting: prompts that have been asked for and not yet used, by the number of their slot, see `_prompted`.
        runs: how often the block of a slot has run.
    """

    def __init__(self, prompt_at: PromptAt | None = None, insert: Insert | None = None) -> None:
        self.prompt_at, self.insert = prompt_at, insert
        self.mask_BL: Tensor | None = None
        self.waiting: dict[int, Prompt] = {}
        self.runs: dict[int, int] = {}


class Preprocess(Protocol):
    """How raw values of one modality become an encoder's input: its own size, statistics, tokenizer."""

    def item(self, value: Any) -> Any:
        """One raw value, prepared alone (in a data worker): `ready` of `reduce`."""

    def reduce(self, value: Any) -> Any:
        """The part of `item` that never changes and may be kept: an image resized, as an array of 8 bits, a text cut."""

    def ready(self, reduced: Any) -> Any:
        """The rest of `item`, after augmentation: an image cropped."""

    def batch(self, items: Sequence[Any]) -> Inputs:
        """Prepared values of a batch as the tensors that `Encoder.encode` takes, first dimension B."""

    def finish(self, inputs: Mapping[str, Tensor]) -> Inputs:
        """What is left to do where the encoder is, by `Encoder.encode`: 8-bit pixels to normalised floats."""

    def describe(self) -> dict[str, Any]:
        """Plain values for `encoders inspect` and for exported artefacts."""


class Encoder(nn.Module):
    """A frozen pretrained backbone of one modality.

    A subclass builds its backbone in `__init__`, fills the attributes below, calls `_ask(layer, tokens, mask)` as
    tokens enter block `layer`, and has the attention of that block use the answer (`_attention.attend`). Without a
    prompt its output is that of the untouched backbone, bit for bit. A sample's output never depends on its batch.
    """


    spec: Spec  # with the full name, as recorded in a run
    modality: str  # name of an entry point in the group ``mopefuse.modalities``, as text
    widths: tuple[int, ...] = ()  # D of each promptable layer; empty if the encoder can be complementary only
    heads: tuple[int, ...] = ()  # H of each promptable layer
    feature_width: int  # C
    token_width: int = 0  # D of the tokens that `encode` returns, which of a CNN are the places of its map; 0 if not known
    preprocess: Preprocess
    patch_size: int = 16  # side of a patch in pixels; images only, used by the papers' initialisation
    revision: str = ""  # commit of the hub repository that the weights came from, where there is one
    recompute: bool = False  # whether promptable blocks keep no activations, see `_recompute`
    insertable: bool = False  # whether its layers take other tokens beside its own, see `Insert` and `run_layer`
    lora_targets: tuple[str, ...] = ()  # names of the query and value projections, as submodules that are called
    libraries: tuple[str, ...] = ()  # distributions whose code computes its features, beside torch and mopefuse
    why_not_main: str = ""  # for an encoder without promptable layers: the reason, for the error message

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.tuned = self.adapted = False
        self._at_work = PerThread()  # a `Call`

    @classmethod
    def check_name(cls, spec: Spec) -> None:
        """Refuse a name that the scheme does not know, before any data are read. Loads no weights and asks no network.

        Raises:
            EncoderError: there is no such encoder.
        """

    @abstractmethod
    def _encode(self, inputs: Inputs) -> Encoded:
        """The forward pass; blocks ask for their prompts through `_ask`."""

    def encode(self, inputs: Inputs, prompt_at: PromptAt | None = None, insert: Insert | None = None) -> Encoded:
        """Encode a batch, prompted at every layer for which `prompt_at` returns a prompt.

        Args:
            insert: tokens to go ahead of the encoder's own, through all layers; they are not among what is returned, but
                among what `prompt_at` is handed.

        Raises:
            EncoderError: prompts for an encoder that has no layer to prompt, tokens for one that does not take them.
        """
        if prompt_at is not None:
            self.require_promptable(fix="use it as --comp instead")
        if insert is not None:
            self.require_insertable()
            found, need = insert.tokens_BPD.shape[2], self.widths[0]
            assert found == need, f"inserted tokens of width {found}, need {need}"
            insert = insert if insert.tokens_BPD.shape[1] else None
        with self._at_work.set(Call(prompt_at, insert)):
            return self._encode(self._finished(inputs))

    def _finished(self, inputs: Inputs) -> Inputs:
        """What `_encode` takes, numbers in the type of the weights."""
        own = weight_type(self)
        finished = self.preprocess.finish(inputs)
        return {name: tensor.to(own) if tensor.is_floating_point() else tensor for name, tensor in finished.items()}

    def require_promptable(self, *, fix: str) -> None:
        """Raise an EncoderError that says why, if there is no layer to prompt."""
        if not self.widths:
            raise EncoderError(21, f"{self.spec} {self.why_not_main or 'has no layer to prompt'}", fix=fix)

    def require_insertable(self, side: str = "main") -> None:
        """Raise an EncoderError if no token can go beside the encoder's own."""
        if not self.insertable:
            fix = f"use tiny:, a ViT of timm: or a BERT of hf: as --{side}, or another --method"
            raise EncoderError(70, f"{self.spec} takes no tokens beside its own", fix=fix)

    def run_layer(
        self, layer: int, tokens_BLD: Tensor, mask_BK: Tensor | None = None, prompt: Prompt | None = None
    ) -> Tensor:
        """What one promptable layer makes of tokens by itself, (B, L, D); also from within ``prompt_at``.

        Of the tokens that a layer is run on, those whose outputs are not wanted can as well be its prompt, ungated.

        Args:
            mask_BK: which are real of the last K of what is seen, the prompt followed by the tokens; None if all are.

        Raises:
            EncoderError: an encoder that takes no tokens beside its own.
        """
        self.require_insertable()
        with self._at_work.set(Call()):
            return self._run_layer(layer, tokens_BLD, None if mask_BK is None else mask_BK[:, None, None], prompt)

    def _run_layer(self, layer: int, tokens_BLD: Tensor, mask_B11K: Tensor | None, prompt: Prompt | None) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} is insertable, and gives no `_run_layer`")

    def forward(self, inputs: Inputs, prompt_at: PromptAt | None = None, insert: Insert | None = None) -> Encoded:
        """Same as `encode`."""
        return self.encode(inputs, prompt_at, insert)

    @property
    def _call(self) -> Call:
        """The call at work in this thread; one without prompts where the backbone is run by itself."""
        call = self._at_work.value
        return call if isinstance(call, Call) else Call()

    def _ask(self, layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None = None) -> Prompt | None:
        prompt_at = self._call.prompt_at
        return None if prompt_at is None else prompt_at(layer, tokens_BLD, mask_BL)

    def freeze(self) -> None:
        """No parameter learns, and the backbone stays in evaluation mode (no dropout) whatever `train()` says."""
        self.tuned = self.adapted = False
        self.requires_grad_(False).eval()

    def tune(self) -> None:
        """Every parameter learns."""
        self.tuned = True
        self.requires_grad_(True)

    def adapt(self, lora: Lora) -> None:
        """What LoRA adds learns, see `_lora.adapt`; once."""
        _lora.adapt(self, lora)
        self.adapted = True
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.learned(name))

    @property
    def learns(self) -> bool:
        """Whether anything of it does: its features then change from step to step."""
        return self.tuned or self.adapted

    def learned(self, name: str) -> bool:
        """Whether a parameter or buffer of it, by its name here, is learned and not given."""
        return self.tuned or (self.adapted and _lora.is_lora(name))

    def train(self, mode: bool = True) -> Encoder:
        """Training mode reaches the backbone only when it is fully tuned; of an adapted one, LoRA's own dropout.

        Never a batch norm: it would mix the samples of a batch, and have statistics of its own in each process.
        """
        super().train(mode and self.tuned)
        for module in self.modules() if mode and self.tuned else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        if self.adapted:
            _lora.train_dropout(self, mode)
        return self

    def architecture(self) -> dict[str, Any]:
        """Every plain value of the model that its features depend on, besides its weights: resolved configuration, pooling.

        By default the name and the options in the spec; a family that reads a configuration returns that, without paths.
        """
        options = {key: value for key, value in self.spec.options.items() if key not in _description.SOURCES}
        stored = os.path.exists(os.path.expanduser(self.spec.name))  # a path says where it is, not what it is
        return {"class": type(self).__name__, **({} if stored else {"name": self.spec.name}), **options}

    def describe(self) -> dict[str, Any]:
        """What determines its features besides its weights: sections ``model``, ``preprocess`` and ``libraries``."""
        owners = [registry.distribution(point) for point in registry.claimed(registry.ENCODERS, self.spec.scheme)]
        description = {
            "model": self.architecture(),
            "preprocess": _description.preprocess_values(self.preprocess),
            "libraries": _description.versions(("mopefuse", "torch", *self.libraries, *owners)),
        }
        plain: dict[str, Any] = _description.plain(description)
        return plain

    def count_tokens(self) -> int:
        """Tokens of a value that says nothing, in one forward pass: of an image, patches and class token.

        They are counted where they enter the first promptable layer; of an encoder without one, where they leave the last.
        """
        counted: list[int] = []

        def count(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> None:
            counted.append(tokens_BLD.shape[1])

        inputs = self.preprocess.batch([self.preprocess.item(of(self.modality).nothing())])
        with torch.no_grad():
            encoded = self.encode(inputs, count if self.widths else None)
        return counted[0] if counted else encoded.tokens_BLD.shape[1]

    def digest(self) -> str:
        """16 hex digits that change with any value of `describe`, library versions among them."""
        return _description.digest(self.describe())

    def fingerprint(self) -> str:
        """16 hex digits that change with the name, shape or type of any weight and with any one value; not with LoRA."""
        digest = hashlib.sha256()
        weights = self.state_dict()
        if self.adapted:
            weights = {_lora.original(name): tensor for name, tensor in weights.items() if not _lora.is_lora(name)}
        for name, tensor in sorted(weights.items()):
            flat = tensor.detach().reshape(-1)
            picked = flat[:: max(1, flat.numel() // 4096)].cpu()
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{_sum_of_bits(flat)}".encode())
            digest.update(picked.double().numpy().tobytes())
        return digest.hexdigest()[:16]


def _sum_of_bits(flat: Tensor) -> int:
    """All values as whole numbers, added: changes with any one of them, on any device alike."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}.get(flat.element_size())
    if flat.dtype == torch.bool or whole is None:
        return int(flat.double().sum())
    return int(flat.contiguous().view(whole).sum(dtype=torch.int64))


def create_encoder(text: str) -> Encoder:
    """The frozen encoder that a spec names, its alias resolved (``encoder.spec`` has the full name).

    Raises:
        ConfigError: not a spec, or an unknown scheme.
        EncoderError: the scheme knows no such encoder, or cannot load it.
        PluginError: the plugin that brings the scheme cannot be used.
    """
    spec = full_spec(text)
    make = registry.load(registry.ENCODERS, spec.scheme)
    owner, of_plugin, _ = spec.scheme.rpartition(":")
    try:
        with registry.nothing_on_stdout():
            encoder = make(spec)
    except Exception as error:
        if not of_plugin or isinstance(error, MopefuseError):
            raise
        what = f"{spec.name} of the plugin {owner} cannot be made: {type(error).__name__}: {error}"
        raise PluginError(12, what, where=str(spec), fix=f"upgrade or uninstall {owner}") from error
    if not isinstance(encoder, Encoder):
        what = f"the plugin {owner} made a {type(encoder).__name__}, which is no mopefuse.encoders.Encoder"
        raise PluginError(13, what, where=str(spec), fix=f"upgrade or uninstall {owner}")
    encoder.freeze()
    return encoder


def check_name(text: str) -> None:
    """Refuse a spec whose scheme or name does not exist, as far as this machine knows.

    Raises:
        as `create_encoder`
    """
    spec = full_spec(text)
    check = getattr(registry.load(registry.ENCODERS, spec.scheme), "check_name", None)  # a plugin may be a function
    if check is not None:
        check(spec)


def full_spec(text: str) -> Spec:
    """A spec with its alias resolved to the documented full name. Imports no encoder."""
    spec = registry.parse_spec(text)
    return replace(spec, name=ALIASES.get(spec.scheme, {}).get(spec.name, spec.name))


def option_flag(spec: Spec, key: str, default: bool) -> bool:
    """A ``true``/``false`` option of a spec."""
    value = spec.options.get(key, str(default)).lower()
    if value not in ("true", "false"):
        raise EncoderError(22, f"{key}={value} is neither true nor false", where=str(spec))
    return value == "true"


def run_frozen(encoder: Encoder, inputs: Inputs) -> Encoded:
    """A forward pass without prompts and without a graph, as psi of a frozen complementary encoder is computed."""
    with torch.no_grad():
        return encoder.encode(inputs)


_ELEMENTS = 64 * 3 * 224 * 224  # most elements of one input tensor of a batch, as pixels and tokens are
_SAMPLES = 32  # more bring nothing on a CPU, and pad texts more


def encode_pooled(encoder: Encoder, inputs: Inputs) -> Tensor:
    """Pooled features (B, C) of a frozen encoder, in batches of samples of similar length, without padding they do not need.

    A sample's feature depends on its batch by rounding only. Padding is on the right; an encoder with a fixed length keeps it.
    """
    count = len(next(iter(inputs.values())))
    order_B, lengths_B = torch.arange(count), None
    if "mask" in inputs and getattr(encoder.preprocess, "length", None) is None:
        padded = inputs["mask"].shape[1]
        lengths_B = inputs["mask"].sum(dim=1).cpu()
        order_B = lengths_B.argsort(stable=True)
    largest = max(tensor[0].numel() for tensor in inputs.values())
    pooled_BC: Tensor | None = None
    for part_b in order_B.split(max(1, min(_SAMPLES, _ELEMENTS // largest))):
        some = {name: tensor[part_b.to(tensor.device)] for name, tensor in inputs.items()}
        if lengths_B is not None:
            longest = int(lengths_B[part_b].max())
            some = {name: tensor[:, :longest] if tensor.shape[1:2] == (padded,) else tensor for name, tensor in some.items()}
        found_bC = run_frozen(encoder, some).pooled_BC
        pooled_BC = found_bC.new_empty(count, found_bC.shape[1]) if pooled_BC is None else pooled_BC
        pooled_BC[part_b.to(found_bC.device)] = found_bC
    assert pooled_BC is not None, "an empty batch"
    return pooled_BC
