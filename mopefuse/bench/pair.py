"""Benchmark of conditional prompting with one pair of encoders: time, memory, parameters and size, compared with a lower bound.

The lower bound, or *floor*, is the minimum cost of prompting the main encoder with both encoders frozen: the complementary
forward pass, the main forward pass, and the main backward pass down to its first layer, without prompts. All weights and
inputs are random; times do not depend on their values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from typing import NamedTuple

import torch

from mopefuse.bench import memory
from mopefuse.bench.inserted_tokens import in_windows
from mopefuse.bench.timing import CALM, Advance, Times, Turns
from mopefuse.bench.variants import (
    FLOOR,
    LABELS,
    QUARTER,
    TOKENS,
    UNGATED,
    Subject,
    Variant,
    build_encoders,
    missing,
    random_inputs,
    variants,
)
from mopefuse.config.schema import RunConfig
from mopefuse.core import device as devices
from mopefuse.core.parameters import count_parameters
from mopefuse.data.base import Batch
from mopefuse.encoders._quantize import with_quantize
from mopefuse.encoders.base import Encoder, check_name
from mopefuse.errors import EncoderError
from mopefuse.fusion.build import full_specs


@dataclass(frozen=True)
class Line:
    """A row of the table; values that were not measured are None."""

    name: str
    train: Times | None
    infer: Times | None
    memory: int | None  # bytes of a training step, without the encoders
    trainable: int  # parameters
    artefact: int  # bytes of the saved tensors
    encoders: int  # bytes of the weights of both encoders
    why_not: str = ""


class Shared(NamedTuple):
    """Inputs that all memory measurements share."""

    config: RunConfig
    encoders: dict[str, dict[str, Encoder]]  # by format
    batch: Batch
    device: torch.device


@dataclass(frozen=True)
class PairBench:
    """Result of the benchmark of one pair of encoders."""

    config: RunConfig
    batch: int
    text_length: int
    device: str
    precision: str
    versions: Mapping[str, str]
    weights: int  # bytes of both encoders, in float32
    lines: tuple[Line, ...]

    @property
    def disturbed_share(self) -> float:
        """Fraction of repetitions in which other machines took more of the processors than `timing.CALM`."""
        every = [share for line in self.lines for times in (line.train, line.infer) if times for share in times.stolen.values()]
        return sum(share > CALM for share in every) / len(every) if every else 0.0

    def line(self, name: str) -> Line:
        """Row by name."""
        return next(line for line in self.lines if line.name == name)

    def ratio(self, name: str, other: str = FLOOR, *, infer: bool = False) -> float | None:
        """Ratio of the times of two rows; None if one of them was not measured."""
        one, two = ((line.infer if infer else line.train) for line in (self.line(name), self.line(other)))
        return None if one is None or two is None else one.ratio_to(two)

    def ratios(self) -> dict[str, float | None]:
        """The ratios for which docs/performance.md gives limits."""
        first, tuned = self.lines[1].name, "late-concat, fine-tuned"
        first_memory, tuned_memory = self.line(first).memory, self.line(tuned).memory
        experts = [line.name for line in self.lines if line.name.startswith("conditional, k = ")]
        return {
            **{f"training step: {name} / floor": self.ratio(name) for name in experts},
            f"prediction: {first} / floor": self.ratio(first, infer=True),
            "training step: ungated / as tokens": self.ratio(UNGATED, TOKENS),
            f"training step: {first} / {tuned}": self.ratio(first, tuned),
            f"memory: {first} / {tuned}": None if first_memory is None or not tuned_memory else first_memory / tuned_memory,
            f"training step: psi cached / {first}": self.ratio("conditional, psi cached", first),
            f"training step: last quarter, all cached / {first}": self.ratio(QUARTER, first),
            f"artefact: {first} / encoders": self.line(first).artefact / self.weights,
            f"artefact in 16 bits: {first} / encoders": self.line(first).artefact / self.weights / 2,
        }


class Facts(NamedTuple):
    """What is known of a variant without measuring it; see `Line`."""

    trainable: int = 0
    artefact: int = 0
    encoders: int = 0
    trains: bool = False  # whether there is a training step


@dataclass(frozen=True)
class _Timed:
    """Facts and times of the variants that exist for a pair, by name."""

    facts: Mapping[str, Facts]
    train: Mapping[str, Times]
    infer: Mapping[str, Times]
    weights: int  # bytes of both encoders, in float32


def bench_pair(
    config: RunConfig,
    *,
    batch: int,
    text_length: int,
    experts: Sequence[int] = (16,),
    methods: Sequence[str] = (),
    quantize: Sequence[str] = (),
    recompute: bool = False,
    rounds: int = 2,
    more: int = 5,
    train: bool = True,
    infer: bool = True,
    with_memory: bool = True,
    compiled: bool = False,
    advance: Advance = lambda what, done, total: None,
) -> PairBench:
    """Measure every variant with one pair of encoders.

    Args:
        config: the pair, its prompts, router and precision.
        text_length: tokens of each text.
        experts: numbers of experts; the first is used by all rows that do not name one.
        methods, quantize, recompute: further rows, see `variants`.
        rounds: rounds over all variants.
        more: further rounds of the most important variants after each of them, see `_turns`; half as many for inference.
        train, infer, with_memory: what to measure.
        compiled: run forward passes through `torch.compile`.

    Raises:
        EncoderError: an encoder that cannot be created, or a main encoder that cannot be prompted.
        ConfigError: an unknown method.
        ResourceError: not enough memory.
    """
    config = full_specs(config)
    device = devices.resolve(config.device)
    chosen = variants(experts, methods, quantize=quantize, recompute=recompute)
    # build the variants and time them; encoders and models are freed before memory is measured
    frozen = build_encoders(config, device)
    frozen["main"].require_promptable(fix="use it as --comp instead")
    quantized, faults = build_quantized(config, quantize, device)
    reasons = {variant.name: faults.get(variant.quantize) or missing(variant, frozen) for variant in chosen}
    present = [variant for variant in chosen if not reasons[variant.name]]
    data, shared = random_batch(frozen, batch, text_length, device), {"": frozen, **quantized}
    subjects = _build_subjects(config, present, shared, data, device, compiled=compiled, advance=advance)
    turns = _turns(device, rounds, more, frozen["main"], chosen[1].name, compiled=compiled)
    timed = _time(subjects, turns, frozen, train=train, infer=infer, advance=advance)
    del subjects, frozen, quantized, shared
    measured = [variant for variant in present if with_memory and timed.facts[variant.name].trains]
    growths = _measure_memory(config, batch, text_length, device, measured, advance)
    return PairBench(
        config=config,
        batch=batch,
        text_length=text_length,
        device=_device_name(device),
        precision=devices.precision(config.train.precision, device),
        versions={name: metadata.version(name) for name in ("torch", "timm", "transformers")},
        weights=timed.weights,
        lines=tuple(_line(name, reason, timed, growths.get(name)) for name, reason in reasons.items()),
    )


def _line(name: str, why_not: str, timed: _Timed, memory: int | None) -> Line:
    facts = timed.facts.get(name, Facts())
    return Line(
        name=name,
        train=timed.train.get(name),
        infer=timed.infer.get(name),
        memory=memory,
        trainable=facts.trainable,
        artefact=facts.artefact,
        encoders=facts.encoders,
        why_not=why_not,
    )


def build_quantized(
    config: RunConfig, kinds: Sequence[str], device: torch.device
) -> tuple[dict[str, dict[str, Encoder]], dict[str, str]]:
    """The pair's encoders in each format, and why they do not exist in others.

    Raises:
        EncoderError: an unknown format.
        PackageError: torchao is not installed.
    """
    found, faults = {}, {}
    for kind in kinds:
        check_name(with_quantize(config.main, kind))
        try:
            found[kind] = build_encoders(config, device, kind)
        except EncoderError as error:
            faults[kind] = str(error.args[0])
    return found, faults


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _build_subjects(
    config: RunConfig,
    chosen: Sequence[Variant],
    frozen: Mapping[str, dict[str, Encoder]],
    data: Batch,
    device: torch.device,
    *,
    compiled: bool,
    advance: Advance,
) -> dict[str, Subject]:
    """Build the model of each variant and, on an uncompiled CPU, warm it up on one sample.

    Args:
        frozen: encoders that variants share, by format.
    """
    subjects = {}
    for variant in chosen:
        encoders = build_encoders(config, device) if variant.own_encoders else frozen[variant.quantize]
        subjects[variant.name] = Subject(variant, config, encoders, data, device, compiled=compiled)
    if _warms_up_on_one_sample(device, compiled):
        for number, (name, subject) in enumerate(subjects.items()):
            advance(f"warming up: {name}", number, len(subjects))
            subject.warm_up()
    return subjects


def _warms_up_on_one_sample(device: torch.device, compiled: bool) -> bool:
    return device.type == "cpu" and not compiled


def _turns(device: torch.device, rounds: int, more: int, main: Encoder, first: str, *, compiled: bool) -> Turns:
    """Most important are the floor and conditional prompts; in windows also prompts as keys and values, and as tokens."""
    often = ((FLOOR, first), *([(UNGATED, TOKENS)] if in_windows(main) else []))
    warm_up = 0 if _warms_up_on_one_sample(device, compiled) else 3
    return Turns(rounds=rounds, often=often, more=more, warm_up=warm_up, device=device)


def _time(
    subjects: Mapping[str, Subject],
    turns: Turns,
    frozen: Mapping[str, Encoder],
    *,
    train: bool,
    infer: bool,
    advance: Advance,
) -> _Timed:
    """Time training steps and inference of the variants."""
    steps = {name: subject.step for name, subject in subjects.items() if subject.trains and train}
    passes = {name: subject.infer for name, subject in subjects.items() if subject.variant.time_inference and infer}
    fewer = replace(turns, more=turns.more // 2)
    return _Timed(
        facts={
            name: Facts(subject.trainable, subject.artefact, subject.encoder_bytes, subject.trains)
            for name, subject in subjects.items()
        },
        train=turns.time(steps, lambda name, done, total: advance(f"training: {name}", done, total)),
        infer=fewer.time(passes, lambda name, done, total: advance(f"inference: {name}", done, total)),
        weights=sum(4 * count_parameters(encoder) for encoder in frozen.values()),
    )


def _measure_memory(
    config: RunConfig,
    batch: int,
    text_length: int,
    device: torch.device,
    measured: Sequence[Variant],
    advance: Advance,
) -> dict[str, int]:
    """Measure the memory of each variant's training step, in bytes by name."""
    growths = iter(_memory(config, batch, text_length, device, measured) if measured else ())
    found = {}
    for number, variant in enumerate(measured):
        advance(f"memory: {variant.name}", number, len(measured))
        found[variant.name] = next(growths)
    return found


