"""What a model loses where samples lack a modality: its metrics with fixed shares of a split taken away.

Which samples lack it is a function of their ids, the modality and a seed, and is written beside the metrics.

Shapes: S samples of the split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopefuse import device as devices
from mopefuse import distributed
from mopefuse.checkpoint import dump_json, read_json, write_atomically
from mopefuse.data.load import load_data
from mopefuse.data.missing import Taken, loss_order
from mopefuse.errors import ConfigError, did_you_mean
from mopefuse.evaluate import Evaluation, elsewhere, judge, load_model, prepared, run_split, with_labels
from mopefuse.fusion._base import Fusion
from mopefuse.shares import GRID, Shares, words
from mopefuse.sides import Comp
from mopefuse.source import kind_of, locate, trained

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Of samples that lack something, in the grid."""

Advance = Callable[[str, int, int], None]  # (what is missing, samples done, samples in all)


@dataclass(frozen=True)
class Cell:
    """The metrics of a split where some of its samples lack something."""

    missing: Shares
    rows: dict[str, int]  # samples that lack it
    samples: int
    metrics: dict[str, float]
    evaluation: Evaluation = field(repr=False, compare=False)

    @property
    def words(self) -> str:
        """What was taken away, so that nobody misreads it."""
        return words(self.missing)

    def as_dict(self) -> dict[str, Any]:
        """What is kept of it."""
        return {"missing": self.missing, "words": self.words, "rows": self.rows, "metrics": self.metrics}


@dataclass(frozen=True)
class Missing:
    """Metrics of a checkpoint on a split with samples that lack something.

    Args:
        step: of the checkpoint.
        learned: whether training meets samples that lack any of it; a model that never did answers as if it were an average
            sample's.
        orders: ids of all samples in the order in which they lose something, those whose rows lack it first: so many as a cell
            says lack it.
    """

    split: str
    step: int | None
    seed: int
    learned: bool
    cells: tuple[Cell, ...]
    orders: dict[str, list[str]]

    def as_dict(self) -> dict[str, Any]:
        """What missing-<split>.json holds."""
        facts = {"split": self.split, "step": self.step, "seed": self.seed, "learned": self.learned}
        cells = [cell.as_dict() for cell in self.cells]
        return {**facts, "samples": self.cells[0].samples, "cells": cells, "orders": self.orders}


def evaluate_missing(
    run: Path,
    asked: Sequence[Shares] | None,
    *,
    split: str = "test",
    data: Path | None = None,
    layout: Mapping[str, Any] | None = None,
    checkpoint: str = "best",
    device: str = "auto",
    seed: int = 0,
    main: str | None = None,
    comp: Comp = None,
    advance: Advance = lambda what, done, total: None,
) -> Missing:
    """Evaluate a run where samples lack what `asked` says; a run on its own data keeps what is found.

    Args:
        asked: see `parse`; None for every modality that may be missing, and all of them, with each of `SHARES`.
        seed: of which samples lack it. layout: of `data`, see `mopefuse.evaluate.elsewhere`.

    Raises:
        ConfigError: a modality that the model does not read or cannot do without.
        CheckpointError, DataError: see `mopefuse.evaluate.evaluate`.
    """
    run = locate(run)
    if kind_of(run) == "bundle":
        what = "what is missing is taken from runs and adapters, not from bundles"
        raise ConfigError(151, what, where="--missing", fix="evaluate the run that it was made of")
    target = devices.resolve(device)
    loaded = load_model(trained(run), checkpoint, target, main=main, comp=comp)
    where = elsewhere(loaded.config.data, data, layout)
    dataset = with_labels(load_data(where, require=(split,)), loaded.manifest, split)
    kinds = {"+".join(kind): kind for kind in _kinds(loaded.model)}
    asked = _grid(kinds) if asked is None else asked
    for what in sorted({what for shares in asked for what in shares}) or ([] if kinds else [GRID]):
        _refuse_unknown(what, kinds, loaded.model)
    samples = prepared(loaded.model, dataset, split, loaded.config, target)
    ids = [row.id for row in dataset.splits[split].rows]
    lacks = {name: dataset.splits[split].lacks(name) for kind in kinds.values() for name in kind}
    orders, natural = {}, {}
    for what in dict.fromkeys(what for shares in asked for what in shares):
        without_S = np.logical_and.reduce([lacks[name] for name in kinds[what]])
        order = loss_order(ids, kinds[what], seed)
        orders[what] = sorted(order, key=lambda number: not without_S[number])
        natural[what] = int(without_S.sum())
    cells: list[Cell] = []
    for asked_for in asked:
        rows = {what: max(natural[what], round(share * len(ids))) for what, share in asked_for.items()}
        shares = {what: count / len(ids) if count == natural[what] else asked_for[what] for what, count in rows.items()}
        if any(cell.missing == shares for cell in cells):
            continue
        taken = Taken(samples, _masks(rows, kinds, orders, len(ids)))
        told = lambda done, total, shares=shares: advance(words(shares), done, total)  # noqa: E731
        said = run_split(loaded.model, dataset, split, loaded.config, target, samples=taken, advance=told)
        found = judge(said.logits_SN, dataset, split, loaded.thresholds)
        cells.append(Cell(shares, rows, len(ids), found.metrics, found))
    met = {loaded.model.encoder(side).modality for side in loaded.model.does_without}
    learned = met.issuperset(lacks)
    named = {what: [ids[number] for number in order] for what, order in orders.items()}
    own = kind_of(run) == "run"
    step = int(trained(run).checkpoint(checkpoint)[1]["step"]) if own else None
    missing = Missing(split, step, seed, learned, tuple(cells), named)
    if own and data is None and distributed.is_main():
        _keep(run, missing)
    return missing


