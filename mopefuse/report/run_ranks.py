"""Sections of the page of a retrieval run on its predictions: recall by the number of candidates, each way, examples.

Shapes: S samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mopefuse.metrics.names import write_metric
from mopefuse.metrics.retrieval import RankTally
from mopefuse.report.curves import Curve, curves
from mopefuse.report.pages import Section, fragment
from mopefuse.report.run_data import RunFacts

_FEW, _CANDIDATES = 8, 50


def sections(facts: RunFacts) -> list[Section]:
    """Everything on the predictions of a retrieval run."""
    tally = facts.task.count(facts.logits_SN, facts.targets)
    assert isinstance(tally, RankTally)
    rank_S2 = tally.ranks().numpy()
    order = np.argsort(rank_S2.sum(axis=1), kind="stable").tolist()
    some = [order[place] for place in np.linspace(0, len(order) - 1, min(len(order), _FEW)).astype(int)]
    return [
        _recall(facts, rank_S2),
        _scores(tally.per_label(facts.labels)),
        Section("examples", "Examples", fragment("cards", _cards(facts, some, rank_S2))),
        Section("mistakes", "Partners that are found last", fragment("cards", _cards(facts, order[: -_FEW - 1 : -1], rank_S2))),
    ]


def _names(facts: RunFacts) -> list[str]:
    """The ways of a search, by modality."""
    main, comp = (facts.manifest["encoders"][side]["modality"] for side in ("main", "comp"))
    return [f"{main} to {comp}", f"{comp} to {main}"]


def _recall(facts: RunFacts, rank_S2: Any) -> Section:
    """The share of partners among the first candidates, by their number."""
    counts = range(1, min(_CANDIDATES, len(rank_S2)) + 1)
    lines = [
        Curve(name, [(count, float((rank_S2[:, way] <= count).mean())) for count in counts])
        for way, name in enumerate(_names(facts))
    ]
    label = "share of partners that are found, by the number of candidates"
    chart = curves("recall", label, lines, across="candidates", up="recall", low=0.0, high=1.0, percent=True)
    caption = f"How often the partner is among the first candidates of {len(rank_S2):,}."
    return Section("recall", "Recall", fragment("figure", chart, caption), (chart,), half=True)


def _scores(found: Sequence[dict[str, Any]]) -> Section:
    """The metrics of each way."""
    names = [name for name in found[0] if name not in ("label", "support")]
    rows = [[row["label"].replace("_", " "), *(write_metric(name, row[name]) for name in names)] for row in found]
    columns = ["way", *(name.replace("_", " ") for name in names)]
    return Section("scores", "Both ways", fragment("table", columns, rows), half=True)


def _cards(facts: RunFacts, numbers: Sequence[int], rank_S2: Any) -> list[dict[str, Any]]:
    names = _names(facts)
    return [
        {
            **facts.card(number),
            "predicted": [f"rank {rank}, {name}" for rank, name in zip(rank_S2[number].tolist(), names, strict=True)],
            "actual": ["rank 1"],
            "probabilities": [],
        }
        for number in numbers
    ]
