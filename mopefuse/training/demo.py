"""The demo: one task solved in six ways, with the same data, encoders and training for all.

The task needs both modalities: the image shows four digits, and the text asks for one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopefuse.config.recipe import resolve
from mopefuse.config.schema import Prompts, RunConfig
from mopefuse.core.registry import DATASETS, load
from mopefuse.training.listener import Listener
from mopefuse.training.train import train

RECIPE = "digit-questions/demo"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "conditional": ("static + dynamic + mapped prompts", {}),
    "static": ("static prompts only", {"prompts.dynamic": 0, "prompts.mapped": 0}),
    "image": ("image only", {"method": "main-only"}),
    "text": ("text only", {"method": "comp-only"}),
    "late-concat": ("late concatenation of frozen features", {"method": "late-concat"}),
    "mlp": ("a deeper head (MLP) on the same features", {"method": "late-concat", "head_hidden": 512}),
}
"""Name of a run to its title and its changes to the recipe."""


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
        config: RunConfig = resolve(recipe=RECIPE, flags={"data.path": str(data), "train.max_steps": steps, **changes})
        if config.method != "conditional":
            config = config.model_copy(update={"prompts": Prompts()})
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
