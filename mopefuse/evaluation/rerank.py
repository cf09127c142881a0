"""Evaluate the two stages of a search: a run for retrieval, and a matcher that re-ranks the best candidates.

The weight of the matcher is chosen on the validation split of the run and stored in its folder, where ``mopefuse predict``
finds it; see `mopefuse.inference.rerank`.

Shapes: S samples of a split, P pairs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mopefuse.config.encoder_sides import Comp
from mopefuse.core import device as devices
from mopefuse.core import distributed
from mopefuse.core.atomic_files import write_lines
from mopefuse.core.error_codes import ConfigCode
from mopefuse.data.base import DataSet
from mopefuse.data.collate import Samples
from mopefuse.data.paired_rows import pair_values
from mopefuse.data.prefix_cache import split_prefixes
from mopefuse.errors import ConfigError, ResourceError
from mopefuse.evaluation.split import prepare_samples, run_split
from mopefuse.fusion.retrieval import SIDES
from mopefuse.inference.rerank import OTHER, Stored, check_matcher, log_odds, store
from mopefuse.inference.run_model import digest_of
from mopefuse.metrics.reranking import BothWays
from mopefuse.metrics.retrieval import rank_metrics
from mopefuse.runs.load import Loaded, OpenRun, load_model, load_split, open_run
from mopefuse.runs.locate import find_run, get_kind, locate
from mopefuse.tasks.retrieval import ranking_lines

Advance = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Reranked:
    """The metrics of a split with and without re-ranking, what was chosen on validation, and the file of predictions."""

    split: str
    metrics: dict[str, float]
    without: dict[str, float]
    stored: Stored
    predictions: Path | None = None


def evaluate_reranked(
    run: Path,
    matcher: Path,
    *,
    candidates: int = 20,
    split: str = "test",
    data: Path | None = None,
    layout: Mapping[str, Any] | None = None,
    checkpoint: str = "best",
    device: str = "auto",
    main: str | None = None,
    comp: Comp = None,
    predictions: Path | None = None,
    advance: Advance = lambda what, done, total: None,
) -> Reranked:
    """Choose the weight of a matcher on the validation split of a run, store it, and measure it on a split.

    Args:
        run: a run for retrieval. matcher: a run or an adapter. candidates: K, how many candidates are re-ranked.
        data, layout, checkpoint, main, comp: those of the run, see `mopefuse.evaluation.evaluate.evaluate`.
        predictions: file for the best candidates of each value, re-ranked.
        advance: called with the name of what is done, and the progress.

    Raises:
        ConfigError: the first stage was not trained for retrieval, or the second is not a matcher.
    """
    first = open_run(
        _require_run(run), split, data, layout=layout, checkpoint=checkpoint, device=device, main=main, comp=comp,
        advance=partial(advance, "checking files"),
    )  # fmt: skip
    if not first.model.task.compares_samples:
        what = f"the model was trained for the task {first.model.task}, and only a search can be re-ranked"
        raise ConfigError(ConfigCode.CANNOT_RERANK, what, where="--rerank", fix="remove --rerank")
    second = load_model(find_run(matcher), "best", devices.resolve(device))
    read, needed = ([model.encoder(side).modality for side in model.reads] for model in (second.model, first.model))
    check_matcher(second.model.task, second.manifest["labels"], read, needed, str(matcher))
    if data is None:
        first.notice_changes("val", split)
    own = first.data
    if data is not None or "val" not in own.splits:
        own, _ = load_split(first.config.data, "val", first.manifest)
    stages = _Stages(first, second, candidates, advance)
    both, odds_P = stages.score(own, "val")
    weight = both.choose_weight(odds_P)
    found = stages.metrics(both, weight, odds_P)
    of_run = {"val": found}
    if split != "val" or data is not None:
        both, odds_P = stages.score(first.data, split)
        found = stages.metrics(both, weight, odds_P)
        of_run |= {split: found} if data is None else {}
    stored = Stored(weight, candidates, of_run)
    if distributed.is_main():
        of_first, of_second = (digest_of(one.model, one.config.method, one.config.train.precision) for one in (first, second))
        store(first.folder.path, of_first, of_second, str(matcher), stored)
        if predictions is not None:
            ids, rank_S2 = [row.id for row in first.data.splits[split].rows], both.ranks(weight, odds_P)
            write_lines(predictions, ranking_lines(ids, both.orders(weight, odds_P), rank_S2))
    return Reranked(split, found["with"], found["without"], stored, predictions)


def _require_run(path: Path) -> Path:
    """The folder of a run; an adapter or a bundle has no validation split.

    Raises:
        ConfigError: it is one of these.
    """
    folder = locate(path)
    if (kind := get_kind(folder)) not in ("", "run"):
        what = f"the weight is chosen on the validation split of a run, and an exported {kind} has none"
        raise ConfigError(ConfigCode.CANNOT_RERANK, what, where="--rerank", fix="pass the run that it was exported from")
    return folder


@dataclass(frozen=True)
class _Stages:
    """Both models, and the number of candidates."""

    first: OpenRun
    second: Loaded
    candidates: int
    advance: Advance

    def score(self, data: DataSet, split: str) -> tuple[BothWays, Tensor]:
        """The candidates of each value of a split, and the log-odds (P,) of the pairs that they form."""
        first, values = self.first, data.splits[split]
        advance = partial(self.advance, f"embedding {split}")
        outputs_SN = run_split(first.model, data, split, first.config, first.device, advance=advance).logits_SN
        main_SE, comp_SE = outputs_SN.float().chunk(2, dim=-1)
        both = BothWays.find(main_SE, comp_SE, data.targets(split), self.candidates)
        numbers = zip(SIDES, both.pair_P2.T.numpy(), strict=True)
        number_P = {first.model.encoder(side).modality: number_P for side, number_P in numbers}
        pairs = pair_values(values, number_P, OTHER)
        model, labels = self.second.model, tuple(self.second.manifest["labels"])
        of_pairs = replace(data, splits={split: pairs}, labels=labels, task=model.task)
        advance, samples = partial(self.advance, f"matching {split}"), self._samples(of_pairs, split)
        found = run_split(model, of_pairs, split, self.second.config, first.device, samples=samples, advance=advance)
        return both, log_odds(found.logits_SN, labels)

    def _samples(self, pairs: DataSet, split: str) -> Samples:
        """The pairs for the matcher, with the outputs of early layers if it was trained from these: one for each value."""
        model, config, device = self.second.model, self.second.config, self.first.device
        layers = model.prefix_layers if config.data.cache_prefix == "on" else {}
        try:
            prefixes = {
                side: split_prefixes(model.encoder(side), layer, pairs, split, config, device) for side, layer in layers.items()
            }
        except ResourceError:  # the cache cannot be written, so all layers run
            prefixes = {}
        return prepare_samples(model, pairs, split, config, device, prefixes=prefixes)

    def metrics(self, both: BothWays, weight: float, odds_P: Tensor) -> dict[str, dict[str, float]]:
        """The metrics without and with re-ranking."""
        return {name: rank_metrics(both.ranks(w, odds_P)) for name, w in (("without", 0.0), ("with", weight))}
