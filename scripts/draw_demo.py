"""Draw the README's picture from the output folder of ``mopefuse demo``.

    python scripts/draw_demo.py demo docs/images/demo.png
"""

from __future__ import annotations

import argparse
import base64
import json
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from mopefuse.training.demo import VARIANTS

EXAMPLES, SIDE = 4, 130  # number of images, and their width in pixels
RIGHT, WRONG, OTHERS, HIGHLIGHT = "#146c2e", "#b3261e", "#9aa0a6", "#1a73e8"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def example(demo: Path, question: dict[str, Any], prediction: dict[str, Any]) -> alt.LayerChart:
    """Draw an image with its question above it and the model's prediction below."""
    label, true = prediction["label"], prediction["true"]
    right = label == true
    probability = prediction["probabilities"][label]
    caption = f"{label}  ({100 * probability:.0f} %)" + ("" if right else f", true: {true}")
    image = base64.b64encode((demo / "digit-questions" / question["img"]).read_bytes()).decode()
    row = alt.Data(values=[{"url": f"data:image/png;base64,{image}", "caption": caption}])
    middle = alt.value(SIDE / 2)
    picture = alt.Chart(row).mark_image(width=SIDE, height=SIDE, smooth=False).encode(url="url:N", x=middle, y=middle)
    below = alt.Chart(row).mark_text(fontSize=14, color=RIGHT if right else WRONG).encode(
        text="caption:N", x=middle, y=alt.value(SIDE + 14)
    )
    title = alt.TitleParams(_wrap(question["text"]), fontSize=11, fontWeight="normal", anchor="middle")
    return (picture + below).properties(width=SIDE, height=SIDE, title=title)


def accuracies(demo: Path) -> alt.LayerChart:
    """Draw the test accuracy of every method as bars, the full method in another colour."""
    metrics = {name: json.loads((demo / name / "metrics.json").read_text(encoding="utf-8"))["metrics"] for name in VARIANTS}
    rows = [
        {"method": VARIANTS[name][0], "accuracy": found["test"]["accuracy"], "highlighted": name == "conditional"}
        for name, found in metrics.items()
    ]
    colour = alt.condition("datum.highlighted", alt.value(HIGHLIGHT), alt.value(OTHERS))
    y = alt.Y("method:N", sort=None, axis=alt.Axis(title=None, ticks=False, domain=False, labelLimit=300))
    x = alt.X("accuracy:Q", scale=alt.Scale(domain=[0, 1.1]), axis=None)
    bars = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y)
    numbers = bars.mark_text(align="left", dx=4).encode(text=alt.Text("accuracy:Q", format=".0%"))
    return (bars.mark_bar().encode(color=colour) + numbers).properties(width=150, height=SIDE, title="test accuracy")


def draw(demo: Path, out: Path) -> None:
    """Draw examples of the test split with the full method's predictions, and the test accuracy of every method."""
    questions = {row["id"]: row for row in read_rows(demo / "digit-questions" / "test.jsonl")}
    predictions = read_rows(demo / "conditional" / "predictions.jsonl")
    by_image = {questions[row["id"]]["img"]: row for row in predictions}  # the last question about each image
    chosen = list(by_image.values())[:: max(1, len(by_image) // EXAMPLES)][:EXAMPLES]
    examples = [example(demo, questions[row["id"]], row) for row in chosen]
    figure = alt.hconcat(*examples, accuracies(demo), spacing=24, background="white").configure_view(stroke=None)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(vl_convert.vegalite_to_png(figure.to_json(), scale=2))


def _wrap(text: str, width: int = 22) -> list[str]:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    draw(arguments.demo, arguments.out)
