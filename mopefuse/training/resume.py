"""The configuration of a resumed run: the saved one with those changes that do not affect what was trained so far."""

from __future__ import annotations

from typing import Any

from mopefuse.config.schema import RunConfig, build_config
from mopefuse.config.setting_paths import flatten, merge, nest
from mopefuse.core.error_codes import ConfigCode
from mopefuse.errors import ConfigError
from mopefuse.fusion.build import full_specs

MAY_CHANGE = frozenset(
    (
        "device data.path data.image_roots data.workers data.cache_images data.cache_features "
        "data.cache_remote_limit data.cache_prefix_limit data.strict data.allow_odd_labels train.epochs "
        "train.max_steps train.patience train.log_every train.checkpoint_every train.evals_per_epoch train.select "
        "train.compile train.checkpoint_activations train.shard"
    ).split()
)
"""Settings that a resumed run may change; all others define the run."""
_RESOLVED = {"data.cache_prefix": "auto"}  # placeholders, besides None, that a run resolves at its start


def merge_resumed(saved: RunConfig, new: RunConfig) -> tuple[RunConfig, list[str]]:
    """The configuration that a resumed run continues with, and its changes as ``path: old -> new``.

    Args:
        new: settings that are not resolved here keep their saved value, see `diff_settings`.

    Raises:
        ConfigError: a change to a setting that defines the run: its encoders, prompts, data or optimization.
    """
    before, after = _values(full_specs(saved)), _values(full_specs(new))
    changed = diff_settings(saved, new)
    refused = [f"{key} (it was {before[key]}, now {after[key]})" for key in changed if key not in MAY_CHANGE]
    if refused:
        raise ConfigError(
            ConfigCode.SETTING_FIXED_ON_RESUME,
            f"a resumed run cannot change {'; '.join(refused)}",
            where="--resume",
            fix="resume without this change, or start a new run with a different --out",
        )
    values = saved.model_dump(mode="json")
    for key in changed:
        values = merge(values, nest(key, after[key]))
    return build_config(values), [f"{key}: {before[key]} -> {after[key]}" for key in changed]


def diff_settings(saved: RunConfig, new: RunConfig) -> list[str]:
    """Paths of the settings that differ in a new configuration; those that a run resolves (None, auto) do not count."""
    before, after = _values(full_specs(saved)), _values(full_specs(new))
    return [key for key in before if before[key] != after[key] and after[key] not in (None, _RESOLVED.get(key))]


def _values(config: RunConfig) -> dict[str, Any]:
    return flatten(config.model_dump(mode="json"))
