"""Prompting the blocks of a library's backbone without touching its code.

A hook on each block asks for the layer's prompt as tokens enter, puts it through the norm that the block applies ahead
of its attention, and leaves it in the block's slot, where the attention of that block picks it up (each family's module
says how). What waits there belongs to the call at work in a thread (`_base.Call`) and is gone when the call ends, however it
ends. Where an encoder takes other tokens ahead of its own, a hook on its first block puts them there and one on its last
drops them.

Shapes: B batch, L tokens, P prompt tokens, D width of the layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mopefuse.core.registry import Spec
from mopefuse.encoders._recompute import run_block
from mopefuse.encoders.attention import Insert, Prompt
from mopefuse.encoders.base import Call, Encoded, Encoder, Inputs
from mopefuse.encoders.probe import Site


class Slot:
    """Of one block of an encoder: where the prompt of the call at work waits for its attention, normed, ready for the key and
    value projections.

    `norm` is what the block applies ahead of its attention; None in a post-norm block. `layers` are the numbers under which
    the block runs, more than one where layers share their weights. `site`: how keys and values are made, in a model of
    transformers. What changes from call to call is in the `Call`.
    """

    def __init__(self, encoder: PromptedEncoder, number: int, block: nn.Module, norm: nn.Module | None) -> None:
        self.encoder, self.number, self.block, self.norm = encoder, number, block, norm
        self.layers: list[int] = []
        self.site: Site | None = None

    @property
    def insert(self) -> Insert | None:
        """What is among the tokens of all blocks, beside the encoder's own."""
        return self.encoder._call.insert

    def put(self, prompt: Prompt | None, tokens_BLD: Tensor) -> None:
        """Leave the prompt that these tokens enter the block with."""
        if prompt is not None and prompt.tokens_BPD.shape[1] > 0:
            prompt_BPD = prompt.tokens_BPD.to(tokens_BLD.dtype)
            found, need = (prompt_BPD.shape[0], prompt_BPD.shape[2]), (tokens_BLD.shape[0], tokens_BLD.shape[2])
            assert found == need, f"prompts for (batch, width) {found}, need {need}"
            normed_BPD = prompt_BPD if self.norm is None else self.norm(prompt_BPD)
            self.encoder._call.waiting[self.number] = prompt._replace(tokens_BPD=normed_BPD)

    def next_layer(self) -> int:
        """Which layer the block is now run as."""
        if len(self.layers) == 1:
            return self.layers[0]
        runs = self.encoder._call.runs
        runs[self.number] = runs.get(self.number, 0) + 1
        return self.layers[runs[self.number] - 1]

    def take(self) -> Prompt | None:
        """The prompt, once."""
        return self.encoder._call.waiting.pop(self.number, None)


class PromptedEncoder(Encoder):
    """An encoder whose promptable layers are blocks of a library's model."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._slots: list[Slot] = []  # of each layer

    @abstractmethod
    def _run(self, inputs: Inputs) -> Encoded:
        """The library's own forward pass. Of texts it begins by leaving their mask in ``self._call.mask_BL``."""

    def _encode(self, inputs: Inputs) -> Encoded:
        encoded, ignored = self._run(inputs), self._call.waiting
        assert not ignored, f"{self.spec}: the attention of blocks {sorted(ignored)} has not picked its prompt up"
        return encoded

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
            slot = by_block.setdefault(block, Slot(self, len(by_block), block, norm))
            slot.layers.append(layer)
            self._slots.append(slot)
        for slot in by_block.values():
            slot.block.register_forward_pre_hook(_Entering(slot), with_kwargs=True)
            slot.block.forward = _Forward(slot)
        return self._slots

    def _run_layer(self, layer: int, tokens_BLD: Tensor, mask_B11K: Tensor | None, prompt: Prompt | None) -> Tensor:
        slot = self._slots[layer]
        slot.put(prompt, tokens_BLD)
        out: Any = slot.block.forward(tokens_BLD, mask_B11K)  # not a call: that would run the hooks of `encode`
        out_BLD: Tensor = out if isinstance(out, Tensor) else out[0]
        return out_BLD


class _Entering:
    """The hook of one block. An object rather than a closure, so that a copy of an encoder, deep or pickled, has its own."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        entering: Tensor = args[0] if args else kwargs["hidden_states"]
        tokens_BLD = entering.flatten(1, -2)  # (B, H, W, D) in timm's Swin
        slot, call = self.slot, self.slot.encoder._call
        mask_BL = call.mask_BL if call.insert is None else call.insert.real(call.mask_BL)
        slot.put(slot.encoder._ask(slot.next_layer(), tokens_BLD, mask_BL), tokens_BLD)


class _Forward:
    """The forward method of one block, which can be run again with what was in its slot."""

    def __init__(self, slot: Slot) -> None:
        self.slot = slot

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        slot, encoder = self.slot, self.slot.encoder
        if not encoder.recompute:
            return self._own(*args, **kwargs)
        options = {"recompute": True, "learns": encoder.learns}
        return run_block(self._with, slot.take(), slot.insert, *args, **options, **kwargs)

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.slot.block).forward(self.slot.block, *args, **kwargs)

    def _with(self, prompt: Prompt | None, insert: Insert | None, *args: Any, **kwargs: Any) -> Any:
        """As in the call that was at work, which has ended when a backward pass runs the block again, in any thread."""
        call = Call(insert=insert)
        if prompt is not None:
            call.waiting[self.slot.number] = prompt
        with self.slot.encoder._at_work.set(call):
            return self._own(*args, **kwargs)


class _Inserting:
    """The hook that puts tokens ahead of those that enter the first block."""

    def __init__(self, encoder: PromptedEncoder) -> None:
        self.encoder = encoder

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        insert = self.encoder._call.insert
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
        insert = self.encoder._call.insert
        if insert is None:
            return None
        count = insert.tokens_BPD.shape[1]
        return out[:, count:] if isinstance(out, Tensor) else (out[0][:, count:], *out[1:])
