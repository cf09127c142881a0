"""Sections of a run's page on its predictions: confusion, scores of each label, calibration, examples, mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from mopefuse.core.formatting import percent
from mopefuse.metrics import classification as metrics
from mopefuse.report.bars import bars, heat_map, reliability
from mopefuse.report.chart import readable, shorten
from mopefuse.report.data_preview import draw
from mopefuse.report.pages import Section, fragment
from mopefuse.report.row_values import text_of
from mopefuse.report.run_data import RunFacts

_EXAMPLES, _WORST = 8, 8  # with their pictures
_MISTAKES = 400  # in the table
_CLASSES = 30  # maximum for a readable confusion matrix
_WRITTEN = 15  # maximum number of classes for counts in the cells of the matrix
_WIDE = 10  # maximum number of classes for half the width of the page
_PAIRS = 20  # pairs of labels that are listed if there are more classes
_BARS = 40
_SCORES = 500  # labels in the table of scores
_SHORT_TEXT = 140  # characters of a text in a table
_PROBABILITIES = 3
_CHOICES = 200  # labels that can be chosen from to filter


def sections(facts: RunFacts) -> list[Section | None]:
    """Everything on the predictions of a classifier."""
    return [confusion(facts), scores(facts), calibration(facts), examples(facts), mistakes(facts)]


def confusion(facts: RunFacts) -> Section | None:
    """A confusion matrix, or the pairs that are most confused; None if a sample may have several labels."""
    if facts.task.name != "single-label":
        return None
    predicted_S, count = facts.logits_SN.argmax(dim=-1), len(facts.labels)
    if count > _CLASSES:
        support_N = facts.targets.bincount(minlength=count).tolist()
        worst = metrics.most_confused(predicted_S, facts.targets, count, most=_PAIRS)
        rows = [(facts.labels[i], facts.labels[j], number, support_N[i]) for number, i, j in worst]
        return Section("confusion", "Which classes are confused", fragment("confused", rows, count), half=True)
    matrix = metrics.confusion(predicted_S, facts.targets, count)
    shares = (matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)).tolist()
    counts = matrix.tolist()

    def tip(i: int, j: int) -> str:
        return f"{facts.labels[i]} predicted as {facts.labels[j]}: {counts[i][j]:,} ({percent(shares[i][j])})"

    def number(i: int, j: int) -> str:
        return f"{counts[i][j]:,}"

    chart = heat_map(
        "confusion",
        "confusion matrix: a row for each actual class, a column for each predicted one",
        shares,
        facts.labels,
        facts.labels,
        across="predicted",
        down="actual",
        tips=tip,
        written=number if count <= _WRITTEN else None,
        in_table=number,
        signed=True,
    )
    caption = (
        "Numbers are samples: rows are actual classes, columns predicted ones, and correct predictions are on the diagonal. "
        "The stronger the colour, the larger the fraction of its row."
    )
    body = fragment("figure", chart, caption)
    return Section("confusion", "Which classes are confused", body, (chart,), half=count <= _WIDE)


def scores(facts: RunFacts) -> Section:
    """Precision, recall, F1 and support of each label."""
    multi = facts.task.uses_thresholds
    each = facts.task.count(facts.logits_SN, facts.targets, facts.thresholds).per_label(facts.labels)
    ordered = sorted(each, key=lambda row: (-row["support"], row["label"])) if multi or len(each) > _CLASSES else each
    left = len(ordered) - _SCORES
    table = fragment("scores", ordered[:_SCORES], "label" if multi else "class", left=max(0, left))
    if not multi:
        return Section("scores", "Precision and recall of each class", table, half=len(each) <= _WIDE, scripted=True)
    values = [(f"{row['label']} ({row['support']:,})", row["f1"]) for row in ordered[:_BARS]]
    chart = bars("labels", "F1 of each label", values, across="F1", shown=percent)
    caption = "F1 of each label, the most frequent first; the number of its samples is in brackets."
    if len(ordered) > _BARS:
        caption += f" The {len(ordered) - _BARS:,} rarer ones are in the table only."
    body = fragment("figure", chart, caption, numbers=False) + table
    return Section("scores", "Precision and recall of each label", body, (chart,), half=True, scripted=True)


def calibration(facts: RunFacts) -> Section:
    """A reliability diagram and the expected calibration error."""
    found = facts.calibration
    chart = reliability("calibration", "accuracy by confidence", found.bins)
    gap = sum(count * (right - confidence) for confidence, right, count in found.bins) / sum(row[2] for row in found.bins)
    kind = "Each label of each sample counts as a prediction. " if facts.task.uses_thresholds else ""
    tendency = "less confident than it could be" if gap > 0 else "more confident than it should be"
    caption = (
        f"Expected calibration error {percent(found.error)}; on average the model is {tendency} "
        f"({100 * abs(gap):.1f} points). {kind}Each dot is one confidence bin; larger dots hold more predictions. "
        "Red: overconfident; green: underconfident. The error is the mean gap between confidence and accuracy, in "
        f"{len(found.bins)} bins of equal width (Guo et al. 2017)."
    )
    return Section("calibration", "Calibration", fragment("figure", chart, caption), (chart,), half=True)


def examples(facts: RunFacts) -> Section:
    """Rows of every class in turn."""
    split = facts.data.splits[facts.split]
    numbers = draw([row.id for row in split.rows], split.labels, _EXAMPLES, 0)
    body = fragment("cards", _cards(facts, numbers))
    return Section("examples", "Examples", body)


def mistakes(facts: RunFacts) -> Section | None:
    """The wrong predictions with the highest loss: a few with their pictures, more in a table."""
    losses_S = facts.task.loss(facts.logits_SN, facts.targets)
    labels = facts.data.splits[facts.split].labels
    order = losses_S.argsort(descending=True, stable=True).tolist()
    wrong = [number for number in order if set(facts.predicted(number)) != set(labels[number])]
    if not wrong:
        return None
    cards = [
        {**card, "loss": float(losses_S[number])}
        for number, card in zip(wrong[:_WORST], _cards(facts, wrong[:_WORST]), strict=True)
    ]
    rows = [_row(facts, number, float(losses_S[number])) for number in wrong[:_MISTAKES]]
    chosen = {key: _choices(row[key] for row in rows) for key in ("predicted", "actual")}
    body = fragment("mistakes", cards, rows, chosen, total=len(wrong), samples=len(order), split=facts.split)
    return Section("mistakes", "Mistakes", body, scripted=True)


def _choices(each: Iterable[Sequence[str]]) -> list[str]:
    found = dict.fromkeys(label for labels in each for label in labels)
    return sorted(found)[:_CHOICES]


def _row(facts: RunFacts, number: int, loss: float) -> dict[str, Any]:
    row, predicted = facts.row(number), facts.predicted(number)
    found = {
        "id": row.id,
        "place": facts.data.splits[facts.split].where(row),
        "text": shorten(text_of(row), _SHORT_TEXT),
        "predicted": predicted,
        "actual": row.labels,
        "confidence": float(facts.p_SN[number].max()) if not facts.task.uses_thresholds else None,
        "loss": loss,
    }
    return found | {"keys": _keys(predicted, row.labels)}


def _keys(predicted: Sequence[str], actual: Sequence[str]) -> dict[str, str]:
    """Labels as the script of the page compares them: JSON in an attribute, spelt as on the page."""
    both = {"predicted": predicted, "actual": actual}
    return {key: json.dumps([readable(label) for label in labels]) for key, labels in both.items()}


def _cards(facts: RunFacts, numbers: Iterable[int]) -> list[dict[str, Any]]:
    cards = []
    for number in numbers:
        row, p_N = facts.row(number), facts.p_SN[number]
        best = p_N.argsort(descending=True, stable=True)[:_PROBABILITIES].tolist()
        predicted = facts.predicted(number)
        cards.append(
            {
                **facts.card(number),
                "actual": row.labels,
                "predicted": predicted,
                "probabilities": [(facts.labels[label], float(p_N[label])) for label in best],
                "keys": _keys(predicted, row.labels),
            }
        )
    return cards
