"""Checks of encoders that take prompts, and of encoders that accept inserted tokens.

Shapes: B batch, L tokens, P prompt tokens, D width of a layer, K keys that a query sees.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mopefuse.encoders.base import EncoderOutput, InsertedTokens, Modulation, Prefix, Prompt, PromptAt
from mopefuse.errors import EncoderError
from mopefuse.testing.encoder_checks import PROMPT_TOKENS, EncoderChecks, prompts_at


class PromptChecks(EncoderChecks):
    """The checks of an encoder with promptable layers."""

    def only_at(self, chosen: int, gates: list[Tensor] | None) -> PromptAt:
        """A callback that returns a prompt at one layer alone."""
        prompt_at = prompts_at(self.prompts, gates)
        return lambda layer, tokens, mask: prompt_at(layer, tokens, mask) if layer == chosen else None

    def layers_in_order(self) -> None:
        """`prompt_at` is called once at each layer, with its width."""
        seen: list[tuple[int, int]] = []

        def look(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> None:
            assert tokens_BLD.dim() == 3, self.message(f"layer {layer} passes tokens of shape {tuple(tokens_BLD.shape)}")
            assert len(tokens_BLD) == len(self.values), self.message(f"layer {layer} sees a batch of {len(tokens_BLD)}")
            if mask_BL is not None:
                assert mask_BL.dtype == torch.bool, self.message(f"the mask at layer {layer} is not boolean")
                assert mask_BL.shape == tokens_BLD.shape[:2], self.message(f"mask and tokens differ at layer {layer}")
            seen.append((layer, tokens_BLD.shape[2]))

        self.run(self.inputs, look)
        assert seen == list(enumerate(self.encoder.widths)), self.message(
            f"prompt_at saw (layer, width) {seen}, expected {list(enumerate(self.encoder.widths))}"
        )

    def untouched_without_prompts(self) -> None:
        """No prompt, a prompt without tokens and a gate of 0 leave the output unchanged, bit for bit."""
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                plain = self.encoder.encode(self.inputs)
                for what, prompt_at in {
                    "prompt_at that returns None": lambda layer, tokens, mask: None,
                    "a prompt of no tokens": lambda layer, tokens, mask: Prompt(self.prompts[layer][:, :0]),
                    "a gate of 0": lambda layer, tokens, mask: Prompt(
                        self.prompts[layer], torch.zeros_like(self.gates[layer])
                    ),
                }.items():
                    self.same(self.encoder.encode(self.inputs, prompt_at), plain, f"{what} changes the output")

    def every_layer_uses_its_prompt(self) -> None:
        """A prompt at one layer changes the feature, and is not among the returned tokens."""
        plain = self.run(self.inputs)
        for gates in (None, self.gates):
            for chosen in range(len(self.encoder.widths)):
                out = self.run(self.inputs, self.only_at(chosen, gates))
                kind = "a gated prompt" if gates else "a prompt"
                assert out.tokens_BLD.shape == plain.tokens_BLD.shape, self.message(
                    f"{kind} at layer {chosen} is among the returned tokens: {tuple(out.tokens_BLD.shape)}"
                )
                assert not torch.equal(out.pooled_BC, plain.pooled_BC), self.message(f"{kind} at layer {chosen} has no effect")

    def masked_prompts(self) -> None:
        """Prompts of different lengths in one batch, padded and masked, act as each sample's own tokens alone."""
        for gates in (None, self.gates):
            together = self.run(self.inputs, self._padded_prompts(gates))
            for index, item in enumerate(self.items):
                own = [prompt[index : index + 1, : self._own_length(index)] for prompt in self.prompts]
                alone = self.run(self.batch([item]), prompts_at(own, gates))
                kind = "gated prompts" if gates else "prompts"
                fault = f"masked tokens of {kind} have an effect on sample {index}"
                self.close(together.pooled_BC[index], alone.pooled_BC[0], fault)

    def _padded_prompts(self, gates: list[Tensor] | None) -> PromptAt:
        """A callback whose prompts have other tokens, which are masked, where a sample has fewer than the longest."""
        lengths = [self._own_length(index) for index in range(len(self.values))]
        mask_BP = torch.arange(PROMPT_TOKENS, device=self.device) < torch.tensor(lengths, device=self.device)[:, None]
        padded = [torch.where(mask_BP[:, :, None], prompt, prompt.flip(-1)) for prompt in self.prompts]
        return lambda layer, tokens, mask: Prompt(padded[layer], gates[layer] if gates else None, mask_BP=mask_BP)

    def _own_length(self, index: int) -> int:
        return 1 + index % PROMPT_TOKENS

    def gradients(self) -> None:
        """Prompts and gates of all layers get a gradient, and weights get none."""
        prompts = [prompt.clone().requires_grad_() for prompt in self.prompts]
        gates = [gate.clone().requires_grad_() for gate in self.gates]
        for used in (None, gates):
            out = self.encoder.encode(self.inputs, prompts_at(prompts, used))
            (out.pooled_BC.square().sum() + out.tokens_BLD.sin().sum()).backward()
        for name, tensors in (("prompt", prompts), ("gate", gates)):
            for layer, tensor in enumerate(tensors):
                assert tensor.grad is not None and tensor.grad.isfinite().all(), self.message(
                    f"the gradient of the {name} of layer {layer} is missing or not finite"
                )
                assert tensor.grad.abs().sum() > 0, self.message(f"the gradient of the {name} of layer {layer} is 0")
        touched = [name for name, parameter in self.encoder.named_parameters() if parameter.grad is not None]
        assert not touched, self.message(f"frozen, yet {touched[:3]} got a gradient")

    def keeps_no_state(self) -> None:
        """An exception of `prompt_at` is passed on, and leaves no prompt behind."""
        plain = self.run(self.inputs)

        def fail(layer: int, tokens: Tensor, mask: Tensor | None) -> Prompt:
            if layer == len(self.encoder.widths) - 1:
                raise Stop
            return Prompt(self.prompts[layer])

        try:
            self.run(self.inputs, fail)
        except Stop:
            self.same(self.run(self.inputs), plain, "a prompt is still active after its call")
            return
        raise AssertionError(self.message("an exception raised by prompt_at is swallowed"))

    def continues_from_a_layer(self) -> None:
        """Continuing from the tokens that enter a layer gives the same output, with prompts in the layers from there on."""
        prompt_at = prompts_at(self.prompts, self.gates)
        for layer in range(len(self.encoder.widths)):
            later = lambda at, tokens, mask, first=layer: prompt_at(at, tokens, mask) if at >= first else None  # noqa: E731
            whole = self.run(self.inputs, later)
            prefix = self.encoder.compute_prefix(self.inputs, layer)
            inputs = self.inputs if "mask" in self.inputs else self.encoder.blank_inputs(len(self.values))
            with torch.no_grad():
                continued = self.encoder.encode(inputs, later, start=prefix)
            self.close(continued.pooled_BC, whole.pooled_BC, f"continuing from layer {layer} gives a different feature")
            self.close(continued.tokens_BLD, whole.tokens_BLD, f"continuing from layer {layer} gives different tokens")

    def modulation(self) -> None:
        """A modulation by 0 changes nothing; others act on every layer, get gradients, and stay within sample and call."""
        plain = self.run(self.inputs)
        zeros = [torch.zeros_like(scale_BD) for scale_BD in self.scales]
        self.same(self.run(self.inputs, self._modulate(zeros)), plain, "a modulation by 0 changes the output")
        for chosen in range(len(self.encoder.widths)):
            out = self.run(self.inputs, self._modulate(self.scales, only=chosen))
            assert not torch.equal(out.pooled_BC, plain.pooled_BC), self.message(f"modulating layer {chosen} has no effect")
        together = self.run(self.inputs, self._modulate(self.scales))
        self.same(self.run(self.inputs), plain, "a modulation outlives its call")
        for index, item in enumerate(self.items):
            alone = self.run(self.batch([item]), self._modulate([scale[index : index + 1] for scale in self.scales]))
            self.close(
                together.pooled_BC[index], alone.pooled_BC[0], f"modulated sample {index} depends on the rest of its batch"
            )
        scales = [scale_BD.clone().requires_grad_() for scale_BD in self.scales]
        self.encoder.encode(self.inputs, self._modulate(scales)).pooled_BC.square().sum().backward()
        for layer, scale_BD in enumerate(scales):
            assert scale_BD.grad is not None and (scale_BD.grad.abs().sum(dim=1) > 0).all(), self.message(
                f"the modulation of layer {layer} gets no gradient"
            )

    def _modulate(self, scales: list[Tensor], only: int | None = None) -> PromptAt:
        """A callback that modulates every layer, or one, without prompt tokens."""

        def at(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt | None:
            if only not in (None, layer):
                return None
            return Prompt(tokens_BLD[:, :0], modulation=Modulation(scales[layer], scales[layer].flip(-1)))

        return at

    def added_to_tokens(self) -> None:
        """Adding 0 to a layer's input changes nothing; adding anything else gives what continuing from the sum gives."""
        plain = self.run(self.inputs)
        for layer in range(len(self.encoder.widths)):
            prefix = self.encoder.compute_prefix(self.inputs, layer)
            random = torch.Generator().manual_seed(layer)
            added_BLD = torch.randn(prefix.tokens_BLD.shape, generator=random).to(prefix.tokens_BLD)
            nothing = self.run(self.inputs, _add(layer, torch.zeros_like(added_BLD)))
            self.same(nothing, plain, f"adding 0 to the input of layer {layer} changes the output")
            with torch.no_grad():
                wanted = self.encoder.encode(self.inputs, None, start=Prefix(layer, prefix.tokens_BLD + added_BLD))
            out = self.encoder.encode(self.inputs, _add(layer, added_BLD.requires_grad_()))
            what = f"what is added to the input of layer {layer} is not what it continues with"
            self.close(out.pooled_BC, wanted.pooled_BC, what)
            self.close(out.tokens_BLD, wanted.tokens_BLD, what)
            (grad,) = torch.autograd.grad(out.pooled_BC.square().sum(), added_BLD)
            assert grad.isfinite().all() and (grad.abs().sum(dim=(1, 2)) > 0).all(), self.message(
                f"what is added to the input of layer {layer} gets no gradient"
            )
        self.same(self.run(self.inputs), plain, "what is added outlives its call")

    def inserted_tokens(self) -> None:
        """Inserted tokens are rejected, or keep what `InsertedTokens` promises."""
        tokens = self.prompts[0]
        if not self.encoder.supports_inserted_tokens:
            try:
                self.encoder.encode(self.inputs, None, InsertedTokens(tokens))
            except EncoderError:
                return
            raise AssertionError(self.message("accepts inserted tokens although supports_inserted_tokens is False"))
        with torch.no_grad():
            plain = self.encoder.encode(self.inputs)
            none = self.encoder.encode(self.inputs, None, InsertedTokens(tokens[:, :0]))
            self.same(none, plain, "inserting no token changes the output")
            for blind in range(PROMPT_TOKENS):
                self._inserted(InsertedTokens(tokens, blind), plain)
            self.same(self.encoder.encode(self.inputs), plain, "an inserted token outlives the call that it was given to")
        learned = tokens.clone().requires_grad_()
        self.encoder.encode(self.inputs, None, InsertedTokens(learned)).pooled_BC.square().sum().backward()
        assert learned.grad is not None and (learned.grad.abs().sum(dim=(1, 2)) > 0).all(), self.message(
            "inserted tokens get no gradient"
        )

    def _inserted(self, insert: InsertedTokens, plain: EncoderOutput) -> None:
        kind = f"inserted tokens, {insert.blind} of them blind,"
        seen: list[Tensor] = []

        def last(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> None:
            assert mask_BL is None or mask_BL.shape == tokens_BLD.shape[:2], self.message(f"{kind} are not in the mask")
            seen[:] = [tokens_BLD]

        out = self.encoder.encode(self.inputs, last, insert)
        assert out.tokens_BLD.shape == plain.tokens_BLD.shape, self.message(f"{kind} are among the returned tokens")
        assert not torch.equal(out.pooled_BC, plain.pooled_BC), self.message(f"{kind} have no effect")
        for index, item in enumerate(self.items):
            rows = InsertedTokens(insert.tokens_BPD[index : index + 1], insert.blind)
            alone = self.encoder.encode(self.batch([item]), None, rows)
            self.close(out.pooled_BC[index], alone.pooled_BC[0], f"with {kind} sample {index} depends on the rest of its batch")
        same = InsertedTokens(insert.tokens_BPD[:1].expand_as(insert.tokens_BPD), insert.blind)
        self.encoder.encode(self.inputs, last, same)
        together = seen[0][:, : insert.blind]
        if insert.blind:
            self.close(together, together[:1].expand_as(together), f"{kind} attend to tokens that they should not see")
        sighted = seen[0][:, insert.blind : insert.tokens_BPD.shape[1]]
        if len(self.encoder.widths) > 1:
            assert not torch.allclose(sighted, sighted[:1].expand_as(sighted)), self.message(f"{kind} see no token of a sample")

    def layers_run_alone(self) -> None:
        """`run_layer` computes what the layer computes within `encode`."""
        entering: list[tuple[Tensor, Tensor | None]] = []

        def look(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> Prompt:
            entering.append((tokens_BLD, mask_BL))
            return Prompt(self.prompts[layer], self.gates[layer] if layer % 2 else None)

        self.run(self.inputs, look)
        for layer, (tokens_BLD, mask_BL) in enumerate(entering):
            real = torch.ones_like(tokens_BLD[..., 0], dtype=torch.bool) if mask_BL is None else mask_BL
            if layer + 1 < len(entering):
                with torch.no_grad():
                    out = self.encoder.run_layer(layer, tokens_BLD, mask_BL, look(layer, tokens_BLD, mask_BL))
                entering.pop()
                self.close(out[real], entering[layer + 1][0][real], f"layer {layer} alone gives a different result")
            self._read(layer, tokens_BLD, mask_BL, real)

    def _read(self, layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None, real_BL: Tensor) -> None:
        """Tokens as what a query sees: the same as the layer on both, and of each sample its own real ones."""
        query_BPD, run = self.prompts[layer].clone().requires_grad_(), self.encoder.run_layer
        real_BK = F.pad(real_BL, (0, PROMPT_TOKENS), value=True)
        mask_BK = None if mask_BL is None else real_BK
        read = run(layer, query_BPD, mask_BK, Prompt(tokens_BLD))
        whole = run(layer, torch.cat([tokens_BLD, query_BPD], dim=1), mask_BK)[:, -PROMPT_TOKENS:]
        self.close(read, whole, f"at layer {layer}, tokens passed as a prompt differ from tokens")
        for index, real in enumerate(real_BL):
            one = slice(index, index + 1)
            alone = run(layer, query_BPD[one], None, Prompt(tokens_BLD[one][:, real]))
            self.close(read[one], alone, f"at layer {layer}, the tokens of sample {index} depend on its batch or padding")
        (grad,) = torch.autograd.grad(read.square().sum(), query_BPD)
        assert grad.isfinite().all() and grad.abs().sum() > 0, self.message(f"a query of layer {layer} gets no gradient")


def _add(chosen: int, added_BLD: Tensor) -> PromptAt:
    """A callback that adds to the input of one layer."""
    return lambda layer, tokens, mask: Prompt(tokens[:, :0], added_BLD=added_BLD) if layer == chosen else None


class Stop(Exception):
    """Raised by a callback to see what an interrupted call leaves behind."""
