"""Draw the README's picture from what ``mopefuse demo`` left in a folder: nothing in it is typed in by hand.

    python scripts/draw_demo.py demo docs/images/demo.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from mopefuse.training.demo import VARIANTS

EXAMPLES = 4


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(demo: Path, out: Path) -> None:
    """Examples of the test split with the full method's answers, and the test accuracy of every method."""
    questions = {row["id"]: row for row in read_rows(demo / "digit-questions" / "test.jsonl")}
    answers = read_rows(demo / "conditional" / "predictions.jsonl")
    different = {questions[answer["id"]]["img"]: answer for answer in answers}  # the last question about each image
    chosen = list(different.values())[:: max(1, len(different) // EXAMPLES)][:EXAMPLES]
    figure = plt.figure(figsize=(12, 2.6), dpi=150)
    grid = figure.add_gridspec(1, EXAMPLES + 2, wspace=0.2, width_ratios=[1] * EXAMPLES + [1.8, 1.6])
    for column, answer in enumerate(chosen):
        axes = figure.add_subplot(grid[0, column])
        question = questions[answer["id"]]
        axes.imshow(Image.open(demo / "digit-questions" / question["img"]).convert("RGB"), interpolation="nearest")
        axes.set_axis_off()
        right = answer["label"] == answer["true"]
        share = answer["probabilities"][answer["label"]]
        axes.set_title(_wrap(question["text"]), fontsize=8)
        said = f"{answer['label']}  ({100 * share:.0f} %)" + ("" if right else f", true: {answer['true']}")
        colour = "#146c2e" if right else "#b3261e"
        axes.text(0.5, -0.08, said, transform=axes.transAxes, ha="center", va="top", fontsize=10, color=colour)
    axes = figure.add_subplot(grid[0, EXAMPLES + 1])
    names = list(VARIANTS)[::-1]
    found = [json.loads((demo / name / "metrics.json").read_text())["metrics"]["test"]["accuracy"] for name in names]
    bars = axes.barh([VARIANTS[name][0] for name in names], found, color=["#9aa0a6"] * (len(names) - 1) + ["#1a73e8"])
    axes.bar_label(bars, [f"{100 * value:.0f} %" for value in found], padding=3, fontsize=8)
    axes.set_xlim(0, 1.1)
    axes.set_xticks([])
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.set_title("test accuracy", fontsize=9)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, bbox_inches="tight", facecolor="white")


def _wrap(text: str, width: int = 22) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    draw(arguments.demo, arguments.out)
