"""Sections of a run's page that look at the router: what experts are used for, how evenly, and what each specialises in.

Shapes: S samples of the split, L routed layers, K experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mopefuse.core.formatting import percent
from mopefuse.modalities.base import of
from mopefuse.prompts import usage as routing
from mopefuse.report import figures, planes
from mopefuse.report.drawing import Drawing
from mopefuse.report.facts import RunFacts
from mopefuse.report.pages import Section, fragment
from mopefuse.report.row_values import text_of

_LAYERS, _EXPERTS, _CLASSES, _TIMES = 24, 32, 30, 16  # that a heat map shows
_SPECIALISTS, _EXEMPLARS = 8, 5
_TEXT = 140  # characters of an exemplar


def sections(facts: RunFacts) -> list[Section]:
    """All that is to be said of the routing; nothing for a method that does not route, or has one expert."""
    routing_SLK = facts.routing_SLK
    if routing_SLK is None or routing_SLK.shape[-1] == 1:
        return []
    told_L = routing.information(routing_SLK)
    layer = int(told_L.argmax())
    found = [_usage(facts, routing_SLK), _over_training(facts), _classes(facts, routing_SLK, layer)]
    return [section for section in (*found, _specialists(facts, routing_SLK[:, layer], layer)) if section is not None]


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
        (f"layer {number}", f"{even:.2f}", f"{cv:.2f}", _dead(dead), f"{told:.2f}")
        for number, (even, cv, dead, told) in enumerate(columns, 1)
    ]
    drawing = _by_expert("usage", "mean weight of each expert, by layer", share_LK[:_LAYERS], _names(share_LK))
    body = fragment("usage", rows, drawing.svg(), split=facts.split, samples=len(routing_SLK), unused=percent(routing.UNUSED))
    return Section("usage", "Routing: which experts are used", body, (drawing,))


def _dead(dead_K: Sequence[bool]) -> str:
    names = [str(expert + 1) for expert, dead in enumerate(dead_K) if dead]
    return ", ".join(names[:_EXPERTS]) + (f" and {len(names) - _EXPERTS} more" if len(names) > _EXPERTS else "") or "none"


def _names(values: Tensor) -> list[str]:
    return [f"layer {number}" for number in range(1, min(len(values), _LAYERS) + 1)]


def _by_expert(name: str, label: str, share_XK: Tensor, names: Sequence[str]) -> Drawing:
    """A heat map with an expert in each column; the most used where there are many."""
    order = _most_used(share_XK)
    values = share_XK[:, order].tolist()
    return figures.heat_map(
        name,
        label,
        values,
        names,
        [str(expert + 1) for expert in order],
        across="expert",
        titles=lambda i, j: f"{names[i]}, expert {order[j] + 1}: {percent(values[i][j])}",
        written=(lambda value: f"{100 * value:.0f}" if value >= 0.005 else "") if len(order) <= 12 else None,
    )


def _most_used(share_XK: Tensor) -> list[int]:
    chosen: list[int] = share_XK.nan_to_num().mean(dim=0).argsort(descending=True, stable=True)[:_EXPERTS].tolist()
    return sorted(chosen)


def _over_training(facts: RunFacts) -> Section | None:
    lines = [line for line in facts.log if line.get("routing")]
    if not lines:
        return None
    entropy = [(float(line["step"]), float(line["routing"]["entropy"])) for line in lines]
    dead = [(float(line["step"]), float(line["routing"]["unused_share"])) for line in lines]
    curves = [planes.Curve("entropy", entropy), planes.Curve("unused experts", dead)]
    title = "how even the load is, and the share of unused experts, by step"
    found = [planes.curves("entropy", title, curves, across="step", mark=float(facts.step), low=0.0, high=1.0)]
    told = ["Entropy of the load on validation, averaged over layers: 1 is even, 0 a single expert."]
    for drawing in _usage_by_step(lines):
        found.append(drawing)
        told.append(drawing.label)
    first, *small = [(drawing.svg(), text) for drawing, text in zip(found, told, strict=True)]
    body = fragment("figures", [first], small)
    return Section("routing-training", "Routing while it was trained", body, tuple(found))


def _usage_by_step(lines: Sequence[Any]) -> list[Drawing]:
    lines = [line for line in lines if line["routing"].get("usage")]
    every = max(1, -(-len(lines) // _TIMES))
    lines = lines[::-1][::every][::-1]  # the last one is among them
    if len(lines) < 2:
        return []
    steps, found = [str(line["step"]) for line in lines], []
    for layer in range(min(len(lines[0]["routing"]["usage"]), _LAYERS)):
        share_TK = Tensor([line["routing"]["usage"][layer] for line in lines])
        order = _most_used(share_TK)
        title = f"Layer {layer + 1}: share of each expert at each validation"
        names = [f"expert {expert + 1}" for expert in order]
        values = share_TK[:, order].T.tolist()
        found.append(figures.heat_map(f"usage-layer-{layer + 1}", title, values, names, steps, across="step"))
    return found


def _classes(facts: RunFacts, routing_SLK: Tensor, told_most: int) -> Section:
    """The layer whose routing tells most, and the first, the middle and the last, one at a time."""
    layers = sorted({told_most, 0, (routing_SLK.shape[1] - 1) // 2, routing_SLK.shape[1] - 1})
    drawings = [_classes_of(facts, routing_SLK[:, layer], layer, told_most) for layer in layers]
    told = (
        "Mean weight of each expert over the samples of each class. Rows that are alike mean that experts are not chosen by "
        "class; a column that is dark in one row only is the expert of a class."
    )
    if len(facts.labels) > _CLASSES:
        told += f" The {_CLASSES} most frequent of {len(facts.labels):,} classes."
    most = f" The routing of layer {told_most + 1} tells most about a sample." if len(layers) > 1 else ""
    panels = [
        (f"layer {layer + 1}", fragment("figure", drawing.svg(), f"Layer {layer + 1}. {told}{most}"))
        for layer, drawing in zip(layers, drawings, strict=True)
    ]
    body = fragment("tabs", "layer", panels, layers.index(told_most)) if len(panels) > 1 else panels[0][1]
    return Section("classes", "Classes and experts", body, tuple(drawings))


def _classes_of(facts: RunFacts, weights_SK: Tensor, layer: int, told_most: int) -> Drawing:
    mean_NK = routing.by_class(weights_SK, facts.targets, len(facts.labels))
    support_N = facts.targets.bincount(minlength=len(facts.labels)) if facts.targets.ndim == 1 else facts.targets.sum(dim=0)
    frequent = sorted(support_N.argsort(descending=True, stable=True)[:_CLASSES].tolist())
    title = f"mean weight of each expert of layer {layer + 1}, by class"
    name = "classes" if layer == told_most else f"classes-layer-{layer + 1}"
    return _by_expert(name, title, mean_NK[frequent], [facts.labels[number] for number in frequent])


def _specialists(facts: RunFacts, weights_SK: Tensor, layer: int) -> Section:
    share_K = weights_SK.mean(dim=0)
    split = facts.data.splits[facts.split]
    words_K = routing.words_of_experts(weights_SK, [text_of(row) for row in split.rows])
    dead_K = routing.unused(share_K.unsqueeze(0))[0]
    alike_S = min(split.alike.items(), key=lambda item: of(item[0]).is_file)[1]  # of texts where there are some
    used = [expert for expert in share_K.argsort(descending=True, stable=True).tolist() if not dead_K[expert]]
    experts = [
        {
            "name": f"expert {expert + 1}",
            "share": float(share_K[expert]),
            "words": words_K[expert],
            "exemplars": [
                {
                    "picture": facts.picture(facts.row(number)),
                    "text": figures.short(text_of(facts.row(number)), _TEXT),
                    "labels": facts.row(number).labels,
                    "weight": float(weights_SK[number, expert]),
                }
                for number in _exemplars(weights_SK[:, expert], alike_S.tolist())
            ],
        }
        for expert in used[:_SPECIALISTS]
    ]
    body = fragment("specialists", experts, layer=layer + 1, split=facts.split, left=len(used) - len(experts))
    return Section("experts", "What each expert specialises in", body)


def _exemplars(weight_S: Tensor, texts_S: Sequence[bytes]) -> list[int]:
    """The samples with the highest weight, each text once while there are others."""
    order = weight_S.argsort(descending=True, stable=True).tolist()
    first: dict[bytes, int] = {}
    for number in order:
        first.setdefault(texts_S[number], number)
    fresh = set(first.values())
    return [*first.values(), *(number for number in order if number not in fresh)][:_EXEMPLARS]
