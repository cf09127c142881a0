"""The demo: one task solved in seven ways, with the same data and frozen encoders.

The task needs both modalities: the image shows four digits, and the text asks for one of them. The image encoder has only ever
seen one digit at a time, so its pooled feature of four is of little use. FiLM and prompts make it look at one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopefuse.config.recipe import resolve
from mopefuse.config.schema import RunConfig
from mopefuse.core.registry import DATASETS, load
from mopefuse.training.listener import Listener
from mopefuse.training.train import train

RECIPE = "digit-questions/demo"
_STATIC_ONLY = {"prompts.dynamic": 0, "prompts.mapped": 0, "prompts.film": False, "warm_start": "none"}
_CROSS_ATTENTION = {
    "method": "cross-attention",
    "cross_attention.dropout": 0.5,
    "head_hidden": 128,
    "train.lr": 3e-3,
    "train.weight_decay": 0.1,
    "train.epochs": 160,
    "train.patience": 30,
}
"""Tuned on this task: dropout, width of the head, learning rate, weight decay, and number of epochs."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "conditional": ("conditional prompts and FiLM", {}),
    "cross-attention": ("cross-attention to the patches", _CROSS_ATTENTION),
    "mlp": ("MLP on both features", {"method": "mlp"}),
    "linear": ("logistic regression on both features", {"method": "linear"}),
    "static": ("static prompts only", _STATIC_ONLY),
    "image": ("image only", {"method": "main-only"}),
    "text": ("text only", {"method": "comp-only"}),
}
"""Name of a run to its title and the settings in which it differs."""


@dataclass(frozen=True)
class Row:
    """One line of the final table."""

    name: str
    title: str
    accuracy: float  # on the test split
    trainable: int
    seconds: float


def demo(
    out: Path, *, listener: Callable[[str], AbstractContextManager[Listener]], steps: int | None = None, overwrite: bool = False
) -> list[Row]:
    """Make the data, train every variant, and return a row for each.

    Args:
        out: folder for the data and the runs.
        listener: creates the listener for the training of a variant, given its title.
        steps: train each variant for only this many steps, as a quick look rather than a result.
    """
    data = out / "digit-questions"
    load(DATASETS, "digit-questions")(data)
    rows = []
    for name, (title, changes) in VARIANTS.items():
        config = _configure({"data.path": str(data), "train.max_steps": steps, **changes})
        with listener(title) as of_run:
            result = train(config, out / name, overwrite=overwrite, listener=of_run)
        rows.append(
            Row(
                name=name,
                title=title,
                accuracy=result["metrics"]["test"]["accuracy"],
                trainable=result["parameters"]["trainable"],
                seconds=result["seconds"],
            )
        )
    return rows


def _configure(changes: dict[str, Any]) -> RunConfig:
    """The recipe with changes; other methods take its data and encoders, and their own defaults for the rest."""
    if "method" not in changes:
        return resolve(recipe=RECIPE, flags=changes)
    recipe = resolve(recipe=RECIPE)
    same = {"main": recipe.main, "comp": recipe.comp, "train.batch_size": recipe.train.batch_size}
    data = {"data.fraction": recipe.data.fraction, "data.cache_images": recipe.data.cache_images}
    return resolve(flags={**same, **data, **changes})
