"""Sections of a run's page about the router: how evenly the experts are used, and what each of them specialises in.

Shapes: S samples of the split, L routed layers, K experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from mopefuse.core.formatting import percent
from mopefuse.modalities.base import get_modality
from mopefuse.prompts import usage as routing
from mopefuse.report.bars import heat_map
from mopefuse.report.chart import Chart, shorten
from mopefuse.report.curves import Curve, curves
from mopefuse.report.pages import Section, fragment
from mopefuse.report.row_values import text_of
from mopefuse.report.run_data import RunFacts

_LAYERS, _EXPERTS, _CLASSES, _TIMES = 24, 32, 30, 16  # maximum numbers that a heat map shows
_WRITTEN = 12  # maximum number of columns for numbers in the cells of a heat map
_SPECIALISTS, _EXEMPLARS = 8, 5
_TEXT = 140  # characters of an exemplar


def sections(facts: RunFacts) -> list[Section]:
    """All sections on the routing, collapsed at first if it depends on a modality that the model does not use.

    Empty for a method that does not route or has one expert.
    """
    routing_SLK = facts.routing_SLK
    if routing_SLK is None or routing_SLK.shape[-1] == 1:
        return []
    layer = int(routing.information(routing_SLK).argmax())
    found = (
        _usage(facts, routing_SLK),
        _over_training(facts, layer),
        _classes(facts, routing_SLK, layer) if facts.task.is_classification else None,
        _specialists(facts, routing_SLK[:, layer], layer),
    )
    present = [section for section in found if section is not None]
    if facts.audit is None or not facts.complementary_unused:
        return present
    why = (
        f"The audit found no sign that the model uses the {facts.audit['modality']}, so the sections on its experts are "
        "collapsed at first."
    )
    return [replace(section, folded=why) for section in present]


def _usage(facts: RunFacts, routing_SLK: Tensor) -> Section:
    share_LK = routing.usage(routing_SLK.sum(dim=0))
    columns = zip(
        routing.entropy(share_LK).tolist(),
        routing.variation(share_LK).tolist(),
        routing.unused(share_LK).tolist(),
        routing.information(routing_SLK).tolist(),
        strict=True,
    )
    rows = [
        (f"layer {number}", f"{even:.2f}", f"{cv:.2f}", _dead(dead), f"{information:.2f}")
        for number, (even, cv, dead, information) in enumerate(columns, 1)
    ]
    chart = _by_expert("usage", "mean weight of each expert, by layer", share_LK[:_LAYERS], _names(share_LK), down="layer")
    body = fragment("usage", rows, chart, split=facts.split, samples=len(routing_SLK), unused=percent(routing.UNUSED))
    return Section("usage", "Routing: which experts are used", body, (chart,))


def _dead(dead_K: Sequence[bool]) -> str:
    names = [str(expert + 1) for expert, dead in enumerate(dead_K) if dead]
    return ", ".join(names[:_EXPERTS]) + (f" and {len(names) - _EXPERTS} more" if len(names) > _EXPERTS else "") or "none"


def _names(values: Tensor) -> list[str]:
    return [f"layer {number}" for number in range(1, min(len(values), _LAYERS) + 1)]


def _by_expert(name: str, label: str, share_XK: Tensor, names: Sequence[str], *, down: str) -> Chart:
    """A heat map with an expert in each column; the most used if there are many."""
    order = _most_used(share_XK)
    values = share_XK[:, order].tolist()
    few = len(order) <= _WRITTEN
    return heat_map(
        name,
        label,
        values,
        names,
        [str(expert + 1) for expert in order],
        across="expert",
        down=down,
        top=_largest(values),
        tips=lambda i, j: f"{names[i]}, expert {order[j] + 1}: {percent(values[i][j])}",
        written=(lambda i, j: f"{100 * values[i][j]:.0f}" if values[i][j] >= 0.005 else "") if few else None,
    )


def _largest(values: Sequence[Sequence[float]]) -> float:
    return max((value for row in values for value in row if value == value), default=0.0)


def _most_used(share_XK: Tensor) -> list[int]:
    chosen: list[int] = share_XK.nan_to_num().mean(dim=0).argsort(descending=True, stable=True)[:_EXPERTS].tolist()
    return sorted(chosen)


def _over_training(facts: RunFacts, most_informative: int) -> Section | None:
    lines = [line for line in facts.log if line.get("routing")]
    if not lines:
        return None
    entropy = [(float(line["step"]), float(line["routing"]["entropy"])) for line in lines]
    unused = [(float(line["step"]), float(line["routing"]["unused_share"])) for line in lines]
    label = "load balance and fraction of unused experts, by step"
    parts = [Curve("entropy of the load", entropy), Curve("share of unused experts", unused)]
    chart = curves("entropy", label, parts, across="step", up="share", mark=float(facts.step), low=0.0, high=1.0)
    caption = "Entropy of the load on validation, averaged over layers: 1 is even, 0 a single expert."
    by_step = _usage_by_step(lines, most_informative)
    body = fragment("figure", chart, caption)
    if by_step:
        names = [f"layer {layer + 1}" for layer, _ in by_step]
        captions = [f"{one.label}; numbers are percentages within the layer." for _, one in by_step]
        panels = [(name, fragment("figure", one, text)) for name, (_, one), text in zip(names, by_step, captions, strict=True)]
        chosen = next((place for place, (layer, _) in enumerate(by_step) if layer == most_informative), 0)
        body = fragment("columns", [body, fragment("tabs", "usage-layer", panels, chosen)])
    return Section("routing-training", "Routing during training", body, (chart, *(one for _, one in by_step)))


def _usage_by_step(lines: Sequence[Any], most_informative: int) -> list[tuple[int, Chart]]:
    """The share of each expert by step, for the layers that `_layers` selects."""
    lines = [line for line in lines if line["routing"].get("usage")]
    every = max(1, -(-len(lines) // _TIMES))
    lines = lines[::-1][::every][::-1]  # the last one is among them
    if len(lines) < 2:
        return []
    count = min(len(line["routing"]["usage"]) for line in lines)
    return [(layer, _usage_of_layer(lines, layer)) for layer in _layers(count, most_informative)]


def _usage_of_layer(lines: Sequence[Any], layer: int) -> Chart:
    steps = [str(line["step"]) for line in lines]
    share_TK = Tensor([line["routing"]["usage"][layer] for line in lines])
    order = _most_used(share_TK)
    values = share_TK[:, order].T.tolist()
    return heat_map(
        f"usage-layer-{layer + 1}",
        f"Layer {layer + 1}: share of each expert at each validation",
        values,
        [f"expert {expert + 1}" for expert in order],
        steps,
        across="step",
        down="",
        top=_largest(values),
        tips=lambda i, j: f"step {steps[j]}, expert {order[i] + 1}: {percent(values[i][j])}",
        written=(lambda i, j: f"{100 * values[i][j]:.0f}") if len(steps) <= _WRITTEN else None,
    )


def _layers(count: int, most_informative: int) -> list[int]:
    """The layer with the most informative routing, and the first, the middle and the last."""
    return sorted({min(most_informative, count - 1), 0, (count - 1) // 2, count - 1})


def _classes(facts: RunFacts, routing_SLK: Tensor, most_informative: int) -> Section:
    """A few layers, one at a time."""
    layers = _layers(routing_SLK.shape[1], most_informative)
    charts = [_classes_of(facts, routing_SLK[:, layer], layer, most_informative) for layer in layers]
    caption = (
        "Mean weight of each expert over the samples of each class, in percent. If rows are alike, routing ignores the "
        "class; an expert whose column is strong in a single row serves that class."
    )
    if len(facts.labels) > _CLASSES:
        caption += f" The {_CLASSES} most frequent of {len(facts.labels):,} classes."
    most = f" The routing of layer {most_informative + 1} depends most on the sample." if len(layers) > 1 else ""
    panels = [
        (f"layer {layer + 1}", fragment("figure", chart, f"Layer {layer + 1}. {caption}{most}"))
        for layer, chart in zip(layers, charts, strict=True)
    ]
    body = fragment("tabs", "layer", panels, layers.index(most_informative)) if len(panels) > 1 else panels[0][1]
    return Section("classes", "Classes and experts", body, tuple(charts))


def _classes_of(facts: RunFacts, weights_SK: Tensor, layer: int, most_informative: int) -> Chart:
    mean_NK = routing.by_class(weights_SK, facts.targets, len(facts.labels))
    support_N = facts.targets.bincount(minlength=len(facts.labels)) if facts.targets.ndim == 1 else facts.targets.sum(dim=0)
    frequent = sorted(support_N.argsort(descending=True, stable=True)[:_CLASSES].tolist())
    label = f"mean weight of each expert of layer {layer + 1}, by class"
    name = "classes" if layer == most_informative else f"classes-layer-{layer + 1}"
    return _by_expert(name, label, mean_NK[frequent], [facts.labels[number] for number in frequent], down="class")


def _specialists(facts: RunFacts, weights_SK: Tensor, layer: int) -> Section:
    share_K = weights_SK.mean(dim=0)
    split = facts.data.splits[facts.split]
    words_K = routing.words_of_experts(weights_SK, [text_of(row) for row in split.rows])
    dead_K = routing.unused(share_K.unsqueeze(0))[0]
    text_first = sorted(split.loose_keys, key=lambda name: get_modality(name).is_file)
    loose_key_S = split.loose_keys[text_first[0]]
    used = [expert for expert in share_K.argsort(descending=True, stable=True).tolist() if not dead_K[expert]]
    experts = [
        {
            "name": f"expert {expert + 1}",
            "share": float(share_K[expert]),
            "words": words_K[expert],
            "exemplars": [
                {
                    "picture": facts.picture(facts.row(number)),
                    "text": shorten(text_of(facts.row(number)), _TEXT),
                    "labels": facts.row(number).labels,
                    "weight": float(weights_SK[number, expert]),
                }
                for number in _exemplars(weights_SK[:, expert], loose_key_S.tolist())
            ],
        }
        for expert in used[:_SPECIALISTS]
    ]
    body = fragment("specialists", experts, layer=layer + 1, split=facts.split, left=len(used) - len(experts))
    return Section("experts", "What each expert specialises in", body)


def _exemplars(weight_S: Tensor, texts_S: Sequence[bytes]) -> list[int]:
    """The samples with the highest weight; a text is repeated only if there are no others."""
    order = weight_S.argsort(descending=True, stable=True).tolist()
    first: dict[bytes, int] = {}
    for number in order:
        first.setdefault(texts_S[number], number)
    fresh = set(first.values())
    return [*first.values(), *(number for number in order if number not in fresh)][:_EXEMPLARS]
