"""The section of a run's page that compares its score with those of simpler methods."""

from __future__ import annotations

from typing import Any

from mopefuse.metrics.names import write_change, write_metric
from mopefuse.report.baselines import command_for, constant_score
from mopefuse.report.pages import Section, fragment
from mopefuse.report.run_data import RunFacts


def baselines(facts: RunFacts) -> Section:
    """Compare this run with the majority class and with all simpler methods that were run on the same data."""
    metric, mine = facts.main_metric, facts.metrics[facts.main_metric]
    rows: list[tuple[str, str, float, int]] = []
    constant = constant_score(facts.data, facts.split, metric)
    if constant is not None:
        rows.append((constant[0], "", constant[1], 1))
    for one in facts.baselines:
        n = f", mean of {len(one.scores)} runs" if len(one.scores) > 1 else ""
        rows.append((f"{one.what}{n}", one.folders[0], one.score, len(one.scores)))
    rows.sort(key=lambda row: row[2])
    lines = []
    for what, place, score, _ in rows:
        shown = {"score": write_metric(metric, score), "ahead": write_change(metric, mine - score)}
        lines.append({"what": what, "place": place, **shown, "won": mine > score})
    body = fragment(
        "baselines",
        lines,
        write_metric(metric, mine),
        metric=metric.replace("_", " "),
        split=facts.split,
        start=_start(facts),
        command="" if facts.baselines or facts.config.method == "linear" else command_for(facts.config),
    )
    return Section("baselines", "Compared with simple baselines", body)


def _start(facts: RunFacts) -> str:
    """Describe the model on frozen features that a run started from, and its gain; empty if it started from scratch."""
    scores = {line["step"]: (line.get("val") or {}).get(facts.main_metric) for line in facts.log}
    first, chosen = scores.get(0), scores.get(facts.step)
    if facts.config.warm_start == "none" or not isinstance(first, int | float) or not isinstance(chosen, int | float):
        return ""
    metric, start = facts.main_metric, facts.result.get("start")
    name, first_score = metric.replace("_", " "), write_metric(metric, first)
    simple = f"Step 0 is a {facts.task.linear_name} on the features of the frozen encoders."
    text = _compared(start, metric) if start else simple
    if facts.step == 0:
        kept = "No later step was better by more than noise, so it was kept."
        return f"{text} Its {name} on validation is {first_score}. {kept}"
    selected = f"that of step {facts.step:,} is {write_metric(metric, chosen)}"
    return f"{text} Its {name} on validation was {first_score}; {selected}."


def _compared(start: dict[str, Any], metric: str) -> str:
    """Describe the models that were compared at the start of a run."""
    others = ", ".join(f"{one['name']} {write_metric(metric, one['score'])}" for one in start["baselines"])
    held_out, read = f"{start['samples']:,} held-out samples", start.get("cross_attention")
    if not read:
        return f"Step 0 is the best of these models on the frozen features, compared on {held_out}: {others}."
    score, other = (write_metric(metric, read[key]) for key in ("score", "best_other"))
    compared = f"{score} on validation, the best of the others {other}"
    chosen = start["best"]
    verdict = "It is step 0" if chosen == read["name"] else f"That is not better by more than noise, so step 0 is {chosen}"
    models = f"Models on the frozen pooled features, compared on {held_out}: {others}."
    return f"{models} {read['name'].capitalize()}: {compared}. {verdict}."
