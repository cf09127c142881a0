"""Quality gates: limits of metrics, for scripts and continuous integration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mopefuse.core.error_codes import ConfigCode, GateCode
from mopefuse.errors import ConfigError, GateError, did_you_mean
from mopefuse.metrics.names import LOWER_IS_BETTER, in_per_cent
from mopefuse.tasks.base import all_metrics


class Gates(NamedTuple):
    """Minimum values by metric, and maximum values of those of which less is better."""

    least: Mapping[str, float]
    most: Mapping[str, float]

    def __bool__(self) -> bool:
        return bool(self.least or self.most)


def parse_gates(least: Sequence[str], most: Sequence[str] = ()) -> Gates:
    """Parse ``metric=value`` arguments of --min and --max.

    Raises:
        ConfigError: not of this form, an unknown metric, or the other flag is meant.
    """
    return Gates(_parse(least, "--min"), _parse(most, "--max"))


def _parse(texts: Sequence[str], flag: str) -> dict[str, float]:
    gates, known = {}, (*all_metrics(more=True), "loss")
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known:
            near = [one for one in known if one.startswith(f"{name}_")]  # f1 for f1_macro
            fix = f"did you mean {', '.join(near[:3])}?" if near else did_you_mean(name, known)
            raise ConfigError(ConfigCode.UNKNOWN_METRIC, f"unknown metric {name!r}", where=flag, fix=fix)
        wanted = "--max" if name in LOWER_IS_BETTER else "--min"
        if wanted != flag:
            better = "less" if wanted == "--max" else "more"
            what = f"{better} {name} is better, so {flag} would refuse good models"
            raise ConfigError(ConfigCode.BAD_GATE, what, where=flag, fix=f"write {wanted} {text}")
        try:
            gates[name] = float(value)
        except ValueError:
            gates[name] = math.nan
        if not math.isfinite(gates[name]):
            example = "--min accuracy=0.8" if flag == "--min" else "--max mae=2.5"
            raise ConfigError(ConfigCode.BAD_GATE, f"not a quality gate: {text!r}", where=flag, fix=f"write {example}")
    return gates


def check_gates(found: Mapping[str, float], gates: Gates) -> None:
    """Check that every metric is within its gate; NaN never is.

    Raises:
        ConfigError: a metric that is not computed for these data.
        GateError: a metric outside its gate.
    """
    for flag, limits, word in (("--min", gates.least, "below"), ("--max", gates.most, "above")):
        for name, limit in limits.items():
            if name not in found:
                what = f"metric {name!r} is not defined for these data"
                raise ConfigError(ConfigCode.UNKNOWN_METRIC, what, where=flag, fix=did_you_mean(name, found))
            if not (found[name] >= limit if flag == "--min" else found[name] <= limit):
                what = f"{name} is {found[name]:.4f}, {word} {limit:g}"
                fix = f"train longer, or {'lower' if flag == '--min' else 'raise'} the threshold"
                if flag == "--min" and in_per_cent(name) and 2 <= limit <= 100:  # as tables show it
                    fix = f"write {name}={limit / 100:g}, as {name} is at most 1"
                raise GateError(GateCode.METRIC_TOO_LOW, what, where=flag, fix=fix)
