"""The search space: settings by path, each with a range or a list of values.

```yaml
search:
  trials: 20
  space:
    train.lr: {low: 1.0e-4, high: 1.0e-2, log: true}
    prompts.experts: [4, 16, 64]
    prompts.dynamic: {low: 1, high: 8}
```
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from mopefuse.config.section import Section


class Range(Section):
    """Numbers from `low` to `high`, both included; whole numbers if both bounds are."""

    low: int | float = Field(description="smallest value")
    high: int | float = Field(description="largest value")
    log: bool = Field(False, description="sample the logarithm uniformly")

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"low ({self.low}) must be above 0 where log is true")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether both bounds are whole numbers, so that only whole numbers are tried."""
        return isinstance(self.low, int) and isinstance(self.high, int)


def _kind(value: Any) -> str | None:
    return "range" if isinstance(value, dict | Range) else "list" if isinstance(value, list) else None


Axis = Annotated[
    Annotated[Range, Tag("range")] | Annotated[list[Any], Field(min_length=1), Tag("list")],
    Discriminator(_kind, custom_error_type="axis", custom_error_message="a list of values, or a range (low, high, log)"),
]
"""A range or a list; an error in a value is reported only for the kind that the value resembles."""


class Search(Section):
    """The section `search` of a study file."""

    trials: int = Field(20, ge=1, le=100_000, description="settings to try")
    space: dict[str, Axis] = Field(
        min_length=1, description="path of a setting to a range (low, high, log) or a list of values"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="random seed of the sampler")
    at_once: int = Field(1, ge=1, le=1000, description="trials that are proposed together, before the results of any")

    @field_validator("space")
    @classmethod
    def _values_differ(cls, value: dict[str, Axis]) -> dict[str, Axis]:
        for path, axis in value.items():
            if isinstance(axis, list) and len({json.dumps(item) for item in axis}) < len(axis):
                raise ValueError(f"{path} lists a value twice")
        return value

    def first(self) -> dict[str, Any]:
        """The smallest, or first, value of each setting."""
        return {path: axis[0] if isinstance(axis, list) else axis.low for path, axis in self.space.items()}

    def extremes(self) -> Iterator[dict[str, Any]]:
        """Yield the bounds of each range and all values of each list, alone and paired with those of every other setting."""
        ends = {path: axis if isinstance(axis, list) else [axis.low, axis.high] for path, axis in self.space.items()}
        for path, values in ends.items():
            yield from ({path: value} for value in values)
        for one, other in itertools.combinations(ends, 2):
            yield from ({one: a, other: b} for a, b in itertools.product(ends[one], ends[other]))
