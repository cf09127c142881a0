"""The sides of a fusion: "main", and "comp", "comp2", "comp3" for the complementary encoders in the order of ``--comp``.

In a configuration, a single complementary encoder is a string and several are a list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from mopefuse.config.schema import RunConfig
from mopefuse.core.error_codes import ConfigCode
from mopefuse.core.tensor_files import check_tensors
from mopefuse.errors import CheckpointError, ConfigError

Comp = str | Sequence[str] | None
_ADDRESS = re.compile(r"([^=:?/]+)=(?=[^=]*:)")


def specs(config: RunConfig) -> dict[str, str]:
    """Side to spec; empty for a side that the method does not use."""
    every = (config.comp,) if isinstance(config.comp, str) else config.comp
    return {"main": config.main} | dict(zip(comps(len(every)), every, strict=True))


def comps(count: int) -> tuple[str, ...]:
    """The names of `count` complementary sides."""
    return tuple("comp" if number == 1 else f"comp{number}" for number in range(1, count + 1))


def is_comp(side: str) -> bool:
    """Whether a side is complementary."""
    return side.startswith("comp")


def with_specs(config: RunConfig, named: Mapping[str, str]) -> RunConfig:
    """`config` with other specs on some of its sides."""
    every = specs(config) | dict(named)
    main, *several = every.values()
    return config.model_copy(update={"main": main, "comp": several[0] if len(several) == 1 else tuple(several)})


def specs_by_side(main: str | None, comp: Comp, modality_of: Mapping[str, str]) -> dict[str, str]:
    """Side to spec, from ``--main SPEC --comp SPEC``; with several complementary encoders ``--comp 2=SPEC`` or ``text=SPEC``.

    Args:
        comp: one, several or none. modality_of: side to modality, for every side of the model.

    Raises:
        ConfigError: a side does not exist or is named twice, or is not named although there are several.
    """
    sides = [side for side in modality_of if is_comp(side)]
    named = {} if main is None else {"main": main}
    for text in [comp] if isinstance(comp, str) else comp or ():
        match = _ADDRESS.match(text)
        side = _find_side(match[1] if match else None, text, sides, modality_of)
        if side in named:
            raise ConfigError(
                ConfigCode.COMP_NAMED_TWICE,
                f"--comp specifies {side} twice",
                where=f"--comp {text}",
                fix="specify each encoder once",
            )
        named[side] = text[match.end() :] if match else text
    return named


def _find_side(address: str | None, text: str, sides: Sequence[str], modality_of: Mapping[str, str]) -> str:
    if address is None and len(sides) <= 1:
        return "comp"
    found = [side for number, side in enumerate(sides, start=1) if address in (str(number), side, modality_of[side])]
    if len(found) == 1:
        return found[0]
    known = ", ".join(f"{number}= ({modality_of[side]})" for number, side in enumerate(sides, start=1))
    what = f"{text} is ambiguous: there are {len(sides)} complementary encoders"
    if address is not None and not found:
        what = f"unknown complementary encoder {address}"
    raise ConfigError(ConfigCode.UNKNOWN_COMP_SIDE, what, where=f"--comp {text}", fix=f"write one of {known} before the spec")


def check_weights(named: Mapping[str, str]) -> None:
    """Refuse a file of weights (``SPEC?weights=FILE``) that does not exist or is not a safetensors file, before data are read.

    Args:
        named: side to spec.

    Raises:
        CheckpointError: there is no such file, or it is a pickle or no safetensors file.
    """
    for name, spec in named.items():
        match = re.search(r"[?&]weights=([^&]+)", spec)
        if match is not None:
            try:
                check_tensors(Path(os.path.expanduser(match[1])))
            except CheckpointError as error:
                flag = "--comp" if is_comp(name) else "--main"
                error.where = f"{flag}, {error.where}"
                raise
