"""Validation of the facts in the manifest of a run or an adapter that loading relies on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mopefuse.core.error_codes import CheckpointCode
from mopefuse.errors import CheckpointError
from mopefuse.tasks.base import with_task


class _Encoder(BaseModel):
    model_config = ConfigDict(strict=True)

    modality: str
    fingerprint: str | None  # None for a tuned encoder
    digest: str
    description: dict[str, Any]  # see `mopefuse.encoders.description`


class _Plugin(BaseModel):
    model_config = ConfigDict(strict=True)

    group: str
    name: str
    distribution: str


class _Task(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str


class _Facts(BaseModel):
    """The facts that loading relies on; a manifest holds more."""

    model_config = ConfigDict(strict=True)

    mopefuse: str
    method: str
    labels: list[str] = Field(min_length=1)
    task: _Task
    encoders: dict[str, _Encoder]
    data: dict[str, Any]
    plugins: list[_Plugin]


def check_facts(facts: dict[str, Any], file: Path) -> dict[str, Any]:
    """Check the facts of a run or an adapter, and return them.

    Args:
        file: the file that they were read from.

    Raises:
        CheckpointError: a fact is missing or of the wrong type.
    """
    facts = with_task(facts)
    try:
        _Facts.model_validate(facts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        what = f"{file.name} is damaged: {name}: {first['msg'][0].lower()}{first['msg'][1:]}"
        raise CheckpointError(
            CheckpointCode.CONTENT_DAMAGED, what, where=str(file.parent), fix="restore the original file"
        ) from None
    return facts
