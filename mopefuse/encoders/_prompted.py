"""Prompts in the blocks of a library's backbone, without changing the library's code.

A hook on each block requests the layer's prompt, applies the norm that the block applies ahead of its attention, and stores
the result in the block's slot, from which the attention of that block takes it (see the module of each family); what the
prompt adds to the layer's input is added to the block's. Pending prompts belong to the current call of the thread
(`base.Call`) and are discarded when it ends. If an encoder supports inserted tokens, a hook on its first block prepends them
and one on its last block removes them. If a call continues from a `Prefix`, the blocks before it return their input, and the
first block after it gets the prefix as its input.

Shapes: B batch, L tokens, P prompt tokens, D width of the layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mopefuse.core.registry import Spec
from mopefuse.encoders._recompute import run_block
from mopefuse.encoders.attention import InsertedTokens, Modulation, Prompt
from mopefuse.encoders.base import Call, Encoder, EncoderOutput, Inputs
from mopefuse.encoders.probe import Site


class Slot:
    """Holds the normed prompt of one block until its attention takes it. State that changes per call is in the `Call`.

    Attributes:
        norm: the norm that the block applies ahead of its attention; None in a post-norm block.
        layers: layer indices of the block; more than one if layers share their weights.
        site: in a model of transformers, how keys and values are projected.
    """

    def __init__(self, encoder: PromptedEncoder, number: int, block: nn.Module, norm: nn.Module | None) -> None:
        self.encoder, self.number, self.block, self.norm = encoder, number, block, norm
        self.layers: list[int] = []
        self.site: Site | None = None
        self.outputs: int | None = None  # length of the tuple that the block returns, 0 for a tensor; unknown before it ran

    @property
    def insert(self) -> InsertedTokens | None:
        """Inserted tokens of the current call."""
        return self.encoder._call.insert

    def put(self, prompt: Prompt | None, tokens_BLD: Tensor) -> None:
        """Norm and store the prompt for the block's attention to `tokens_BLD`, and its modulation."""
        if prompt is None:
            return
        if prompt.modulation is not None:
            shape, need = tuple(prompt.modulation.scale_BD.shape), (tokens_BLD.shape[0], tokens_BLD.shape[2])
            assert shape == need, f"modulation for (batch, width) {shape}, need {need}"
            self.encoder._call.modulations[self.number] = prompt.modulation
        if prompt.tokens_BPD.shape[1] > 0:
            prompt_BPD = prompt.tokens_BPD.to(tokens_BLD.dtype)
            found, need = (prompt_BPD.shape[0], prompt_BPD.shape[2]), (tokens_BLD.shape[0], tokens_BLD.shape[2])
            assert found == need, f"prompts for (batch, width) {found}, expected {need}"
            normed_BPD = prompt_BPD if self.norm is None else self.norm(prompt_BPD)
            self.encoder._call.pending[self.number] = prompt._replace(tokens_BPD=normed_BPD)

    def next_layer(self) -> int:
        """Layer index of the current run of the block."""
        if len(self.layers) == 1:
            return self.layers[0]
        runs = self.encoder._call.runs
        runs[self.number] = runs.get(self.number, 0) + 1
        return self.layers[runs[self.number] - 1]

    def pop(self) -> Prompt | None:
        """Take the prompt out of the slot; None if there is none."""
        return self.encoder._call.pending.pop(self.number, None)

    def pop_modulation(self) -> Modulation | None:
        """Take the modulation out of the slot; None if there is none."""
        return self.encoder._call.modulations.pop(self.number, None)


class PromptedEncoder(Encoder):
    """An encoder whose promptable layers are blocks of a library's model."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._slots: list[Slot] = []  # slots of each layer

    @abstractmethod
    def _run(self, inputs: Inputs) -> EncoderOutput:
        """Run the library's forward pass. For texts it must first set ``self._call.mask_BL``."""

    def _encode(self, inputs: Inputs) -> EncoderOutput:
        encoded, call = self._run(inputs), self._call
        unused = sorted({*call.pending, *call.modulations})
        assert not unused, f"{self.spec}: the attention of blocks {unused} did not use its prompt"
        return encoded

    def _prompt_blocks(
        self, blocks: Sequence[nn.Module], norms: Sequence[nn.Module | None], attentions: Sequence[nn.Module] = ()
    ) -> list[Slot]:
        """Hook each block so that it requests a prompt, and return the slot of each.

        Args:
            blocks: in the order in which they run; a block that several layers share is listed once for each.
            norms: the norm that each block applies ahead of its attention; None in a post-norm block.
            attentions: the module of each block whose input becomes queries, keys and values, to be hooked for modulation;
                empty if the family's own code applies it.
        """
        if self.supports_inserted_tokens:
            blocks[0].register_forward_pre_hook(_PrependHook(self), with_kwargs=True)
            blocks[-1].register_forward_hook(_RemoveHook(self))
        by_block: dict[nn.Module, Slot] = {}
        for layer, (block, norm) in enumerate(zip(blocks, norms, strict=True)):
            slot = by_block.setdefault(block, Slot(self, len(by_block), block, norm))
            slot.layers.append(layer)
            self._slots.append(slot)
        for slot in by_block.values():
            slot.block.register_forward_pre_hook(_PromptHook(slot), with_kwargs=True)
            slot.block.forward = _BlockForward(slot)
        for attention, slot in dict(zip(attentions, self._slots, strict=bool(attentions))).items():
            attention.register_forward_pre_hook(_ModulateHook(slot), with_kwargs=True)
        return self._slots

    def _run_layer(self, layer: int, tokens_BLD: Tensor, mask_B11K: Tensor | None, prompt: Prompt | None) -> Tensor:
        slot = self._slots[layer]
        slot.put(prompt, tokens_BLD)
        out: Any = slot.block.forward(tokens_BLD, mask_B11K)  # calling the block would run the hooks of `encode`
        out_BLD: Tensor = out if isinstance(out, Tensor) else out[0]
        return out_BLD


