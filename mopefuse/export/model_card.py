"""The model card of what is exported or pushed: what it is, what it was trained on, how good it is, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mopefuse.core.formatting import markdown, visible

_HEAD = """---
library_name: mopefuse
tags:
- multimodal
- prompt-tuning
- mixture-of-experts
---

# {title}

Says of {inputs} which of {count} labels {fit}: {labels}.
Pretrained encoders, fused by the method `{method}` of mopefuse (conditional prompts from prompt experts: arXiv 2312.03734,
2403.10568).

| side | encoder | revision | weights |
|---|---|---|---|
"""

_USE = {
    "adapter": """The encoders are not in this folder. They are loaded by their names, and refused if their weights are others.

```python
from PIL import Image
import mopefuse

predictor = mopefuse.load("FOLDER")
print(predictor.predict([Image.open("image.jpg")], ["a text"]))
```

`mopefuse predict FOLDER pairs.jsonl`, `mopefuse eval FOLDER --data DIR`, and, for other encoders,
`mopefuse swap-encoder FOLDER --comp SPEC -o NEW`.
""",
    "onnx": """One ONNX graph, all encoders inside. It runs without torch:

```sh
pip install --no-deps mopefuse
pip install {packages}
mopefuse predict FOLDER --image image.jpg --text "a text"
```

In Python, `mopefuse.load("FOLDER").predict(images, texts)`; with onnxruntime alone, `preprocess.json` says how images
and texts become the inputs of `model.onnx`. `mopefuse export verify FOLDER` compares every file, and the answer to the
example, with what was exported.
""",
    "pt2": """One graph of torch.export, all encoders inside:

```python
from PIL import Image
import mopefuse

predictor = mopefuse.load("FOLDER")
print(predictor.predict([Image.open("image.jpg")], ["a text"]))
```
""",
}
RUNTIME = ("onnxruntime", "tokenizers", "pillow", "numpy", "typer", "rich", "pydantic", "pyyaml")


def model_card(
    facts: Mapping[str, Any], *, title: str, form: str, checks: Mapping[str, Any] | None = None, command: str = ""
) -> str:
    """Markdown with the header that hubs read.

    Args:
        facts: encoders, labels, data hashes and metrics, as of `AdapterFolder.manifest`.
        form: "adapter", "onnx" or "pt2".
        checks: how far the exported graph was from the model.
        command: that made the folder.
    """
    labels = facts["labels"]
    shown = ", ".join(map(markdown, labels[:20])) + (", …" if len(labels) > 20 else "")
    fit = "fit" if facts["multi_label"] else "fits best"
    inputs = " and ".join(dict.fromkeys(encoder["modality"] for encoder in facts["encoders"].values()))
    text = _HEAD.format(inputs=inputs, title=markdown(title), count=len(labels), fit=fit, labels=shown, method=facts["method"])
    for side, encoder in facts["encoders"].items():
        weights = encoder["fingerprint"] or "in this folder (tuned)"
        spec, revision = _code(encoder["spec"]), markdown(encoder["revision"] or "-")
        text += f"| {side} ({encoder['modality']}) | `{spec}` | {revision} | {weights} |\n"
    text += "\n## How good it is\n\n" + _metrics(facts.get("metrics") or {})
    text += "\n## How it was made\n\n"
    parameters = facts.get("parameters") or {}
    if parameters:
        text += f"- {parameters['trainable']:,} of {parameters['total']:,} parameters were trained\n"
    for split, digest in facts["data"].items():
        rows = (facts.get("rows") or {}).get(split)
        text += f"- {split}: {f'{rows:,} rows, ' if rows else ''}data hash `{digest}`\n"
    text += f"- mopefuse {facts['mopefuse']}, seed {facts.get('seed', '-')}; all settings are in `config.yaml`\n"
    text += "- again: `mopefuse train --recipe config.yaml --data DATA --out RUN`"
    text += f", then `{command}`\n" if command else "\n"
    for name, value in (checks or {}).items():
        text += f"- {name}: {value}\n"
    text += "\n## How to use it\n\n" + _USE[form].format(packages=" ".join(RUNTIME))
    return visible(text, lines=True)


def _code(text: object) -> str:
    """In backticks, in a table."""
    return visible(text).replace("`", "'").replace("|", "\\|")


def _metrics(metrics: Mapping[str, Mapping[str, float] | None]) -> str:
    splits = {split: values for split, values in metrics.items() if values}
    if not splits:
        return "It was not evaluated.\n"
    names = list(next(iter(splits.values())))
    text = "| split | " + " | ".join(names) + " |\n|---" + "|---" * len(names) + "|\n"
    for split, values in splits.items():
        text += f"| {split} | " + " | ".join(f"{values[name]:.4g}" for name in names) + " |\n"
    return text
