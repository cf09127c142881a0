"""Sections of the page of a regression on its predictions: predicted against true values, errors, examples.

Shapes: S samples of the split, T targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from mopefuse.core.formatting import share
from mopefuse.metrics.names import value_metrics, write_metric
from mopefuse.report.chart import Chart, data_of, make_chart, plain
from mopefuse.report.pages import Section, fragment
from mopefuse.report.run_data import RunFacts
from mopefuse.tasks.regression import Regression

_POINTS = 2000  # in a chart
_IN_TABLE = 200  # samples below it
_CHARTS = 4  # targets with a chart
_EXAMPLES, _WORST = 8, 8


def sections(facts: RunFacts) -> list[Section]:
    """Everything on the predictions of a regression."""
    return [scatter(facts), scores(facts), examples(facts), mistakes(facts)]


def values(facts: RunFacts) -> tuple[Tensor, Tensor]:
    """Predicted and true values (S, T)."""
    assert isinstance(facts.task, Regression)
    return facts.task.values(facts.logits_SN), facts.task.in_units(facts.targets)


def scatter(facts: RunFacts) -> Section:
    """Predicted against true values and, if there are some, predicted intervals: a chart for each of the first targets."""
    samples = len(facts.targets)
    some = np.linspace(0, samples - 1, min(samples, _POINTS)).astype(int).tolist()
    charts = [_chart(facts, number, name, some) for number, name in enumerate(facts.labels[:_CHARTS])]
    caption = "Each dot is a sample; on the line, the prediction is right."
    if quantiles := _quantiles(facts):
        caption += f" Bars are the predicted intervals, from the {share(quantiles[0])} to the {share(quantiles[-1])} quantile."
    if len(some) < samples:
        caption += f" {len(some):,} of {samples:,} samples are shown."
    body = Markup("").join(fragment("figure", chart, caption) for chart in charts)
    return Section("values", "Predicted and true values", body, tuple(charts), half=True)


def _quantiles(facts: RunFacts) -> tuple[float, ...]:
    """The quantiles that a model predicts; empty if it predicts no interval."""
    assert isinstance(facts.task, Regression)
    return facts.task.quantiles if len(facts.task.quantiles) > 1 else ()


def _chart(facts: RunFacts, number: int, name: str, some: Sequence[int]) -> Chart:
    import altair as alt

    assert isinstance(facts.task, Regression)
    bounds = facts.task.interval(facts.logits_SN) if _quantiles(facts) else ()
    columns = ["actual", "predicted", *(("low", "high") if bounds else ())]
    predicted_ST, actual_ST = values(facts)
    numbers = torch.stack([actual_ST, predicted_ST, *bounds], dim=-1)[some, number].tolist()
    rows = facts.data.splits[facts.split].rows
    points = [(rows[i].id, dict(zip(columns, point, strict=True))) for i, point in zip(some, numbers, strict=True)]
    dots = [{**point, "tip": _tip(identity, point)} for identity, point in points]
    ends = [{"actual": value, "predicted": value} for value in (np.min(numbers), np.max(numbers))]
    scale = alt.Scale(domain=[end["actual"] for end in ends], nice=True, zero=False)
    x = alt.X("actual:Q", scale=scale, axis=alt.Axis(title=f"true {name}", grid=False, tickCount=5))
    y_axis = alt.Axis(title=f"predicted {name}", domain=False, ticks=False)
    y, low = (alt.Y(f"{column}:Q", scale=scale, axis=y_axis) for column in ("predicted", "low"))
    base = alt.Chart(data_of(dots)).encode(x=x)
    layers: list[Any] = [alt.Chart(data_of(ends)).mark_line(style="reference").encode(x=x, y=y)]
    if bounds:
        layers.append(base.mark_rule(style="spread", opacity=0.35).encode(y=low, y2="high:Q"))
    layers.append(base.mark_circle(opacity=0.6, size=30).encode(y=y, tooltip=alt.Tooltip("tip:N")))
    table = [[identity, *map(plain, point.values())] for identity, point in points[:_IN_TABLE]]
    label = f"predicted {name} against true {name}"
    heads = ["id", "true", "predicted", *(("from", "to") if bounds else ())]
    return make_chart(f"values-{number}", label, layers, heads, table, height=300)


def _tip(identity: str, point: Mapping[str, float]) -> str:
    interval = f", {plain(point['low'])} to {plain(point['high'])}" if "low" in point else ""
    return f"{identity}: {plain(point['actual'])}, predicted {plain(point['predicted'])}{interval}"


def scores(facts: RunFacts) -> Section:
    """The metrics of each target."""
    found = facts.task.count(facts.logits_SN, facts.targets).per_label(facts.labels)
    names = value_metrics(1)  # each target is in its own units
    rows = [
        [row["label"], *(write_metric(name, row[name]) for name in names), f"{plain(row['lowest'])} to {plain(row['highest'])}"]
        for row in found
    ]
    return Section("scores", "Errors", fragment("table", ["target", *names, "true values"], rows), half=True)


def examples(facts: RunFacts) -> Section:
    """Some samples, evenly spaced by their true value."""
    order = values(facts)[1][:, 0].argsort().tolist()
    places = np.linspace(0, len(order) - 1, min(len(order), _EXAMPLES)).astype(int)
    return Section("examples", "Examples", fragment("cards", _cards(facts, [order[place] for place in places])))


def mistakes(facts: RunFacts) -> Section:
    """The samples with the largest loss."""
    order = facts.task.loss(facts.logits_SN, facts.targets).argsort(descending=True, stable=True)[:_WORST].tolist()
    return Section("mistakes", "Largest errors", fragment("cards", _cards(facts, order)))


def _cards(facts: RunFacts, numbers: Sequence[int]) -> list[dict[str, Any]]:
    predicted_ST, actual_ST = values(facts)
    cards = []
    for number in numbers:
        cards.append(
            {
                **facts.card(number),
                "actual": _shown(facts, actual_ST[number]),
                "predicted": _shown(facts, predicted_ST[number]),
                "probabilities": [],
            }
        )
    return cards


def _shown(facts: RunFacts, values_T: Tensor) -> list[str]:
    """Values with the names of their targets, if there are several."""
    texts = [plain(value) for value in values_T.tolist()]
    return texts if len(texts) == 1 else [f"{name} {text}" for name, text in zip(facts.labels, texts, strict=True)]