class _PromptHook:
    """Pre-forward hook of one block that requests its prompt.

    An object rather than a closure, so that a deep or pickled copy of an encoder has its own.
    """

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        slot, call = self.slot, self.slot.encoder._call
        layer, start = slot.next_layer(), call.start
        call.skip = start is not None and layer < start.layer
        if call.skip:
            return None
        resumes = start is not None and layer == start.layer
        if start is not None and resumes:
            tokens_BLD = start.tokens_BLD.to(hidden.dtype)
            hidden = tokens_BLD.view_as(hidden) if tokens_BLD.numel() == hidden.numel() else tokens_BLD  # a grid, or fewer
        tokens_BLD = hidden.flatten(1, -2)  # (B, H, W, D) in timm's Swin
        mask_BL = call.mask_BL if call.insert is None else call.insert.extend_mask(call.mask_BL)
        prompt = slot.encoder._request_prompt(layer, tokens_BLD, mask_BL)
        slot.put(prompt, tokens_BLD)
        entering = hidden if prompt is None else prompt.add_to(hidden)
        return _replace_hidden(args, kwargs, entering) if resumes or entering is not hidden else None


class _ModulateHook:
    """Pre-forward hook of the attention of one block that modulates its input."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def __call__(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        modulation = self.slot.pop_modulation()
        if modulation is None:
            return None
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        modulated = modulation.apply(hidden)
        others = {name: modulated if value is hidden else value for name, value in kwargs.items()}
        return tuple(modulated if value is hidden else value for value in args), others


class _BlockForward:
    """The forward method of one block, which can be recomputed with the same prompt and inserted tokens."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        slot, encoder = self.slot, self.slot.encoder
        if encoder._call.skip and slot.outputs is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden, *[None] * (slot.outputs - 1)) if slot.outputs else hidden
        if not encoder.recompute:
            out = self._run_original(*args, **kwargs)
        else:
            options = {"recompute": True, "trainable": encoder.trainable}
            state = (slot.pop(), slot.pop_modulation(), slot.insert)
            out = run_block(self._run_in_call, state, *args, **options, **kwargs)
        slot.outputs = len(out) if isinstance(out, tuple) else 0
        return out

    def _run_original(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.slot.block).forward(self.slot.block, *args, **kwargs)

    def _run_in_call(
        self, state: tuple[Prompt | None, Modulation | None, InsertedTokens | None], *args: Any, **kwargs: Any
    ) -> Any:
        """Restore the state of the call, which has ended when the backward pass recomputes the block, in any thread."""
        prompt, modulation, insert = state
        call = Call(insert=insert)
        if prompt is not None:
            call.pending[self.slot.number] = prompt
        if modulation is not None:
            call.modulations[self.slot.number] = modulation
        with self.slot.encoder._current_call.set(call):
            return self._run_original(*args, **kwargs)


class _PrependHook:
    """Pre-forward hook of the first block that prepends inserted tokens."""

    def __init__(self, encoder: PromptedEncoder) -> None:
        self.encoder = encoder

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        insert = self.encoder._call.insert
        if insert is None:
            return None
        return _replace_hidden(args, kwargs, insert.prepend_to(args[0] if args else kwargs["hidden_states"]))


class _RemoveHook:
    """Forward hook of the last block that removes inserted tokens."""

    def __init__(self, encoder: PromptedEncoder) -> None:
        self.encoder = encoder

    def __call__(self, block: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        insert = self.encoder._call.insert
        if insert is None:
            return None
        count = insert.tokens_BPD.shape[1]
        return out[:, count:] if isinstance(out, Tensor) else (out[0][:, count:], *out[1:])


def _replace_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a block with another hidden state."""
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})
