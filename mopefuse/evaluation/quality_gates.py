"""Quality gates: minimum values of metrics, for scripts and continuous integration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from mopefuse.core.error_codes import ConfigCode, GateCode
from mopefuse.errors import ConfigError, GateError, did_you_mean
from mopefuse.tasks.base import all_metrics


def parse_gates(texts: Sequence[str]) -> dict[str, float]:
    """Parse ``metric=value`` arguments to minimum values by metric.

    Raises:
        ConfigError: not of this form, or an unknown metric.
    """
    gates, known = {}, all_metrics(more=True)
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known:
            raise ConfigError(
                ConfigCode.UNKNOWN_METRIC, f"unknown metric {name!r}", where="--min", fix=did_you_mean(name, known)
            )
        try:
            gates[name] = float(value)
        except ValueError:
            gates[name] = math.nan
        if not math.isfinite(gates[name]):
            raise ConfigError(
                ConfigCode.BAD_GATE, f"not a quality gate: {text!r}", where="--min", fix="write --min accuracy=0.8"
            )
    return gates


def check_gates(found: Mapping[str, float], gates: Mapping[str, float]) -> None:
    """Check that every metric is at or above its gate; NaN is below any gate.

    Raises:
        ConfigError: a metric that is not computed for these data.
        GateError: a metric below its gate.
    """
    for name, least in gates.items():
        if name not in found:
            raise ConfigError(
                ConfigCode.UNKNOWN_METRIC,
                f"metric {name!r} is not defined for these data",
                where="--min",
                fix=did_you_mean(name, found),
            )
        if not found[name] >= least:
            raise GateError(
                GateCode.METRIC_TOO_LOW,
                f"{name} is {found[name]:.4f}, below {least:g}",
                where="--min",
                fix="train longer, or lower the threshold",
            )
