"""The demonstration: one task, six ways to solve it, the same data, encoders and training for all.

Digit questions needs both modalities: the image shows four digits, the text asks for one of them.
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
from mopefuse.training.train import train
from mopefuse.training.trainer import Listener

RECIPE = "digit-questions/demo"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "conditional": ("static + dynamic + mapped prompts", {}),
    "static": ("static prompts only", {"prompts.dynamic": 0, "prompts.mapped": 0}),
    "image": ("image only", {"method": "main-only"}),
    "text": ("text only", {"method": "comp-only"}),
    "late-concat": ("late concatenation of frozen features", {"method": "late-concat"}),
    "mlp": ("a deeper head (MLP) on the same features", {"method": "late-concat", "head_hidden": 512}),
}
"""Name of a run to what it is and how it differs from the recipe."""


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
        listener: title of a variant to what watches its training.
        steps: train each variant for so many steps only; what comes out is a look, not a result.
    """
    data = out / "digit-questions"
    load(DATASETS, "digit-questions")(data)
    rows = []
    for name, (title, changes) in VARIANTS.items():
        config: RunConfig = resolve(recipe=RECIPE, flags={"data.path": str(data), "train.max_steps": steps, **changes})
        if config.method != "conditional":
            config = config.model_copy(update={"prompts": Prompts()})
        with listener(title) as watching:
            result = train(config, out / name, overwrite=overwrite, listener=watching)
        rows.append(
            Row(name, title, result["metrics"]["test"]["accuracy"], result["parameters"]["trainable"], result["seconds"])
        )
    return rows
