"""Studies made from one trained run, with made-up numbers, in no time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mopefuse.config.setting_paths import merge, nest


@dataclass(frozen=True)
class Made:
    """A row. scores: test accuracy of each seed. curve: validation accuracy by step of the first seed; others are 0.1
    higher."""

    label: str
    settings: Mapping[str, Any]
    scores: Sequence[float]
    curve: Mapping[int, float]
    trainable: int = 1000


def make_study(template: Path, out: Path, rows: Sequence[Made], **facts: Any) -> Path:
    """Make the folder of a study whose cells are copies of a run, with other settings and scores."""
    cells = []
    for number, row in enumerate(rows):
        for seed, score in enumerate(row.scores):
            run = f"cells/row-{number}/seed-{seed}"
            _make_run(template, out / run, row, seed, score)
            cell = {"label": row.label, "seed": seed, "settings": dict(row.settings), "run": run}
            cells.append(cell | {"state": "finished", "error": None})
    known = {"kind": "study", "format": 1, "mopefuse": "0", "name": "made", "baseline": None, "metric": "accuracy"}
    (out / "study.json").write_text(json.dumps(known | {"cells": cells} | facts))
    return out


def change(study: Path, number: int, **facts: Any) -> None:
    """Change facts of a cell in study.json; a cell without a result loses its result."""
    known = json.loads((study / "study.json").read_text())
    known["cells"][number] |= facts
    (study / "study.json").write_text(json.dumps(known))
    if facts.get("state", "finished") != "finished":
        (study / known["cells"][number]["run"] / "metrics.json").unlink()


def _make_run(template: Path, run: Path, row: Made, seed: int, score: float) -> None:
    run.mkdir(parents=True)
    for name in ("manifest.json", "predictions.jsonl"):
        shutil.copy(template / name, run)
    config = yaml.safe_load((template / "config.yaml").read_text()) | {"seed": seed}
    for path, value in row.settings.items():
        config = merge(config, nest(path, value))
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    result = json.loads((template / "metrics.json").read_text())
    result["metrics"]["test"]["accuracy"] = score
    result["parameters"]["trainable"] = row.trainable
    (run / "metrics.json").write_text(json.dumps(result))
    lines = [{"step": step, "val": {"accuracy": value + 0.1 * seed}} for step, value in row.curve.items()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
