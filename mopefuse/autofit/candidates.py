"""The candidates of a fit, from cheap to expensive: regressions, MLPs, cross-attention, conditional prompts.

Candidates on pooled features (`REGRESSIONS`, `NETWORKS`) are cross-validated; the others (`TRAINED`) are trained once and
compared on the validation split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mopefuse.config.schema import RunConfig, build_config
from mopefuse.config.setting_paths import merge
from mopefuse.tasks.base import Task

WARM_START = "auto"
"""Conditional prompts start at the best simple model of the frozen features."""
_READS = {"main": "main", "comp": "comp", "concat": "both", "average": "both"}  # by `linear.features`


@dataclass(frozen=True)
class Candidate:
    """A method with its settings.

    Args:
        title: ``{linear}`` stands for the linear model of the task.
        changes: settings, nested, that differ from those of the fit. reads: "main", "comp" or "both".
        swapped: whether main and comp exchange their roles.
    """

    name: str
    title: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    reads: str = "both"
    swapped: bool = False

    def title_for(self, task: Task) -> str:
        """The title, with the name of the linear model of a task."""
        return self.title.format(linear=task.linear_name)

    def config(self, values: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> RunConfig:
        """The configuration of its run.

        Args:
            values: settings of the fit, nested. more: further changes, nested.
        """
        if self.swapped:
            values = {**values, "main": values["comp"], "comp": values["main"]}
        return build_config(merge(merge(dict(values), dict(self.changes)), dict(more or {})))


def _linear(features: str, title: str) -> Candidate:
    changes = {"method": "linear", "linear": {"features": features}}
    return Candidate(f"linear-{features}", title, changes, _READS[features])


def _mlp(name: str, title: str, **changes: Any) -> Candidate:
    """An MLP whose last epoch is taken, so that none is selected on the samples that score it; it is fitted in memory."""
    return Candidate(name, title, merge({"method": "mlp", "train": {"select": "last"}}, changes))


def _conditional(name: str, title: str, *, swapped: bool = False, **changes: Any) -> Candidate:
    train = {"epochs": 5, "evals_per_epoch": 4, "patience": 8, "log_every": 5}
    common = {"method": "conditional", "warm_start": WARM_START, "train": train}
    return Candidate(name, title, merge(common, changes), swapped=swapped)


REGRESSIONS = (
    _linear("comp", "{linear}"),
    _linear("main", "{linear}"),
    _linear("concat", "{linear}"),
    _linear("average", "average of two {linear}s"),
)
NETWORKS = (
    _mlp("mlp", "MLP"),
    _mlp("mlp-dropout", "MLP, more dropout", mlp={"dropout": 0.5}),
    _mlp("mlp-wide", "MLP, 1,024 units", head_hidden=1024),
)
TRAINED = (
    Candidate("cross-attention", "cross-attention", {"method": "cross-attention"}),
    _conditional("conditional", "conditional prompts"),
    _conditional("conditional-swapped", "conditional prompts in the other encoder", swapped=True),
    _conditional("conditional-deep", "conditional prompts in all layers", prompts={"layers": "all"}),
)
CANDIDATES = {one.name: one for one in (*REGRESSIONS, *NETWORKS, *TRAINED)}
