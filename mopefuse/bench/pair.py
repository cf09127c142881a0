"""What conditional prompting costs with one pair of encoders: time, memory, parameters and size, against the floor.

The *floor* is what cannot be had for less as long as both encoders are frozen and the main one is prompted: the complementary
forward pass, the main forward pass, and the main backward pass down to its first layer, without any prompt. All weights and
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
from mopefuse.bench.timing import CALM, Advance, Times, Turns
from mopefuse.bench.token_form import in_windows
from mopefuse.bench.variants import (
    FLOOR,
    LABELS,
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
from mopefuse.data.base import Batch
from mopefuse.encoders.base import Encoder
from mopefuse.fusion.build import full_specs


@dataclass(frozen=True)
class Line:
    """A row of the table; what was not measured is None."""

    name: str
    train: Times | None
    infer: Times | None
    memory: int | None  # bytes of a training step beside the encoders
    trainable: int
    artefact: int  # bytes of what is trained
    why_not: str = ""


class Shared(NamedTuple):
    """What measurements of memory share."""

    config: RunConfig
    encoders: dict[str, Encoder]
    batch: Batch
    device: torch.device


@dataclass(frozen=True)
class PairBench:
    """One pair of encoders."""

    config: RunConfig
    batch: int
    text_length: int
    device: str
    precision: str
    versions: Mapping[str, str]
    weights: int  # bytes of both encoders, in float32
    lines: tuple[Line, ...]

    @property
    def disturbed(self) -> float:
        """Share of the repetitions in which others had more of the processors than `timing.CALM`."""
        every = [share for line in self.lines for times in (line.train, line.infer) if times for share in times.stolen.values()]
        return sum(share > CALM for share in every) / len(every) if every else 0.0

    def line(self, name: str) -> Line:
        """The row of that name."""
        return next(line for line in self.lines if line.name == name)

    def ratio(self, name: str, other: str = FLOOR, *, infer: bool = False) -> float | None:
        """Time of one row over that of another; None if one of them was not measured."""
        mine, theirs = ((line.infer if infer else line.train) for line in (self.line(name), self.line(other)))
        return None if mine is None or theirs is None else mine.over(theirs)

    def ratios(self) -> dict[str, float | None]:
        """What docs/performance.md gives limits for."""
        first, tuned = self.lines[1].name, "late-concat, fine-tuned"
        mine, theirs = self.line(first).memory, self.line(tuned).memory
        experts = [line.name for line in self.lines if line.name.startswith("conditional, k = ")]
        return {
            **{f"training step: {name} / floor": self.ratio(name) for name in experts},
            f"answer: {first} / floor": self.ratio(first, infer=True),
            "training step: ungated / as tokens": self.ratio(UNGATED, TOKENS),
            f"training step: {first} / {tuned}": self.ratio(first, tuned),
            f"memory: {first} / {tuned}": None if mine is None or not theirs else mine / theirs,
            f"training step: psi cached / {first}": self.ratio("conditional, psi cached", first),
            f"artefact: {first} / encoders": self.line(first).artefact / self.weights,
            f"artefact in 16 bits: {first} / encoders": self.line(first).artefact / self.weights / 2,
        }


def bench_pair(
    config: RunConfig,
    *,
    batch: int,
    text_length: int,
    experts: Sequence[int] = (16,),
    methods: Sequence[str] = (),
    recompute: bool = False,
    rounds: int = 2,
    more: int = 5,
    train: bool = True,
    infer: bool = True,
    with_memory: bool = True,
    compiled: bool = False,
    advance: Advance = lambda what, done, total: None,
) -> PairBench:
    """Measure every variant with one pair.

    Args:
        config: of the pair, its prompts, router and precision.
        text_length: tokens of each text.
        experts: numbers of experts; the first is that of all rows that name none.
        methods, recompute: further rows, see `variants`.
        rounds: of all variants in turns.
        more: further rounds after each of them, of the floor and conditional prompts, and where the main encoder attends within
            windows in turn with that of prompts as keys and values and as tokens; of answers half as many.
        compiled: forward passes through `torch.compile`.

    Raises:
        EncoderError: an encoder that cannot be had, or a main encoder that cannot be prompted.
        ConfigError: no such method. ResourceError: there is not enough memory.
    """
    config = full_specs(config)
    device = devices.resolve(config.device)
    chosen = variants(experts, methods, recompute=recompute)
    frozen = build_encoders(config, device)
    frozen["main"].require_promptable(fix="use it as --comp instead")
    data = random_batch(frozen, batch, text_length, device)
    reasons = {variant.name: missing(variant, frozen) for variant in chosen}
    subjects = {}
    for variant in chosen:
        if not reasons[variant.name]:
            encoders = build_encoders(config, device) if variant.own_encoders else frozen
            subjects[variant.name] = Subject(variant, config, encoders, data, device, compiled=compiled)
    small = device.type == "cpu" and not compiled
    for number, (name, subject) in enumerate(subjects.items() if small else ()):
        advance(f"warming up: {name}", number, len(subjects))
        subject.warm_up()
    often = ((FLOOR, chosen[1].name), *([(UNGATED, TOKENS)] if in_windows(frozen["main"]) else []))
    turns = Turns(rounds=rounds, often=often, more=more, warm_up=0 if small else 3, device=device)
    steps = {name: subject.step for name, subject in subjects.items() if subject.trains and train}
    answers = {name: subject.infer for name, subject in subjects.items() if subject.variant.answers and infer}
    fewer = replace(turns, more=turns.more // 2)
    trained = turns.time(steps, lambda name, done, total: advance(f"training: {name}", done, total))
    answered = fewer.time(answers, lambda name, done, total: advance(f"answering: {name}", done, total))
    weights = sum(4 * p.numel() for encoder in frozen.values() for p in encoder.parameters())
    facts = {name: (subject.trainable, subject.artefact, subject.trains) for name, subject in subjects.items()}
    del subjects, frozen, steps, answers
    measured = [variant for variant in chosen if variant.name in facts and facts[variant.name][2]] if with_memory else []
    taken = {}
    growths = iter(_memory(config, batch, text_length, device, measured) if measured else ())
    for number, variant in enumerate(measured):
        advance(f"memory: {variant.name}", number, len(measured))
        taken[variant.name] = next(growths)
    lines = [
        Line(
            variant.name, trained.get(variant.name), answered.get(variant.name), taken.get(variant.name),
            *facts.get(variant.name, (0, 0))[:2], reasons[variant.name],
        )
        for variant in chosen
    ]  # fmt: skip
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
    versions = {name: metadata.version(name) for name in ("torch", "timm", "transformers")}
    precision = devices.precision(config.train.precision, device)
    return PairBench(config, batch, text_length, named, precision, versions, weights, tuple(lines))


def random_batch(encoders: Mapping[str, Encoder], batch: int, text_length: int, device: torch.device) -> Batch:
    """Noise, the same for the same sizes."""
    generator = torch.Generator().manual_seed(0)
    inputs = {side: random_inputs(encoders[side], batch, text_length, generator) for side in encoders}
    targets = torch.randint(LABELS, (batch,), generator=generator)
    return Batch(inputs, {}, targets, torch.arange(batch)).to(device)


def _memory(
    config: RunConfig, batch: int, text_length: int, device: torch.device, measured: Sequence[Variant]
) -> Iterator[int]:
    """Bytes by which each variant's training step grows the memory in use, its gradients and optimiser state included."""
    build = partial(_encoders_and_batch, config, batch, text_length, device)
    if device.type == "cuda":
        return (_step_memory(build(), variant) for variant in measured)
    return memory.in_fresh_processes(build, _step_memory, measured)


def _encoders_and_batch(config: RunConfig, batch: int, text_length: int, device: torch.device) -> Shared:
    encoders = build_encoders(config, devices.resolve(str(device)))
    return Shared(config, encoders, random_batch(encoders, batch, text_length, device), device)


def _step_memory(shared: Shared, variant: Variant) -> int:
    subject = Subject(variant, shared.config, shared.encoders, shared.batch, shared.device)
    return memory.growth(shared.device, subject.warm_up, subject.step)
