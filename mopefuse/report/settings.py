"""Settings as a page shows them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mopefuse.config.schema import RunConfig
from mopefuse.config.setting_paths import flat


def changed(config: RunConfig, *, hidden: Collection[str] = ()) -> list[tuple[str, str, str]]:
    """(name, value, default) of the settings that differ from their defaults."""
    default = flat(RunConfig(main="", comp="").model_dump(mode="json"))
    return [
        (name, written(value), written(default.get(name)))
        for name, value in flat(config.model_dump(mode="json")).items()
        if value != default.get(name) and name not in hidden
    ]


def written(value: Any) -> str:
    """A value of a setting."""
    if value is None:
        return "none, or by encoder"
    return f"{value:g}" if isinstance(value, float) else str(value)
