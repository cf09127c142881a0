"""The budget of wall time, and what is left of it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field

from mopefuse.core.error_codes import ConfigCode
from mopefuse.core.formatting import duration
from mopefuse.errors import ConfigError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_RESERVED, _LEAST_RESERVED = 0.05, 2.0  # share of the budget, and seconds, kept for calibration and the test


def parse_budget(text: str | float) -> float:
    """Convert ``10m``, ``90s`` or ``1.5h`` to seconds; a number, in Python, is one of seconds.

    Raises:
        ConfigError: it is none of these.
    """
    text = text if isinstance(text, str) else f"{text}s"
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([smh])", text.strip(), re.ASCII)
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not seconds:
        what = f"cannot read the budget {str(text)!r}"
        raise ConfigError(ConfigCode.BAD_BUDGET, what, where="--budget", fix="write --budget 10m, 90s or 2h")
    return seconds


@dataclass
class Budget:
    """Wall time that may be spent.

    Args:
        total: in seconds. spent: seconds that earlier attempts of a resumed command have spent.
    """

    total: float
    spent: float = 0.0
    began: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        """Seconds spent, by all attempts."""
        return self.spent + time.monotonic() - self.began

    @property
    def left(self) -> float:
        """Seconds left for candidates; negative if the budget is exceeded. Some are reserved for calibration and the test."""
        return self.total - max(_LEAST_RESERVED, _RESERVED * self.total) - self.elapsed

    def __str__(self) -> str:
        return f"{duration(self.elapsed)} of {duration(self.total)}"
