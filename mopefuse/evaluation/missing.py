"""What a model loses where samples lack a modality: its metrics with fixed shares of a split taken away.

Which samples lack it is a function of their ids, the modality and a seed, and is written beside the metrics.

Shapes: S samples of the split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mopefuse.config.sides import Comp
from mopefuse.core import device as devices
from mopefuse.core import distributed
from mopefuse.core.artifact import dump_json, read_json, write_atomically
from mopefuse.data.load import load_data
from mopefuse.data.missing import Taken, loss_order
from mopefuse.errors import ConfigError
from mopefuse.evaluation.answers import judge
from mopefuse.evaluation.missing_shares import GRID, Shares, words
from mopefuse.evaluation.split import answers_to, prepared
from mopefuse.fusion.base import Fusion
from mopefuse.runs.load import elsewhere, load_model, with_labels
from mopefuse.runs.locate import kind_of, locate, trained

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
"""Of samples that lack something, in the grid."""

Lacks = Mapping[str, NDArray[np.bool_]]  # modality to (S,): whether a row has none
Advance = Callable[[str, int, int], None]  # (what is missing, samples done, samples in all)


@dataclass(frozen=True)
class Cell:
    """The metrics of a split where some of its samples lack something.

    Args:
        missing: share of samples that lack what is named. rows: how many these are. natural: how many rows lack each
            modality before anything is taken away.
    """

    missing: Shares
    rows: dict[str, int]
    natural: dict[str, int]
    samples: int
    metrics: dict[str, float]

    @property
    def words(self) -> str:
        """What was taken away, so that nobody misreads it."""
        return words(self.missing, self.natural)

    @property
    def lacking(self) -> str:
        """How many samples lack what."""
        counts = self.rows or self.natural
        return ", ".join(f"{count:,}" if self.rows else f"{count:,} {what}" for what, count in counts.items()) or "0"

    def as_dict(self) -> dict[str, Any]:
        """What is kept of it."""
        facts = {"missing": self.missing, "words": self.words, "rows": self.rows, "lacking": self.lacking}
        return {**facts, "metrics": self.metrics}


@dataclass(frozen=True)
class Missing:
    """Metrics of a checkpoint on a split with samples that lack something.

    Args:
        step: of the checkpoint.
        learned: whether training meets samples that lack any of it; a model that never did answers as if it were an average
            sample's.
        orders: ids of samples in the order in which they lose something, those whose rows lack it first: so many as a cell
            says lack it. A sample that has nothing else is not among them; where a cell takes several things away, the
            later ones pass over samples that have nothing else left by then.
    """

    split: str
    step: int | None
    seed: int
    learned: bool
    cells: tuple[Cell, ...]
    orders: dict[str, list[str]]

    def as_dict(self) -> dict[str, Any]:
        """What is kept of it in the run."""
        facts = {"split": self.split, "step": self.step, "seed": self.seed, "learned": self.learned}
        cells = [cell.as_dict() for cell in self.cells]
        first = self.cells[0]
        return {**facts, "samples": first.samples, "natural": first.natural, "cells": cells, "orders": self.orders}


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
    predictions: Path | None = None,
    advance: Advance = lambda what, done, total: None,
) -> Missing:
    """Evaluate a run where samples lack what `asked` says; a run on its own data keeps what is found.

    Args:
        asked: see `parse`; None for every modality that may be missing, and all of them, with each of `SHARES`.
        seed: of which samples lack it. layout: of `data`, see `mopefuse.runs.load.elsewhere`.
        predictions: a file for those where samples lack the last of `asked`.

    Raises:
        ConfigError: a modality that the model does not read or cannot do without.
        CheckpointError, DataError: see `mopefuse.evaluation.evaluate.evaluate`.
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
    lacks = {name: dataset.splits[split].lacks(name) for name in read_by(loaded.model)}
    natural = {name: count for name, lacks_S in lacks.items() if (count := int(lacks_S.sum()))}
    every = dict.fromkeys(what for shares in asked for what in shares)
    orders = {what: _order(ids, kinds[what], lacks, seed) for what in every}
    cells: list[Cell] = []
    for asked_for in asked:
        masks, rows = _masks(asked_for, kinds, orders, lacks)
        if len(asked) == 1:
            _require_so_many(asked_for, rows, len(ids))
        shares = {what: asked_for[what] if n == round(asked_for[what] * len(ids)) else n / len(ids) for what, n in rows.items()}
        if any(cell.missing == shares for cell in cells):
            continue
        told = lambda done, total, shares=shares: advance(words(shares), done, total)  # noqa: E731
        taken = Taken(samples, {name: mask_S for name, mask_S in masks.items() if mask_S.any()})
        answers = answers_to(loaded.model, dataset, split, loaded.config, target, samples=taken, advance=told)
        found = judge(answers, dataset, split, loaded.thresholds, predictions=predictions)
        cells.append(Cell(shares, rows, natural, len(ids), found.metrics))
    met = {loaded.model.encoder(side).modality for side in loaded.model.does_without}
    learned = met.issuperset(name for kind in kinds.values() for name in kind)
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
    return [kind for size in range(1, len(may) + 1) for kind in combinations(may, size) if set(kind) < set(read_by(model))]


