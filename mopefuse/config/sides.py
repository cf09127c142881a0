"""The sides of a fusion: "main", and "comp", "comp2", "comp3" for the complementary encoders in the order of ``--comp``.

One complementary encoder is written as text in a configuration, several as a list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mopefuse.config.schema import RunConfig
from mopefuse.errors import ConfigError

Comp = str | Sequence[str] | None
_ADDRESS = re.compile(r"([^=:?/]+)=(?=[^=]*:)")


def specs(config: RunConfig) -> dict[str, str]:
    """Side to spec; of a side that the method has no use for, an empty one."""
    several = (config.comp,) if isinstance(config.comp, str) else config.comp
    return {"main": config.main} | dict(zip(comps(len(several)), several, strict=True))


def comps(count: int) -> tuple[str, ...]:
    """The names of so many complementary sides."""
    return tuple("comp" if number == 1 else f"comp{number}" for number in range(1, count + 1))


def is_comp(side: str) -> bool:
    """Whether a side is one of the complementary ones."""
    return side.startswith("comp")


def with_specs(config: RunConfig, named: Mapping[str, str]) -> RunConfig:
    """`config` with other specs on some of its sides."""
    every = specs(config) | dict(named)
    main, *several = every.values()
    return config.model_copy(update={"main": main, "comp": several[0] if len(several) == 1 else tuple(several)})


def addressed(main: str | None, comp: Comp, modality_of: Mapping[str, str]) -> dict[str, str]:
    """Side to spec, as ``--main SPEC --comp SPEC`` say it of a model; of several encoders ``--comp 2=SPEC`` or ``text=SPEC``.

    Args:
        comp: one, several or none. modality_of: of every side that the model has.

    Raises:
        ConfigError: a side that there is not or is meant twice, or that is not said where there are several.
    """
    there = [side for side in modality_of if is_comp(side)]
    named = {} if main is None else {"main": main}
    for text in [comp] if isinstance(comp, str) else comp or ():
        match = _ADDRESS.match(text)
        side = _side(match[1] if match else None, text, there, modality_of)
        if side in named:
            raise ConfigError(141, f"--comp names {side} twice", where=f"--comp {text}", fix="name each encoder once")
        named[side] = text[match.end() :] if match else text
    return named


def _side(address: str | None, text: str, there: Sequence[str], modality_of: Mapping[str, str]) -> str:
    if address is None and len(there) <= 1:
        return "comp"
    meant = [
        side for number, side in enumerate(there, start=1) if address in (str(number), side, modality_of[side])
    ]
    if len(meant) == 1:
        return meant[0]
    known = ", ".join(f"{number}= ({modality_of[side]})" for number, side in enumerate(there, start=1))
    what = f"there are {len(there)} complementary encoders, and {text} does not say which one is meant"
    if address is not None and not meant:
        what = f"there is no complementary encoder {address}"
    raise ConfigError(140, what, where=f"--comp {text}", fix=f"write one of {known} before the spec")
