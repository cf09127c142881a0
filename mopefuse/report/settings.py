"""Settings as a page shows them: those set by the user, without defaults and values that follow from other settings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from mopefuse.config.method_defaults import defaults_of
from mopefuse.config.schema import RunConfig
from mopefuse.config.setting_paths import flatten, merge, nest

Derive = Callable[[RunConfig], RunConfig]
"""Fills in settings that are unset, as a run does when it begins."""
_FROM_DATA = frozenset({"data.modalities", "data.task"})  # usually not chosen by the user, but read from the data


def changed_settings(config: RunConfig, derive: Derive, *, hidden: Collection[str] = ()) -> list[tuple[str, str, str]]:
    """(name, value, default) of the settings that were chosen and differ from their defaults.

    The configuration of a run has every value filled in: learning rates, lengths of prompts. A value that `derive`
    would fill in for an unset setting was not chosen.
    """
    values, default = flatten(config.model_dump(mode="json")), _defaults(config)
    derived = _derived(config, derive, [name for name, value in values.items() if value is not None and default[name] is None])
    usual = {**default, **derived}
    return [
        (name, format_setting(value), format_setting(usual[name]))
        for name, value in values.items()
        if value != usual[name] and name not in hidden and name not in _FROM_DATA
    ]


def _derived(config: RunConfig, derive: Derive, names: Sequence[str]) -> dict[str, Any]:
    """The value that is filled in for each of the settings in `names` if those that nobody chose are unset.

    One setting may follow another, as learning rates do: if they cannot all have been left unset, the first counts as set.
    """
    values, chosen = flatten(config.model_dump(mode="json")), dict[str, Any]()
    while True:
        left_open = config.model_dump(mode="json")
        for name in names:
            left_open = left_open if name in chosen else merge(left_open, nest(name, None))
        found = flatten(derive(RunConfig.model_validate(left_open)).model_dump(mode="json"))
        other = next((name for name in names if name not in chosen and found[name] != values[name]), None)
        if other is None:
            return {name: chosen.get(name, found[name]) for name in names}
        chosen[other] = found[other]


def _defaults(config: RunConfig) -> dict[str, Any]:
    usual = RunConfig(main="", comp="").model_dump(mode="json")
    return flatten(merge(usual, defaults_of(config.model_dump(mode="json"))))


def format_setting(value: Any) -> str:
    """A value of a setting."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(format_setting, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