def random_batch(encoders: Mapping[str, Encoder], batch: int, text_length: int, device: torch.device) -> Batch:
    """Batch of random inputs and targets, equal for equal sizes."""
    generator = torch.Generator().manual_seed(0)
    inputs = {side: random_inputs(encoders[side], batch, text_length, generator) for side in encoders}
    targets = torch.randint(LABELS, (batch,), generator=generator)
    return Batch(inputs, {}, targets, torch.arange(batch)).to(device)


def _memory(
    config: RunConfig, batch: int, text_length: int, device: torch.device, measured: Sequence[Variant]
) -> Iterator[int]:
    """Iterate over the memory in bytes that each variant's training step adds, including gradients and optimizer state."""
    formats = tuple(dict.fromkeys(variant.quantize for variant in measured))
    build = partial(_encoders_and_batch, config, batch, text_length, device, formats)
    if device.type == "cuda":
        return (_step_memory(build(), variant) for variant in measured)
    return memory.in_fresh_processes(build, _step_memory, measured)


def _encoders_and_batch(
    config: RunConfig, batch: int, text_length: int, device: torch.device, formats: Sequence[str]
) -> Shared:
    device = devices.resolve(str(device))
    encoders = {kind: build_encoders(config, device, kind) for kind in formats}
    return Shared(config, encoders, random_batch(encoders[formats[0]], batch, text_length, device), device)


def _step_memory(shared: Shared, variant: Variant) -> int:
    encoders = shared.encoders[variant.quantize]
    subject = Subject(variant, shared.config, encoders, shared.batch, shared.device)
    return memory.memory_growth(shared.device, subject.warm_up, subject.step)
