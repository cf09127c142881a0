"""Benchmark of how the cost of conditional prompts scales with experts, prompt length, batch and text length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mopefuse.bench.pair import random_batch
from mopefuse.bench.timing import Advance, Times, Turns
from mopefuse.bench.variants import FLOOR, Subject, Variant, build_encoders
from mopefuse.config.schema import RunConfig
from mopefuse.core import device as devices
from mopefuse.fusion.build import full_specs

AXES: Mapping[str, Sequence[int]] = {
    "experts": (1, 4, 16, 64, 256, 1024),
    "prompt tokens": (2, 12, 32, 128),  # static and dynamic together
    "batch": (1, 4, 16),
    "text length": (8, 32, 128),
}


@dataclass(frozen=True)
class Point:
    """A training step with one setting changed, and the floor at the same batch and text length."""

    axis: str
    value: int
    step: Times
    floor: Times

    @property
    def ratio(self) -> float:
        """Ratio of the step to the floor."""
        return self.step.ratio_to(self.floor)


def bench_scale(
    config: RunConfig,
    *,
    batch: int,
    text_length: int,
    rounds: int = 3,
    advance: Advance = lambda what, done, total: None,
) -> list[Point]:
    """Time every value of every axis, with the other settings fixed.

    Raises:
        EncoderError: an encoder that cannot be created, or a main encoder that cannot be prompted.
    """
    config = full_specs(config)
    device = devices.resolve(config.device)
    encoders = build_encoders(config, device)
    encoders["main"].require_promptable(fix="use it as --comp instead")
    found: list[Point] = []
    for axis, values in AXES.items():
        for value in values:
            size = {"batch": batch, "text_length": text_length} | ({axis.replace(" ", "_"): value} if axis in _SIZES else {})
            data = random_batch(encoders, **size, device=device)
            variants = (Variant(FLOOR, bare=True), Variant("conditional", _settings(axis, value)))
            calls = {variant.name: Subject(variant, config, encoders, data, device).step for variant in variants}
            advance(f"{axis} {value}", len(found), sum(map(len, AXES.values())))
            times = Turns(device, rounds, warm_up=1).time(calls)
            found.append(Point(axis, value, times["conditional"], times[FLOOR]))
    return found


_SIZES = ("batch", "text length")


def _settings(axis: str, value: int) -> dict[str, Any]:
    if axis == "experts":
        return {"prompts": {"experts": value}}
    return {"prompts": {"static": value // 2, "dynamic": value // 2}} if axis == "prompt tokens" else {}
