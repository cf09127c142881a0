"""Optimizer, learning-rate schedule, and the optimizer state that an exact resume needs.

The learning rate depends only on the step, so the schedule has no state.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from mopefuse.config.schema import RunConfig, Train
from mopefuse.core.error_codes import CheckpointCode
from mopefuse.errors import CheckpointError
from mopefuse.fusion.base import Fusion
from mopefuse.modalities.base import get_modality


def with_learning_rates(
    config: RunConfig, modality_of: Mapping[str, str], tuned: Collection[str] = (), *, fitted: bool = False
) -> RunConfig:
    """`config` with the papers' learning rates where none is given: 4e-4 for an image encoder, 5e-4 for others.

    Args:
        tuned: sides whose encoder is fully tuned; a complementary encoder then has the learning rate `lr_tuned`, as the main
            one has.
        fitted: whether the head starts as a fitted model; its learning rate is then a fiftieth.
    """
    default = {side: get_modality(modality).lr for side, modality in modality_of.items()}
    main = config.train.lr or default.get("main", default.get("comp", 4e-4))
    full = config.train.lr_tuned if "comp" in tuned else None
    comp = config.train.lr_comp or full or config.train.lr or default.get("comp", main)
    head = config.train.lr_head or main * (1 / 50 if fitted else 1)
    rates = {"lr": main, "lr_comp": comp, "lr_head": head}
    return config.model_copy(update={"train": config.train.model_copy(update=rates)})


def make_optimizer(model: Fusion, config: Train) -> torch.optim.AdamW:
    """AdamW for `Fusion.parameter_groups`; ``group["peak"]`` is the learning rate of a group before the schedule."""
    assert config.lr is not None
    groups = model.parameter_groups(config.lr, comp=config.lr_comp, head=config.lr_head, tuned=config.lr_tuned)
    for group in groups:
        group["peak"] = group["lr"]
    return torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)


def compute_lr_factor(config: Train, step: int, total: int) -> float:
    """The factor of the peak learning rate at `step` (from 0) of `total`."""
    progress = step / max(1, total)
    warmup = config.warmup or (0.3 if config.schedule == "one-cycle" else 0.0)
    if progress < warmup:
        if config.schedule == "one-cycle":
            return 0.04 + 0.96 * (1 - math.cos(math.pi * progress / warmup)) / 2
        return (step + 1) / (warmup * total + 1)
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "paper":
        return 0.4 ** ((progress >= 0.3) + (progress >= 0.6))
    return (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Set the learning rate of each parameter group to its peak times `scale`."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * scale


def optimizer_state(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The optimizer's tensors by name: ``<parameter>/exp_avg``, ...

    Args:
        names: ``id(parameter)`` to the parameter's name.
    """
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, entry in optimizer.state.items()
        for key, value in entry.items()
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], state: Mapping[str, Tensor], *, where: str
) -> None:
    """The inverse of `optimizer_state`.

    Raises:
        CheckpointError: a tensor belongs to a parameter that the model does not have.
    """
    parameters = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    for full_name, tensor in state.items():
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise CheckpointError(
                CheckpointCode.STATE_MISMATCH,
                f"the optimizer state has {name}, which the model does not have",
                where=where,
                fix="use a different checkpoint",
            )
        parameter = parameters[name]
        # a fused AdamW keeps even its step count on the device
        optimizer.state[parameter][key] = tensor.to(parameter.device).clone()
