"""Sections of a run's page that look at its answers: what the task is, examples, errors, calibration, the audit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mopefuse.config.sides import is_comp
from mopefuse.core.formatting import percent
from mopefuse.metrics import classification as metrics
from mopefuse.metrics.gates import selected_metric
from mopefuse.report import figures
from mopefuse.report.data_preview import draw
from mopefuse.report.facts import RunFacts
from mopefuse.report.pages import Section, fragment
from mopefuse.report.row_values import text_of
from mopefuse.report.settings import changed

_EXAMPLES, _MISTAKES = 8, 8
_CLASSES = 30  # of a confusion matrix that can be read
_PAIRS = 20  # of labels, where there are more classes
_BARS = 40
_TEXT = 300  # characters of a text
_PROBABILITIES = 3
_ELSEWHERE = frozenset({"main", "comp", "method", "data.path"})  # settings that are told of by themselves
_CONDITIONS = {
    "as is": "as is",
    "shuffled": "another sample's {}",
    "blank": "no {}",
    "static": "without static prompts",
    "dynamic": "without dynamic prompts",
    "mapped": "without mapped prompts",
}


def main_metric(facts: RunFacts) -> str:
    """The name of the metric that selects checkpoints."""
    return selected_metric(multi_label=facts.multi_label)


def tiles(facts: RunFacts) -> list[tuple[str, str]]:
    """The numbers on top of the page."""
    found = [
        (f"{facts.split} {name.replace('_', ' ')}", percent(facts.metrics[name]))
        for name in ("accuracy", "f1_macro", "f1_micro")
        if name in facts.metrics
    ]
    found.append((f"{facts.split} calibration error", percent(facts.calibration.error)))
    parameters = facts.result.get("parameters")
    if parameters:
        share = parameters["trainable"] / max(1, parameters["total"])
        found.append((f"trained parameters, {percent(share)} of all", f"{parameters['trainable']:,}"))
    return found


def task(facts: RunFacts) -> Section:
    """Data, labels, encoders, counts, and settings that differ from their defaults."""
    counts = facts.result.get("rows") or {name: len(split.rows) for name, split in facts.data.splits.items()}
    kind = "any number of" if facts.multi_label else "one of"
    rows = [
        ("data", str(facts.data.root)),
        ("rows", ", ".join(f"{name} {count:,}" for name, count in counts.items())),
        ("labels", f"{kind} {len(facts.labels):,}: {figures.short(', '.join(facts.labels), 120)}"),
        ("method", facts.config.method),
    ]
    for side, encoder in facts.manifest["encoders"].items():
        told = f"{encoder.get('spec', '')} ({encoder.get('modality', '')}, {encoder.get('layers', '?')} layers)"
        rows.append(("complementary encoder" if is_comp(side) else f"{side} encoder", told))
    body = fragment("rows", rows) + fragment("settings", changed(facts.config, hidden=_ELSEWHERE))
    return Section("task", "The task", body, half=True)


def audit(facts: RunFacts) -> Section | None:
    """Whether the model uses its other modality."""
    if facts.audit is None:
        return None
    found, name = facts.audit, main_metric(facts)
    rows = [
        {
            "name": _CONDITIONS.get(row["name"], f"without {row['name']}").format(row["modality"]),
            "value": row["metrics"][name],
            "lost": row["lost"],
            "interval": (row["low"], row["high"]),
            "changed": row["changed"],
            "first": row["name"] == "as is",
        }
        for row in found["conditions"]
    ]
    whole = found["samples"] == found["total"]
    told = f"all {found['samples']:,}" if whole else f"{found['samples']:,} of {found['total']:,}"
    drawing = figures.bars(
        "audit",
        f"{name} when something is taken away",
        [(row["name"], row["value"]) for row in rows],
        shown=percent,
        against=rows[0]["value"],
    )
    score = "macro-F1" if facts.multi_label else "accuracy"
    body = fragment("audit", found, rows, drawing.svg(), told=told, split=facts.split, metric=name, score=score)
    return Section("audit", f"Does the model use the {found['modality']}?", body, (drawing,))


# -- right and wrong


def errors(facts: RunFacts) -> Section:
    """A confusion matrix, the pairs that are most confused, or the F1 of each label."""
    if facts.multi_label:
        return _label_bars(facts)
    predicted_S, count = facts.logits_SN.argmax(dim=-1), len(facts.labels)
    if count > _CLASSES:
        support_N = facts.targets.bincount(minlength=count).tolist()
        worst = metrics.confused(predicted_S, facts.targets, count, most=_PAIRS)
        rows = [(facts.labels[i], facts.labels[j], number, support_N[i]) for number, i, j in worst]
        body = fragment("confused", rows, len(facts.labels))
        return Section("confusion", "What is taken for what", body, half=True)
    matrix = metrics.confusion(predicted_S, facts.targets, count)
    sums = matrix.sum(dim=1, keepdim=True).clamp(min=1)
    share, counts = (matrix / sums).tolist(), matrix.tolist()
    drawing = figures.heat_map(
        "confusion",
        "confusion matrix: rows are classes, columns are answers",
        share,
        facts.labels,
        facts.labels,
        top=1.0,
        across="answer",
        titles=lambda i, j: f"{facts.labels[i]} answered as {facts.labels[j]}: {counts[i][j]:,} ({percent(share[i][j])})",
        written=(lambda value: f"{100 * value:.0f}" if value >= 0.005 else "") if count <= 15 else None,
        colour=lambda i, j: "a" if i == j else "bad",
    )
    told = "Rows are true classes, in percent of each; what is right is on the diagonal."
    return Section("confusion", "What is taken for what", fragment("figure", drawing.svg(), told), (drawing,), half=True)


def _label_bars(facts: RunFacts) -> Section:
    each = metrics.per_label(facts.logits_SN, facts.targets, facts.labels, multi_label=True, thresholds=facts.thresholds)
    ordered = sorted(each, key=lambda row: (-row["support"], row["label"]))
    rows = [(f"{row['label']} ({row['support']:,})", row["f1"]) for row in ordered[:_BARS]]
    drawing = figures.bars("labels", "F1 of each label", rows, shown=percent)
    told = "F1 of each label, the most frequent first; how many samples have it is in brackets."
    if len(ordered) > _BARS:
        told += f" {len(ordered) - _BARS:,} rarer ones are left out."
    return Section("labels", "Labels", fragment("figure", drawing.svg(), told), (drawing,), half=True)


def calibration(facts: RunFacts) -> Section:
    """A reliability diagram and the expected calibration error."""
    found = facts.calibration
    drawing = figures.reliability("calibration", "how often answers of a confidence are right", found.bins)
    gap = sum(count * (right - confidence) for confidence, right, count in found.bins) / sum(row[2] for row in found.bins)
    kind = "Each label of each sample is an answer. " if facts.multi_label else ""
    tendency = "less sure than it may be" if gap > 0 else "surer than it should be"
    told = (
        f"Expected calibration error {percent(found.error)}; on the whole the model is {tendency} "
        f"({100 * abs(gap):.1f} points). {kind}Red is confidence above the share of answers that are right, green is the share "
        f"above confidence; the error is the mean of that distance over all answers, in {len(found.bins)} bins of equal width "
        "(Guo et al. 2017)."
    )
    return Section("calibration", "Calibration", fragment("figure", drawing.svg(), told), (drawing,), half=True)


def examples(facts: RunFacts) -> Section:
    """Rows of every class in turn."""
    split = facts.data.splits[facts.split]
    numbers = draw([row.id for row in split.rows], split.labels, _EXAMPLES, 0)
    body = fragment("cards", _cards(facts, numbers))
    return Section("examples", "Examples", body)


def mistakes(facts: RunFacts) -> Section | None:
    """The wrong answers with the highest loss."""
    losses_S = metrics.sample_losses(facts.logits_SN, facts.targets)
    worst: list[int] = []
    for number in losses_S.argsort(descending=True, stable=True).tolist():
        if set(facts.given(number)) != set(facts.data.splits[facts.split].labels[number]):
            worst.append(number)
        if len(worst) == _MISTAKES:
            break
    if not worst:
        return None
    cards = [{**card, "loss": float(losses_S[number])} for number, card in zip(worst, _cards(facts, worst), strict=True)]
    return Section("mistakes", "The worst mistakes", fragment("cards", cards))


def _cards(facts: RunFacts, numbers: Iterable[int]) -> list[dict[str, Any]]:
    cards = []
    for number in numbers:
        row, p_N = facts.row(number), facts.p_SN[number]
        best = p_N.argsort(descending=True, stable=True)[:_PROBABILITIES].tolist()
        cards.append(
            {
                "id": row.id,
                "picture": facts.picture(row),
                "text": figures.short(text_of(row), _TEXT),
                "true": row.labels,
                "given": facts.given(number),
                "probabilities": [(facts.labels[label], float(p_N[label])) for label in best],
            }
        )
    return cards
