"""Prompting the blocks of a library's backbone without touching its code.

A hook on each block asks for the layer's prompt as tokens enter, puts it through the norm that the block applies ahead
of its attention, and leaves it in the block's slot, where the attention of that block picks it up (each family's module
says how). A slot is emptied when it is read, and all are emptied when `encode` ends, however it ends. Where an encoder takes
other tokens ahead of its own, a hook on its first block puts them there and one on its last drops them.

Shapes: B batch, L tokens, P prompt tokens, D width of the layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mopefuse.encoders._attention import Insert, Prompt
from mopefuse.encoders._base import Encoded, Encoder, Inputs
from mopefuse.encoders._probe import Site
from mopefuse.encoders._recompute import run_block
from mopefuse.registry import Spec


class Slot:
    """Where a prompt waits (normed, ready for the key and value projections) for the attention of `block`.

    `norm` is what the block applies ahead of its attention; None in a post-norm block. `insert` is what is among the tokens
    of all blocks, beside the encoder's own. `layers` are the numbers under which the block runs, more than one where layers
    share their weights. `site`: how keys and values are made, in a model of transformers.
    """

    def __init__(self, block: nn.Module, norm: nn.Module | None) -> None:
        self.block, self.norm = block, norm
        self.layers: list[int] = []
        self.runs = 0  # of the block, in the call at work; counted where there are several layers
        self.prompt: Prompt | None = None
        self.insert: Insert | None = None
        self.site: Site | None = None

    def put(self, prompt: Prompt | None, tokens_BLD: Tensor) -> None:
        """Leave the prompt that these tokens enter the block with."""
        self.prompt = None
        if prompt is not None and prompt.tokens_BPD.shape[1] > 0:
            prompt_BPD = prompt.tokens_BPD.to(tokens_BLD.dtype)
            found, need = (prompt_BPD.shape[0], prompt_BPD.shape[2]), (tokens_BLD.shape[0], tokens_BLD.shape[2])
            assert found == need, f"prompts for (batch, width) {found}, need {need}"
            self.prompt = prompt._replace(tokens_BPD=prompt_BPD if self.norm is None else self.norm(prompt_BPD))

    def next_layer(self) -> int:
        """Which layer the block is now run as."""
        if len(self.layers) == 1:
            return self.layers[0]
        self.runs += 1
        return self.layers[self.runs - 1]

    def take(self) -> Prompt | None:
        """The prompt, once."""
        prompt, self.prompt = self.prompt, None
        return prompt


class PromptedEncoder(Encoder):
    """An encoder whose promptable layers are blocks of a library's model."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._slots: list[Slot] = []
        self._mask_BL: Tensor | None = None  # of the texts being encoded

    @abstractmethod
    def _run(self, inputs: Inputs) -> Encoded:
        """The library's own forward pass."""

    def _encode(self, inputs: Inputs) -> Encoded:
        for slot in self._slots:
            slot.insert = self._insert
        try:
            encoded = self._run(inputs)
            ignored = [layer for layer, slot in enumerate(self._slots) if slot.prompt is not None]
            assert not ignored, f"{self.spec}: the attention of layers {ignored} has not picked its prompt up"
            return encoded
        finally:
            self._mask_BL = None
            for slot in self._slots:
                slot.prompt = slot.insert = None
                slot.runs = 0

    def _prompt_blocks(self, blocks: Sequence[nn.Module], norms: Sequence[nn.Module | None]) -> list[Slot]:
        """Ask for a prompt at each of `blocks`; the slots where the answers will be, one for each of them.

        Args:
            blocks: in the order in which they run; one that runs again, as it is shared by several layers, is named again.
            norms: of each block, what it applies ahead of its attention; None in a post-norm block.
        """
        if self.insertable:
            blocks[0].register_forward_pre_hook(_Inserting(self), with_kwargs=True)
            blocks[-1].register_forward_hook(_Dropping(self))
        by_block: dict[nn.Module, Slot] = {}
        for layer, (block, norm) in enumerate(zip(blocks, norms, strict=True)):
            slot = by_block.setdefault(block, Slot(block, norm))
            slot.layers.append(layer)
            self._slots.append(slot)
        for slot in by_block.values():
            slot.block.register_forward_pre_hook(_Entering(self, slot), with_kwargs=True)
            slot.block.forward = _Forward(self, slot)
        return self._slots

    def _run_layer(self, layer: int, tokens_BLD: Tensor, mask_B11K: Tensor | None, prompt: Prompt | None) -> Tensor:
        slot = self._slots[layer]
        assert slot.insert is None and slot.prompt is None, f"{self.spec}: layer {layer} is already at work"
        slot.put(prompt, tokens_BLD)
        try:
            out: Any = slot.block.forward(tokens_BLD, mask_B11K)  # not a call: that would run the hooks of `encode`
        finally:
            slot.prompt = None
        out_BLD: Tensor = out if isinstance(out, Tensor) else out[0]
        return out_BLD


class _Entering:
    """The hook of one block. An object rather than a closure, so that a deep copy of an encoder has hooks of its own."""

    def __init__(self, encoder: PromptedEncoder, slot: Slot) -> None:
        self.encoder, self.slot = encoder, slot

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        entering: Tensor = args[0] if args else kwargs["hidden_states"]
        tokens_BLD = entering.flatten(1, -2)  # (B, H, W, D) in timm's Swin
        insert, mask_BL = self.encoder._insert, self.encoder._mask_BL
        layer = self.slot.next_layer()
        prompt = self.encoder._ask(layer, tokens_BLD, mask_BL if insert is None else insert.real(mask_BL))
        self.slot.put(prompt, tokens_BLD)


class _Forward:
    """The forward method of one block, which can be run again with what was in its slot."""

    def __init__(self, encoder: PromptedEncoder, slot: Slot) -> None:
        self.encoder, self.slot, self.own = encoder, slot, slot.block.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encoder, slot = self.encoder, self.slot
        if not encoder.recompute:
            return self.own(*args, **kwargs)
        options = {"recompute": True, "learns": encoder.learns}
        return run_block(self._with, slot.take(), slot.insert, *args, **options, **kwargs)

    def _with(self, prompt: Prompt | None, insert: Insert | None, *args: Any, **kwargs: Any) -> Any:
        slot, before = self.slot, self.slot.insert
        slot.prompt, slot.insert = prompt, insert
        try:
            return self.own(*args, **kwargs)
        finally:
            slot.insert = before  # a recomputation ends by an exception as soon as it has what is needed


class _Inserting:
    """The hook that puts tokens ahead of those that enter the first block."""

    def __init__(self, encoder: PromptedEncoder) -> None:
        self.encoder = encoder

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        insert = self.encoder._insert
        if insert is None:
            return None
        if args:
            return (insert.ahead(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": insert.ahead(kwargs["hidden_states"])}


class _Dropping:
    """The hook that drops them from what leaves the last block."""

    def __init__(self, encoder: PromptedEncoder) -> None:
        self.encoder = encoder

    def __call__(self, block: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        insert = self.encoder._insert
        if insert is None:
            return None
        count = insert.tokens_BPD.shape[1]
        return out[:, count:] if isinstance(out, Tensor) else (out[0][:, count:], *out[1:])
