"""Export a trained model: as one ONNX or pt2 graph in a bundle, or as an adapter, which loads its encoders by name.

A bundle is checked before it exists (`mopefuse.export.bundle_maker`); `mopefuse.inference.bundle` runs it,
for ONNX without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from mopefuse.core.artifact import publish
from mopefuse.core.atomic_files import remove_leftovers
from mopefuse.core.dependencies import require
from mopefuse.core.error_codes import ConfigCode
from mopefuse.errors import ConfigError
from mopefuse.export.adapter_export import require_free, write_adapter
from mopefuse.export.bundle_maker import Maker, Notice, Parity, without_data_path
from mopefuse.runs import adapter_folder
from mopefuse.runs.load import Loaded, load_model
from mopefuse.runs.locate import find_run

Form = Literal["onnx", "pt2", "adapter"]
FORMS = ("onnx", "pt2", "adapter")


@dataclass(frozen=True)
class Exported:
    """An export that was written."""

    folder: Path
    form: Form
    size: int  # bytes
    parity: Parity | None = None
    int8: dict[str, dict[str, float]] | None = None  # metrics on the validation split, "before" and "after"

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
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
        routing: whether the graph also returns the routing weights of the experts.
        int8: whether weights of matrix products have 8 bits (ONNX); the metric on the run's validation split is measured before
            and after.
        half: whether weights have 16 bits (adapter); probabilities then differ in the third or fourth digit.
        overwrite: whether to replace an earlier export.
        notice: called with a description of each step.

    Raises:
        ConfigError: `out` is not empty, or the options cannot be combined. PackageError: a missing package.
        EncoderError: an encoder cannot be traced, or its tokenizer cannot be exported.
        GateError: the graph's logits or inputs differ from those of the model.
    """
    remove_leftovers(out.absolute().parent, out.name)  # restores an export that was killed during replacement
    _refuse(out, form, {"--int8": int8, "--routing": routing, "--half": half}, overwrite)
    if form == "onnx":
        require("onnx", "onnxscript", "onnxruntime", extra="export", what="export")
    source = find_run(run)
    loaded = load_model(source, checkpoint, torch.device("cpu"))
    facts = _facts(loaded, source.result())
    if form == "adapter":
        config, command = without_data_path(loaded.config), "mopefuse export RUN --format adapter -o OUT"
        publish(
            out,
            lambda folder: write_adapter(folder, loaded.model, config, facts, name=out.name, half=half, command=command),
            {"kind": adapter_folder.KIND},
        )
        return Exported(folder=out, form=form, size=_size(out))
    maker = Maker(loaded, facts, form, routing=routing, int8=int8, name=out.name, notice=notice)
    publish(out, maker.write, maker.manifest)
    return Exported(folder=out, form=form, size=_size(out), parity=maker.parity, int8=maker.manifest.get("int8"))


_GOES_WITH = {"--int8": ("onnx",), "--routing": ("onnx", "pt2"), "--half": ("adapter",)}


def _refuse(out: Path, form: str, options: Mapping[str, bool], overwrite: bool) -> None:
    if form not in FORMS:
        raise ConfigError(
            ConfigCode.UNKNOWN_EXPORT_FORMAT, f"unknown format {form!r}", where="--format", fix=f"use {', '.join(FORMS)}"
        )
    for option, wanted in options.items():
        if wanted and form not in _GOES_WITH[option]:
            what = f"{option} cannot be combined with --format {form}"
            raise ConfigError(
                ConfigCode.OPTION_OF_OTHER_FORMAT,
                what,
                where=option,
                fix=f"remove {option}, or use --format {_GOES_WITH[option][0]}",
            )
    require_free(out, overwrite)


def _facts(loaded: Loaded, result: Mapping[str, Any]) -> dict[str, Any]:
    """The facts that loading the export needs and that its model card shows."""
    manifest, labels = loaded.manifest, loaded.manifest["labels"]
    own = loaded.thresholds
    thresholds = [own] * len(labels) if isinstance(own, float) else list(own)
    known = {key: manifest[key] for key in ("mopefuse", "method", "encoders", "labels", "task", "data")}
    known["plugins"] = manifest.get("plugins", [])
    measured = {key: result[key] for key in ("metrics", "parameters", "rows") if key in result}
    return {**known, "progress": {"thresholds": thresholds}, "seed": loaded.config.seed, "metrics": {}, **measured}


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
