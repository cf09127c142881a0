"""What to take away from a split, as a user says it and as a reader is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mopefuse.errors import ConfigError

GRID = "grid"
Shares = dict[str, float]
"""Modalities that the same samples lack, joined by "+", to the share of samples."""


def words(missing: Mapping[str, float], natural: Mapping[str, int] | None = None) -> str:
    """``70 % of samples lack text``.

    Args:
        natural: how many rows lack each modality before anything is taken away.
    """
    said = [f"{100 * share:.3g} % of samples lack {what.replace('+', ' and ')}" for what, share in missing.items() if share]
    return ", ".join(said) or ("nothing but what rows lack is missing" if natural else "nothing is taken away")


def parse(texts: Sequence[str]) -> list[Shares] | None:
    """``text=0.7`` (more than one: all at once) as what to take away; None for ``grid``.

    Raises:
        ConfigError: no such thing, or no share from 0 to 1.
    """
    if list(texts) == [GRID]:
        return None
    found: Shares = {}
    for text in texts:
        what, equals, number = text.partition("=")
        what = "+".join(sorted(what.split("+")))
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if not (equals and what and 0 <= share <= 1):
            fix = "write text=0.7 for 70 % of the samples, text+audio=0.5 for samples that lack both, or grid by itself"
            raise ConfigError(150, f"--missing {text} is no share of samples", where=f"--missing {text}", fix=fix)
        if what in found:
            raise ConfigError(150, f"{what} is there twice", where=f"--missing {text}", fix="give it once")
        found[what] = share
    return [found]
