"""The values of ``--missing``: which share of a split lacks which modality; parsing and wording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mopefuse.core.error_codes import ConfigCode
from mopefuse.errors import ConfigError

GRID = "grid"
Shares = dict[str, float]
"""Share of samples that lack a modality, by modality; names joined by "+" are missing together."""


def describe_shares(missing: Mapping[str, float], already_missing: Mapping[str, int] | None = None) -> str:
    """``70 % of samples lack text``.

    Args:
        already_missing: number of rows that lack each modality in the data.
    """
    parts = [f"{100 * share:.3g} % of samples lack {what.replace('+', ' and ')}" for what, share in missing.items() if share]
    return ", ".join(parts) or ("nothing removed beyond what rows already lack" if already_missing else "nothing is removed")


def parse_shares(texts: Sequence[str]) -> list[Shares] | None:
    """Parse ``text=0.7``, several of which apply at once; None for ``grid``.

    Raises:
        ConfigError: not MODALITY=FRACTION with a fraction from 0 to 1, or a modality given twice.
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
            raise ConfigError(
                ConfigCode.BAD_MISSING_SHARE, f"{text} is not MODALITY=FRACTION", where=f"--missing {text}", fix=fix
            )
        if what in found:
            raise ConfigError(
                ConfigCode.BAD_MISSING_SHARE, f"{what} is specified twice", where=f"--missing {text}", fix="specify it once"
            )
        found[what] = share
    return [found]
