"""Metrics of a model if a fixed share of the samples of a split lacks a modality.

Which samples lack it depends on their ids, the modality and a seed, and is saved next to the metrics.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mopefuse.config.encoder_sides import Comp
from mopefuse.core import distributed
from mopefuse.core.artifact import dump_json, read_json
from mopefuse.core.atomic_files import write_atomically
from mopefuse.core.error_codes import ConfigCode
from mopefuse.data.modality_dropout import FixedMissing
from mopefuse.errors import ConfigError
from mopefuse.evaluation.missing_masks import Removal, plan_removal
from mopefuse.evaluation.missing_shares import Shares, describe_shares
from mopefuse.evaluation.scoring import score
from mopefuse.evaluation.split import model_outputs, prepare_samples
from mopefuse.runs.load import OpenRun, open_run
from mopefuse.runs.locate import get_kind, locate

Advance = Callable[[str, int, int], None]  # (what is missing, samples done, samples in all)


@dataclass(frozen=True)
class Cell:
    """Metrics of a split in which some samples lack a modality.

    Args:
        missing: share of samples that lack each kind. rows: number of these samples.
        already_missing: number of rows that lack each modality in the data.
    """

    missing: Shares
    rows: dict[str, int]
    already_missing: dict[str, int]
    samples: int
    metrics: dict[str, float]

    @property
    def words(self) -> str:
        """What is missing, in words."""
        return describe_shares(self.missing, self.already_missing)

    @property
    def lacking(self) -> str:
        """How many samples lack which modality, in words."""
        counts = self.rows or self.already_missing
        return ", ".join(f"{count:,}" if self.rows else f"{count:,} {kind}" for kind, count in counts.items()) or "0"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as saved in the run."""
        facts = {"missing": self.missing, "words": self.words, "rows": self.rows, "lacking": self.lacking}
        return {**facts, "metrics": self.metrics}


@dataclass(frozen=True)
class Missing:
    """Metrics of a checkpoint on a split in which some samples lack a modality.

    Args:
        metric: the metric of the task. step: step of the checkpoint; None for an adapter.
        learned: whether samples lacked these modalities in training. A model that never saw such a sample replaces the
            missing features by those of an average sample.
        orders: kind to ids of the samples that can lose it, in the order in which they do. A cell removes as many as its
            `rows` states; if it removes several kinds, later ones skip samples that would have nothing left.
    """

    split: str
    metric: str
    step: int | None
    seed: int
    learned: bool
    cells: tuple[Cell, ...]
    orders: dict[str, list[str]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as saved in the run."""
        facts = {"split": self.split, "step": self.step, "seed": self.seed, "learned": self.learned}
        cells = [cell.as_dict() for cell in self.cells]
        first = self.cells[0]
        return {**facts, "samples": first.samples, "natural": first.already_missing, "cells": cells, "orders": self.orders}


def evaluate_missing(
    run: str | Path,
    shares: Sequence[Shares] | None,
    *,
    split: str = "test",
    data: Path | None = None,
    layout: Mapping[str, Any] | None = None,
    checkpoint: str = "best",
    device: str = "auto",
    seed: int = 0,
    main: str | None = None,
    comp: Comp = None,
    predictions: Path | None = None,
    advance: Advance = lambda what, done, total: None,
) -> Missing:
    """Evaluate a run where shares of the samples lack modalities; for a run on its own data the result is saved in the run.

    Args:
        shares: see `mopefuse.evaluation.missing_shares.parse_shares`; None for a grid of shares of every modality that may be
            missing.
        seed: determines which samples lack a modality.
        layout: settings of the section `data` that differ for these data, see `mopefuse.runs.load.with_data_path`.
        predictions: file for the predictions of the last entry of `shares`.

    Raises:
        ConfigError: a modality that the model does not read or that it needs, or `run` is a bundle.
        CheckpointError, DataError: see `mopefuse.evaluation.evaluate.evaluate`.
    """
    folder = locate(run)
    if get_kind(folder) == "bundle":
        fix = "evaluate the run that it was exported from"
        raise ConfigError(
            ConfigCode.MISSING_NEEDS_A_RUN, "--missing needs a run or an adapter, not a bundle", where="--missing", fix=fix
        )
    opened = open_run(folder, split, data, layout=layout, checkpoint=checkpoint, device=device, main=main, comp=comp)
    if data is None:
        opened.notice_changes(split)
    removal, requested = plan_removal(opened.model, opened.data, split, shares, seed)
    cells = _evaluate_cells(opened, removal, requested, predictions, advance)
    trained_without = {opened.model.encoder(side).modality for side in opened.model.optional_sides}
    is_run = get_kind(folder) == "run"
    missing = Missing(
        split=split,
        metric=opened.data.task.metric,
        step=opened.step,
        seed=seed,
        learned=trained_without.issuperset(name for kind in removal.kinds.values() for name in kind),
        cells=tuple(cells),
        orders={kind: [removal.ids[index] for index in order] for kind, order in removal.orders.items()},
    )
    if is_run and data is None and distributed.is_main():
        _save(folder, missing)
    return missing


def _evaluate_cells(
    opened: OpenRun, removal: Removal, requested: Sequence[Shares], predictions: Path | None, advance: Advance
) -> list[Cell]:
    """A cell for each of the requested shares, without duplicates."""
    model, data, split, config, device = opened.model, opened.data, opened.split, opened.config, opened.device
    samples = prepare_samples(model, data, split, config, device)
    cells: list[Cell] = []
    for one in requested:
        masks, counts = removal.masks(one)
        if len(requested) == 1:
            removal.require_shares(one, counts)
        shares = removal.actual_shares(one, counts)
        if any(cell.missing == shares for cell in cells):
            continue
        report = lambda done, total, shares=shares: advance(describe_shares(shares), done, total)  # noqa: E731
        taken = FixedMissing(samples, {name: mask_S for name, mask_S in masks.items() if mask_S.any()})
        outputs = model_outputs(model, data, split, config, device, samples=taken, advance=report)
        found = score(outputs, data, split, opened.thresholds, predictions=predictions)
        cells.append(
            Cell(
                missing=shares,
                rows=counts,
                already_missing=removal.already_missing,
                samples=len(removal.ids),
                metrics=found.metrics,
            )
        )
    return cells


def saved_missing(run: Path, split: str, step: int | None) -> dict[str, Any]:
    """The saved result for a split at a step; with several seeds, that of the lowest; empty if there is none."""
    files = {int(path.stem.rpartition("-")[2]): path for path in run.glob(f"missing-{split}-step-{step}-seed-*.json")}
    return read_json(files[min(files)]) if files else {}


def _save(run: Path, missing: Missing) -> None:
    """Merge into the saved result of the same step and seed, if it is of the same samples."""
    path, new = run / f"missing-{missing.split}-step-{missing.step}-seed-{missing.seed}.json", missing.as_dict()
    old = read_json(path) if path.exists() else {}
    if all(old.get(key) == new[key] for key in ("samples", "natural", "learned")):
        cells = {str(cell["missing"]): cell for cell in [*old["cells"], *new["cells"]]}
        new |= {"cells": list(cells.values()), "orders": old["orders"] | new["orders"]}
    write_atomically(path, dump_json(new))
