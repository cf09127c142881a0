"""scripts/draw_demo.py draws the picture from the output folder of the demo."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from PIL import Image

from mopefuse.data.sets.digit_questions import make
from mopefuse.training.demo import VARIANTS

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "draw_demo.py"


def test_the_picture_shows_the_images_of_the_demo_in_a_row(tmp_path: Path) -> None:
    make(tmp_path / "digit-questions", train=1, val=1, test=16)
    for name in VARIANTS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text('{"metrics": {"test": {"accuracy": 0.5}}}')
    rows = map(json.loads, (tmp_path / "digit-questions" / "test.jsonl").read_text().splitlines())
    predictions = [{"id": row["id"], "label": "3", "true": row["label"], "probabilities": {"3": 0.7}} for row in rows]
    (tmp_path / "conditional" / "predictions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in predictions))
    runpy.run_path(str(SCRIPT))["draw"](tmp_path, tmp_path / "demo.png")
    with Image.open(tmp_path / "demo.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24) or ()}
        assert picture.width > 4 * picture.height
    assert {(0x1A, 0x73, 0xE8), (0x9A, 0xA0, 0xA6)} <= colours, "the bars of the full method and of the others"
