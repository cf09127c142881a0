"""Write docs/encoders.md: which families were tried, on small random models, whether they can be prompted, and what holds.

``python scripts/encoders_page.py``, with the plugin mopefuse-audio installed, for which the page has rows, too;
tests/test_encoders.py holds the page to the families that it tries.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from mopefuse.encoders.base import create_encoder
from mopefuse.testing import contract

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "encoders.md"
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "plugins" / "mopefuse-audio" / "tests")]

import encoder_cases  # noqa: E402
import test_audio  # noqa: E402

HEAD = """# Encoders

`mopefuse encoders` lists schemes and short names, `mopefuse encoders inspect SPEC` shows one, and
`mopefuse encoders check SPEC` runs the contract below on it, whatever it is.

Every encoder can condition (`--comp`). To be prompted (`--main`) it needs layers whose attention takes keys and values that
are not of its own tokens. In **transformers** such layers are found by a probe, not by name: one small forward pass shows
which modules call the attention function, which projections give its keys and values (separate or fused, heads shared or
not, keys normed or not) and which norm feeds them. The probe compares what these make of the tokens that entered the layer
with what attention saw. What does not agree is refused, with the reason. Prompts carry no position: rotary codes and
position biases are for tokens alone. In **timm** and **open_clip** each kind of attention that is known is listed below.

The contract: an encoder stays frozen; a sample depends neither on its batch nor on padding; without prompts, or with a gate
of 0, the output is that of the untouched library, bit for bit; a prompt at each layer has an effect, gets a gradient, and
leaves nothing behind. Tests compare ungated prompts with tokens that are inserted into a plain model of the library.

Images have the size that the model's own image processor declares (of DINOv2 224 pixels, although its positions are for 518):
positions are interpolated where that differs. `?size=N` asks for another size wherever the model can take one. `mopefuse
encoders inspect SPEC` shows size, statistics and tokens per image.

A run records more of an encoder than its weights: resolved configuration, pooling, preprocessing, a digest of the tokenizer
and library versions. Loading it onto an encoder that differs is an error that names the field; another library version is
a notice.

The table is generated (`python scripts/encoders_page.py`) with small random models of each family.

| family | reads | prompted layers | contract |
| --- | --- | --- | --- |
"""


def page() -> str:
    """The whole page."""
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        short = {f"audio: {name}": test_audio.spec(name, path) for name, path in test_audio.save(Path(folder)).items()}
        for name, spec in {**encoder_cases.every_spec(Path(folder)), **short}.items():
            encoder = create_encoder(spec)
            if name.startswith(("timm", "open_clip")):  # fresh ones: some norms of Swin V2 begin at 0
                encoder_cases.sharpen(encoder.backbone)  # type: ignore[arg-type]
            parts = list(contract(encoder))
            broken = [fault for _, fault in parts if fault]
            layers = str(len(encoder.widths)) if encoder.widths else f"none: {encoder.why_not_main.partition(';')[0]}"
            held = f"{len(parts) - len(broken)} of {len(parts)} parts hold"
            rows.append(f"| {name} | {encoder.modality} | {layers} | {held} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
