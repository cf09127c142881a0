"""The contract that every encoder must satisfy.

See `mopefuse.encoders.base.Encoder`; the checks are in `encoder_checks` and `encoder_prompts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mopefuse.encoders.base import Encoder, create_encoder
from mopefuse.modalities.base import get_modality
from mopefuse.testing._contract import Part, enforce, faults
from mopefuse.testing.encoder_prompts import PromptChecks


def check_encoder(encoder: str | Encoder, samples: Sequence[Any] | None = None) -> Encoder:
    """Check that an encoder satisfies the contract of `mopefuse.encoders.base.Encoder`; it is returned frozen.

    Args:
        encoder: a spec, or an encoder, which is frozen first.
        samples: at least two raw values of its modality; default ``preprocess.examples()`` if there is such a method, else
            the examples of the modality.

    Raises:
        AssertionError: the first part of the contract that is broken: what, where, and how to fix it.
    """
    built = create_encoder(encoder) if isinstance(encoder, str) else encoder
    built.freeze()
    values = list(samples if samples is not None else _samples(built))
    assert len(values) >= 2, "check_encoder needs at least two samples: one alone cannot leak into another"
    enforce(_parts(PromptChecks(built, values)))
    return built


def contract(encoder: Encoder, samples: Sequence[Any] | None = None) -> Iterator[tuple[str, str]]:
    """Every part of the contract in words, and how a frozen encoder breaks it; empty if it holds. See `check_encoder`."""
    yield from faults(_parts(PromptChecks(encoder, list(samples if samples is not None else _samples(encoder)))))


def _parts(check: PromptChecks) -> list[Part]:
    alone = "mask padding in attention and pooling, and use no statistics over the batch"
    plain = [
        Part(
            "declares its attributes correctly",
            check.attributes,
            "set the attributes of mopefuse.encoders.Encoder to what they describe",
        ),
        Part("stays frozen and in evaluation mode", check.frozen, "do not override freeze() or train(), or call super() there"),
        Part(
            "returns a feature and tokens deterministically",
            check.plain_output,
            "return EncoderOutput(pooled_BC, tokens_BLD, mask_BL) from _encode, without dropout or other randomness",
        ),
        Part("a sample does not depend on its batch", lambda: check.does_not_depend_on_the_batch(None), alone),
        Part("a sample alone, without padding, gives the same output", check.without_padding, alone),
    ]
    if not check.encoder.widths:
        fix = "leave encode() as it is, and implement _encode() only"
        return [*plain, Part("refuses prompts", check.refuses_prompts, fix)]
    return [*plain, *_prompted_parts(check, alone)]


def _prompted_parts(check: PromptChecks, alone: str) -> list[Part]:
    supported = check.encoder.supports_inserted_tokens
    insert = "accepts inserted tokens" if supported else "rejects inserted tokens"
    use = "give prompt.tokens_BPD the layer's own norm and projections, and pass keys, values and gate_H to mopefuse's attend"
    keep = "keep nothing on self during a call; use mopefuse.core.threads.PerThread where hooks need it"
    parts = [
        Part(
            "requests a prompt at each layer, in order",
            check.layers_in_order,
            "call self._request_prompt(layer, tokens_BLD, mask_BL) once as tokens enter each of the layers in widths",
        ),
        Part(
            "without prompts, or with a gate of 0, the output is unchanged bit for bit",
            check.untouched_without_prompts,
            "where _request_prompt returns None, compute the layer as the backbone does; elsewhere use mopefuse's attend",
        ),
        Part("a prompt at each layer has an effect", check.every_layer_uses_its_prompt, use),
        Part(
            "with prompts, a sample does not depend on its batch",
            lambda: check.does_not_depend_on_the_batch(lambda gates: None),
            alone,
        ),
        Part(
            "with gated prompts, a sample does not depend on its batch",
            lambda: check.does_not_depend_on_the_batch(lambda gates: gates),
            alone,
        ),
        Part(
            "prompt tokens that the prompt masks have no effect",
            check.masked_prompts,
            "pass prompt.mask_BP to mopefuse's attend as prompt_mask_BP, or to attend_prompts as mask_BP",
        ),
        Part("every prompt and gate receives a gradient, and no weight does", check.gradients, f"do not detach prompts; {use}"),
        Part("a prompt is not kept after its call", check.keeps_no_state, keep),
        Part(
            "continues from the tokens that enter a layer",
            check.continues_from_a_layer,
            "begin with first, x_BLD = self._resume(x_BLD), and run the layers from `first` on",
        ),
        Part(
            "scale and shift modulate what the attention of each layer reads",
            check.modulation,
            "pass the input of the query, key and value projections through prompt.modulate",
        ),
        Part(
            "adds to the input of each layer",
            check.added_to_tokens,
            "pass the input of each layer through prompt.add_to, ahead of the residual connection",
        ),
        Part(
            insert,
            check.inserted_tokens,
            "put inserted tokens ahead of the encoder's own and into masks, or set supports_inserted_tokens = False",
        ),
    ]
    fix = "compute in _run_layer what the layer computes in _encode, with the prompt as more keys and values"
    return [*parts, Part("each layer run alone gives the same output", check.layers_run_alone, fix)] if supported else parts


def _samples(encoder: Encoder) -> list[Any]:
    own = getattr(encoder.preprocess, "examples", None)
    return list(own() if own is not None else get_modality(encoder.modality).examples())
