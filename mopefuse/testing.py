"""The contract that every encoder keeps, as a check that plugin authors run too.

    from mopefuse.testing import check_encoder

    def test_my_encoder() -> None:
        check_encoder("mine:small?pretrained=false")

Shapes: B batch, L tokens, P prompt tokens, D width of a layer, C width of the pooled feature, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mopefuse.encoders.base import Encoded, Encoder, Inputs, Insert, Prompt, PromptAt, create_encoder, encode_pooled
from mopefuse.errors import EncoderError
from mopefuse.modalities.base import of

_TOLERANCE = 1e-4  # of the largest value, in float32
_PROMPT_TOKENS = 3


def check_encoder(encoder: str | Encoder, samples: Sequence[Any] | None = None) -> Encoder:
    """Check that an encoder keeps the contract of `mopefuse.encoders.base.Encoder`; it is returned frozen.

    Args:
        encoder: a spec, or an encoder (which is frozen first).
        samples: at least two raw values of its modality; when left out those of ``preprocess.examples()`` where it has that, or
            those of the modality.

    Raises:
        AssertionError: a part of the contract that is broken, and where.
    """
    built = create_encoder(encoder) if isinstance(encoder, str) else encoder
    built.freeze()
    values = list(samples if samples is not None else _samples(built))
    assert len(values) >= 2, "check_encoder needs at least two samples: one alone cannot leak into another"
    for _, check in _checks(_Check(built, values)):
        check()
    return built


def contract(encoder: Encoder, samples: Sequence[Any] | None = None) -> Iterator[tuple[str, str]]:
    """Every part of the contract in words, and how a frozen encoder breaks it; empty where it holds. See `check_encoder`."""
    for part, check in _checks(_Check(encoder, list(samples if samples is not None else _samples(encoder)))):
        try:
            check()
        except AssertionError as broken:
            yield part, str(broken)
        else:
            yield part, ""


def _checks(check: _Check) -> list[tuple[str, Callable[[], None]]]:
    alike = check.does_not_depend_on_the_batch
    plain: list[tuple[str, Callable[[], None]]] = [
        ("says what it is", check.attributes),
        ("stays frozen and in evaluation mode", check.frozen),
        ("gives a feature and tokens, the same each time", check.plain_output),
        ("a sample does not depend on its batch", lambda: alike(None)),
        ("a sample by itself, without padding, is the same", check.without_padding),
    ]
    if not check.encoder.widths:
        return [*plain, ("refuses prompts", check.refuses_prompts)]
    insert = "takes tokens beside its own" if check.encoder.insertable else "refuses tokens beside its own"
    prompted: list[tuple[str, Callable[[], None]]] = [
        ("asks for a prompt at each layer, in order", check.layers_in_order),
        ("without prompts and with a gate of 0, bit for bit the same", check.untouched_without_prompts),
        ("a prompt at each layer has an effect", check.every_layer_listens),
        ("with prompts, a sample does not depend on its batch", lambda: alike(lambda gates: None)),
        ("with gated prompts, a sample does not depend on its batch", lambda: alike(lambda gates: gates)),
        ("gradients reach every prompt and gate, and no weight", check.gradients),
        ("a prompt does not outlive its call", check.nothing_is_left_behind),
        (insert, check.inserted_tokens),
    ]
    layers = [("each layer by itself gives the same", check.layers_by_themselves)] if check.encoder.insertable else []
    return [*plain, *prompted, *layers]


class _Check:
    """One encoder, one batch, and prompts for every sample and layer."""

    def __init__(self, encoder: Encoder, values: list[Any]) -> None:
        self.encoder, self.values = encoder, values
        self.items = [encoder.preprocess.item(value) for value in values]
        self.device = next((parameter.device for parameter in encoder.parameters()), torch.device("cpu"))
        self.inputs = self.batch(self.items)
        random = torch.Generator().manual_seed(0)
        shapes = [(len(values), _PROMPT_TOKENS, width) for width in encoder.widths]
        self.prompts = [torch.randn(shape, generator=random).to(self.device) for shape in shapes]
        self.gates = [(torch.rand(heads, generator=random) + 0.5).to(self.device) for heads in encoder.heads]

    def batch(self, items: list[Any]) -> Inputs:
        return {name: tensor.to(self.device) for name, tensor in self.encoder.preprocess.batch(items).items()}

    def say(self, what: str) -> str:
        return f"{self.encoder.spec}: {what}"

    def run(self, inputs: Inputs, prompt_at: PromptAt | None = None) -> Encoded:
        with torch.no_grad():
            return self.encoder.encode(inputs, prompt_at)

    def attributes(self) -> None:
        e = self.encoder
        assert e.modality.isidentifier(), self.say(f"modality is {e.modality!r}, need a name such as 'image'")
        assert len(e.widths) == len(e.heads), self.say(f"{len(e.widths)} widths but {len(e.heads)} heads")
        assert all(type(n) is int and n > 0 for n in (*e.widths, *e.heads, e.feature_width)), self.say(
            "widths, heads and feature_width must be positive integers"
        )
        assert bool(e.widths) != bool(e.why_not_main), self.say("why_not_main is for encoders without widths, and for all")
        json.dumps(e.preprocess.describe())
        sizes = {name: tensor.shape[0] for name, tensor in self.inputs.items()}
        assert set(sizes.values()) == {len(self.values)}, self.say(f"first dimensions {sizes} of {len(self.values)} samples")
        assert e.fingerprint() == e.fingerprint(), self.say("the fingerprint changes by itself")

    def frozen(self) -> None:
        self.encoder.train()
        learning = [name for name, p in self.encoder.named_parameters() if p.requires_grad]
        assert not learning, self.say(f"frozen, yet {learning[:3]} would learn")
        training = [name for name, m in self.encoder.named_modules() if m.training]
        assert not training, self.say(f"frozen, yet {training[:3]} are in training mode after train()")

    def plain_output(self) -> None:
        out, count = self.run(self.inputs), len(self.values)
        assert out.pooled_BC.shape == (count, self.encoder.feature_width), self.say(
            f"pooled feature {tuple(out.pooled_BC.shape)}, need {(count, self.encoder.feature_width)}"
        )
        assert out.tokens_BLD.dim() == 3 and len(out.tokens_BLD) == count, self.say("tokens are not (B, L, D)")
        assert self.encoder.token_width in (0, out.tokens_BLD.shape[2]), self.say(
            f"tokens of width {out.tokens_BLD.shape[2]}, but token_width is {self.encoder.token_width}"
        )
        if out.mask_BL is not None:
            assert out.mask_BL.dtype == torch.bool, self.say("the mask is not boolean")
            assert out.mask_BL.shape == out.tokens_BLD.shape[:2], self.say("mask and tokens do not match")
            assert out.mask_BL.any(dim=1).all(), self.say("a sample has no real token")
        assert out.pooled_BC.isfinite().all(), self.say("the pooled feature is not finite")
        self.same(self.run(self.inputs), out, "the same input gives another output the second time")

    def without_padding(self) -> None:
        rows = [{name: tensor[row : row + 1] for name, tensor in self.inputs.items()} for row in range(len(self.values))]
        pooled_BC = torch.cat([encode_pooled(self.encoder, row) for row in rows])
        self.close(self.run(self.inputs).pooled_BC, pooled_BC, "a sample by itself, without padding, gives another feature")

    def does_not_depend_on_the_batch(self, gates: Callable[[list[Tensor]], list[Tensor] | None] | None) -> None:
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
        return None if gates is None else _answers([prompt[rows] for prompt in self.prompts], gates(self.gates))

    def only_at(self, chosen: int, gates: list[Tensor] | None) -> PromptAt:
        answers = _answers(self.prompts, gates)
        return lambda layer, tokens, mask: answers(layer, tokens, mask) if layer == chosen else None

    def refuses_prompts(self) -> None:
        try:
            self.encoder.encode(self.inputs, lambda layer, tokens, mask: None)
        except EncoderError:
            return
        raise AssertionError(self.say("has no layer to prompt, and takes prompt_at all the same"))

    def layers_in_order(self) -> None:
        seen: list[tuple[int, int]] = []

        def look(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> None:
            assert tokens_BLD.dim() == 3, self.say(f"layer {layer} hands over tokens of shape {tuple(tokens_BLD.shape)}")
            assert len(tokens_BLD) == len(self.values), self.say(f"layer {layer} sees a batch of {len(tokens_BLD)}")
            if mask_BL is not None:
                assert mask_BL.dtype == torch.bool, self.say(f"the mask at layer {layer} is not boolean")
                assert mask_BL.shape == tokens_BLD.shape[:2], self.say(f"mask and tokens differ at layer {layer}")
            seen.append((layer, tokens_BLD.shape[2]))

        self.run(self.inputs, look)
        assert seen == list(enumerate(self.encoder.widths)), self.say(
            f"prompt_at saw (layer, width) {seen}, need {list(enumerate(self.encoder.widths))}"
        )

    def untouched_without_prompts(self) -> None:
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                plain = self.encoder.encode(self.inputs)
                for what, prompt_at in {
                    "no answer": lambda layer, tokens, mask: None,
                    "a prompt of no tokens": lambda layer, tokens, mask: Prompt(self.prompts[layer][:, :0]),
                    "a gate of 0": lambda layer, tokens, mask: Prompt(
                        self.prompts[layer], torch.zeros_like(self.gates[layer])
                    ),
                }.items():
                    self.same(self.encoder.encode(self.inputs, prompt_at), plain, f"{what} changes the output")

    def every_layer_listens(self) -> None:
        plain = self.run(self.inputs)
        for gates in (None, self.gates):
            for chosen in range(len(self.encoder.widths)):
                out = self.run(self.inputs, self.only_at(chosen, gates))
                kind = "a gated prompt" if gates else "a prompt"
                assert out.tokens_BLD.shape == plain.tokens_BLD.shape, self.say(
                    f"{kind} at layer {chosen} is among the returned tokens: {tuple(out.tokens_BLD.shape)}"
                )
                assert not torch.equal(out.pooled_BC, plain.pooled_BC), self.say(f"{kind} at layer {chosen} has no effect")

    def gradients(self) -> None:
        prompts = [prompt.clone().requires_grad_() for prompt in self.prompts]
        gates = [gate.clone().requires_grad_() for gate in self.gates]
        for used in (None, gates):
            out = self.encoder.encode(self.inputs, _answers(prompts, used))
            (out.pooled_BC.square().sum() + out.tokens_BLD.sin().sum()).backward()
        for name, tensors in (("prompt", prompts), ("gate", gates)):
            for layer, tensor in enumerate(tensors):
                assert tensor.grad is not None and tensor.grad.isfinite().all(), self.say(
                    f"the gradient of the {name} of layer {layer} is missing or not finite"
                )
                assert tensor.grad.abs().sum() > 0, self.say(f"the gradient of the {name} of layer {layer} is 0")
        touched = [name for name, parameter in self.encoder.named_parameters() if parameter.grad is not None]
        assert not touched, self.say(f"frozen, yet {touched[:3]} got a gradient")

    def nothing_is_left_behind(self) -> None:
        plain = self.run(self.inputs)

        def fail(layer: int, tokens: Tensor, mask: Tensor | None) -> Prompt:
            if layer == len(self.encoder.widths) - 1:
                raise _Stop
            return Prompt(self.prompts[layer])

        try:
            self.run(self.inputs, fail)
        except _Stop:
            self.same(self.run(self.inputs), plain, "a prompt outlives the call that it was given to")
            return
        raise AssertionError(self.say("an exception of prompt_at is swallowed"))

    def inserted_tokens(self) -> None:
        tokens = self.prompts[0]
        if not self.encoder.insertable:
            try:
                self.encoder.encode(self.inputs, None, Insert(tokens))
            except EncoderError:
                return
            raise AssertionError(self.say("is not insertable, and takes tokens all the same"))
        with torch.no_grad():
            plain = self.encoder.encode(self.inputs)
            none = self.encoder.encode(self.inputs, None, Insert(tokens[:, :0]))
            self.same(none, plain, "inserting no token changes the output")
            for blind in range(_PROMPT_TOKENS):
                self._inserted(Insert(tokens, blind), plain)
            self.same(self.encoder.encode(self.inputs), plain, "an inserted token outlives the call that it was given to")
        learned = tokens.clone().requires_grad_()
        self.encoder.encode(self.inputs, None, Insert(learned)).pooled_BC.square().sum().backward()
        assert learned.grad is not None and (learned.grad.abs().sum(dim=(1, 2)) > 0).all(), self.say(
            "inserted tokens get no gradient"
        )

    def _inserted(self, insert: Insert, plain: Encoded) -> None:
        kind = f"inserted tokens, {insert.blind} of them blind,"
        seen: list[Tensor] = []

        def last(layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None) -> None:
            assert mask_BL is None or mask_BL.shape == tokens_BLD.shape[:2], self.say(f"{kind} are not in the mask")
            seen[:] = [tokens_BLD]

        out = self.encoder.encode(self.inputs, last, insert)
        assert out.tokens_BLD.shape == plain.tokens_BLD.shape, self.say(f"{kind} are among the returned tokens")
        assert not torch.equal(out.pooled_BC, plain.pooled_BC), self.say(f"{kind} have no effect")
        for index, item in enumerate(self.items):
            rows = Insert(insert.tokens_BPD[index : index + 1], insert.blind)
            alone = self.encoder.encode(self.batch([item]), None, rows)
            self.close(out.pooled_BC[index], alone.pooled_BC[0], f"with {kind} sample {index} depends on the rest of its batch")
        same = Insert(insert.tokens_BPD[:1].expand_as(insert.tokens_BPD), insert.blind)
        self.encoder.encode(self.inputs, last, same)
        together = seen[0][:, : insert.blind]
        if insert.blind:
            self.close(together, together[:1].expand_as(together), f"{kind} see what they should not")
        sighted = seen[0][:, insert.blind : insert.tokens_BPD.shape[1]]
        if len(self.encoder.widths) > 1:
            assert not torch.allclose(sighted, sighted[:1].expand_as(sighted)), self.say(f"{kind} see no token of a sample")

    def layers_by_themselves(self) -> None:
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
                self.close(out[real], entering[layer + 1][0][real], f"layer {layer} by itself gives something else")
            self._read(layer, tokens_BLD, mask_BL, real)

    def _read(self, layer: int, tokens_BLD: Tensor, mask_BL: Tensor | None, real_BL: Tensor) -> None:
        """Tokens as what a query sees: the same as the layer on both, and of each sample its own real ones."""
        query_BPD, run = self.prompts[layer].clone().requires_grad_(), self.encoder.run_layer
        real_BK = F.pad(real_BL, (0, _PROMPT_TOKENS), value=True)
        mask_BK = None if mask_BL is None else real_BK
        read = run(layer, query_BPD, mask_BK, Prompt(tokens_BLD))
        whole = run(layer, torch.cat([tokens_BLD, query_BPD], dim=1), mask_BK)[:, -_PROMPT_TOKENS:]
        self.close(read, whole, f"at layer {layer}, tokens as a prompt are not as tokens")
        for index, real in enumerate(real_BL):
            one = slice(index, index + 1)
            alone = run(layer, query_BPD[one], None, Prompt(tokens_BLD[one][:, real]))
            self.close(read[one], alone, f"at layer {layer}, what sample {index} is asked depends on its batch or padding")
        (grad,) = torch.autograd.grad(read.square().sum(), query_BPD)
        assert grad.isfinite().all() and grad.abs().sum() > 0, self.say(f"a query of layer {layer} gets no gradient")

    def same(self, left: Encoded, right: Encoded, fault: str) -> None:
        for name, a, b in zip(Encoded._fields, left, right, strict=True):
            equal = a is b or (a is not None and b is not None and torch.equal(a, b))
            assert equal, self.say(f"{fault} ({name})")

    def close(self, left: Tensor, right: Tensor, fault: str) -> None:
        apart, scale = float((left - right).detach().abs().max()), max(1.0, float(right.detach().abs().max()))
        assert apart <= _TOLERANCE * scale, self.say(f"{fault}: apart by {apart:.2e}, values up to {scale:.2g}")


def _answers(prompts: list[Tensor], gates: list[Tensor] | None) -> PromptAt:
    return lambda layer, tokens, mask: Prompt(prompts[layer], gates[layer] if gates else None)


class _Stop(Exception):
    """Raised by a callback to see what an interrupted call leaves behind."""


def _samples(encoder: Encoder) -> list[Any]:
    own = getattr(encoder.preprocess, "examples", None)
    return list(own() if own is not None else of(encoder.modality).examples())
