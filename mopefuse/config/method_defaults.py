"""Defaults that depend on other settings: on the method, on ``compat``, and on which encoders the method uses.

Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any

from mopefuse.config.setting_paths import flatten, merge

ONE_SIDED = {"main-only": "comp", "comp-only": "main"}
"""Methods that use one encoder, mapped to the side whose encoder can be omitted."""

PAPER: dict[str, Any] = {"head_norm": "none", "prompts": {"gate": "none"}}
"""Settings that ``compat: paper`` changes unless they are given: the stack of the papers."""

OFFICIAL: dict[str, Any] = merge(
    PAPER,
    {
        "prompts": {"experts": 4, "mapper_norm": "batch-frozen", "route_stage_starts": False},
        "router": {"kind": "joint", "noise_in_eval": True},
        "data": {"image_stats": "mmbt"},
        "train": {"select": "last"},
    },
)
"""Settings that ``compat: official`` changes unless they are given: the choices of the papers' released code, without its leak
between samples of a batch. Its average over prompts and patches has no counterpart here: prompts have no output."""

_NEW_LAYERS: dict[str, Any] = {"train": {"lr": 1e-3, "weight_decay": 1e-2, "schedule": "cosine"}}
_SMALL_NETWORK: dict[str, Any] = {"head_hidden": 512, **_NEW_LAYERS}
METHODS: dict[str, dict[str, Any]] = {
    "mlp": merge(_SMALL_NETWORK, {"train": {"epochs": 30}}),
    "qmf": merge(_SMALL_NETWORK, {"train": {"epochs": 30}}),
    "cross-attention": merge(_SMALL_NETWORK, {"train": {"lr": 3e-4, "epochs": 20}}),
    "flamingo": _NEW_LAYERS,
    "map": {"prompts": {"static": 16}},
    "maple": {"prompts": {"static": 2}},
}
"""Defaults of fusion methods for which the general defaults, which are chosen for prompts, are unsuitable.

On easy-VQA (5,786 training pairs, DINOv2-small and MiniLM) an MLP reaches 95.5 % in 10 epochs and 98.2 % in 30, and an epoch on
cached features takes a second or two. For cross-attention see "Photo grids" in docs/results.md.
"""


CONDITIONAL: dict[str, Any] = {
    "warm_start": "auto",
    "head_features": None,
    "head_hidden": 256,
    "head_dropout": 0.5,
    "prompts": {"film": True, "layers": "last:1/3", "token_dropout": None},
    "router": {"importance_weight": 0.0, "lr_factor": None},
    "train": {"patience": 3, "lr": 2e-3, "lr_head": 1e-3, "weight_decay": 1e-2, "schedule": "cosine", "warmup": 0.1},
}
"""Defaults of the method conditional without ``compat``, chosen by measurement; see "Defaults" in docs/results.md."""

RETRIEVAL: dict[str, dict[str, Any]] = {
    "linear": {"train": {"batch_size": 128, "epochs": 40, **_NEW_LAYERS["train"], "weight_decay": 0.1}},
    "conditional": {
        "prompts": {"layers": "last:1/3"},
        "train": {"batch_size": 128, "epochs": 6, "lr": 1e-2, "lr_head": 1e-4, "weight_decay": 1e-2, "schedule": "cosine"},
    },
}
"""Defaults of fusion methods for the task retrieval; see "Retrieval" in docs/log.md."""

CONDITIONAL_BY_PATH = flatten(CONDITIONAL)
"""The same by dotted path."""

BEST_START: dict[str, Any] = {"head_hidden": 256}
"""What ``warm_start: auto`` sets, with ``compat``, unless it is given: without a hidden layer, the head could not start as an
MLP."""


def defaults_of(values: dict[str, Any]) -> dict[str, Any]:
    """The settings, nested, that ``method``, ``warm_start`` and ``compat`` of a configuration set unless they are given."""
    method, compat = values.get("method", "conditional"), values.get("compat")
    data = values.get("data")
    if isinstance(data, dict) and data.get("task") == "retrieval":
        return RETRIEVAL.get(method, {}) if isinstance(method, str) else {}
    papers = {"paper": PAPER, "official": OFFICIAL}.get(compat) if isinstance(compat, str) else None
    found = METHODS.get(method, {}) if isinstance(method, str) else {}
    if method == "conditional":
        with_papers = BEST_START if values.get("warm_start") == "auto" else {}
        found = CONDITIONAL if papers is None else with_papers
    return merge(found, papers or {})


def without_idle_side(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with an empty encoder for a side that the method does not use, if none is given."""
    section = values.get("linear")
    features = section.get("features") if isinstance(section, dict) and values.get("method") == "linear" else None
    method = f"{features}-only" if isinstance(features, str) else values.get("method")
    idle = ONE_SIDED.get(method) if isinstance(method, str) else None
    return {idle: "", **values} if idle else values
