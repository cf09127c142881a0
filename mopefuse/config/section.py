"""The base class of the sections of a configuration, and bounds that several sections share."""

from __future__ import annotations

from typing import Any, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

# Bounds that no useful model reaches: a mistyped size is rejected here instead of filling the memory.
MAX_TOKENS = 4096  # tokens of a prompt; also experts of a layer
WIDEST = 16_384  # width of a hidden layer
MANY = 10**9  # upper bound for counts that use no memory; keeps 64-bit arithmetic from overflowing


def is_section(annotation: Any) -> bool:
    """Whether an annotation is a pydantic model; Python 3.10 also counts ``tuple[int, ...]`` as a type, hence `get_origin`."""
    return get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel)


class Section(BaseModel):
    """A group of settings: immutable, with finite values and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_true_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("a value other than true and false")
        return value