def _kinds(model: Fusion) -> list[tuple[str, ...]]:
    """Each modality that samples may lack, and all that they may lack at once; never everything that the model reads."""
    may = sorted({model.encoder(side).modality for side in model.may_lack})
    read = {model.encoder(side).modality for side in model.uses}
    return [kind for size in range(1, len(may) + 1) for kind in combinations(may, size) if set(kind) < read]


def _grid(kinds: Mapping[str, tuple[str, ...]]) -> list[Shares]:
    return [{}, *({what: share} for what in kinds for share in SHARES)]


def _refuse_unknown(what: str, kinds: Mapping[str, tuple[str, ...]], model: Fusion) -> None:
    if what in kinds:
        return
    if not kinds:
        fix = "use --method conditional, late-concat or linear, and encoders of several modalities"
        raise ConfigError(152, f"{model.config.method} needs all that it reads", where=f"--missing {what}", fix=fix)
    fix = did_you_mean(what, kinds) or f"take away {' or '.join(kinds)}"
    if "main" in model.uses and model.encoder("main").modality in what.split("+"):
        fix = "train with --either, or take something else away"
    raise ConfigError(152, f"{model.config.method} cannot do without {what}", where=f"--missing {what}", fix=fix)


def _masks(
    rows: Mapping[str, int], kinds: Mapping[str, tuple[str, ...]], orders: Mapping[str, Sequence[int]], count: int
) -> dict[str, NDArray[np.bool_]]:
    """Modality to (S,): True where it is taken away."""
    masks: dict[str, NDArray[np.bool_]] = {}
    for what, number in rows.items():
        for modality in kinds[what]:
            mask_S = masks.setdefault(modality, np.zeros(count, dtype=np.bool_))
            mask_S[list(orders[what][:number])] = True
    return masks


def _file(run: Path, split: str) -> Path:
    return run / f"missing-{split}.json"


def kept(run: Path, split: str, step: int | None) -> dict[str, Any]:
    """What was found and kept of a split at a step; empty if nothing was."""
    found = read_json(_file(run, split)) if _file(run, split).exists() else {}
    return found if found.get("step") == step else {}


def _keep(run: Path, missing: Missing) -> None:
    """Add to what is kept, if that is of the same step and seed; replace it if not."""
    old, new = kept(run, missing.split, missing.step), missing.as_dict()
    if all(old.get(key) == new[key] for key in ("seed", "samples", "learned")):
        found = {str(cell["missing"]): cell for cell in [*old["cells"], *new["cells"]]}
        new |= {"cells": list(found.values()), "orders": old["orders"] | new["orders"]}
    write_atomically(_file(run, missing.split), dump_json(new))