def read_by(model: Fusion) -> tuple[str, ...]:
    """The modalities that a model's encoders read."""
    return tuple(dict.fromkeys(model.encoder(side).modality for side in model.uses))


def _grid(kinds: Mapping[str, tuple[str, ...]]) -> list[Shares]:
    return [{}, *({what: share} for what in kinds for share in SHARES)]


def _refuse_unknown(what: str, kinds: Mapping[str, tuple[str, ...]], model: Fusion) -> None:
    if what in kinds:
        return
    if not kinds:
        fix = "use --method conditional, late-concat or linear, and encoders of several modalities"
        raise ConfigError(152, f"{model.config.method} needs all that it reads", where=f"--missing {what}", fix=fix)
    parts, read = set(what.split("+")), read_by(model)
    said, fix = f"{model.config.method} cannot do without {what}", f"take away {' or '.join(kinds)}"
    if unknown := sorted(parts - set(read)):
        said = f"no encoder of this model reads {unknown[0]}"
    elif parts == set(read):
        said = f"a sample without {' and '.join(sorted(parts))} has nothing left that this model reads"
    elif not model.config.either:
        fix = f"train with --either, or {fix}"
    raise ConfigError(152, said, where=f"--missing {what}", fix=fix)


def _order(ids: Sequence[str], kind: tuple[str, ...], lacks: Lacks, seed: int) -> list[int]:
    """The samples that can lack `kind`, in the order in which they lose it; first those whose rows do."""
    without_S = np.logical_and.reduce([lacks[name] for name in kind])
    nothing_else_S = np.logical_and.reduce([lacks_S for name, lacks_S in lacks.items() if name not in kind])
    order = sorted(loss_order(ids, kind, seed), key=lambda number: not without_S[number])
    return [number for number in order if not nothing_else_S[number]]


def _masks(
    shares: Shares, kinds: Mapping[str, tuple[str, ...]], orders: Mapping[str, Sequence[int]], lacks: Lacks
) -> tuple[dict[str, NDArray[np.bool_]], dict[str, int]]:
    """Modality to (S,), True where it is taken away or never was; and how many samples lack what was asked.

    No sample loses the last that it has: what is taken first decides who can lose what comes next.
    """
    masks = {name: lacks_S.copy() for name, lacks_S in lacks.items()}
    rows = {}
    for what, share in shares.items():
        mine, others = kinds[what], [name for name in masks if name not in kinds[what]]
        natural_S = np.logical_and.reduce([lacks[name] for name in mine])
        can = [number for number in orders[what] if not all(masks[name][number] for name in others)]
        count = max(int(natural_S[can].sum()), round(share * len(natural_S)))
        for name in mine:
            masks[name][can[:count]] = True
        rows[what] = min(count, len(can))
    return masks, rows


def _require_so_many(asked: Shares, rows: Mapping[str, int], samples: int) -> None:
    for what, share in asked.items():
        if rows[what] < round(share * samples):
            said = f"{rows[what]:,} of {samples:,} samples can lack {what}: the others would have nothing left"
            fix = f"write at most {what}={int(1000 * rows[what] / samples) / 1000:g}"
            raise ConfigError(155, said, where=f"--missing {what}={share:g}", fix=fix)


def kept(run: Path, split: str, step: int | None) -> dict[str, Any]:
    """What was found and kept of a split at a step, with the first seed of those that were; empty if nothing was."""
    files = {int(path.stem.rpartition("-")[2]): path for path in run.glob(f"missing-{split}-step-{step}-seed-*.json")}
    return read_json(files[min(files)]) if files else {}


def _keep(run: Path, missing: Missing) -> None:
    """Add to what is kept of the same step and seed, if that is of the same samples."""
    path, new = run / f"missing-{missing.split}-step-{missing.step}-seed-{missing.seed}.json", missing.as_dict()
    old = read_json(path) if path.exists() else {}
    if all(old.get(key) == new[key] for key in ("samples", "natural", "learned")):
        found = {str(cell["missing"]): cell for cell in [*old["cells"], *new["cells"]]}
        new |= {"cells": list(found.values()), "orders": old["orders"] | new["orders"]}
    write_atomically(path, dump_json(new))
