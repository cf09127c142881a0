"""What a search may choose: settings by path, each from a range or a list.

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

from pydantic import Field, field_validator, model_validator

from mopefuse.config.schema import Section


class Range(Section):
    """Numbers from `low` to `high`, both included; whole ones if both are written as such."""

    low: int | float = Field(description="least value")
    high: int | float = Field(description="greatest value")
    log: bool = Field(False, description="equal chances for equal ratios")

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.low >= self.high:
            raise ValueError(f"low is {self.low}, not below high, {self.high}")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low}: a logarithm needs more than 0")
        return self

    @property
    def whole(self) -> bool:
        """Whether only whole numbers are meant."""
        return isinstance(self.low, int) and isinstance(self.high, int)


Axis = Range | list[Any]


class Search(Section):
    """What is searched, how long, and from which seed."""

    trials: int = Field(20, ge=1, le=100_000, description="settings to try")
    space: dict[str, Range | Annotated[list[Any], Field(min_length=1)]] = Field(
        min_length=1, description="path of a setting to a range (low, high, log) or a list of values"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="of the sampler")
    at_once: int = Field(1, ge=1, le=1000, description="trials that are chosen together, none knowing how the others end")

    @field_validator("space")
    @classmethod
    def _values_differ(cls, value: dict[str, Axis]) -> dict[str, Axis]:
        for path, axis in value.items():
            if isinstance(axis, list) and len({json.dumps(one) for one in axis}) < len(axis):
                raise ValueError(f"{path} has a value twice")
        return value

    def first(self) -> dict[str, Any]:
        """The least, or first, value of each setting."""
        return {path: axis[0] if isinstance(axis, list) else axis.low for path, axis in self.space.items()}

    def extremes(self) -> Iterator[dict[str, Any]]:
        """Each least and greatest value, each value of a list, alone and with each of every other setting."""
        ends = {path: axis if isinstance(axis, list) else [axis.low, axis.high] for path, axis in self.space.items()}
        for path, values in ends.items():
            yield from ({path: value} for value in values)
        for one, other in itertools.combinations(ends, 2):
            yield from ({one: a, other: b} for a, b in itertools.product(ends[one], ends[other]))
