"""Evaluate a run: every sample of a split once, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mopefuse.config.recipe import read_saved
from mopefuse.config.schema import build_config
from mopefuse.config.sides import Comp
from mopefuse.core import device as devices
from mopefuse.data.load import load_data
from mopefuse.evaluation.answers import Advance, Evaluation, judge
from mopefuse.evaluation.split import answers_to, ask_split
from mopefuse.inference.bundle import Bundle
from mopefuse.runs.load import elsewhere, load_model, with_labels
from mopefuse.runs.locate import kind_of, locate, trained


def evaluate(
    run: Path,
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
    """Evaluate a checkpoint of a run on a split of its data set, or of another with the same labels.

    Args:
        run: folder of a run, an adapter or a bundle; the latter two know of no data set.
        layout: of `data`, see `elsewhere`.
        main, comp: specs, where the same weights go by another name here; see `mopefuse.config.sides.addressed`.
        predictions: a file that they are written to as they come, see `mopefuse.evaluation.predictions`.

    Raises:
        CheckpointError: no such run, or encoders other than it was trained with. DataError: unknown labels, bad rows.
    """
    run = locate(run)
    if kind_of(run) == "bundle":
        bundle = Bundle(run, device)
        config = build_config(read_saved(run / "config.yaml"), source=str(run))
        known = {"labels": bundle.labels, "multi_label": bundle.multi_label}
        where = elsewhere(config.data, data, layout)
        dataset = with_labels(load_data(where, require=(split,), advance=advance), known, split)
        asked = ask_split(bundle, dataset, split, where, advance=advance)
        return judge(asked, dataset, split, bundle.thresholds, predictions=predictions, together=False)
    target = devices.resolve(device)
    loaded = load_model(trained(run), checkpoint, target, main=main, comp=comp)
    where = elsewhere(loaded.config.data, data, layout)
    dataset = with_labels(load_data(where, require=(split,), advance=advance), loaded.manifest, split)
    answers = answers_to(loaded.model, dataset, split, loaded.config, target, advance=advance)
    return judge(answers, dataset, split, loaded.thresholds, predictions=predictions)
