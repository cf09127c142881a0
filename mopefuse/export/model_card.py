"""The model card of an export: what the model is, what it was trained on, its metrics, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mopefuse.core.formatting import markdown, visible
from mopefuse.tasks.base import task_from_facts

_HEAD = """---
library_name: mopefuse
tags:
- multimodal
- prompt-tuning
- mixture-of-experts
---

# {title}

A model that predicts {task} from {inputs}: {labels}.
Pretrained encoders, fused by mopefuse's `{method}` method{papers}.

| side | encoder | revision | weights |
|---|---|---|---|
"""

_PAPERS = {"conditional": " (conditional prompts from prompt experts: arXiv 2312.03734, 2403.10568)"}

_USE = {
    "adapter": """The encoders are not in this folder. They are loaded by name; loading fails if their weights
differ from those in training.

```python
from PIL import Image
import mopefuse

predictor = mopefuse.load("FOLDER")
print(predictor.predict([Image.open("image.jpg")], ["a text"]))
```

`mopefuse predict FOLDER pairs.jsonl`, `mopefuse eval FOLDER --data DIR`, and, for other encoders,
`mopefuse swap-encoder FOLDER --comp SPEC -o NEW`.
""",
    "onnx": """A single ONNX graph that contains all encoders. It runs without torch:

```sh
pip install --no-deps mopefuse
pip install {packages}
mopefuse predict FOLDER --image image.jpg --text "a text"
```

In Python: `mopefuse.load("FOLDER").predict(images, texts)`. To use onnxruntime alone, `preprocess.json` describes how
images and texts become the inputs of `model.onnx`. `mopefuse export verify FOLDER` compares every file, and the prediction for
the example, with the export.
""",
    "pt2": """A single torch.export graph that contains all encoders:

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
    """The card in Markdown, with the metadata that hubs read.

    Args:
        facts: encoders, labels, data hashes and metrics, as in `AdapterFolder.manifest`.
        form: "adapter", "onnx" or "pt2".
        checks: comparisons of the exported graph with the model, by name.
        command: the command that made the folder from a run; empty for a model from a training loop in Python.
    """
    labels = facts["labels"]
    shown = ", ".join(map(markdown, labels[:20])) + (", …" if len(labels) > 20 else "")
    task = task_from_facts(facts["task"]).describe(labels)
    inputs = " and ".join(dict.fromkeys(encoder["modality"] for encoder in facts["encoders"].values()))
    labelled = {"task": task, "labels": shown}
    method = {"method": facts["method"], "papers": _PAPERS.get(facts["method"], "")}
    text = _HEAD.format(inputs=inputs, title=markdown(title), **method, **labelled)
    for side, encoder in facts["encoders"].items():
        weights = encoder["fingerprint"] or "in this folder (tuned)"
        spec, revision = _code(encoder["spec"]), markdown(encoder["revision"] or "-")
        text += f"| {side} ({encoder['modality']}) | `{spec}` | {revision} | {weights} |\n"
    text += "\n## Evaluation\n\n" + _metrics(facts.get("metrics") or {})
    text += "\n## Training\n\n"
    parameters = facts.get("parameters") or {}
    if parameters:
        text += f"- {parameters['trainable']:,} of {parameters['total']:,} parameters were trained\n"
    for split, digest in facts["data"].items():
        rows = (facts.get("rows") or {}).get(split)
        text += f"- {split}: {f'{rows:,} rows, ' if rows else ''}data hash `{digest}`\n"
    text += f"- mopefuse {facts['mopefuse']}, seed {facts.get('seed', '-')}; "
    if command:
        text += "all settings are in `config.yaml`\n"
        text += f"- to reproduce it: `mopefuse train --recipe config.yaml --data DATA --out RUN`, then `{command}`\n"
    else:
        text += "the settings of the model are in `config.yaml`; a training loop in Python trained it\n"
    for name, value in (checks or {}).items():
        text += f"- {name}: {value}\n"
    text += "\n## Usage\n\n" + _USE[form].format(packages=" ".join(RUNTIME))
    return visible(text, lines=True)


def _code(text: object) -> str:
    """`text`, escaped for use in backticks within a table."""
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
