"""Which encoders of a run are sharded over processes (`train.shard`), and which cannot be."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mopefuse.config.encoder_sides import is_comp
from mopefuse.config.schema import RunConfig
from mopefuse.core import device as devices
from mopefuse.core import distributed
from mopefuse.core.error_codes import ConfigCode
from mopefuse.encoders.sharding import make_mesh, shard
from mopefuse.errors import ConfigError
from mopefuse.fusion.base import Fusion
from mopefuse.training.listener import Listener

_FLAG = "--shard-encoders"


def _kind(side: str) -> str:
    return "comp" if is_comp(side) else "main"


def sides_to_shard(config: RunConfig, model: Fusion) -> list[str]:
    """The sides of a model whose encoders are to be sharded.

    Raises:
        ConfigError: one of them is trained, or the model is to be compiled.
    """
    chosen = config.train.shard
    sides = [side for side in model.uses if chosen in ("both", _kind(side))]
    if sides and config.train.compile:
        what = "a compiled model cannot gather the weights of its encoders"
        raise ConfigError(ConfigCode.CANNOT_SHARD, what, where=_FLAG, fix="remove train.compile, or --shard-encoders")
    trained = [side for side in sides if model.encoder(side).trainable]
    if trained:
        what = f"the encoder of {trained[0]} is trained, and only frozen encoders can be sharded"
        others = {_kind(side) for side in sides} - {_kind(side) for side in trained}
        fix = f"use {_FLAG} {others.pop()}" if others else f"remove {_FLAG}"
        raise ConfigError(ConfigCode.CANNOT_SHARD, what, where=_FLAG, fix=fix)
    return sides


def build_sharded(build: Callable[[], Fusion], config: RunConfig, device: torch.device | None, listener: Listener) -> Fusion:
    """Build a model, and shard the encoders that `train.shard` names over all processes.

    The processes of a machine do so one after another, so that it never holds more than one whole encoder of each side.

    Args:
        build: builds the model on the CPU. device: where the encoders are moved to; None if the model is not to be trained.

    Raises:
        ConfigError: see `sides_to_shard`.
    """
    if device is None or config.train.shard == "none" or distributed.world_size() == 1:
        model = build()
        if sides_to_shard(config, model) and device is not None:
            listener.on_notice(f"{_FLAG} has no effect in one process; start several with torchrun --nproc-per-node N")
        return model
    mesh = make_mesh(device)

    def build_and_shard() -> Fusion:
        model = build()
        for side in sides_to_shard(config, model):
            encoder = model.encoder(side)
            shard(encoder, mesh)
            if devices.precision(config.train.precision, device) == "bf16":
                # autocast's copies of the weights would otherwise stay in memory until the backward pass
                encoder.recompute = True
        return model

    built: Fusion = distributed.in_turns(build_and_shard)
    return built
