"""Decide whether training starts at the first prompted layer, and get the outputs of the layers before it from the cache."""

from __future__ import annotations

import shutil
from functools import partial

import torch

from mopefuse.config.schema import RunConfig
from mopefuse.core import cache, distributed
from mopefuse.core.error_codes import ConfigCode, NumericCode, ResourceCode
from mopefuse.core.formatting import several, size
from mopefuse.data.base import DataSet
from mopefuse.data.prefix_cache import Prefixes, estimate_prefixes, split_prefixes
from mopefuse.encoders.sharding import uneven_calls
from mopefuse.errors import ConfigError, MopefuseError, ResourceError
from mopefuse.fusion.base import Fusion
from mopefuse.modalities.base import get_modality
from mopefuse.training.listener import Listener

SPLITS = ("train", "val")
PrefixTables = dict[str, dict[str, Prefixes]]  # split -> side -> prefixes
_UNUSABLE = {
    code.text
    for code in (
        ConfigCode.NO_PREFIX_TO_CACHE,
        ResourceCode.PREFIX_CACHE_TOO_LARGE,
        ResourceCode.PREFIX_CACHE_NOT_WRITABLE,
        NumericCode.PREFIX_EXCEEDS_FLOAT16,
    )
}


def prepare_prefixes(
    model: Fusion, data: DataSet, config: RunConfig, device: torch.device, listener: Listener
) -> tuple[RunConfig, PrefixTables]:
    """Get the prefixes of the training and validation samples, and resolve ``data.cache_prefix: auto``.

    Returns:
        `config` with `data.cache_prefix` on or off (unchanged for a model without prefix), and the prefixes.

    Raises:
        ConfigError, ResourceError, NumericError: `data.cache_prefix` is on, and it is not possible.
    """
    setting = config.data.cache_prefix
    if setting == "off" or (setting == "auto" and not model.prefix_layers):
        return config, {}
    try:
        require_prefixes(model, data, config, device)
        tables = _compute(model, data, config, device, listener)
    except MopefuseError as error:
        if setting == "on" or error.code not in _UNUSABLE:
            raise
        listener.on_notice(f"all layers run in every step, because {error.what}; to change this, {error.fix}")
        return _with_setting(config, "off"), {}
    return _with_setting(config, "on"), tables


def require_prefixes(model: Fusion, data: DataSet, config: RunConfig, device: torch.device) -> None:
    """Check that the prefixes of a model can be cached, and that they fit into the limits.

    Raises:
        ConfigError: no layer precedes the prompts, or its output changes in training. ResourceError: they take too much space.
    """
    if not model.prefix_layers:
        reason = f"no frozen layer of an encoder precedes the prompts of {config.method}"
        raise _nothing_to_cache(reason, "use --layers last:N, or --cache-prefix off")
    for side in model.prefix_layers:
        if not config.data.cache_features:
            raise _nothing_to_cache("data.cache_features is false", "add --set data.cache_features=true")
        if config.data.augment != "none" and get_modality(model.encoder(side).modality).is_picture:
            raise _nothing_to_cache(f"data.augment={config.data.augment} changes the images", "add --set data.augment=none")
        if config.train.modality_dropout and side in model.droppable_sides:
            raise _nothing_to_cache(f"--modality-dropout removes inputs of {side}", "remove --modality-dropout")
    distributed.run_on_all(lambda: _require_space(model, data, config, device))


def _nothing_to_cache(reason: str, fix: str) -> ConfigError:
    what = f"outputs of early layers cannot be cached: {reason}"
    return ConfigError(ConfigCode.NO_PREFIX_TO_CACHE, what, where="--cache-prefix", fix=fix)


def _require_space(model: Fusion, data: DataSet, config: RunConfig, device: torch.device) -> None:
    """Check the estimated size against `data.cache_prefix_limit` and half of the free space."""
    total = missing = 0
    for side, layer in model.prefix_layers.items():
        encoder = model.encoder(side)
        with uneven_calls(encoder):
            found = estimate_prefixes(encoder, layer, data, SPLITS, config, device)
        if found is None:
            raise _nothing_to_cache(f"{encoder.spec} cannot continue from layer {layer}", "use --cache-prefix off")
        total, missing = total + found.size, missing + found.missing
    limit, folder = config.data.cache_prefix_limit * 2**30, cache.root()
    if total > limit:
        allowed, enough = f"{config.data.cache_prefix_limit:g} GiB", f"{total / 2**30 * 1.1:.2g}"
        what = f"outputs of early layers would take {size(total)}, more than data.cache_prefix_limit ({allowed})"
        fix = f"add --set data.cache_prefix_limit={enough}, or --cache-prefix off"
        raise ResourceError(ResourceCode.PREFIX_CACHE_TOO_LARGE, what, where="--cache-prefix", fix=fix)
    free = shutil.disk_usage(folder).free // 2 if folder else 0
    if missing > free:
        what = f"outputs of early layers would take {size(missing)}, more than half of the cache's free space ({size(free)})"
        fix = "set MOPEFUSE_CACHE to a folder with more space, or use --cache-prefix off"
        raise ResourceError(ResourceCode.PREFIX_CACHE_TOO_LARGE, what, where=str(folder or "no cache"), fix=fix)


def _compute(model: Fusion, data: DataSet, config: RunConfig, device: torch.device, listener: Listener) -> PrefixTables:
    tables: PrefixTables = {split: {} for split in SPLITS}
    for side, layer in model.prefix_layers.items():
        encoder = model.encoder(side)
        for split in SPLITS:
            advance = partial(listener.on_data_progress, f"{encoder.spec.name} on {split}")
            # pooled features and tokens are for the initial weights, see `mopefuse.training.warm_start`
            pooled, tokens = side in (model.standard or ()), side in model.tokens_to_fit
            found = split_prefixes(
                encoder, layer, data, split, config, device, pooled=pooled, tokens=tokens, advance=advance
            )
            tables[split][side] = found
            first = "the first" if layer == 1 else f"the first {layer}"
            what = f"{first} of {len(encoder.widths)} layers of {encoder.spec} ran once"
            modality = encoder.modality
            how_many = several(found.different, f"distinct {modality}", f"distinct {get_modality(modality).plural}")
            where = f"{size(found.size)} in {config.data.prefix_precision}, {found.origin} (--cache-prefix)"
            listener.on_notice(f"{split}: {what} for {how_many}, {where}")
    return tables


def _with_setting(config: RunConfig, setting: str) -> RunConfig:
    return config.model_copy(update={"data": config.data.model_copy(update={"cache_prefix": setting})})
