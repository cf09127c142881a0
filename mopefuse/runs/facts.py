"""The facts that a run or an adapter keeps in its manifest, and that loading relies on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mopefuse.errors import CheckpointError


class _Encoder(BaseModel):
    model_config = ConfigDict(strict=True)

    fingerprint: str | None
    digest: str | None = None
    description: dict[str, Any] | None = None  # see `mopefuse.encoders.description`; absent from older artefacts


class _Plugin(BaseModel):
    model_config = ConfigDict(strict=True)

    group: str
    name: str
    distribution: str


class _Facts(BaseModel):
    """What is relied on in the facts of a run or an adapter; they hold more."""

    model_config = ConfigDict(strict=True)

    mopefuse: str
    method: str
    labels: list[str] = Field(min_length=1)
    multi_label: bool
    encoders: dict[str, _Encoder]
    data: dict[str, Any]
    plugins: list[_Plugin] = []


def check_facts(facts: dict[str, Any], file: Path) -> dict[str, Any]:
    """The facts of a run or an adapter, if they are of the kinds that loading relies on.

    Raises:
        CheckpointError: one is missing, or no such thing.
    """
    try:
        _Facts.model_validate(facts)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(map(str, first["loc"]))
        what = f"{file.name} is damaged: {name}: {first['msg'][0].lower()}{first['msg'][1:]}"
        raise CheckpointError(3, what, where=str(file.parent), fix="restore that file, or use another copy") from None
    return facts
