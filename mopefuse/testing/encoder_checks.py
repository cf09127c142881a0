"""Checks that every encoder must pass, prompted or not; `mopefuse.testing.encoder` lists the claims.

Shapes: B batch, L tokens, P prompt tokens, D width of a layer, C width of the pooled feature, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mopefuse.encoders.base import Encoder, EncoderOutput, Inputs, Prompt, PromptAt
from mopefuse.encoders.frozen import encode_pooled
from mopefuse.errors import EncoderError

TOLERANCE = 1e-4  # relative to the largest value, in float32
PROMPT_TOKENS = 3


class EncoderChecks:
    """One encoder, one batch, and prompts for every sample and layer."""

    def __init__(self, encoder: Encoder, values: list[Any]) -> None:
        self.encoder, self.values = encoder, values
        self.items = [encoder.preprocess.item(value) for value in values]
        self.device = next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))
        self.inputs = self.batch(self.items)
        random = torch.Generator().manual_seed(0)
        shapes = [(len(values), PROMPT_TOKENS, width) for width in encoder.widths]
        self.prompts = [torch.randn(shape, generator=random).to(self.device) for shape in shapes]
        self.scales = [(torch.rand(len(values), width, generator=random) - 0.5).to(self.device) for width in encoder.widths]
        self.gates = [(torch.rand(heads, generator=random) + 0.5).to(self.device) for heads in encoder.heads]

    def batch(self, items: list[Any]) -> Inputs:
        """Prepared samples as inputs, on the device of the encoder."""
        return {name: tensor.to(self.device) for name, tensor in self.encoder.preprocess.batch(items).items()}

    def message(self, what: str) -> str:
        """Describe a fault, naming the encoder."""
        return f"{self.encoder.spec}: {what}"

    def run(self, inputs: Inputs, prompt_at: PromptAt | None = None) -> EncoderOutput:
        """Run a forward pass without gradients."""
        with torch.no_grad():
            return self.encoder.encode(inputs, prompt_at)

    def attributes(self) -> None:
        """The attributes are consistent with one another and with the output of `preprocess`; the fingerprint is stable."""
        e = self.encoder
        assert e.modality.isidentifier(), self.message(f"modality is {e.modality!r}, expected a name such as 'image'")
        assert len(e.widths) == len(e.heads), self.message(f"{len(e.widths)} widths but {len(e.heads)} heads")
        assert all(type(n) is int and n > 0 for n in (*e.widths, *e.heads, e.feature_width)), self.message(
            "widths, heads and feature_width must be positive integers"
        )
        assert bool(e.widths) != bool(e.unpromptable_reason), self.message(
            "unpromptable_reason must be set exactly if widths is empty"
        )
        json.dumps(e.preprocess.describe())
        sizes = {name: tensor.shape[0] for name, tensor in self.inputs.items()}
        count = len(self.values)
        assert set(sizes.values()) == {count}, self.message(f"first dimensions {sizes} of {count} samples")
        assert e.fingerprint() == e.fingerprint(), self.message("the fingerprint is not deterministic")

    def frozen(self) -> None:
        """No parameter is trainable and no module is in training mode, even after train()."""
        self.encoder.train()
        learning = [name for name, p in self.encoder.named_parameters() if p.requires_grad]
        assert not learning, self.message(f"although frozen, {learning[:3]} would be trained")
        training = [name for name, m in self.encoder.named_modules() if m.training]
        assert not training, self.message(f"although frozen, {training[:3]} are in training mode after train()")

    def plain_output(self) -> None:
        """Shapes and types of `EncoderOutput`, and the same values the second time."""
        out, count = self.run(self.inputs), len(self.values)
        assert out.pooled_BC.shape == (count, self.encoder.feature_width), self.message(
            f"pooled feature {tuple(out.pooled_BC.shape)}, expected {(count, self.encoder.feature_width)}"
        )
        assert out.tokens_BLD.dim() == 3 and len(out.tokens_BLD) == count, self.message("tokens are not (B, L, D)")
        assert self.encoder.token_width in (0, out.tokens_BLD.shape[2]), self.message(
            f"tokens of width {out.tokens_BLD.shape[2]}, but token_width is {self.encoder.token_width}"
        )
        if out.mask_BL is not None:
            assert out.mask_BL.dtype == torch.bool, self.message("the mask is not boolean")
            assert out.mask_BL.shape == out.tokens_BLD.shape[:2], self.message("mask and tokens do not match")
            assert out.mask_BL.any(dim=1).all(), self.message("a sample has no real token")
        assert out.pooled_BC.isfinite().all(), self.message("the pooled feature is not finite")
        self.same(self.run(self.inputs), out, "the same input gives a different output the second time")

    def without_padding(self) -> None:
        """Features of single rows, cut to their own length."""
        rows = [{name: tensor[row : row + 1] for name, tensor in self.inputs.items()} for row in range(len(self.values))]
        pooled_BC = torch.cat([encode_pooled(self.encoder, row) for row in rows])
        self.close(self.run(self.inputs).pooled_BC, pooled_BC, "a sample alone, without padding, gives a different feature")

    def does_not_depend_on_the_batch(self, gates: Callable[[list[Tensor]], list[Tensor] | None] | None) -> None:
        """Features and tokens of a sample by itself and within the batch.

        Args:
            gates: None without prompts; else a function from all gates to those of the prompts (None for ungated prompts).
        """
        together = self.run(self.inputs, self.prompting(gates, slice(None)))
        how = "without prompts" if gates is None else "with prompts" if gates([]) is None else "with gated prompts"
        for index, item in enumerate(self.items):
            alone = self.run(self.batch([item]), self.prompting(gates, slice(index, index + 1)))
            self.close(
                together.pooled_BC[index], alone.pooled_BC[0], f"sample {index} depends on the rest of its batch, {how}"
            )
            count = alone.tokens_BLD.shape[1]
            real = slice(None) if alone.mask_BL is None else alone.mask_BL[0]
            self.close(
                together.tokens_BLD[index, :count][real],
                alone.tokens_BLD[0][real],
                f"tokens of sample {index} depend on the rest of its batch, {how}",
            )

    def prompting(self, gates: Callable[[list[Tensor]], list[Tensor] | None] | None, rows: slice) -> PromptAt | None:
        """The callback for some of the samples; see `does_not_depend_on_the_batch`."""
        return None if gates is None else prompts_at([prompt[rows] for prompt in self.prompts], gates(self.gates))

    def refuses_prompts(self) -> None:
        """An encoder without promptable layers raises an EncoderError for `prompt_at`."""
        try:
            self.encoder.encode(self.inputs, lambda layer, tokens, mask: None)
        except EncoderError:
            return
        raise AssertionError(self.message("accepts prompt_at although it has no layer to prompt"))

    def same(self, left: EncoderOutput, right: EncoderOutput, fault: str) -> None:
        """Require equal values."""
        for name, a, b in zip(EncoderOutput._fields, left, right, strict=True):
            equal = a is b or (a is not None and b is not None and torch.equal(a, b))
            assert equal, self.message(f"{fault} ({name})")

    def close(self, left: Tensor, right: Tensor, fault: str) -> None:
        """Require values that differ by rounding alone."""
        apart, scale = float((left - right).detach().abs().max()), max(1.0, float(right.detach().abs().max()))
        assert apart <= TOLERANCE * scale, self.message(f"{fault}: differs by {apart:.2e}, values up to {scale:.2g}")


def prompts_at(prompts: list[Tensor], gates: list[Tensor] | None) -> PromptAt:
    """A callback that returns the prompt, and the gate if there are any, of each layer."""
    return lambda layer, tokens, mask: Prompt(prompts[layer], gates[layer] if gates else None)
