"""Take a trained model out of its run: as one ONNX or pt2 graph in a bundle, or as an adapter for its own encoders.

A bundle is checked before it exists (`mopefuse.export.bundle_maker`); `mopefuse.inference.bundle` runs it,
for ONNX without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mopefuse.config.recipe import to_yaml
from mopefuse.core.artifact import check_parent, dump_json, publish, sweep, write_tensors
from mopefuse.core.dependencies import require
from mopefuse.errors import ConfigError
from mopefuse.export.bundle_maker import Maker, Notice, Parity, public
from mopefuse.export.model_card import model_card
from mopefuse.inference.bundle import KIND
from mopefuse.runs import adapter
from mopefuse.runs.load import Loaded, load_model
from mopefuse.runs.locate import kind_of, trained

Form = Literal["onnx", "pt2", "adapter"]
FORMS = ("onnx", "pt2", "adapter")


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    form: Form
    size: int  # bytes
    parity: Parity | None = None
    int8: dict[str, dict[str, float]] | None = None  # metrics on the validation split, "before" and "after"

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "folder": str(self.folder)}


def export(
    run: Path,
    out: Path,
    *,
    form: Form = "onnx",
    checkpoint: str = "best",
    routing: bool = False,
    int8: bool = False,
    half: bool = False,
    overwrite: bool = False,
    notice: Notice = lambda text: None,
) -> Exported:
    """Write the model of a run into the folder `out`, whole and checked, or not at all.

    Args:
        form: ``onnx``, ``pt2`` or ``adapter``.
        routing: the graph also says which experts it used.
        int8: 8-bit weights of matrix products (ONNX); the metric on the run's validation split is measured before and after.
        half: 16-bit floats, half the size (adapter); answers then differ in the third or fourth digit.
        overwrite: replace an earlier export.

    Raises:
        ConfigError: `out` is taken, or the options do not go together. PackageError: what exporting needs is missing.
        EncoderError: an encoder cannot be traced or its tokenizer cannot be taken along.
        GateError: the graph's answers or inputs are not those of the model.
    """
    sweep(out.absolute().parent, out.name)  # what was killed while it was replaced is back in its place
    _refuse(out, form, {"--int8": int8, "--routing": routing, "--half": half}, overwrite)
    if form == "onnx":
        require("onnx", "onnxscript", "onnxruntime", extra="export", what="export")
    source = trained(run)
    loaded = load_model(source, checkpoint, torch.device("cpu"))
    facts = _facts(loaded, source.result())
    if form == "adapter":
        publish(out, lambda folder: _write_adapter(folder, loaded, facts, out.name, half), {"kind": adapter.KIND})
        return Exported(out, form, _size(out))
    maker = Maker(loaded, facts, form, routing=routing, int8=int8, name=out.name, notice=notice)
    publish(out, maker.write, maker.manifest)
    return Exported(out, form, _size(out), maker.parity, maker.manifest.get("int8"))


_GOES_WITH = {"--int8": ("onnx",), "--routing": ("onnx", "pt2"), "--half": ("adapter",)}


def _refuse(out: Path, form: str, asked: Mapping[str, bool], overwrite: bool) -> None:
    if form not in FORMS:
        raise ConfigError(67, f"there is no format {form!r}", where="--format", fix=f"use {', '.join(FORMS)}")
    for option, wanted in asked.items():
        if wanted and form not in _GOES_WITH[option]:
            what = f"{option} does not go with --format {form}"
            raise ConfigError(68, what, where=option, fix=f"leave it out, or use --format {_GOES_WITH[option][0]}")
    check_parent(out)
    taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    ours = out.is_dir() and kind_of(out) in (KIND, adapter.KIND)
    if taken and not (overwrite and ours):
        fix = "name another --out" + (", or add --overwrite" if ours else "")
        raise ConfigError(23, f"{out} is not empty", where="--out", fix=fix)


def _facts(loaded: Loaded, result: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader of the artefact should know, and what loading it needs."""
    manifest, labels = loaded.manifest, loaded.manifest["labels"]
    each = loaded.thresholds
    thresholds = [each] * len(labels) if isinstance(each, float) else list(each)
    known = {key: manifest[key] for key in ("mopefuse", "method", "encoders", "labels", "multi_label", "data")}
    known["plugins"] = manifest.get("plugins", [])
    told = {key: result[key] for key in ("metrics", "parameters", "rows") if key in result}
    return {**known, "progress": {"thresholds": thresholds}, "seed": loaded.config.seed, "metrics": {}, **told}


def _write_adapter(folder: Path, loaded: Loaded, facts: Mapping[str, Any], name: str, half: bool) -> None:
    state = loaded.model.own_state()
    if half:
        state = {name: tensor.half() if tensor.dtype == torch.float32 else tensor for name, tensor in state.items()}
        large = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
        if large:
            what = f"{large[0]} has values that 16 bits do not hold"
            raise ConfigError(131, what, where="--half", fix="leave it out")
    write_tensors(folder / "weights.safetensors", state)
    (folder / "config.yaml").write_text(to_yaml(public(loaded.config)), encoding="utf-8")
    (folder / adapter.FACTS).write_text(dump_json(facts), encoding="utf-8")
    card = model_card(facts, title=name, form="adapter", command="mopefuse export RUN --format adapter -o OUT")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
