"""Evaluate a run: every sample of a split once, regardless of the number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mopefuse.config.encoder_sides import Comp
from mopefuse.config.recipe import saved_config
from mopefuse.evaluation.bundle_split import bundle_outputs
from mopefuse.evaluation.outputs import Advance
from mopefuse.evaluation.scoring import Evaluation, score
from mopefuse.evaluation.split import model_outputs
from mopefuse.inference.bundle import Bundle
from mopefuse.runs.load import load_split, open_run, with_data_path
from mopefuse.runs.locate import get_kind, locate


def evaluate(
    run: str | Path,
    *,
    split: str = "test",
    data: Path | None = None,
    layout: Mapping[str, Any] | None = None,
    checkpoint: str = "best",
    device: str = "auto",
    main: str | None = None,
    comp: Comp = None,
    predictions: Path | None = None,
    advance: Advance = lambda done, total: None,
) -> Evaluation:
    """Evaluate a checkpoint of a run on a split of its own data set, or of another one with the same labels.

    Args:
        run: folder of a run, an adapter or a bundle; adapters and bundles need `data`.
        layout: settings of the section `data` that differ for these data, see `mopefuse.runs.load.with_data_path`.
        main, comp: other specs of the same encoders, see `mopefuse.config.encoder_sides.specs_by_side`.
        predictions: file to write predictions to, see `mopefuse.tasks.base.Task.prediction_lines`. The predictions of the run
            itself are kept if its data have changed since; others are then written next to them.
        advance: progress over files to check, then over samples.

    Raises:
        CheckpointError: no such run, or its encoders differ from those it was trained with.
        DataError: unknown labels, bad rows.
    """
    folder = locate(run)
    if get_kind(folder) == "bundle":
        return _evaluate_bundle(folder, split, data, layout, device, predictions, advance)
    opened = open_run(
        folder, split, data, layout=layout, checkpoint=checkpoint, device=device, main=main, comp=comp, advance=advance
    )
    changed = data is None and opened.notice_changes(split)
    if changed and predictions == opened.folder.predictions_file:
        predictions = predictions.with_name(f"predictions-{split}-changed.jsonl")
    outputs = model_outputs(opened.model, opened.data, split, opened.config, opened.device, advance=advance)
    return score(outputs, opened.data, split, opened.thresholds, predictions=predictions)


def _evaluate_bundle(
    folder: Path,
    split: str,
    data: Path | None,
    layout: Mapping[str, Any] | None,
    device: str,
    predictions: Path | None,
    advance: Advance,
) -> Evaluation:
    bundle = Bundle(folder, device)
    config = saved_config(folder / "config.yaml")
    where = with_data_path(config.data, data, layout)
    labels = {"labels": bundle.labels, "task": bundle.task.facts()}
    dataset, _ = load_split(where, split, labels, advance=advance)
    outputs = bundle_outputs(bundle, dataset, split, where, advance=advance)
    return score(outputs, dataset, split, bundle.thresholds, predictions=predictions, distributed_outputs=False)
